# SPDX-License-Identifier: MIT
"""tq_cache: sequences of keys and values over compressed pages. docs/cache.md explains; names are those of turboquant.h."""
from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _threads
from ._library import (Allocator, AttendParams, BatchRows, CacheParams, CacheStats, CalibrationInfo, SnapshotInfo,
                       integer, lib)
from .buffers import address, floats, integers, raw_bytes, writable
from .errors import ArgumentError, RangeError
from .formats import SEED_DEFAULT, exact_ends, format_number, preset as find_preset

MAX_TOK_DEFAULT = 1 << 22
_DEVICES = ("cpu", "cuda")  # tq_device_kind
# Multiplications that one thread does in some 80 us.
_SMALL = 1 << 21


@dataclass(frozen=True)
class Stats:
    """tq_cache_stats: pages, bytes, and seconds. turboquant.h says what each is."""

    n_sequences: int
    n_pages_used: int
    n_pages_kept: int
    n_pages_free: int
    n_pages_shared: int
    n_pages_offloaded: int
    n_offloads: int
    n_restores: int
    page_bytes: int
    exact_bytes: int
    checkpoint_bytes: int
    table_bytes: int
    allocated_bytes: int
    n_asked_tok: int
    n_matched_tok: int
    n_evicted_pages: int
    n_copied_pages: int
    encode_seconds: float
    attend_seconds: float


@dataclass(frozen=True)
class Snapshot:
    """tq_snapshot_info: what a file says of itself, and the formats [n_layer] of keys and of values."""

    version: int
    n_layer: int
    n_head_kv: int
    head_dim: int
    head_dim_v: int
    page_size: int
    n_sink: int
    n_recent: int
    n_take_back: int
    k_ref_block: int
    n_sequences: int
    n_pages: int
    n_prefixes: int
    seed: int
    file_bytes: int
    page_bytes: int
    exact_bytes: int
    k_formats: list[int]
    v_formats: list[int]


def _fields(struct: ctypes.Structure) -> dict[str, Any]:
    return {name: getattr(struct, name) for name, *_ in struct._fields_ if name != "struct_size"}


def _formats_array(names: Sequence[str | int] | None, fmt: int, n_layer: int, exact_layers: int, what: str
                   ) -> ctypes.Array | None:
    """tq_format [n_layer] by names, or by fmt where these are None; None where one is for all."""
    if names is not None and len(names) != n_layer:
        raise ArgumentError(f"{what}: has {len(names)} formats; give one for each of {n_layer} layers")
    names = exact_ends(names, fmt, n_layer, exact_layers)
    if names is None:
        return None
    return (ctypes.c_int * n_layer)(*(format_number(name) for name in names))


