# SPDX-License-Identifier: MIT
"""turboquant.h by ctypes: structs, prototypes, and failed calls as exceptions. test_header.py compares it with the header.

The library is libturboquant.so of the wheel, or what TURBOQUANT_LIBRARY names.
"""
from __future__ import annotations

import ctypes
import functools
import logging
import operator
import os
import threading
import types
from ctypes import POINTER, c_bool, c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from .errors import ArgumentError, RangeError, of_status

log = logging.getLogger("turboquant")

ERROR, WARNING = 0, 1
LOG_FN = ctypes.CFUNCTYPE(None, c_void_p, ctypes.c_int, c_char_p)


_INTEGERS = (ctypes.c_int, c_int32, c_int64, c_size_t, c_uint64)
# What is counted from 0, and does not exist beyond.
_PLACES = {"seq", "layer"}


@functools.cache
def _limits(kind: type) -> tuple[int, int]:
    bits = 8 * ctypes.sizeof(kind)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind(-1).value < 0 else (0, (1 << bits) - 1)


def integer(value: Any, kind: type, name: str) -> int:
    """value as an int that a C integer of this kind holds: ctypes would cut it. Raises ArgumentError; RangeError for places."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name}: is {value!r}; give an integer") from None
    low, high = _limits(kind)
    if not low <= number <= high:
        error = RangeError if name in _PLACES else ArgumentError
        raise error(f"{name}: is {number}; give an integer from {max(low, 0) if name in _PLACES else low} to {high}")
    return number


def _checked(value: Any, kind: type, name: str) -> Any:
    """What ctypes takes for this kind of argument or member, if it holds all of the value."""
    if issubclass(kind, _INTEGERS):
        return integer(value, kind, name)
    if issubclass(kind, c_char_p) and isinstance(value, bytes) and b"\0" in value:
        raise ArgumentError(f"{name}: {os.fsdecode(value)!r} has a NUL character in it, where the library would stop reading; "
                            "leave it out")
    return value


def _named(name: str, kind: type) -> type:
    """A kind of argument with the name that messages call it by."""
    return type(name, (kind,), {})


class _Struct(ctypes.Structure):
    """A struct whose members refuse what they cannot hold, and which knows its size where the library asks for it."""

    _fields_: list[tuple[str, type]] = []

    def __init__(self, *values: Any, **members: Any) -> None:
        super().__init__(*values, **members)
        if "struct_size" in self._kinds:
            self.struct_size = ctypes.sizeof(self)

    def __init_subclass__(cls) -> None:
        cls._kinds = {name: kind for name, kind in cls._fields_ if issubclass(kind, (*_INTEGERS, c_char_p))}

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self._kinds.get(name)
        super().__setattr__(name, value if kind is None else _checked(value, kind, name))


class FormatInfo(_Struct):
    _fields_ = [
        ("name", c_char_p), ("description", c_char_p), ("bits", c_int32), ("head_dim", c_int32),
        ("bytes_per_vector", c_size_t), ("bits_per_value", c_double), ("ratio_to_f16", c_double),
        ("codebook", POINTER(c_float)), ("n_codebook", c_int32), ("lloyd_max", c_double),
    ]


class Preset(_Struct):
    _fields_ = [
        ("name", c_char_p), ("description", c_char_p), ("k_format", ctypes.c_int), ("v_format", ctypes.c_int),
        ("n_sink", c_int32), ("n_recent", c_int32), ("k_ref_block", c_int32),
    ]


class KeyFactorsParams(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("n_head", c_int32), ("n_head_kv", c_int32), ("head_dim", c_int32),
        ("k_square", c_void_p), ("k_mean", c_void_p), ("q_square", c_void_p), ("partners", c_void_p), ("angles", c_void_p),
        ("ref_block", c_int32),
    ]


class Executor(_Struct):
    _fields_ = [("n_threads", c_int32), ("user", c_void_p), ("run", c_void_p)]


class OpenMP(_Struct):
    _fields_ = [("n_threads", c_int32), ("parallel", c_void_p), ("thread_num", c_void_p), ("num_threads", c_void_p)]


class AttendParams(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("n_query", c_int64), ("n_head", c_int32), ("q", c_void_p), ("q_token_stride", c_int64),
        ("q_head_stride", c_int64), ("out", c_void_p), ("out_token_stride", c_int64), ("out_head_stride", c_int64),
        ("out_dim", c_int32), ("lse", c_void_p), ("softmax_scale", c_float), ("softcap", c_float), ("causal", c_bool),
        ("first_pos", c_int64), ("window", c_int64), ("mask", c_void_p), ("mask_is_f16", c_bool),
        ("mask_token_stride", c_int64), ("mask_head_stride", c_int64), ("alibi_slopes", c_void_p), ("sinks", c_void_p),
    ]


class CacheParams(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("n_layer", c_int32), ("n_head_kv", c_int32), ("head_dim", c_int32),
        ("head_dim_v", c_int32), ("k_format", ctypes.c_int), ("v_format", ctypes.c_int),
        ("layer_k_formats", POINTER(ctypes.c_int)), ("layer_v_formats", POINTER(ctypes.c_int)), ("page_size", c_int32),
        ("n_pages", c_int32), ("n_sink", c_int32), ("n_recent", c_int32), ("n_take_back", c_int32), ("k_ref_block", c_int32),
        ("checkpoint_stride", c_int32), ("budget_bytes", c_size_t), ("offload_folder", c_char_p), ("offload_bytes", c_size_t),
        ("calibration", c_void_p), ("seed", c_uint64), ("dry_run", c_bool), ("device", ctypes.c_int),
        ("allocator", c_void_p), ("values_in_keys", c_bool),
    ]


ALLOC_FN = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_size_t)
FREE_FN = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)


class Allocator(_Struct):
    _fields_ = [("user", c_void_p), ("alloc", ALLOC_FN), ("free", FREE_FN)]


class BatchRows(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("dtype", ctypes.c_int), ("q", c_void_p), ("k", c_void_p), ("v", c_void_p),
        ("out", c_void_p), ("q_token_stride", c_int64), ("q_head_stride", c_int64), ("k_token_stride", c_int64),
        ("v_token_stride", c_int64), ("out_token_stride", c_int64), ("out_head_stride", c_int64),
        ("softmax_scale", c_float), ("softcap", c_float), ("window", c_int64), ("sinks", c_void_p),
        ("mask", c_void_p), ("mask_is_f16", c_bool), ("mask_token_stride", c_int64), ("mask_head_stride", c_int64),
        ("alibi_slopes", c_void_p), ("lse", c_void_p), ("out_dim", c_int32), ("is_shared", c_bool), ("n_query", c_void_p),
    ]


class CacheStats(_Struct):
    _fields_ = [
        ("n_sequences", c_int32), ("n_pages_used", c_int64), ("n_pages_kept", c_int64), ("n_pages_free", c_int64),
        ("n_pages_shared", c_int64), ("n_pages_offloaded", c_int64), ("n_offloads", c_int64), ("n_restores", c_int64),
        ("page_bytes", c_size_t), ("exact_bytes", c_size_t), ("checkpoint_bytes", c_size_t), ("table_bytes", c_size_t),
        ("allocated_bytes", c_size_t), ("n_asked_tok", c_int64), ("n_matched_tok", c_int64), ("n_evicted_pages", c_int64),
        ("n_copied_pages", c_int64), ("encode_seconds", c_double), ("attend_seconds", c_double),
    ]


class CalibrationInfo(_Struct):
    _fields_ = [("model", ctypes.c_char * 64), ("n_layer", c_int32), ("bytes", c_size_t)]


class SnapshotInfo(_Struct):
    _fields_ = [
        ("version", c_int32), ("n_layer", c_int32), ("n_head_kv", c_int32), ("head_dim", c_int32), ("head_dim_v", c_int32),
        ("page_size", c_int32), ("n_sink", c_int32), ("n_recent", c_int32), ("n_take_back", c_int32), ("k_ref_block", c_int32),
        ("n_sequences", c_int32), ("n_pages", c_int32), ("n_prefixes", c_int32), ("seed", c_uint64),
        ("file_bytes", c_uint64), ("page_bytes", c_uint64), ("exact_bytes", c_uint64),
    ]


class CudaInfo(_Struct):
    _fields_ = [
        ("name", c_char * 64), ("compute_major", c_int32), ("compute_minor", c_int32), ("n_multiprocessors", c_int32),
        ("driver_version", c_int32), ("runtime_version", c_int32), ("memory_bytes", c_size_t),
    ]


class CudaStore(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("device", ctypes.c_int), ("k_format", ctypes.c_int), ("v_format", ctypes.c_int),
        ("head_dim", c_int32), ("n_head_kv", c_int32), ("head_dim_v", c_int32), ("page_size", c_int32), ("n_sink", c_int32),
        ("n_recent", c_int32), ("k_ref_block", c_int32), ("k_factors", c_void_p), ("k_transforms", c_void_p),
        ("seed", c_uint64), ("n_pages", c_int64), ("n_exact_slots", c_int64), ("pages", c_void_p), ("exact", c_void_p),
        ("n_ring", c_int32), ("page_stride_bytes", c_size_t), ("exact_stride_bytes", c_size_t),
    ]


class CudaSizes(_Struct):
    _fields_ = [("page_bytes", c_size_t), ("exact_bytes", c_size_t), ("canonical_bytes", c_size_t)]


class CudaAppendParams(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("n_tok", c_int64), ("dtype", ctypes.c_int), ("k", c_void_p), ("v", c_void_p),
        ("row_stride", c_int64), ("slot_mapping", c_void_p), ("seq_ids", c_void_p), ("positions", c_void_p),
        ("page_table", c_void_p), ("page_table_stride", c_int64), ("exact_slots", c_void_p), ("n_not_finite", c_void_p),
        ("half", ctypes.c_int), ("v_row_stride", c_int64), ("executor", POINTER(Executor)),
        ("keep_references", c_bool), ("encode_from", c_int64),
    ]


class PagedExact(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("n_sink", c_int32), ("n_recent", c_int32), ("pages", c_void_p), ("n_pages", c_int64),
        ("page_size", c_int32), ("page_stride_bytes", c_size_t), ("page_table", c_void_p), ("page_table_stride", c_int64),
        ("sink_offset_bytes", c_size_t),
    ]


class CudaAttendParams(_Struct):
    _fields_ = [
        ("struct_size", c_size_t), ("n_seq", c_int32), ("n_query", c_int32), ("n_head", c_int32), ("dtype", ctypes.c_int),
        ("q", c_void_p), ("out", c_void_p), ("q_token_stride", c_int64), ("q_head_stride", c_int64),
        ("out_token_stride", c_int64), ("out_head_stride", c_int64), ("lse", c_void_p), ("page_table", c_void_p),
        ("page_table_stride", c_int64), ("seq_lens", c_void_p), ("seq_lens_are_64", c_bool), ("max_seq_len", c_int64),
        ("exact_slots", c_void_p), ("softmax_scale", c_float), ("softcap", c_float), ("window", c_int64),
        ("sinks", c_void_p), ("deterministic", c_bool), ("follows_append", c_bool), ("workspace", c_void_p),
        ("workspace_bytes", c_size_t), ("query_starts", c_void_p), ("new_k", c_void_p), ("new_v", c_void_p),
        ("new_row_stride", c_int64), ("mask", c_void_p), ("mask_is_f16", c_bool), ("mask_token_stride", c_int64),
        ("mask_head_stride", c_int64), ("alibi_slopes", c_void_p), ("out_dim", c_int32), ("new_v_row_stride", c_int64),
        ("executor", POINTER(Executor)), ("exact_pages", POINTER(PagedExact)),
    ]


STRUCTS = {
    "tq_format_info": FormatInfo, "tq_preset": Preset, "tq_executor": Executor, "tq_openmp": OpenMP,
    "tq_attend_params": AttendParams, "tq_cache_params": CacheParams,
    "tq_allocator": Allocator, "tq_batch_rows": BatchRows,
    "tq_cache_stats": CacheStats, "tq_calibration_info": CalibrationInfo, "tq_snapshot_info": SnapshotInfo,
    "tq_cuda_info": CudaInfo, "tq_paged_store": CudaStore, "tq_paged_sizes": CudaSizes,
    "tq_paged_append_params": CudaAppendParams, "tq_paged_exact": PagedExact,
    "tq_paged_attend_params": CudaAttendParams,
}

# Arguments that are checked before ctypes takes them.
_N_THREADS, _HEAD_DIM, _N_HEAD, _N_HEAD_KV, _LAYER, _SEQ, _ROOM, _N_ROWS, _N_SEQ, _INDEX = (_named(name, c_int32) for name in (
    "n_threads", "head_dim", "n_head", "n_head_kv", "layer", "seq", "room", "n_rows", "n_seq", "index"))
_N, _N_TOK, _FIRST, _FIRST_PAGE, _N_PAGES = (_named(name, c_int64) for name in (
    "n", "n_tok", "first", "first_page", "n_pages"))
_FORMAT, _SEED, _EXACT_BYTES = _named("format", ctypes.c_int), _named("seed", c_uint64), _named("exact_bytes", c_size_t)
_FORMAT_NAME, _PATH = _named("format_name", c_char_p), _named("path", c_char_p)

# Arrays go as addresses: whoever calls keeps the array alive and has checked its type and shape.
_FALLIBLE = {
    "tq_pool_create": [POINTER(c_void_p), _N_THREADS],
    "tq_format_describe": [POINTER(FormatInfo), _FORMAT, _HEAD_DIM],
    "tq_format_from_name": [POINTER(ctypes.c_int), _FORMAT_NAME],
    "tq_codec_create": [POINTER(c_void_p), _FORMAT, _HEAD_DIM, _SEED],
    "tq_codec_encode": [c_void_p, c_void_p, _N, c_void_p],
    "tq_codec_decode": [c_void_p, c_void_p, _N, c_void_p],
    "tq_preset_bits_per_value": [POINTER(c_double), POINTER(Preset), _HEAD_DIM, _N_HEAD_KV, _N_TOK],
    "tq_key_factors": [c_void_p, POINTER(c_float), POINTER(KeyFactorsParams)],
    "tq_calibration_load": [POINTER(c_void_p), _PATH],
    "tq_calibration_describe": [POINTER(CalibrationInfo), c_void_p],
    "tq_calibration_take_layer": [POINTER(c_void_p), c_void_p, _LAYER],
    "tq_cache_create": [POINTER(c_void_p), POINTER(CacheParams)],
    "tq_cache_set_key_factors": [c_void_p, c_int32, c_void_p],
    "tq_cache_get_key_factors": [c_void_p, c_int32, c_void_p],
    "tq_cache_seq_create": [c_void_p, POINTER(c_int32)],
    "tq_cache_seq_fork": [c_void_p, _SEQ, POINTER(c_int32)],
    "tq_cache_seq_publish": [c_void_p, _SEQ, c_void_p, _N_TOK],
    "tq_cache_seq_match": [c_void_p, c_void_p, _N_TOK, POINTER(c_int32), POINTER(c_int64)],
    "tq_cache_seq_free": [c_void_p, _SEQ],
    "tq_cache_append": [c_void_p, _SEQ, _LAYER, _N_TOK, c_void_p, c_void_p, POINTER(Executor)],
    "tq_cache_attend": [c_void_p, _SEQ, _LAYER, POINTER(AttendParams), POINTER(Executor)],
    "tq_cache_prefill": [c_void_p, _SEQ, _LAYER, _N_TOK, c_void_p, c_void_p, POINTER(AttendParams), POINTER(Executor)],
    "tq_cache_reserve": [c_void_p, _SEQ, _N_TOK],
    "tq_cache_page_table": [c_void_p, _SEQ, c_void_p, _ROOM, POINTER(c_int32)],
    "tq_cache_trim": [c_void_p, _SEQ, _N_TOK],
    "tq_cache_read": [c_void_p, _SEQ, _LAYER, _FIRST, _N, c_void_p, c_void_p],
    "tq_cache_get_stats": [c_void_p, POINTER(CacheStats)],
    "tq_cache_save": [c_void_p, _PATH, c_void_p, _N_SEQ],
    "tq_cache_load": [c_void_p, _PATH, c_void_p, _ROOM, POINTER(c_int32)],
    "tq_cache_seq_export": [c_void_p, _SEQ, _FIRST_PAGE, _N_PAGES, c_void_p, c_void_p, _EXACT_BYTES],
    "tq_cache_seq_import": [c_void_p, _SEQ, _N_TOK, _FIRST_PAGE, c_void_p, c_void_p, _EXACT_BYTES],
    "tq_cache_set_stream": [c_void_p, c_void_p],
    "tq_batch_create": [POINTER(c_void_p), c_void_p, _N_ROWS],
    "tq_batch_begin": [c_void_p, c_void_p, c_void_p, _N_HEAD],
    "tq_batch_attend": [c_void_p, _LAYER, POINTER(BatchRows), POINTER(Executor)],
    "tq_batch_end": [c_void_p],
    "tq_batch_replayed": [c_void_p, c_void_p, c_void_p],
    "tq_snapshot_describe": [POINTER(SnapshotInfo), _PATH, c_bool, POINTER(ctypes.c_int), _ROOM],
    "tq_cuda_describe": [POINTER(CudaInfo)],
    "tq_paged_sizes_get": [POINTER(CudaSizes), POINTER(CudaStore)],
    "tq_paged_append": [POINTER(CudaStore), POINTER(CudaAppendParams), c_void_p],
    "tq_paged_workspace_bytes": [POINTER(c_size_t), POINTER(CudaStore), POINTER(CudaAttendParams)],
    "tq_paged_attend": [POINTER(CudaStore), POINTER(CudaAttendParams), c_void_p],
    "tq_paged_copy": [POINTER(CudaStore), c_void_p, c_void_p, _N, c_void_p],
    "tq_paged_export": [POINTER(CudaStore), c_void_p, _N, c_void_p, c_void_p],
    "tq_paged_import": [POINTER(CudaStore), c_void_p, _N, c_void_p, c_void_p],
}
_OTHER = {
    "tq_version_string": (c_char_p, []),
    "tq_status_string": (c_char_p, [ctypes.c_int]),
    "tq_log_set": (None, [LOG_FN, c_void_p]),
    "tq_head_dim_list": (POINTER(c_int32), [POINTER(c_int32)]),
    "tq_preset_get": (POINTER(Preset), [_INDEX]),
    "tq_preset_find": (POINTER(Preset), [c_char_p]),
    "tq_key_guard": (ctypes.c_int, [_FORMAT, c_float]),
    "tq_calibration_free": (None, [c_void_p]),
    "tq_cache_params_set_preset": (None, [POINTER(CacheParams), POINTER(Preset)]),
    "tq_cache_length": (c_int64, [c_void_p, _SEQ, _LAYER]),
    "tq_batch_free": (None, [c_void_p]),
    "tq_batch_is_captured": (c_bool, [c_void_p]),
    "tq_codec_free": (None, [c_void_p]),
    "tq_cache_free": (None, [c_void_p]),
    "tq_pool_free": (None, [c_void_p]),
    "tq_pool_executor": (Executor, [c_void_p]),
    "tq_openmp_executor": (Executor, [POINTER(OpenMP)]),
    "tq_cpu_name": (c_char_p, []),
}

_said = threading.local()


def _hear(_user: int | None, level: int, message: bytes) -> None:
    """Errors, from the cause outwards, wait for the exception of the call that fails; others go to the logger `turboquant`."""
    text = message.decode(errors="replace")
    if level == ERROR:
        before = getattr(_said, "error", None)
        _said.error = text if before is None else f"{before}; {text}"
    else:
        log.log(logging.WARNING if level == WARNING else logging.INFO, text)


_callback = LOG_FN(_hear)


def _check(status: int, function: ctypes._CFuncPtr, _arguments: tuple) -> int:
    said, _said.error = getattr(_said, "error", None), None
    if status:
        raise of_status(status, said or lib.tq_status_string(status).decode())
    return status


def find() -> str:
    """The library's path."""
    named = os.environ.get("TURBOQUANT_LIBRARY")
    if named:
        return named
    path = Path(__file__).resolve().parent / "libturboquant.so"
    if not path.exists():
        raise ImportError(f"{path} is not there. Install the package (pip install .), or set TURBOQUANT_LIBRARY to the "
                          "library's path.")
    return str(path)


