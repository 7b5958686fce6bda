# SPDX-License-Identifier: MIT
"""
The cache in MLX-LM, on the CPU: attention of its models over compressed keys and values. docs/python.md.

    cache = turboquant.mlx.make_prompt_cache(model, preset="TQ4")
    mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)

or turboquant.mlx.install(model) once, after which MLX-LM makes such caches itself. A cache's update_and_fetch returns handles
of the compressed keys, which MLX's own attention does not take; make_prompt_cache puts a dispatcher before the
scaled_dot_product_attention of the model's module, which sends them to the library and all else to MLX-LM.

All caches of one shape and one set of options share a pool, so that batches are made of sequences without a copy.
"""
from __future__ import annotations

import copy
import json
import sys
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx_lm.models.base as base
import mlx_lm.models.cache as stock
import numpy as np

from . import cache as _cache
from ._library import AttendParams, lib
from .errors import ArgumentError, UnsupportedError

# Of a pool, whose sequences are those of all layers. Memory is taken as it is used; the tables of so many pages take some MB.
MAX_TOK_DEFAULT = 1 << 25

_stores: weakref.WeakValueDictionary[str, _cache.Cache] = weakref.WeakValueDictionary()
_stock_attention = base.scaled_dot_product_attention
_announced: set[str] = set()


def _store(shape: Sequence[int], options: dict[str, Any]) -> _cache.Cache:
    """The pool of caches of this shape (n_head_kv, head_dim, head_dim_v) and these options."""
    key = json.dumps([list(shape), options], sort_keys=True)
    found = _stores.get(key)
    if found is None:
        n_head_kv, head_dim, head_dim_v = shape
        found = _cache.Cache(1, n_head_kv, head_dim, head_dim_v=head_dim_v, **({"max_tok": MAX_TOK_DEFAULT} | options))
        _stores[key] = found
    return found


class _Sequence:
    """A sequence of a pool, freed with this object."""

    def __init__(self, store: _cache.Cache, seq: int | None = None) -> None:
        self.store, self.seq = store, store.seq_create() if seq is None else seq

    def __len__(self) -> int:
        return self.store.length(self.seq)

    def fork(self) -> _Sequence:
        return _Sequence(self.store, self.store.seq_fork(self.seq))

    def __del__(self) -> None:
        # When a cycle of references is collected, the store may have been first.
        if hasattr(self, "seq") and not self.store.closed:
            self.store.seq_free(self.seq)


class _Rows:
    """What update_and_fetch returns in place of an array: rows [n_batch, n_head_kv, n_tok, head_dim], not yet appended."""

    def __init__(self, cache: TurboQuantKVCache, rows: mx.array) -> None:
        self.cache, self.rows = cache, rows

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copy and inspect look for
            raise AttributeError(name)
        raise ArgumentError(f"`{name}` was asked of keys or values that are compressed: this model has an attention of its "
                            "own, which turboquant.mlx does not reach. Use mlx_lm.models.cache.make_prompt_cache")


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