class Calibration:
    """
    What `tq calibrate` learnt of a model (docs/calibrate.md), read from its file: for Cache(calibration=...), any number of
    them. Its order of channels must be that of the keys: Transformers and MLX-LM turn two halves of a head where llama.cpp, for
    models of architecture llama, turns neighbours; `tq calibrate --order halves` makes a file for those.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._handle = ctypes.c_void_p()
        self.path = os.path.abspath(path)
        lib.tq_calibration_load(ctypes.byref(self._handle), os.fsencode(path))

    def layer(self, i: int) -> Calibration:
        """Layer i as a calibration of its own, for a Cache of one layer. Nothing is copied."""
        one = Calibration.__new__(Calibration)
        one._handle, one.path = ctypes.c_void_p(), self.path
        one._whole = self  # whose memory it reads
        lib.tq_calibration_take_layer(ctypes.byref(one._handle), self._handle, i)
        return one

    def __repr__(self) -> str:
        return f"Calibration({self.path!r})"

    @property
    def _info(self) -> CalibrationInfo:
        info = CalibrationInfo()
        lib.tq_calibration_describe(info, self._handle)
        return info

    @property
    def n_layer(self) -> int:
        return self._info.n_layer

    @property
    def model(self) -> str:
        return self._info.model.decode(errors="replace")

    @property
    def nbytes(self) -> int:
        return self._info.bytes

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            lib.tq_calibration_free(self._handle)


class _Handle(ctypes.c_void_p):
    """A tq_cache, freed with the last user: a call that another thread is in has it among its arguments."""

    def __del__(self, free: Any = lib.tq_cache_free) -> None:
        free(self)
        self.value = None  # when a cycle of references is collected, who uses the cache may come later


class Cache:
    """
    Keys and values of many sequences, encoded, in pages from one pool.

    n_layer, n_head_kv, head_dim: the model's shape; head_dim_v if values differ. values_in_keys: values are the first ones of
    the keys, which take all memory then, and what is given as v means nothing (latent attention; on the CPU only).
    preset: formats, exact tokens and references; k_format, v_format, n_sink, n_recent and k_ref_block override parts of it,
    layer_k_formats and layer_v_formats [n_layer] single layers. exact_layers: so many layers at either end keep keys and values
    in f16.
    n_take_back: so many newest tokens can be trimmed, drafts that were rejected, as if they had never come.
    checkpoint_stride: a multiple of page_size; others can begin with a sequence's first tokens where so many of them end
    (seq_publish, seq_match), which keeps a copy of its exact tokens there. 0: nowhere, and nothing is published.
    max_tok: capacity in tokens, all sequences together; memory is taken page by page as it is used. budget_bytes: limit of all
    that the cache takes from the allocator. offload_folder, offload_bytes: a file for pages beyond it.
    calibration: of all n_layer layers; a path or a Calibration.
    device: "cpu", or "cuda": the current CUDA device, where a Batch is the way in and out; allocator: of its memory.
    n_threads: for encoding and attention; by default the processors that this process may use.

    Arrays may be anything with the buffer protocol or DLPack, or a libturboquant.Pointer; float32 is not copied.
    Threads: any number may use one cache, each sequence one at a time. Errors are libturboquant.TurboQuantError and its kinds;
    a call that fails has changed nothing.
    """

    def __init__(self, n_layer: int, n_head_kv: int, head_dim: int, *, preset: str = "TQ4", head_dim_v: int = 0,
                 values_in_keys: bool = False,
                 k_format: str | int | None = None, v_format: str | int | None = None, n_sink: int | None = None,
                 n_recent: int | None = None, n_take_back: int = 0, k_ref_block: int | None = None, checkpoint_stride: int = 0,
                 layer_k_formats: Sequence[str | int] | None = None, layer_v_formats: Sequence[str | int] | None = None,
                 exact_layers: int = 0, page_size: int = 128, max_tok: int = MAX_TOK_DEFAULT, budget_bytes: int = 0,
                 offload_folder: str | os.PathLike | None = None, offload_bytes: int = 0,
                 calibration: str | os.PathLike | Calibration | None = None, seed: int = SEED_DEFAULT, dry_run: bool = False,
                 device: str = "cpu", allocator: Allocator | None = None, n_threads: int | None = None) -> None:
        self._handle = _Handle()
        params = CacheParams()
        lib.tq_cache_params_set_preset(ctypes.byref(params), lib.tq_preset_get(find_preset(preset).index))
        params.n_layer, params.n_head_kv, params.head_dim, params.head_dim_v = n_layer, n_head_kv, head_dim, head_dim_v
        params.values_in_keys = values_in_keys
        if k_format is not None:
            params.k_format = format_number(k_format)
        if v_format is not None:
            params.v_format = format_number(v_format)
        for name, value in (("n_sink", n_sink), ("n_recent", n_recent), ("n_take_back", n_take_back),
                            ("k_ref_block", k_ref_block), ("checkpoint_stride", checkpoint_stride)):
            if value is not None:
                setattr(params, name, value)
        # ctypes keeps no reference to what a pointer field points to.
        layer_k = _formats_array(layer_k_formats, params.k_format, n_layer, exact_layers, "layer_k_formats")
        layer_v = _formats_array(layer_v_formats, params.v_format, n_layer, exact_layers, "layer_v_formats")
        if layer_k:
            params.layer_k_formats = layer_k
        if layer_v:
            params.layer_v_formats = layer_v
        page_size, max_tok = integer(page_size, ctypes.c_int32, "page_size"), integer(max_tok, ctypes.c_int64, "max_tok")
        if page_size <= 0 or max_tok <= 0:
            raise ArgumentError(f"page_size is {page_size} and max_tok {max_tok}; give positive numbers")
        n_pages = -(-max_tok // page_size)
        if n_pages >= 1 << 31:
            raise ArgumentError(f"max_tok is {max_tok}, which is {n_pages} pages of {page_size}; give at most "
                                f"{((1 << 31) - 1) * page_size}")
        params.page_size, params.n_pages = page_size, n_pages
        params.budget_bytes, params.seed, params.dry_run = budget_bytes, seed, dry_run
        if offload_folder is not None:
            params.offload_folder, params.offload_bytes = os.fsencode(offload_folder), offload_bytes
        if device not in _DEVICES:
            raise ArgumentError(f"device: is {device!r}; give one of {', '.join(_DEVICES)}")
        params.device, self.device_kind = _DEVICES.index(device), device
        if allocator is not None:
            params.allocator = ctypes.addressof(allocator)
            self._handle.allocator = allocator
        # The library reads it as long as the cache lives.
        self.calibration = Calibration(calibration) if isinstance(calibration, (str, bytes, os.PathLike)) else calibration
        if self.calibration is not None:
            params.calibration = self.calibration._handle
            self._handle.calibration = self.calibration
        lib.tq_cache_create(ctypes.byref(self._handle), ctypes.byref(params))
        self.n_layer, self.n_head_kv, self.page_size = n_layer, n_head_kv, page_size
        self.head_dim, self.head_dim_v, self.values_in_keys = head_dim, head_dim_v or head_dim, values_in_keys
        self.k_format, self.v_format = params.k_format, params.v_format
        self.n_sink, self.n_recent = params.n_sink, params.n_recent
        if n_threads is not None:
            self._threads(n_threads)  # refuses now what the first tokens would be refused for
        self._n_threads = _threads.default_n_threads() if n_threads is None else n_threads

    @property
    def n_values(self) -> int:
        """What is kept of a token, in all layers."""
        return self.n_layer * self.n_head_kv * (self.head_dim + (0 if self.values_in_keys else self.head_dim_v))

    def close(self) -> None:
        """
        Free all memory now, or when the calls that other threads are in return; otherwise that happens with the object. Any
        later call raises ArgumentError.
        """
        self._handle = ctypes.c_void_p()

    @property
    def closed(self) -> bool:
        return not self._handle

    def __reduce__(self) -> Any:
        raise TypeError("a turboquant cache can be neither copied nor pickled: fork its sequences (seq_fork), or save() it")

    @staticmethod
    def _threads(n_threads: int) -> Any:
        """What calls run on."""
        return _threads.pool(n_threads)

    def _here(self) -> Any:
        """A context for calls that a device works on."""
        return contextlib.nullcontext()

    def _executor(self) -> Any:
        return self._threads(self._n_threads).executor()

    def _executor_of(self, n_score: int) -> Any:
        """
        The same, or the caller's thread for few scores. It takes some 80 us at most for them, and a framework that computes a
        layer around them has its threads elsewhere: on a busy machine each call of others waits for one of them to get a core.
        """
        is_small = n_score * (self.head_dim + self.head_dim_v) < _SMALL
        return contextlib.nullcontext() if is_small else self._executor()

    # ---- sequences ----

    def set_key_factors(self, layer: int, factors: np.ndarray | None) -> None:
        """
        Factors of a layer's keys, int8 [n_head_kv, head_dim] of quarters of an octave, None for none: what is coded of channel
        j is divided by 2^(factors[j] / 4). Only while the layer holds no tokens; files have them.
        """
        if factors is not None:
            factors = np.ascontiguousarray(factors)
            if factors.dtype != np.int8 or factors.shape != (self.n_head_kv, self.head_dim):
                raise ArgumentError(f"factors are {factors.dtype} {list(factors.shape)}; give int8 [{self.n_head_kv}, "
                                    f"{self.head_dim}]")
        lib.tq_cache_set_key_factors(self._handle, integer(layer, ctypes.c_int32, "layer"), address(factors))

    def key_factors(self, layer: int) -> np.ndarray | None:
        """Those that a layer has, a file's perhaps."""
        found = np.empty((self.n_head_kv, self.head_dim), np.int8)
        lib.tq_cache_get_key_factors(self._handle, integer(layer, ctypes.c_int32, "layer"), address(found))
        return found if found.any() else None

    def seq_create(self) -> int:
        """The id of a new, empty sequence. Ids of freed sequences are used again."""
        seq = ctypes.c_int32()
        lib.tq_cache_seq_create(self._handle, ctypes.byref(seq))
        return seq.value

    def seq_fork(self, seq: int) -> int:
        """The id of a sequence with the content of another, whose pages it shares until they differ."""
        out = ctypes.c_int32()
        lib.tq_cache_seq_fork(self._handle, seq, ctypes.byref(out))
        return out.value

    def seq_free(self, seq: int) -> None:
        """Its pages go back to the pool; published ones stay findable as long as there is room."""
        lib.tq_cache_seq_free(self._handle, seq)

    def seq_publish(self, seq: int, tokens: Any) -> None:
        """
        Say that the sequence's first tokens are these int32 [n_tok], so that seq_match finds the pages that they fill. Needs a
        checkpoint_stride.
        """
        ids = integers(tokens, np.int32, "tokens")
        lib.tq_cache_seq_publish(self._handle, seq, address(ids), len(ids))

    def seq_match(self, tokens: Any) -> tuple[int, int]:
        """
        A new sequence of the published pages that these tokens begin with: its id, and how many tokens it holds, a multiple of
        checkpoint_stride. It is as if they had been appended.
        """
        ids = integers(tokens, np.int32, "tokens")
        seq, n_matched = ctypes.c_int32(), ctypes.c_int64()
        lib.tq_cache_seq_match(self._handle, address(ids), len(ids), ctypes.byref(seq), ctypes.byref(n_matched))
        return seq.value, n_matched.value

    def trim(self, seq: int, n_tok: int) -> None:
        """Keep the first n_tok tokens of every layer. What was encoded stays encoded."""
        lib.tq_cache_trim(self._handle, seq, n_tok)

    def length(self, seq: int, layer: int = 0) -> int:
        """Tokens in one layer of a sequence, or -1 if one of them does not exist."""
        try:
            return lib.tq_cache_length(self._handle, seq, layer)
        except RangeError:  # more than 32 bits
            return -1

    # ---- tokens in, attention out ----

    def _rows(self, k: Any, v: Any) -> tuple[np.ndarray, np.ndarray]:
        keys = floats(k, (None, self.n_head_kv, self.head_dim), "k")
        if self.values_in_keys:
            return keys, keys
        return keys, floats(v, (len(keys), self.n_head_kv, self.head_dim_v), "v")

    def _attention(self, q: Any, out: Any, softmax_scale: float | None, softcap: float, sinks: Any, lse: Any
                   ) -> tuple[AttendParams, np.ndarray, list]:
        """Parameters of an attention call, its output, and the arrays that must stay alive during the call."""
        queries = floats(q, (None, None, self.head_dim), "q")
        n_query, n_head, _ = queries.shape
        result = writable(out, (n_query, n_head, self.head_dim_v), "out")
        params = AttendParams()
        params.n_query, params.n_head = n_query, n_head
        params.q, params.q_token_stride, params.q_head_stride = address(queries), n_head * self.head_dim, self.head_dim
        params.out, params.out_token_stride = address(result), n_head * self.head_dim_v
        params.out_head_stride = self.head_dim_v
        params.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        params.softcap = softcap
        kept = [queries, result]
        if sinks is not None:
            kept.append(floats(sinks, (n_head,), "sinks"))
            params.sinks = address(kept[-1])
        if lse is not None:
            kept.append(writable(lse, (n_query, n_head), "lse"))
            params.lse = address(kept[-1])
        return params, result, kept

    def append(self, seq: int, layer: int, k: Any = None, v: Any = None, *, n_tok: int | None = None) -> None:
        """
        Append tokens to one layer: k [n_tok, n_head_kv, head_dim], v [n_tok, n_head_kv, head_dim_v]. A dry run takes only
        n_tok. Raises ArgumentError (NaN, infinity or above 65504: the text names layer, head and position), CacheFullError.
        """
        if k is None and v is None and n_tok is not None:
            lib.tq_cache_append(self._handle, seq, layer, n_tok, None, None, None)
            return
        keys, values = self._rows(k, v)
        with self._executor() as executor:
            lib.tq_cache_append(self._handle, seq, layer, len(keys), address(keys), address(values), executor)

    def attend(self, seq: int, layer: int, q: Any, *, causal: bool = False, first_pos: int = 0, window: int = 0,
               softmax_scale: float | None = None, softcap: float = 0.0, sinks: Any = None, out: Any = None,
               lse: Any = None) -> np.ndarray:
        """
        Attention of q [n_query, n_head, head_dim] over all tokens of one layer of a sequence: float32 [n_query, n_head,
        head_dim_v], in `out` if given. softmax_scale: head_dim ** -0.5 by default. causal: query i sees positions up to
        first_pos + i. lse, optional float32 [n_query, n_head], gets the logarithm of the sum of exponentials.
        """
        params, result, kept = self._attention(q, out, softmax_scale, softcap, sinks, lse)
        params.causal, params.first_pos, params.window = causal, first_pos, window
        with self._executor() as executor:
            lib.tq_cache_attend(self._handle, seq, layer, ctypes.byref(params), executor)
        del kept
        return result

    def prefill(self, seq: int, layer: int, q: Any, k: Any, v: Any, *, softmax_scale: float | None = None,
                softcap: float = 0.0, sinks: Any = None, out: Any = None, lse: Any = None) -> np.ndarray:
        """
        Append tokens and attend with their queries, as if token by token: q [n_tok, n_head, head_dim], k, v as in append.
        Returns as attend does. The way for prompts, and right for single tokens.
        """
        keys, values = self._rows(k, v)
        params, result, kept = self._attention(q, out, softmax_scale, softcap, sinks, lse)
        if params.n_query != len(keys):
            raise ArgumentError(f"q: has {params.n_query} tokens and k {len(keys)}; give a query for each")
        with self._executor() as executor:
            lib.tq_cache_prefill(self._handle, seq, layer, len(keys), address(keys), address(values), ctypes.byref(params),
                                 executor)
        del kept
        return result

    def prefill_raw(self, seq: int, layer: int, n_tok: int, k: int, v: int, params: AttendParams) -> None:
        """prefill on addresses of contiguous float32 memory, which is what adapters of frameworks use; nothing is checked."""
        with self._executor_of(n_tok * params.n_head * (self.length(seq) + n_tok)) as executor:
            lib.tq_cache_prefill(self._handle, seq, layer, n_tok, k, v, ctypes.byref(params), executor)

    def attend_raw(self, seq: int, layer: int, params: AttendParams) -> None:
        """attend on addresses, as prefill_raw."""
        with self._executor() as executor:
            lib.tq_cache_attend(self._handle, seq, layer, ctypes.byref(params), executor)

    def read(self, seq: int, layer: int, first: int = 0, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Decode tokens [first, first + n): k [n, n_head_kv, head_dim], v [n, n_head_kv, head_dim_v]. For looking at them."""
        held = self.length(seq, layer)
        n = held - first if n is None else integer(n, ctypes.c_int64, "n")
        room = max(min(n, held), 0)  # the library refuses to read more
        k = np.empty((room, self.n_head_kv, self.head_dim), np.float32)
        v = np.empty((room, self.n_head_kv, self.head_dim_v), np.float32)
        lib.tq_cache_read(self._handle, seq, layer, first, n, address(k), address(v))
        return k, v

    # ---- room ----

    def reserve(self, seq: int, n_tok: int) -> None:
        """Make room for n_tok tokens more in every layer; appending them cannot fail for want of memory then."""
        lib.tq_cache_reserve(self._handle, seq, n_tok)

    def page_table(self, seq: int) -> np.ndarray:
        """The pages of a sequence, int32; valid until it is next reserved, appended to, trimmed or freed."""
        n = ctypes.c_int32()
        lib.tq_cache_page_table(self._handle, seq, None, 0, ctypes.byref(n))
        table = np.empty(n.value, np.int32)
        lib.tq_cache_page_table(self._handle, seq, address(table), n.value, None)
        return table

    def set_stream(self, stream: int) -> None:
        """The CUDA stream, a cudaStream_t, on which the calls of a cache on such a device work from now on."""
        lib.tq_cache_set_stream(self._handle, stream or None)

    # ---- bytes and files ----

    def stats(self) -> Stats:
        """How the pool stands. allocated_bytes is everything that the cache holds from the allocator now."""
        raw = CacheStats()
        lib.tq_cache_get_stats(self._handle, ctypes.byref(raw))
        return Stats(**_fields(raw))

    def save(self, path: str | os.PathLike, seqs: Any = None) -> None:
        """Write sequences (by default all, and published prefixes) to a file; the path holds the old file or the new one."""
        ids = None if seqs is None else integers(seqs, np.int32, "seqs")
        lib.tq_cache_save(self._handle, os.fsencode(path), address(ids), 0 if ids is None else len(ids))

    def load(self, path: str | os.PathLike) -> list[int]:
        """Add a file's sequences to this cache, of the same shape and formats; their ids, in the order of saving."""
        room = describe_snapshot(path).n_sequences
        seqs, n = np.empty(max(room, 1), np.int32), ctypes.c_int32()
        lib.tq_cache_load(self._handle, os.fsencode(path), address(seqs), room, ctypes.byref(n))
        return seqs[: n.value].tolist()

    def _page_bytes(self, x: Any, n: int | None, is_written: bool) -> np.ndarray | None:
        """Pages as seq_export and seq_import take them; n: how many, None for any number."""
        if x is None:
            return None
        pages, page_bytes = raw_bytes(x, "pages", is_written), self.stats().page_bytes
        if pages.dtype != np.uint8 or pages.ndim != 2 or pages.shape[1] != page_bytes or n not in (None, len(pages)):
            raise ArgumentError(f"pages: has type {pages.dtype} and shape {list(pages.shape)}; give uint8 "
                                f"[{'any' if n is None else n}, {page_bytes}]")
        return pages

    def seq_export(self, seq: int, first_page: int = 0, pages: np.ndarray | None = None, exact: np.ndarray | None = None
                   ) -> None:
        """
        A snapshot's bytes of a sequence into arrays: uint8 pages [n, page_bytes] from first_page on, and its exact data, an
        array of exact_bytes bytes of whatever type. Both must be contiguous.
        """
        pages = self._page_bytes(pages, None, True)
        exact = None if exact is None else raw_bytes(exact, "exact", True)
        lib.tq_cache_seq_export(self._handle, seq, first_page, 0 if pages is None else len(pages), address(pages),
                                address(exact), 0 if exact is None else exact.nbytes)

    def seq_import(self, seq: int, n_tok: int, first_page: int, pages: np.ndarray | None, exact: np.ndarray | None) -> None:
        """Make a sequence one of n_tok tokens: of its first first_page pages, those given, and these exact data."""
        n_tok, first_page = integer(n_tok, ctypes.c_int64, "n_tok"), integer(first_page, ctypes.c_int64, "first_page")
        n_pages = -(-n_tok // self.page_size) - first_page
        if pages is None and n_pages > 0:
            raise ArgumentError(f"pages: give {n_pages}, for {n_tok} tokens behind page {first_page}")
        pages = self._page_bytes(pages, max(n_pages, 0), False)
        exact = None if exact is None else raw_bytes(exact, "exact", False)
        lib.tq_cache_seq_import(self._handle, seq, n_tok, first_page, address(pages), address(exact),
                                0 if exact is None else exact.nbytes)


class Batch:
    """
    n_rows sequences of a cache that go through a model together, in forward passes: begin, attend in each layer, end. On a CUDA
    device steps of decoding can be captured in a graph (turboquant.h, tq_batch). For one thread at a time.
    """

    def __init__(self, cache: Cache, n_rows: int) -> None:
        self.cache, self.n_rows = cache, n_rows
        self._handle = ctypes.c_void_p()
        self._cache_handle = cache._handle
        with cache._here():
            lib.tq_batch_create(ctypes.byref(self._handle), cache._handle, n_rows)
        self._n_score = 0

    def __del__(self, free: Any = lib.tq_batch_free) -> None:
        # When a cycle of references is collected, the cache may have been first.
        if getattr(self, "_handle", None) and self._cache_handle.value is not None:
            free(self._handle)

    @property
    def is_captured(self) -> bool:
        """Is the pass that is open, or what would begin now, captured in a CUDA graph?"""
        with self.cache._here():
            return lib.tq_batch_is_captured(self._handle)

    def _rows(self, seqs: Sequence[int], n_tok: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = integers(seqs, np.int32, "seqs"), integers(n_tok, np.int64, "n_tok")
        if len(ids) != self.n_rows or len(counts) != self.n_rows:
            raise ArgumentError(f"seqs and n_tok: have {len(ids)} and {len(counts)} numbers; give {self.n_rows}")
        return ids, counts

    def begin(self, seqs: Sequence[int], n_tok: Sequence[int], n_head: int) -> None:
        """A pass brings n_tok[i] tokens of sequence seqs[i]: room is made for them."""
        ids, counts = self._rows(seqs, n_tok)
        with self.cache._here():
            lib.tq_batch_begin(self._handle, address(ids), address(counts), n_head)
        longest = max(map(self.cache.length, ids.tolist()))
        self._n_score = int(counts.sum()) * n_head * (longest + int(counts.max()))

    def attend(self, layer: int, rows: BatchRows) -> None:
        """Append a layer's tokens and attend with their queries, on addresses, which nobody checks."""
        with self.cache._here(), self.cache._executor_of(self._n_score) as executor:
            lib.tq_batch_attend(self._handle, layer, ctypes.byref(rows), executor)

    def end(self) -> None:
        """The pass is over."""
        lib.tq_batch_end(self._handle)

    def replayed(self, seqs: Sequence[int], n_tok: Sequence[int]) -> None:
        """A graph of a captured pass was launched."""
        ids, counts = self._rows(seqs, n_tok)
        lib.tq_batch_replayed(self._handle, address(ids), address(counts))


def describe_snapshot(path: str | os.PathLike, verify: bool = False) -> Snapshot:
    """What a snapshot file says of itself; verify checks every hash. Raises SnapshotError."""
    raw = SnapshotInfo()
    name = os.fsencode(path)
    lib.tq_snapshot_describe(ctypes.byref(raw), name, verify, None, 0)
    formats = (ctypes.c_int * (2 * raw.n_layer))()
    lib.tq_snapshot_describe(ctypes.byref(raw), name, False, formats, len(formats))
    return Snapshot(**_fields(raw), k_formats=formats[0::2], v_formats=formats[1::2])
