# SPDX-License-Identifier: MIT
"""
The cache in MLX-LM: attention of its models over compressed keys and values. docs/python.md. This module has the CPU's cache,
mlx_metal.py that of Apple GPUs.

    cache = libturboquant.mlx.make_prompt_cache(model, preset="TQ4")
    mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)

or libturboquant.mlx.install(model) once, after which MLX-LM makes such caches itself. A cache's update_and_fetch returns
handles of the compressed keys, which MLX's own attention does not take; make_prompt_cache puts a dispatcher before the
scaled_dot_product_attention of the model's module, which sends them to the library and all else to MLX-LM.

A layer's caches with one set of options share a pool, so that batches are made of sequences without a copy.
"""
from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models.base as base
import mlx_lm.models.cache as stock
import numpy as np

from . import cache as _cache
from ._library import AttendParams
from ._mlx_batch import BatchCache, Factors, Rows, Shape, guard_passes
from ._rows import attend_params
from .errors import ArgumentError, SnapshotError, UnsupportedError
from .formats import exact_ends
from .mlx_metal import TurboQuantMetalKVCache

# Of the pools of all layers. Memory is taken as it is used; the tables of so many pages take some MB.
MAX_TOK_DEFAULT = 1 << 25

_stores: weakref.WeakValueDictionary[str, _cache.Cache] = weakref.WeakValueDictionary()
_calibrations: weakref.WeakValueDictionary[str, _cache.Calibration] = weakref.WeakValueDictionary()
_stock_attention = base.scaled_dot_product_attention
_announced: set[str] = set()


def _calibration(path: str) -> _cache.Calibration:
    """What a file holds, read once for all caches that live at the same time."""
    found = _calibrations.get(path)
    if found is None:
        found = _calibrations[path] = _cache.Calibration(path)
    return found


