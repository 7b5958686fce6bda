# SPDX-License-Identifier: MIT
"""python -m libturboquant plan: what context a memory holds, with a BF16 cache and with presets."""
from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libturboquant
from libturboquant import Cache, _library, weight_factors
from libturboquant.errors import DeviceError

from . import CommandError, add_presets, at_least, kept_bytes, table
from .models import HELP, config_of, no_language_model, weight_bytes

BF16 = "BF16"
_BYTES = 2  # of a value of a cache in BF16
_MOST = 1 << 28  # tokens of all sequences
_PAGE_SIZES = {"cpu": 128, "cuda": 64}  # what caches have there by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument("--memory", type=_gib, metavar="GIB", help="of the machine or the card, in GiB (what is free on this "
                        "machine, with --device cuda all that the card has)")
    parser.add_argument("--weights", type=_gib, metavar="GIB", help="what of it is not for the cache: weights and activations "
                        "(the size of MODEL's files; 0 if they are not here)")
    add_presets(parser)
    parser.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="sequences of the same length (%(default)s)")
    parser.add_argument("--device", choices=tuple(_PAGE_SIZES), default="cpu", help="where the cache is (%(default)s)")


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1 << 30:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size in GiB")
    return value


@dataclass(frozen=True)
class Kept:
    """Layers that stay as Transformers has them: values of a token, and tokens that they keep at most."""

    n_value: int
    window: float

    def bytes(self, n_tok: int) -> int:
        return int(_BYTES * self.n_value * min(n_tok, self.window))


