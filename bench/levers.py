#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
What a lever of the cache's quality is worth, before it is built: a llama model (GGUF, architecture llama) in 32-bit floats,
where attention reads keys and values that the library's codec has encoded and decoded. Unlike `tq eval` it has no floor, and
it knows levers that the library has not: means before RoPE, transforms from plain query and key covariances.

    levers.py MODEL.gguf --text FILE [--calibrate FILE...] --csv OUT [--tokens 2048] [--only WORD[,WORD...]]

A row is the mean KL divergence of the next-token distribution from that with exact keys and values, over the second half of
the tokens. Transforms come from the same text (an oracle, which bounds what calibration can win) or from --calibrate's; from
plain second moments of keys and queries, or, as `tq calibrate` learns them, weighted by the attention that coded keys get.
Needs the release build and llama.cpp (`make run` makes both), for the codec and the tokenizer.
"""
import argparse
import csv
import ctypes
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from calibrate.transform import balance, coded_columns, weighted_moments  # noqa: E402
from eval import llama  # noqa: E402


class Codec:
    """encode, then decode, by the library's public functions."""

    shared = None  # libturboquant.so

    def __init__(self, name, head_dim):
        if Codec.shared is None:
            Codec.shared = ctypes.CDLL(str(ROOT / "build/release/libturboquant.so"))
        self.head_dim = head_dim
        self.handle = ctypes.c_void_p()
        number = ctypes.c_int()
        self.check(self.shared.tq_format_from_name(ctypes.byref(number), name.encode()))
        self.check(self.shared.tq_codec_create(ctypes.byref(self.handle), number, ctypes.c_int32(head_dim),
                                               ctypes.c_uint64(0x7475726271756e74)))

    @staticmethod
    def check(status):
        if status:
            raise RuntimeError(f"the library returned status {status}")

    def round_trip(self, x):
        """x [n, head_dim] as it comes back."""
        x = np.ascontiguousarray(x, np.float32)
        n, out = ctypes.c_int64(len(x)), np.empty_like(x)
        room = ctypes.create_string_buffer(x.nbytes + 16 * len(x))  # no format takes more than a float a value and its scales
        self.check(self.shared.tq_codec_encode(self.handle, x.ctypes.data_as(ctypes.c_void_p), n, room))
        self.check(self.shared.tq_codec_decode(self.handle, room, n, out.ctypes.data_as(ctypes.c_void_p)))
        return out


@dataclass(frozen=True)
class Cache:
    """One kind of simulated cache. The defaults are the preset TQ3's levers, channel factors apart."""
    keys: str = "tt3"
    values: str = "tt3"
    sinks: int = 4
    recent: int = 64
    mean: str = "block"  # of keys: none, block, first (64 tokens), slow (first, slow pairs alone), pre-rope (first), block-of-N
    values_mean: str = "none"  # or block
    transform: str = "none"  # or own (oracle), start (learnt from the first 512 tokens), other (--calibrate's), *-weighted
    exact_layers: int = 0  # at either end, with tt4


TRANSFORMS = ("none", "own", "other", "start", "own-weighted", "other-weighted")
LEVERS = {
    "ring": [Cache(recent=n) for n in (0, 8, 16, 32, 64, 128)],
    "sinks": [Cache(sinks=n) for n in (0, 1, 2, 4, 8, 16)],
    "means": [Cache(mean=mean) for mean in
              ("none", "first", "slow", "pre-rope", "block", "block-of-8", "block-of-16", "block-of-32")],
    "values-mean": [Cache(), Cache(values_mean="block")],
    "parts": [Cache("tt4", "tt4"), Cache("tt4", "f32"), Cache("f32", "tt4")],
    "transform-tt3": [Cache(transform=t, mean=mean) for mean in ("none", "block") for t in TRANSFORMS],
    "transform-tt2": [Cache("tt2", "tt2", transform=t) for t in TRANSFORMS],
    "boundary": [Cache(), Cache(exact_layers=1)],
}
START = 512  # tokens from which `start` learns