class TurboQuantKVCache(stock._BaseCache):
    """
    The cache of one layer for a batch of sequences, in the place of MLX-LM's KVCache and BatchKVCache. Padding is not stored.
    Options are those of turboquant.Cache, without the shape, which comes with the first keys.
    """

    def __init__(self, preset: str = "TQ4", **options: Any) -> None:
        self._options = {"preset": preset, **options}
        self._sequences: list[_Sequence | None] = [None]  # None: empty
        self._left = [0]  # padding to come before a row's first token
        self._to_come: list[int] | None = None  # tokens to come of each row, right padding after them; None: all
        self._batched = False
        self._pending = 0

    # ---- what the models call ----

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token; in batches of each row, negative in the padding before it."""
        offsets = [length - left for length, left in zip(self._lengths(), self._left)]
        return mx.array(offsets) if self._batched else offsets[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[_Rows, _Rows]:
        """Handles of the rows. They are appended when the attention that follows brings the queries."""
        if self._pending:
            raise ArgumentError("a forward pass was interrupted between a layer's keys and its attention: make a new cache")
        n_batch, n_head_kv, n_tok, head_dim = keys.shape
        if n_batch != len(self._sequences) and any(self._lengths()):
            raise ArgumentError(f"this cache holds a batch of {len(self._sequences)}, and was given one of {n_batch}")
        if n_batch != len(self._sequences):
            self._sequences, self._left, self._batched = [None] * n_batch, [0] * n_batch, True
        store = _store((n_head_kv, head_dim, values.shape[3]), self._options)
        for sequence in self._sequences:
            if sequence is not None and sequence.store is not store:
                raise ArgumentError(f"a layer has {n_head_kv} KV heads of {head_dim}, but the cache holds others: it belongs "
                                    "to another model. Make a new one")
        self._sequences = [_Sequence(store) if sequence is None else sequence for sequence in self._sequences]
        self._pending = n_tok
        return _Rows(self, keys), _Rows(self, values)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None = None
               ) -> mx.array:
        """
        Append the rows of update_and_fetch and attend with their queries [n_batch, n_head, n_tok, head_dim]: the same shape.
        sinks [n_head]: learned logits of the denominator alone. Computes at once, whatever was lazy.
        """
        n_batch, n_head, n_tok, _ = queries.shape
        q, k, v = (_host(x) for x in (queries, keys, values))
        store = self._sequences[0].store
        out = np.zeros((n_batch, n_tok, n_head, store.head_dim_v), np.float32)
        params = AttendParams()
        lib.tq_attend_params_default(params)
        params.n_head, params.softmax_scale = n_head, scale
        params.q_token_stride, params.q_head_stride = n_head * store.head_dim, store.head_dim
        params.out_token_stride, params.out_head_stride = n_head * store.head_dim_v, store.head_dim_v
        if sinks is not None:
            sinks = np.array(sinks.astype(mx.float32))
            params.sinks = sinks.ctypes.data
        # A row that fails leaves the others longer; the next forward pass is refused by `_pending`.
        for i, sequence in enumerate(self._sequences):
            begin = min(self._left[i], n_tok)
            n = n_tok - begin if self._to_come is None else min(n_tok - begin, self._to_come[i])
            if n > 0:
                params.n_query, params.q, params.out = n, q[i, begin:].ctypes.data, out[i, begin:].ctypes.data
                store.prefill_raw(sequence.seq, 0, n, k[i, begin:].ctypes.data, v[i, begin:].ctypes.data, params)
            self._left[i] -= begin
            if self._to_come is not None:
                self._to_come[i] -= n
        self._pending = 0
        return mx.array(out).astype(queries.dtype).transpose(0, 2, 1, 3)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """None or "causal": there is no mask but causality, and padding is not stored."""
        if return_array or window_size is not None:
            raise UnsupportedError("this model asks for a mask as an array, or for a window, which compressed attention does "
                                   "not have: use mlx_lm.models.cache.make_prompt_cache")
        return None if N == 1 else "causal"

    # ---- what generation and the server call ----

    def _lengths(self) -> list[int]:
        return [0 if sequence is None else len(sequence) for sequence in self._sequences]

    def size(self) -> int:
        return max(self._lengths(), default=0)

    def empty(self) -> bool:
        return self.size() == 0

    @property
    def nbytes(self) -> int:
        """Bytes of pages and exact tokens. Pages that caches share count in each."""
        total = 0
        for sequence in self._sequences:
            if sequence is not None:
                stats = sequence.store.stats()
                total += len(sequence.store.page_table(sequence.seq)) * stats.page_bytes
                total += stats.exact_bytes // stats.n_sequences
        return total

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens of each row; how many that were."""
        n = min(n, self.size())
        for sequence in self._sequences:
            if sequence is not None:
                sequence.store.trim(sequence.seq, max(len(sequence) - n, 0))
        return n

    def prepare(self, *, left_padding: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
                right_padding: Sequence[int] | None = None) -> None:
        """Say how what comes is padded: on the left, or with `lengths` tokens and right_padding after them."""
        if left_padding is not None:
            if not self.empty():
                raise ArgumentError("left padding can only be added to an empty cache")
            self._as_batch(len(left_padding))
            self._left = [a + b for a, b in zip(self._left, left_padding)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ArgumentError("right_padding: give the lengths, too")
            self._as_batch(len(lengths))
            self._to_come = list(lengths)

    def finalize(self) -> None:
        self._to_come = None

    def _as_batch(self, n: int) -> None:
        if len(self._sequences) != n:
            if not self.empty():
                raise ArgumentError(f"this cache holds a batch of {len(self._sequences)}, not of {n}")
            self._sequences, self._left = [None] * n, [0] * n
        self._batched = True

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows."""
        indices = batch_indices.tolist() if isinstance(batch_indices, mx.array) else list(batch_indices)
        used: set[int] = set()
        sequences = []
        for i in indices:
            sequence = self._sequences[i]
            sequences.append(sequence.fork() if sequence is not None and i in used else sequence)
            used.add(i)
        self._sequences, self._left = sequences, [self._left[i] for i in indices]

    def extend(self, other: TurboQuantKVCache) -> None:
        """Add another cache's rows."""
        if other._options != self._options:
            raise ArgumentError(f"caches of {self._options} and {other._options} do not go together in a batch")
        self._sequences, self._left = self._sequences + other._sequences, self._left + other._left
        self._batched = True

    def extract(self, idx: int) -> TurboQuantKVCache:
        """One row as a cache of its own; its pages are shared."""
        other = self._like([self._sequences[idx]])
        other._batched = False
        return other

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache]) -> TurboQuantKVCache:
        """One cache for the rows of all; their pages are shared."""
        merged = caches[0]._like([])
        merged._batched = True
        for cache in caches:
            merged.extend(cache._like(cache._sequences))
        return merged

    def _like(self, sequences: Iterable[_Sequence | None]) -> TurboQuantKVCache:
        """A cache with these options and forks of these sequences."""
        other = copy.copy(self)
        other._options = dict(self._options)
        other._sequences = [None if sequence is None else sequence.fork() for sequence in sequences]
        other._left, other._to_come, other._pending = [0] * len(other._sequences), None, 0
        return other

    def __deepcopy__(self, memo: dict) -> TurboQuantKVCache:
        other = self._like(self._sequences)
        other._left, other._to_come = list(self._left), copy.copy(self._to_come)
        return other

    # ---- what save_prompt_cache and load_prompt_cache call ----

    @property
    def state(self) -> _State:
        """{"options": JSON, "batched": 0 or 1, "snapshot": uint8 of docs/snapshot.md, if anything is held}, made when read."""
        return _State(self._save)

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self.__init__(**json.loads(value["options"]))
        self._batched = bool(value["batched"])
        if "snapshot" not in value:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.tqs"
            path.write_bytes(np.array(value["snapshot"]).tobytes())
            info = _cache.describe_snapshot(path)
            store = _store((info.n_head_kv, info.head_dim, info.head_dim_v), self._options)
            self._sequences = [_Sequence(store, seq) for seq in store.load(path)]
        self._left = [0] * len(self._sequences)

    def _save(self) -> dict[str, Any]:
        found: dict[str, Any] = {"options": json.dumps(self._options), "batched": int(self._batched)}
        sequences = [sequence for sequence in self._sequences if sequence is not None]
        if sequences and not self.empty():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache.tqs"
                sequences[0].store.save(path, [sequence.seq for sequence in sequences])
                found["snapshot"] = mx.array(np.fromfile(path, np.uint8))
        return found