def _new_store(shape: Shape, options: dict[str, Any], factors: np.ndarray | None = None) -> _cache.Cache:
    """
    A pool with options of libturboquant.Cache, but that a calibration is a path, and that `layer` may say [i, n]: it is for
    layer i of a model, and one of n pools, which have tokens and bytes together.
    """
    options = dict(options)
    if "layer" in options:
        i, n = options.pop("layer")
        options = {"max_tok": MAX_TOK_DEFAULT} | options
        options |= {name: -(-options[name] // n) for name in ("max_tok", "budget_bytes", "offload_bytes") if name in options}
        if "calibration" in options:
            options["calibration"] = _calibration(options["calibration"]).layer(i)
    n_head_kv, head_dim, head_dim_v = shape
    store = _cache.Cache(1, n_head_kv, head_dim, head_dim_v=head_dim_v, **options)
    store.set_key_factors(0, factors)
    return store


def _key(shape: Shape, options: dict[str, Any], factors: np.ndarray | None) -> str:
    return json.dumps([shape, options, None if factors is None else factors.tolist()], sort_keys=True)


def _store(shape: Shape, options: dict[str, Any], factors: np.ndarray | None) -> _cache.Cache:
    """The pool of caches of this shape, these options and factors of keys."""
    key = _key(shape, options, factors)
    found = _stores.get(key)
    if found is None:
        found = _stores[key] = _new_store(shape, options, factors)
    return found


def _load(path: Path, options: dict[str, Any]) -> tuple[_cache.Cache, list[int]]:
    """A file's sequences, in the pool of caches with these options and the file's factors."""
    info = _cache.describe_snapshot(path)
    shape = (info.n_head_kv, info.head_dim, info.head_dim_v)
    fresh = _new_store(shape, options)
    seqs = fresh.load(path)
    store = _stores.setdefault(_key(shape, options, fresh.key_factors(0)), fresh)
    return store, seqs if store is fresh else store.load(path)


# What comes with the first keys, or is no matter of a model's cache.
_NOT_OPTIONS = {"self", "n_layer", "n_head_kv", "head_dim", "head_dim_v", "values_in_keys", "dry_run"}
_OPTIONS = [name for name in inspect.signature(_cache.Cache.__init__).parameters if name not in _NOT_OPTIONS]
_OPTIONS += ["factors", "exact_prefill"]
# Those that are no matter of the smallest cache: calibrations know shapes, and are read elsewhere.
_CHECKED_ELSEWHERE = ("calibration", "layer", "factors", "exact_prefill")


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON has them. Raises now what the pool that they are for would be refused for, as far as no shape matters."""
    known = [*_OPTIONS, "layer"]
    for name in options:
        if name not in known:
            raise ArgumentError(f"unknown option {name!r}; the options are {', '.join(_OPTIONS)}")
    plain = {name: _plain(value) for name, value in options.items()}
    try:
        _try(json.dumps(plain, sort_keys=True))
    except TypeError as error:
        raise ArgumentError(f"options {options}: {error}") from error
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, bool) or not hasattr(value, "__index__") else value.__index__()


@functools.cache
def _try(options: str) -> None:
    """Make the smallest cache with these options."""
    found = {name: value for name, value in json.loads(options).items() if name not in _CHECKED_ELSEWHERE}
    _cache.Cache(1, 1, 128, **found).close()


class _Sequence:
    """A sequence of a pool, freed with this object. It computes at once, on rows as TurboQuantKVCache._rows has them."""

    def __init__(self, store: _cache.Cache, seq: int | None = None) -> None:
        self.store, self.seq = store, store.seq_create() if seq is None else seq
        self.shape = (store.n_head_kv, store.head_dim, store.head_dim_v)

    def __len__(self) -> int:
        return self.store.length(self.seq)

    def fork(self) -> _Sequence:
        return _Sequence(self.store, self.store.seq_fork(self.seq))

    def trim(self, length: int) -> None:
        self.store.trim(self.seq, length)

    def attend(self, queries: np.ndarray | None, keys: np.ndarray, values: np.ndarray, scale: float = 1,
               sinks: mx.array | None = None) -> np.ndarray | None:
        k, v = (x[0].transpose(1, 0, 2) for x in (keys, values))
        if queries is None:
            self.store.append(self.seq, 0, k, v)
            return None
        return self._call(queries, scale, sinks, lambda params: self.store.prefill_raw(
            self.seq, 0, params.n_query, k.ctypes.data, v.ctypes.data, params))

    def attend_again(self, queries: np.ndarray, scale: float, sinks: mx.array | None) -> np.ndarray:
        def call(params: AttendParams) -> None:
            params.causal, params.first_pos = True, len(self) - params.n_query
            self.store.attend_raw(self.seq, 0, params)

        return self._call(queries, scale, sinks, call)

    def _call(self, queries: np.ndarray, scale: float, sinks: mx.array | None, call: Callable[[AttendParams], None]
              ) -> np.ndarray:
        sinks = None if sinks is None else np.array(sinks.astype(mx.float32))
        _, n_head, n_tok, head_dim = queries.shape
        out = np.empty((n_tok, n_head, self.store.head_dim_v), np.float32)
        params = attend_params(n_head, scale, None if sinks is None else sinks.ctypes.data)
        params.n_query, params.q, params.out = n_tok, queries.ctypes.data, out.ctypes.data
        params.q_token_stride, params.q_head_stride = n_head * head_dim, head_dim
        params.out_token_stride, params.out_head_stride = n_head * self.store.head_dim_v, self.store.head_dim_v
        call(params)
        return out[None].transpose(0, 2, 1, 3)

    def __del__(self) -> None:
        # When a cycle of references is collected, the store may have been first.
        if hasattr(self, "seq") and not self.store.closed:
            self.store.seq_free(self.seq)


class _State(dict):
    """
    A cache's state, whose arrays are made only for who reads its items: save_prompt_cache does, mx.eval, which MLX-LM calls on
    states after each part of a prompt, looks into the dict itself and finds it empty. So nothing is copied while generating.
    """

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def items(self) -> Any:
        return self._make().items()


class TurboQuantKVCache(BatchCache):
    """
    The cache of one layer on the CPU. Options are those of libturboquant.Cache, without the shape, which comes with the first
    keys.
    """

    def __init__(self, preset: str = "TQ4", **options: Any) -> None:
        super().__init__(_checked({"preset": preset, **options}))

    _arrays = np

    @staticmethod
    def _rows(x: mx.array) -> np.ndarray:
        """In host memory, MLX's own: float32, where heads follow each other token by token."""
        return np.array(mx.contiguous(x.transpose(0, 2, 1, 3).astype(mx.float32)), copy=False).transpose(0, 2, 1, 3)

    def _make(self, shape: Shape) -> _Sequence:
        return _Sequence(_store(shape, self._used_options(), self._factors.array))

    @property
    def nbytes(self) -> int:
        """Bytes of pages and exact tokens. Pages that caches share count in each."""
        total = self._exact_bytes()
        for sequence in self._coded():
            stats = sequence.store.stats()
            total += len(sequence.store.page_table(sequence.seq)) * stats.page_bytes
            total += stats.exact_bytes // stats.n_sequences
        return total

    # ---- what save_prompt_cache and load_prompt_cache call ----

    @property
    def state(self) -> _State:
        """
        {"options": JSON, "batched": 0 or 1, "instead": JSON, "snapshot": uint8, a file of docs/snapshot.md }, the last two if
        anything is held; made when read.
        """
        return _State(self._save)

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self.__init__(**json.loads(value["options"]))
        self._batched = bool(value["batched"])
        if "snapshot" not in value:
            return
        if json.loads(value.get("factors", "[null]"))[0] is not None:
            raise SnapshotError("this prompt cache is from before 2026-11-30 and holds scaled keys, which are not read any "
                                "more: run the prompt again")
        self._factors = Factors.of(None, json.loads(value.get("instead", "{}")))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.tqs"
            path.write_bytes(np.array(value["snapshot"]).tobytes())
            store, seqs = _load(path, self._used_options())
        self._factors = Factors.of(store.key_factors(0), self._factors.instead)
        self._sequences = [self._wrapped(_Sequence(store, seq)) for seq in seqs]
        self._left = [0] * len(self._sequences)

    def _save(self) -> dict[str, Any]:
        found: dict[str, Any] = {"options": json.dumps(self._options), "batched": int(self._batched)}
        self._settle()
        sequences = self._coded()
        if sequences and not self.empty():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache.tqs"
                sequences[0].store.save(path, [sequence.seq for sequence in sequences])
                found["instead"] = json.dumps(self._factors.instead)
                found["snapshot"] = mx.array(np.fromfile(path, np.uint8))
        return found


def scaled_dot_product_attention(queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any,
                                 sinks: mx.array | None = None) -> mx.array:
    """mlx_lm.models.base.scaled_dot_product_attention, for compressed keys and all others."""
    if not isinstance(keys, Rows):
        return _stock_attention(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    if mask is not None and not (isinstance(mask, str) and mask == "causal"):
        raise UnsupportedError("a mask as an array: compressed attention is causal only, and knows padding from the cache")
    if keys.rows is None:
        return keys.cache.attend_again(queries, scale, sinks)
    out = keys.cache.attend(queries, keys.rows, values.rows, scale, sinks)
    keys.rows = values.rows = None  # they are appended: a layer that is given them shares them
    return out


def _reach_attention(model: Any) -> None:
    """Put the dispatcher into every module that the model's layers come from."""
    modules = {sys.modules[type(module).__module__] for module in model.modules()} | {base}
    reached = [module for module in modules if hasattr(module, "scaled_dot_product_attention")]
    for module in reached:
        if module.scaled_dot_product_attention is _stock_attention:
            module.scaled_dot_product_attention = scaled_dot_product_attention
    if reached == [base]:
        raise UnsupportedError(f"{type(model).__module__} has an attention of its own, which libturboquant.mlx does not reach: "
                               "use mlx_lm.models.cache.make_prompt_cache")


def _options_of_layers(options: dict[str, Any], compressed: Sequence[int], n_layer: int) -> list[dict[str, Any]]:
    """
    Of the compressed ones of a model's n_layer layers: layer_k_formats, layer_v_formats and exact_layers become each layer's
    k_format and v_format.
    """
    n, of_layers = len(compressed), ("layer_k_formats", "layer_v_formats", "exact_layers", "calibration")
    common = {name: value for name, value in options.items() if name not in of_layers}
    layers = [dict(common) for _ in compressed]
    calibration = options.get("calibration")
    if calibration is not None:
        if not isinstance(calibration, _cache.Calibration):
            calibration = _calibration(os.path.abspath(calibration))
        if calibration.n_layer != n_layer:
            raise ArgumentError(f"the calibration {calibration.path} (of {calibration.model}) has {calibration.n_layer} "
                                f"layers, not {n_layer}: it is of another model")
        for layer in layers:
            layer["calibration"] = calibration.path
    for side in "kv":
        formats = options.get(f"layer_{side}_formats") or None
        if formats is not None and len(formats) != n:
            raise ArgumentError(f"layer_{side}_formats has {len(formats)} formats, but {n} layers are compressed: give one for "
                                "each of these")
        formats = exact_ends(formats, None, n, options.get("exact_layers", 0))
        for layer, name in zip(layers, formats or []):
            if name is not None:
                layer[f"{side}_format"] = name
    return layers


def cache_class() -> type:
    """The cache for the device that MLX computes on."""
    if mx.default_device() == mx.cpu:
        return TurboQuantKVCache
    if mx.metal.is_available():
        return TurboQuantMetalKVCache
    raise UnsupportedError("libturboquant.mlx computes on the CPU and on Apple GPUs. Call mx.set_default_device(mx.cpu), or "
                           "use mlx_lm.models.cache.make_prompt_cache")


def make_prompt_cache(model: Any, preset: str = "TQ4", max_kv_size: int | None = None, **options: Any) -> list[Any]:
    """
    MLX-LM's make_prompt_cache, with a compressed cache in place of each plain KVCache; layers with a window or a recurrent
    state keep what they have. On the CPU it is a TurboQuantKVCache, with the options of libturboquant.Cache, as k_format="sq8";
    on an Apple GPU a TurboQuantMetalKVCache, with those of that. Both take layer_k_formats=[...] and layer_v_formats=[...], one
    for each compressed layer, or exact_layers=1: the first and the last of them keep keys and values in f16; k_format="f16"
    keeps all keys exact. exact_prefill=True reads prompts with exact keys and values, which are coded when a single token comes
    after others (MLX-LM: a prompt's last); until then they take their memory. A calibration, a path or a Calibration, is of the
    whole model. What was applied is printed once. factors="off" leaves channels of keys as they are; by default factors from
    the model's weights keep outlier channels from costing the others precision. On the CPU max_tok, budget_bytes and
    offload_bytes are of all layers together, which get equal shares. Options are checked now. max_kv_size is MLX-LM's, and
    refused: there is no bound.
    """
    if max_kv_size is not None:
        raise UnsupportedError(f"max_kv_size is {max_kv_size}, but a compressed cache holds all tokens: leave it out, or use a "
                               "model that libturboquant.mlx.install has not changed, with "
                               "mlx_lm.models.cache.make_prompt_cache")
    make = getattr(model, "make_cache", None)
    caches = make.stock() if getattr(make, "is_turboquant", False) else stock.make_prompt_cache(model)
    return from_kvcache(model, caches, preset, **options)


def from_kvcache(model: Any, caches: Sequence[Any], preset: str = "TQ4", **options: Any) -> list[Any]:
    """
    Caches as make_prompt_cache makes them, with what those of MLX-LM hold, a list of all layers: the prompt has been read with
    exact keys and values, and what follows is read and generated with compressed ones. Each plain KVCache gets a copy of its
    own, which leaves it as it is; other caches are in both lists.
    """
    kind = cache_class()
    if any("embed_q" in module for module in model.modules()):
        raise UnsupportedError("this model has latent attention (MLA): it keeps latents in place of keys and values, which are "
                               "not compressed. Use mlx_lm.models.cache.make_prompt_cache")
    compressed = [i for i, cache in enumerate(caches) if type(cache) is stock.KVCache]
    n = len(compressed)
    if n == 0:
        kinds = ", ".join(dict.fromkeys(type(cache).__name__ for cache in caches))
        raise UnsupportedError(f"none of this model's layers has a plain KVCache, but {kinds}: there is nothing to compress. "
                               "Use mlx_lm.models.cache.make_prompt_cache")
    applied = list(caches)
    for i, of_layer in zip(compressed, _options_of_layers(options, compressed, len(caches))):
        pools = {"layer": [i, n]} if kind is TurboQuantKVCache else {}
        applied[i] = kind(preset, **pools, **of_layer)
        if caches[i].offset > 0:
            applied[i].append(*caches[i].keys_and_values(), model.layers[i])
    _reach_attention(model)
    guard_passes(type(model))
    said = ", ".join(f"{name}={value}" for name, value in {"preset": preset, **options}.items() if value is not None)
    what = f"turboquant: {n} of {len(caches)} layers compressed ({said}), {len(caches) - n} left to MLX-LM"
    if what not in _announced:
        _announced.add(what)
        print(what, file=sys.stderr)
    return applied


def install(model: Any, preset: str = "TQ4", **options: Any) -> Any:
    """Let MLX-LM make these caches itself, wherever it makes one for this model: generate, batches, the server. The model."""
    before = None if getattr(getattr(model, "make_cache", None), "is_turboquant", False) else getattr(model, "make_cache", None)

    def stock_caches() -> list[Any]:
        if before is not None:
            return before()
        return [stock.KVCache() for _ in model.layers]

    def make_cache() -> list[Any]:
        # MLX-LM keeps the bound to itself where a model makes its caches, whoever has imported its make_prompt_cache.
        caller = sys._getframe(1)
        is_stock = caller.f_code is stock.make_prompt_cache.__code__
        return make_prompt_cache(model, preset, caller.f_locals["max_kv_size"] if is_stock else None, **options)

    make_cache.is_turboquant, make_cache.stock = True, stock_caches
    make_cache()  # refuses now what it would refuse later
    model.make_cache = make_cache
    return model


# load_prompt_cache looks classes up in that module.
stock.TurboQuantKVCache = TurboQuantKVCache
stock.TurboQuantMetalKVCache = TurboQuantMetalKVCache
