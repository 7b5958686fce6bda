# SPDX-License-Identifier: MIT
"""
python -m libturboquant eval: how far presets move a model's output from that with its own cache, at how many bits.

All caches read the text side by side, a part at a time, so that the reference's logits are computed once and never kept.
"""
from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from libturboquant._divergence import N_PART, divergences, figures_of, scored
from libturboquant.errors import TurboQuantError

from . import CommandError, add_presets, at_least, first_line, kept_bytes, table
from .models import WITH_WEIGHTS, faults_of, mlx_folder, need_mlx, need_transformers, source_of

OWN, FLOOR = "own cache", "floor"
_LEAST = 256  # tokens of a window, as for `tq eval`
# Reads tokens [n], and gives logits [n_row, n_vocab] after some of them, in float32.
Forward = Callable[[np.ndarray, slice], np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=WITH_WEIGHTS)
    parser.add_argument("text", type=Path, metavar="TEXT", help="a text file of --context tokens or more: some 5 bytes a token "
                        "of English")
    parser.add_argument("--context", type=at_least(_LEAST), default=4096, metavar="N",
                        help="tokens of a window, of which the second half is scored (%(default)s)")
    parser.add_argument("--chunks", type=at_least(1), default=1, metavar="N", help="windows of the text (%(default)s)")
    add_presets(parser)
    parser.add_argument("--engine", choices=("transformers", "mlx"), default="transformers", help="what runs the model; mlx is "
                        "MLX-LM, which takes folders (%(default)s)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="PyTorch's, as cuda (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                        help="of weights and arithmetic, in Transformers (float32 on the CPU, the model's own on a device)")


@dataclass(frozen=True)
class Reader:
    """A cache that reads a window; bits: of a value of what it has compressed, when the window was read."""

    name: str
    forward: Forward
    bits: Callable[[], float | None] = lambda: None


class Transformers:
    def __init__(self, args: argparse.Namespace) -> None:
        transformers = need_transformers()
        self.args, self.source = args, source_of(args.model)
        with faults_of(args.model):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(**self.source)
            config = transformers.AutoConfig.from_pretrained(**self.source)
        self.n_ctx_train = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)

    def load(self) -> None:
        import torch
        import transformers
        from libturboquant.transformers import install, uninstall
        args, dtype = self.args, self.args.dtype or ("float32" if self.args.device == "cpu" else "auto")
        torch.set_grad_enabled(False)
        with faults_of(args.model):
            model = transformers.AutoModelForCausalLM.from_pretrained(**self.source, dtype=dtype).eval()
        try:
            self.model = model.to(args.device)
        except (RuntimeError, AssertionError) as error:
            raise CommandError(f"--device {args.device}: {first_line(error)}. Give cpu, or one that PyTorch has") from error
        for preset in args.presets:  # refuses now what cannot be served
            uninstall(install(self.model, preset))
        self.own = self.model.config.get_text_config(decoder=True)._attn_implementation
        # Another algorithm for the same cache, where there is one.
        self.floors = [] if self.own == "eager" else [FLOOR]
        self.engine = (f"Transformers {transformers.__version__}, {str(self.model.dtype).removeprefix('torch.')} on "
                       f"{args.device}")

    def reader(self, name: str, n_ctx: int) -> Reader:
        import torch
        from transformers import DynamicCache
        from libturboquant.transformers import NAME, TurboQuantCache, set_attention
        config = self.model.config
        is_ours = name not in (OWN, FLOOR)
        cache = TurboQuantCache(config=config, preset=name, max_tok=n_ctx) if is_ours else DynamicCache(config=config)
        attention = {OWN: self.own, FLOOR: "eager"}.get(name, NAME)

        def forward(part: np.ndarray, rows: slice) -> np.ndarray:
            set_attention(self.model, attention)
            tokens = torch.from_numpy(part.astype(np.int64))[None].to(self.model.device)
            n_last = len(part) - rows.start
            out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=max(n_last, 1))
            return out.logits[0, out.logits.shape[1] - n_last :][: rows.stop - rows.start].float().cpu().numpy()

        def bits() -> float:
            store = cache.store
            return 8 * kept_bytes(store.stats()) / (store.n_values * n_ctx)

        return Reader(name, forward, bits) if is_ours else Reader(name, forward)


class Mlx:
    floors: Sequence[str] = ()

    def __init__(self, args: argparse.Namespace) -> None:
        mlx_lm, folder = need_mlx(), mlx_folder(args.model)
        import mlx.core as mx
        with faults_of(args.model):
            self.model, self.tokenizer = mlx_lm.load(str(folder))
        self.presets, self.mx, self.engine = args.presets, mx, f"MLX-LM {mlx_lm.__version__}"
        self.n_ctx_train = getattr(self.model.args, "max_position_embeddings", None)

    def load(self) -> None:
        from libturboquant.mlx import make_prompt_cache
        for preset in self.presets:  # refuses now what cannot be served
            make_prompt_cache(self.model, preset)

    def reader(self, name: str, n_ctx: int) -> Reader:
        import mlx_lm.models.cache as stock
        from libturboquant._mlx_batch import BatchCache
        from libturboquant.mlx import make_prompt_cache
        cache = stock.make_prompt_cache(self.model) if name == OWN else make_prompt_cache(self.model, name)

        def forward(part: np.ndarray, rows: slice) -> np.ndarray:
            logits = self.model(self.mx.array(part[None]), cache=cache)
            self.mx.eval([layer.state for layer in cache])
            if rows.start == rows.stop:  # logits that nobody reads are never computed
                return np.empty((0, 1), np.float32)
            return np.array(logits[0, rows].astype(self.mx.float32))

        def bits() -> float:
            ours = [layer for layer in cache if isinstance(layer, BatchCache)]
            shapes = [layer._sequences[0].shape for layer in ours]
            n_value = sum(n_head_kv * (head_dim + head_dim_v) for n_head_kv, head_dim, head_dim_v in shapes)
            return 8 * sum(layer.nbytes for layer in ours) / (n_value * n_ctx)

        return Reader(name, forward) if name == OWN else Reader(name, forward, bits)