class Model:
    """Weights and shape of a GGUF model of architecture llama."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        value = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer")}
        if value["general.architecture"] != "llama":
            sys.exit(f"levers.py: {path} is of architecture {value['general.architecture']}, not llama")
        self.n_layer, self.n_head = value["llama.block_count"], value["llama.attention.head_count"]
        self.n_head_kv = value["llama.attention.head_count_kv"]
        self.head_dim = value["llama.embedding_length"] // self.n_head
        self.epsilon = value["llama.attention.layer_norm_rms_epsilon"]
        self.rope_base = value.get("llama.rope.freq_base", 10000.0)
        self.weights = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
                        for tensor in reader.tensors}

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weights[name]

    def rope(self, x, positions):
        """Turn x [n, ..., head_dim]; GGUF has the two of a pair side by side in this architecture."""
        angles = positions[:, None] * self.rope_base ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        turn = np.exp(1j * angles).astype(np.complex64).reshape(len(positions), *[1] * (x.ndim - 2), -1)
        return (np.ascontiguousarray(x, np.float32).view(np.complex64) * turn).view(np.float32)

    def run(self, tokens, attend):
        """Logits of the second half of the tokens; attend(layer, q, k, v before RoPE) gives attention's output."""
        w, n = self.weights, len(tokens)
        x = w["token_embd.weight"][tokens]
        for layer in range(self.n_layer):
            name = f"blk.{layer}."
            h = self.norm(x, name + "attn_norm.weight")
            q, k, v = ((h @ w[f"{name}attn_{part}.weight"].T).reshape(n, -1, self.head_dim) for part in "qkv")
            x = x + attend(layer, q, k, v).reshape(n, -1) @ w[name + "attn_output.weight"].T
            h = self.norm(x, name + "ffn_norm.weight")
            gate = h @ w[name + "ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[name + "ffn_up.weight"].T)) @ w[name + "ffn_down.weight"].T
        head = w.get("output.weight", w["token_embd.weight"])
        return self.norm(x[n // 2:], "output_norm.weight") @ head.T


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def block_means(x, block, of_first):
    """The mean of each block's first vectors, repeated over the block: x [n, head_dim]."""
    starts = range(0, len(x), block)
    means = np.stack([x[start:start + of_first].mean(0) for start in starts])
    return np.repeat(means, block, axis=0)[:len(x)]


def second_moments(x):
    """E[x x^T] of x [n, head_dim]."""
    x = x.astype(np.float64)
    return x.T @ x / len(x)


class Attention:
    """Causal attention of one run: exact for sinks and for what is recent to a query, decoded else."""

    def __init__(self, model, cache, codecs, moments=None):
        self.model, self.cache, self.codecs, self.moments = model, cache, codecs, moments
        self.seen = {}  # (layer, head, whether weighted): sums of second moments, when they are to be learnt

    def stored(self, layer, name, x):
        if 0 < self.cache.exact_layers and not self.cache.exact_layers <= layer < self.model.n_layer - self.cache.exact_layers:
            name = "tt4"
        return x if name == "f32" else self.codecs[name].round_trip(x)

    def mean_of_keys(self, raw, keys, positions):
        kind, first = self.cache.mean, slice(0, 64)
        if kind == "none":
            return np.zeros_like(keys)
        if kind == "pre-rope":
            return self.model.rope(np.broadcast_to(raw[first].mean(0), raw.shape), positions)
        if kind.startswith("block"):
            return block_means(keys, 64, int(kind.rpartition("-")[2]) if "-" in kind else 64)
        mean = keys[first].mean(0)
        if kind == "slow":  # pairs that turn by less than one radian over those tokens
            mean = np.where(np.repeat(64 * self.model.rope_base ** (-np.arange(0, len(mean), 2) / len(mean)) < 1, 2), mean, 0)
        return np.broadcast_to(mean, keys.shape)

    def learn(self, queries, keys, centered, weighted):
        """Second moments of a KV head's keys without their means and of its queries, for balance."""
        if not weighted:
            return second_moments(centered), second_moments(queries.reshape(-1, keys.shape[1]))
        visible = np.tri(len(keys), dtype=bool)
        return weighted_moments(queries, keys, centered, visible, coded_columns(visible, self.cache.sinks, self.cache.recent))

    def transform(self, layer, head, queries, keys, centered):
        """(A, A^-1) of this KV head, or None."""
        kind, _, weighted = self.cache.transform.partition("-")
        if kind == "none":
            return None
        if kind == "learn":
            for is_weighted in (False, True):
                new = self.learn(queries, keys, centered, is_weighted)
                known = self.seen.get((layer, head, is_weighted), (0, 0))
                self.seen[layer, head, is_weighted] = known[0] + new[0], known[1] + new[1]
            return None
        if kind == "own":
            pair = self.learn(queries, keys, centered, weighted)
        elif kind == "start":
            pair = self.learn(queries[:, :START], keys[:START], centered[:START], weighted)
        else:
            pair = self.moments[layer, head, bool(weighted)]
        matrix = balance(*pair)
        return matrix.astype(np.float32), np.linalg.inv(matrix).astype(np.float32)

    def __call__(self, layer, q, k, v):
        model, cache, n = self.model, self.cache, len(q)
        positions = np.arange(n)
        group = model.n_head // model.n_head_kv
        distance = positions[:, None] - positions[None, :]
        hidden = distance < 0
        exact = (distance < cache.recent) | (positions < cache.sinks) if cache.recent or cache.sinks else None
        q_turned, k_turned, out = model.rope(q, positions), model.rope(k, positions), np.empty_like(q)
        for head in range(model.n_head_kv):
            keys, values = k_turned[:, head], v[:, head]
            queries = q_turned[:, head * group:(head + 1) * group].transpose(1, 0, 2) / np.float32(model.head_dim ** 0.5)
            mean = self.mean_of_keys(k[:, head], keys, positions)
            values_mean = block_means(values, 64, 64) if cache.values_mean == "block" else 0
            pair = self.transform(layer, head, queries, keys, keys - mean)
            rest = (keys - mean) @ pair[0] if pair else keys - mean
            decoded = self.stored(layer, cache.keys, rest)
            k_stored = mean + (decoded @ pair[1] if pair else decoded)
            v_stored = values_mean + self.stored(layer, cache.values, values - values_mean)
            for member in range(group):
                scores = queries[member] @ k_stored.T
                if exact is not None:
                    scores = np.where(exact, queries[member] @ keys.T, scores)
                scores[hidden] = -np.inf
                scores = np.exp(scores - scores.max(1, keepdims=True))
                scores /= scores.sum(1, keepdims=True)
                near = scores * exact if exact is not None else 0 * scores
                out[:, head * group + member] = near @ values + (scores - near) @ v_stored
        return out


def tokenize(args, path):
    setup = llama.Setup(args.llama_bin, Path(), args.model, 2)
    with llama.running_server(setup, llama.F16, ["-c", "256", "-np", "1"]) as server:
        tokens = server.post("/tokenize", content=path.read_text()[:8 * args.tokens])["tokens"][:args.tokens]
    if len(tokens) < args.tokens:
        sys.exit(f"levers.py: {path} has {len(tokens)} tokens, fewer than --tokens {args.tokens}")
    return np.array(tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, nargs="+", help="other texts, to learn transforms from")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", default=",".join(LEVERS), help="of " + ", ".join(LEVERS))
    parser.add_argument("--llama-bin", type=Path, default=ROOT / "build/deps/llama-bin")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(LEVERS)
    if unknown:
        parser.error(f"unknown lever {', '.join(unknown)}; there are {', '.join(LEVERS)}")
    if args.tokens < 2 * START:
        parser.error(f"--tokens is at least {2 * START}")
    rows = [(lever, cache) for lever in args.only.split(",") for cache in LEVERS[lever]
            if not cache.transform.startswith("other") or args.calibrate]

    model = Model(args.model)
    codecs = {name: Codec(name, model.head_dim) for name in ("tt4", "tt3", "tt2")}
    tokens = tokenize(args, args.text)
    exact = Cache("f32", "f32", mean="none")
    expected = log_softmax(model.run(tokens, Attention(model, exact, codecs)))
    moments = {}
    means = {cache.mean for _, cache in rows if cache.transform.startswith("other")}
    others = [tokenize(args, path) for path in args.calibrate] if means else []
    for mean in means:
        attention = Attention(model, replace(exact, mean=mean, transform="learn"), codecs)
        for other in others:
            model.run(other, attention)
        moments[mean] = attention.seen

    fields = ["lever", *Cache.__dataclass_fields__, "kld_mean", "same_top_1", "text", "tokens", "commit", "command"]
    known = {}  # a cache stands in several levers
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for lever, cache in tqdm(rows, unit="row"):
            if cache not in known:
                got = log_softmax(model.run(tokens, Attention(model, cache, codecs, moments.get(cache.mean))))
                divergence = (np.exp(expected) * (expected - got)).sum(-1).mean()
                known[cache] = {"kld_mean": f"{divergence:.5f}",
                                "same_top_1": f"{100 * (expected.argmax(-1) == got.argmax(-1)).mean():.2f}"}
            writer.writerow({"lever": lever, **vars(cache), **known[cache], "text": args.text.stem, "tokens": args.tokens,
                             "commit": llama.commit(), "command": llama.shown(["bench/levers.py", *sys.argv[1:]])})
            file.flush()


if __name__ == "__main__":
    main()