@dataclass(frozen=True)
class Model:
    """What of a model takes memory in a cache."""

    n_layer: int
    n_compressed: int
    n_head_kv: int
    head_dim: int
    head_dim_v: int
    kept: tuple[Kept, ...]
    n_recurrent: int
    n_value: int  # of a token, in the layers that are compressed
    is_latent: bool

    def kept_bytes(self, n_tok: int) -> int:
        return sum(kept.bytes(n_tok) for kept in self.kept)

    def bf16_bytes(self, n_tok: int) -> int:
        return _BYTES * self.n_value * n_tok + self.kept_bytes(n_tok)

    def counted(self, preset: str, n_tok: int, batch: int, page_size: int) -> libturboquant.Stats:
        """What the library's cache says of itself with so many tokens in each of so many sequences: in a dry run, which has
        pages, exact tokens and tables, and no vectors."""
        n_pages = batch * -(-n_tok // page_size)
        options = {"preset": preset, "head_dim_v": self.head_dim_v}
        if self.is_latent:
            options |= weight_factors.of_latents(options, self.n_compressed)
        cache = Cache(self.n_compressed, self.n_head_kv, self.head_dim, page_size=page_size, max_tok=n_pages * page_size,
                      dry_run=True, n_threads=1, **options)
        for _ in range(batch):
            cache.reserve(cache.seq_create(), n_tok)
        return cache.stats()


def read_model(config: Any) -> Model:
    from libturboquant._shapes import shape_of_layer, sort_layers
    layers = sort_layers(config)
    of_layers, kept, n_recurrent = getattr(config, "per_layer_config", None), [], 0
    for i, kind in enumerate(layers.kinds):
        n_recurrent += kind in ("linear_attention", "conv", "hybrid", "hybrid_sliding")
        if layers.is_compressed(i) or kind in ("dummy", "linear_attention", "conv"):
            continue
        n_head_kv, *head_dims = shape_of_layer(of_layers[i] if of_layers else config)
        n_values = n_head_kv * (head_dims[0] if layers.rank else sum(head_dims))
        kept.append(Kept(n_values, layers.options[i].get("sliding_window") or math.inf))
    n_compressed = sum(map(layers.is_compressed, range(len(layers.kinds))))
    shape = layers.n_head_kv, layers.head_dim, layers.head_dim_v
    return Model(len(layers.kinds), n_compressed, *shape, tuple(kept), n_recurrent, n_compressed * layers.n_values,
                 layers.rank > 0)


def longest(n_bytes: Callable[[int], int], room: int, batch: int) -> int:
    """The most tokens of each sequence whose bytes fit."""
    low, high = 0, 256
    while high * batch < _MOST and n_bytes(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if n_bytes(middle) <= room else (low, middle)
    return low


def memory_of(device: str) -> int:
    if device == "cuda":
        try:
            return _library.describe_cuda().memory_bytes
        except DeviceError as error:
            raise CommandError(f"{error}. Give the card's size by --memory") from error
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    config = config_of(args.model)
    try:
        text_config = config.get_text_config(decoder=True)
        model = read_model(text_config)
    except AttributeError as error:
        raise no_language_model(args.model, config, error) from error
    memory = memory_of(args.device) if args.memory is None else int(args.memory * 2 ** 30)
    in_files = weight_bytes(args.model)
    weights = (in_files or 0) if args.weights is None else int(args.weights * 2 ** 30)
    room, page_size = memory - weights, _PAGE_SIZES[args.device]
    if room <= 0:
        raise CommandError(f"the weights take {weights / 2 ** 30:.2f} GiB, and the memory has {memory / 2 ** 30:.2f}: give "
                           "more by --memory, or what the weights take there by --weights")
    found = {"model": args.model, "configuration": type(config).__name__, "n_layer": model.n_layer,
             "n_compressed": model.n_compressed, "n_kept": len(model.kept), "n_recurrent": model.n_recurrent,
             "n_head_kv": model.n_head_kv, "head_dim": model.head_dim, "head_dim_v": model.head_dim_v,
             "memory_bytes": memory, "weight_bytes": weights, "are_weights_known": args.weights is not None or bool(in_files),
             "cache_bytes": room, "batch": args.batch, "device": args.device, "page_size": page_size,
             "n_ctx_train": getattr(text_config, "max_position_embeddings", None), "caches": []}
    n_tok = longest(lambda n: args.batch * model.bf16_bytes(n), room, args.batch)
    found["caches"].append({"cache": BF16, "n_tok": n_tok, "bits_per_value": 8. * _BYTES, "bytes_per_token":
                            _bytes_per_token(model, _BYTES * model.n_value), "exact_bytes": 0, "n_exact": 0})
    for preset in args.presets:
        found["caches"].append(_of_preset(model, preset, args.batch, room, page_size))
    return found, 0


def _bytes_per_token(model: Model, of_compressed: float) -> float:
    """What a token more costs, once windows are full."""
    return of_compressed + sum(kept.bytes(1) for kept in model.kept if kept.window == math.inf)


def _of_preset(model: Model, preset: str, batch: int, room: int, page_size: int) -> dict[str, Any]:
    def n_bytes(n_tok: int) -> int:
        return model.counted(preset, n_tok, batch, page_size).allocated_bytes + batch * model.kept_bytes(n_tok)

    n_tok = longest(n_bytes, room, batch)
    stats, of_preset = model.counted(preset, max(n_tok, 1), batch, page_size), libturboquant.preset(preset)
    return {"cache": preset, "n_tok": n_tok,
            "bits_per_value": 8 * kept_bytes(stats) / (model.n_value * n_tok * batch) if n_tok else None,
            "bytes_per_token": _bytes_per_token(model, stats.page_bytes / page_size),
            "exact_bytes": stats.exact_bytes // batch, "n_exact": of_preset.n_sink + of_preset.n_recent}


def text(found: dict[str, Any]) -> str:
    gib = {name: f"{found[name + '_bytes'] / 2 ** 30:.2f} GiB" for name in ("memory", "weight", "cache")}
    values = "" if found["head_dim_v"] == found["head_dim"] else f" and {found['head_dim_v']} for values"
    lines = [f"{found['model']} ({found['configuration']}): {found['n_layer']} layers, {found['n_compressed']} compressed "
             f"({found['n_head_kv']} KV heads, head_dim {found['head_dim']}{values})" +
             (f", {found['n_kept']} left to Transformers, in BF16" if found["n_kept"] else "")]
    if found["are_weights_known"]:
        lines.append(f"{gib['memory']} of memory, {gib['weight']} of weights: {gib['cache']} for the cache")
    else:
        lines.append(f"{gib['memory']}, all for the cache: the weights are not here, so give what they take by --weights")
    rows = [["cache", "tokens of context", "of BF16's", "bits per value", "bytes a token", "exact tokens, MiB a sequence"]]
    most = found["caches"][0]["n_tok"]
    for cache in found["caches"]:
        bits = "" if cache["bits_per_value"] is None else f"{cache['bits_per_value']:.2f}"
        exact = f"{cache['n_exact']}, {cache['exact_bytes'] / 2 ** 20:.2f}" if cache["n_exact"] else ""
        rows.append([cache["cache"], str(cache["n_tok"]), f"{cache['n_tok'] / most:.2f}" if most else "", bits,
                     f"{cache['bytes_per_token']:.0f}", exact])
    lines += ["", table(rows), ""]
    if found["batch"] > 1:
        lines.append(f"Tokens are those of each of {found['batch']} sequences.")
    if found["n_ctx_train"] and max(cache["n_tok"] for cache in found["caches"]) > found["n_ctx_train"]:
        lines.append(f"The model was made for {found['n_ctx_train']} tokens; what is more holds more sequences (--batch).")
    if found["n_recurrent"]:
        lines.append(f"Not counted: the recurrent states of {found['n_recurrent']} layers, which do not grow.")
    if found["device"] == "cuda":
        lines.append("Not counted: scratch of the kernels, up to 64 MiB, and room for a thirty-second more pages, which the "
                     "option max_tokens does without.")
    lines.append("Where the weights ask for it, a layer's keys get a better format than the preset's: `eval` counts that.")
    return "\n".join(lines)