def windows_of(host: Any, args: argparse.Namespace) -> np.ndarray:
    """The first tokens of the text, [n_chunk, n_ctx]; each begins as a text does, as llama-perplexity has it."""
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{args.text}: {getattr(error, 'strerror', None) or error}. Give a text file in UTF-8") from error
    tokens, n_tok = host.tokenizer.encode(text), args.context * args.chunks
    if len(tokens) < n_tok:
        raise CommandError(f"{args.text} has {len(tokens)} tokens, fewer than {args.chunks} x {args.context}: give a longer "
                           "text, or a smaller --context")
    windows = np.array(tokens[:n_tok], np.int32).reshape(args.chunks, -1)
    if tokens[0] == getattr(host.tokenizer, "bos_token_id", None):
        windows[:, 0] = tokens[0]
    return windows


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    if not args.text.is_file():
        raise CommandError(f"{args.text} does not exist: give a text file in UTF-8")
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        host = {"transformers": Transformers, "mlx": Mlx}[args.engine](args)
        if host.n_ctx_train and args.context > host.n_ctx_train:
            raise CommandError(f"the model was made for {host.n_ctx_train} tokens: give at most so many by --context")
        windows = windows_of(host, args)
        host.load()
        try:
            rows = measure(host, windows, [*host.floors, *args.presets])
        except TurboQuantError:
            raise
        except (MemoryError, RuntimeError) as error:  # RuntimeError: PyTorch's, where a device has no memory left
            raise CommandError(f"{first_line(error)}. If memory has run out, give a smaller --context, fewer --presets, or a "
                               "smaller --dtype") from error
    notes = list(dict.fromkeys(str(warning.message) for warning in caught if str(warning.message).startswith("turboquant")))
    return {"model": args.model, "text": str(args.text), "engine": host.engine, "n_ctx": args.context, "n_chunks": args.chunks,
            "n_scored": args.chunks * len(range(args.context)[scored(0, args.context, args.context)]), "rows": rows,
            "notes": notes, "seconds": round(time.monotonic() - begin, 1)}, 0


def measure(host: Any, windows: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """Figures of each cache, by the names of `tq eval`."""
    from tqdm import tqdm
    kl: dict[str, list[np.ndarray]] = {name: [] for name in names}
    same: dict[str, list[np.ndarray]] = {name: [] for name in names}
    bits: dict[str, list[float | None]] = {name: [] for name in names}
    with tqdm(total=windows.size * (1 + len(names)), unit="tok", unit_scale=True, file=sys.stderr) as bar:
        for window in windows:
            own, *others = (host.reader(name, len(window)) for name in [OWN, *names])
            for begin in range(0, len(window), N_PART):
                part = window[begin : begin + N_PART]
                rows = scored(begin, len(part), len(window))
                bar.set_description(own.name)
                wanted = own.forward(part, rows)
                bar.update(len(part))
                for reader in others:
                    bar.set_description(reader.name)
                    found = reader.forward(part, rows)
                    kl[reader.name].append(divergences(wanted, found))
                    same[reader.name].append(wanted.argmax(axis=-1) == found.argmax(axis=-1))
                    bar.update(len(part))
            for reader in others:
                bits[reader.name].append(reader.bits())
    return [{"name": name, "bits_per_value": bits[name][-1], **figures_of(*map(np.concatenate, (kl[name], same[name])))}
            for name in names]


def text(found: dict[str, Any]) -> str:
    rows = [["cache", "bits per value", "mean KLD", "99.9 %", "same top-1 %"]]
    for row in found["rows"]:
        name = "own, another algorithm" if row["name"] == FLOOR else row["name"]
        bits = "" if row["bits_per_value"] is None else f"{row['bits_per_value']:.2f}"
        rows.append([name, bits, f"{row['kld_mean']:.5f} ± {row['kld_mean_error']:.5f}", f"{row['kld_99_9']:.4f}",
                     f"{row['same_top_1']:.2f}"])
    lines = [f"{found['model']}, {found['text']}: {found['n_chunks']} x {found['n_ctx']} tokens, {found['n_scored']} of them "
             "scored", f"{found['engine']}; KL divergence from the model's own cache, in nats", "", table(rows)]
    return "\n".join(lines + [f"\nnote: {note}" for note in found["notes"]])