def _guarded(function: ctypes._CFuncPtr) -> Any:
    """The function, behind checks of its named arguments."""
    kinds = [(i, kind) for i, kind in enumerate(function.argtypes) if issubclass(kind, (*_INTEGERS, c_char_p))]
    if not kinds:
        return function

    def call(*arguments: Any) -> Any:
        given = list(arguments)
        for i, kind in kinds:
            given[i] = _checked(given[i], kind, kind.__name__)
        return function(*given)

    call.argtypes = function.argtypes
    return call


def _open() -> ctypes.CDLL:
    """The library, which has all functions that are called here."""
    path = find()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(f"{error}. Set TURBOQUANT_LIBRARY to the path of a libturboquant.so for this machine") from error
    missing = next((name for name in FUNCTIONS if not hasattr(library, name)), None)
    if missing is not None:
        raise ImportError(f"{path} has no {missing}, so it is of another version: set TURBOQUANT_LIBRARY to this version's")
    return library


def _load() -> types.SimpleNamespace:
    library = _open()
    functions = types.SimpleNamespace()
    for name, arguments in _FALLIBLE.items():
        function = getattr(library, name)
        function.restype, function.argtypes, function.errcheck = ctypes.c_int, arguments, _check
        setattr(functions, name, _guarded(function))
    for name, (result, arguments) in _OTHER.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, _guarded(function))
    functions.tq_log_set(_callback, None)
    return functions


FUNCTIONS = [*_FALLIBLE, *_OTHER]
lib = _load()


def describe_cuda() -> CudaInfo:
    """The current CUDA device. Raises DeviceError where a device, its driver or libturboquant-cuda.so does not exist."""
    info = CudaInfo()
    lib.tq_cuda_describe(ctypes.byref(info))
    return info
