# SPDX-License-Identifier: MIT
"""Is a folded model the old one? By its weights, which are read again, and by the logits of stock llama.cpp."""
import random
import struct
from dataclasses import dataclass

import numpy as np
from gguf import quants

from eval.llama import LlamaError, run_command

from .blocks import bytes_of

PIECE = 1 << 24
ROWS_AT_ONCE = 1024
HALF_ROUNDED = 2.0 ** -12  # of a row's largest value: blocks.py
N_CONTEXT = 256
# llama-perplexity wants two windows of tokens; of these words each is one at least.
WORDS = ("the", "river", "was", "a", "key", "of", "seven", "old", "stones", "and", "they", "asked", "who", "could", "read")
N_WORDS = 3 * N_CONTEXT
MAGIC = struct.Struct("<8sIII")  # of llama-perplexity's file: "_logits_", tokens of a window, vocabulary, windows
# Products are equal, so that only what the file of logits rounds may differ. Where plain half floats were rounded, llama.cpp
# may round activations to 8 bits on top, which makes of any change as much as its attention algorithms differ by.
DIVERGENCE_MAX, DIVERGENCE_ROUNDED_MAX = 1e-5, 0.01


@dataclass
class Compared:
    """What logits say: positions, the mean divergence, and the largest change of the logarithm of a probability."""
    n: int
    divergence: float
    largest: float


def compare_weights(old, new, changes):
    """
    Raise LlamaError unless `new` has the tensors of `old`, rows times 2^exponents and all others byte for byte. Returns how
    many values were rounded.
    """
    before, after = ({tensor.name: tensor for tensor in reader.tensors} for reader in (old, new))
    if before.keys() != after.keys():
        raise LlamaError("the new file has other tensors")
    n_rounded = 0
    for name, tensor in before.items():
        other = after[name]
        if (tensor.tensor_type, list(tensor.shape)) != (other.tensor_type, list(other.shape)):
            raise LlamaError(f"{name} has another type or shape in the new file")
        if name in changes:
            n_rounded += compare_rows(tensor, other, changes[name])
        elif not is_same(bytes_of(tensor), bytes_of(other)):
            raise LlamaError(f"{name} is not what it was, though no factor goes into it")
    return n_rounded


def is_same(a, b):
    return all(np.array_equal(a[i:i + PIECE], b[i:i + PIECE]) for i in range(0, len(a), PIECE))


def compare_rows(old, new, exponents):
    """compare_weights, of one tensor."""
    n_rounded = 0
    rows = [tensor.data.reshape(len(exponents), -1) for tensor in (old, new)]
    for first in range(0, len(exponents), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        x, y = (quants.dequantize(data[part], old.tensor_type).astype(np.float64) for data in rows)
        wanted = np.ldexp(x, np.asarray(exponents[part])[:, None])
        allowed = HALF_ROUNDED * abs(wanted).max(axis=1, keepdims=True) if old.tensor_type.name == "F16" else 0
        if not (abs(y - wanted) <= allowed).all():
            row = first + int((abs(y - wanted) > allowed).any(axis=1).argmax())
            raise LlamaError(f"row {row} of {old.name} is not 2^{exponents[row]} times what it was")
        n_rounded += int((y != wanted).sum())
    return n_rounded


def write_logits(setup, folder, path, out):
    """
    llama.cpp's logits of a model after the same words. Its cache has 32 bits, so that factors change no bit of a product, and
    its attention is the one that takes such a cache. Weights stay in the order of the file: in another one (AMX) this attention
    makes llama.cpp overwrite the list of wanted rows of Gemma 3n, and abort.
    """
    text = folder / "words.txt"
    if not text.exists():
        chance = random.Random(1)
        text.write_text(" ".join(chance.choice(WORDS) for _ in range(N_WORDS)))
    command = [setup.llama_bin / "llama-perplexity", "-m", path, "-f", text, "-c", N_CONTEXT, "-b", N_CONTEXT, "--chunks", 1,
               "-t", setup.threads, "-fa", "off", "-ctk", "f32", "-ctv", "f32", "-dev", "none", "--no-repack",
               "--no-warmup", "--kl-divergence-base", out]
    done = run_command(setup, command)
    if done.status or not out.exists() or out.stat().st_size <= MAGIC.size:
        raise done.fail(f"llama.cpp computes nothing with {path.name}, so that logits could not be compared; --check weights "
                        "does without")


def read_logits(path):
    """
    Logarithms of probabilities [positions, vocabulary]. The file has them in 16 bits, from a least one on by a step, both of
    which stand before them.
    """
    _, n_ctx, n_vocab, n_windows = MAGIC.unpack(path.read_bytes()[:MAGIC.size])
    n_row = 2 * ((n_vocab + 1) // 2) + 4
    first = MAGIC.size + 4 * n_ctx * n_windows
    rows = np.fromfile(path, "<u2", offset=first).reshape(-1, n_row)
    step, least = np.ascontiguousarray(rows[:, :4]).view("<f4").astype(np.float64).T[:, :, None]
    return rows[:, 4:4 + n_vocab] * step + least


def compare_logits(setup, folder, old, new):
    """Compared, of two models' files; raises LlamaError where llama.cpp runs with neither or one."""
    files = [folder / "old.logits", folder / "new.logits"]
    for path, out in zip((old, new), files):
        write_logits(setup, folder, path, out)
    p, q = map(read_logits, files)
    if p.shape != q.shape:
        raise LlamaError(f"llama.cpp gives {q.shape} logits with the new file, and {p.shape} with the old one")
    largest = float(abs(p - q).max())
    for x in (p, q):  # rounded as they are, probabilities do not quite add up to 1
        x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return Compared(len(p), float((np.exp(p) * (p - q)).sum(axis=1).mean()), largest)