def _host(x: mx.array) -> np.ndarray:
    """[n_batch, n_head, n_tok, head_dim] as float32 [n_batch, n_tok, n_head, head_dim] in host memory, MLX's own."""
    return np.array(mx.contiguous(x.transpose(0, 2, 1, 3).astype(mx.float32)), copy=False)


def scaled_dot_product_attention(queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any,
                                 sinks: mx.array | None = None) -> mx.array:
    """mlx_lm.models.base.scaled_dot_product_attention, for compressed keys and all others."""
    if not isinstance(keys, _Rows):
        return _stock_attention(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    if mask is not None and not (isinstance(mask, str) and mask == "causal"):
        raise UnsupportedError("a mask as an array: compressed attention is causal alone, and knows padding from the cache")
    return keys.cache.attend(queries, keys.rows, values.rows, scale, sinks)


def _reach_attention(model: Any) -> None:
    """Put the dispatcher into every module that the model's layers come from."""
    modules = {sys.modules[type(module).__module__] for module in model.modules()} | {base}
    reached = [module for module in modules if hasattr(module, "scaled_dot_product_attention")]
    for module in reached:
        if module.scaled_dot_product_attention is _stock_attention:
            module.scaled_dot_product_attention = scaled_dot_product_attention
    if reached == [base]:
        raise UnsupportedError(f"{type(model).__module__} has an attention of its own, which turboquant.mlx does not reach: "
                               "use mlx_lm.models.cache.make_prompt_cache")


def _options_of_layers(options: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Of n layers: layer_k_formats and layer_v_formats become each layer's k_format and v_format."""
    common = {name: value for name, value in options.items() if name not in ("layer_k_formats", "layer_v_formats")}
    layers = [dict(common) for _ in range(n)]
    for side in "kv":
        formats = options.get(f"layer_{side}_formats") or []
        if formats and len(formats) != n:
            raise ArgumentError(f"layer_{side}_formats has {len(formats)} formats, but {n} layers are compressed: give one for "
                                "each of these")
        for layer, name in zip(layers, formats):
            layer[f"{side}_format"] = name
    return layers


def make_prompt_cache(model: Any, preset: str = "TQ4", max_kv_size: int | None = None, **options: Any) -> list[Any]:
    """
    MLX-LM's make_prompt_cache, with a TurboQuantKVCache in place of each plain KVCache; layers with a window or a recurrent
    state keep what they have. Options are those of turboquant.Cache, as k_format="tq8" or layer_k_formats=[...], one for each
    compressed layer. What was applied is printed once.
    """
    if mx.default_device() != mx.cpu:
        raise UnsupportedError("turboquant.mlx computes on the CPU. Call mx.set_default_device(mx.cpu), or use "
                               "mlx_lm.models.cache.make_prompt_cache")
    make = getattr(model, "make_cache", None)
    if getattr(make, "is_turboquant", False):
        caches = make.stock(max_kv_size)
    else:
        caches = stock.make_prompt_cache(model, max_kv_size)
    n = sum(type(cache) is stock.KVCache for cache in caches)
    if n == 0:
        raise UnsupportedError("none of this model's layers has a plain KVCache: there is nothing to compress")
    of_layers = iter(_options_of_layers(options, n))
    applied = [TurboQuantKVCache(preset, **next(of_layers)) if type(cache) is stock.KVCache else cache for cache in caches]
    _reach_attention(model)
    said = ", ".join(f"{name}={value}" for name, value in {"preset": preset, **options}.items())
    what = f"turboquant: {n} of {len(caches)} layers compressed ({said}), {len(caches) - n} left to MLX-LM"
    if what not in _announced:
        _announced.add(what)
        print(what, file=sys.stderr)
    return applied


def install(model: Any, preset: str = "TQ4", **options: Any) -> Any:
    """Let MLX-LM make these caches itself, wherever it makes one for this model: generate, batches, the server. The model."""
    before = None if getattr(getattr(model, "make_cache", None), "is_turboquant", False) else getattr(model, "make_cache", None)

    def stock_caches(max_kv_size: int | None) -> list[Any]:
        if before is not None:
            return before()
        return [stock.KVCache() for _ in model.layers]

    def make_cache() -> list[Any]:
        return make_prompt_cache(model, preset, **options)

    make_cache.is_turboquant, make_cache.stock = True, stock_caches
    make_cache()  # refuses now what it would refuse later
    model.make_cache = make_cache
    return model


# load_prompt_cache looks classes up in that module.
stock.TurboQuantKVCache = TurboQuantKVCache
