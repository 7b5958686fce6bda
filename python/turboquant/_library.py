# SPDX-License-Identifier: MIT
"""turboquant.h by ctypes: structs, prototypes, and failed calls as exceptions. test_header.py compares it with the header.

The library is libturboquant.so of the wheel, or what TURBOQUANT_LIBRARY names.
"""
from __future__ import annotations

import ctypes
import logging
import os
import threading
from ctypes import POINTER, c_bool, c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

from .errors import of_status

log = logging.getLogger("turboquant")

ERROR, WARNING = 0, 1
LOG_FN = ctypes.CFUNCTYPE(None, c_void_p, ctypes.c_int, c_char_p)


class FormatInfo(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p), ("description", c_char_p), ("bits", c_int32), ("head_dim", c_int32),
        ("bytes_per_vector", c_size_t), ("bits_per_value", c_double), ("ratio_to_f16", c_double),
        ("codebook", POINTER(c_float)), ("n_codebook", c_int32), ("lloyd_max", c_double),
    ]


class Preset(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p), ("description", c_char_p), ("k_format", ctypes.c_int), ("v_format", ctypes.c_int),
        ("n_sink", c_int32), ("n_recent", c_int32), ("k_ref_block", c_int32), ("k_balance", c_bool),
    ]


class Executor(ctypes.Structure):
    _fields_ = [("n_threads", c_int32), ("user", c_void_p), ("run", c_void_p)]


class AttendParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("n_query", c_int64), ("n_head", c_int32), ("q", c_void_p), ("q_token_stride", c_int64),
        ("q_head_stride", c_int64), ("out", c_void_p), ("out_token_stride", c_int64), ("out_head_stride", c_int64),
        ("out_dim", c_int32), ("lse", c_void_p), ("softmax_scale", c_float), ("softcap", c_float), ("causal", c_bool),
        ("first_pos", c_int64), ("window", c_int64), ("mask", c_void_p), ("mask_is_f16", c_bool),
        ("mask_token_stride", c_int64), ("mask_head_stride", c_int64), ("alibi_slopes", c_void_p), ("sinks", c_void_p),
        ("key_stage", c_void_p), ("value_stage", c_void_p),
    ]


class AttendBatch(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("n_seq", c_int32), ("seqs", c_void_p), ("query_starts", c_void_p),
        ("seq_lens", c_void_p), ("params", AttendParams),
    ]


class CacheParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("n_layer", c_int32), ("n_head_kv", c_int32), ("head_dim", c_int32),
        ("head_dim_v", c_int32), ("k_format", ctypes.c_int), ("v_format", ctypes.c_int),
        ("layer_k_formats", POINTER(ctypes.c_int)), ("layer_v_formats", POINTER(ctypes.c_int)), ("page_size", c_int32),
        ("n_pages", c_int32), ("n_sink", c_int32), ("n_recent", c_int32), ("k_ref_block", c_int32),
        ("budget_bytes", c_size_t), ("offload_folder", c_char_p), ("offload_bytes", c_size_t),
        ("calibration", c_void_p), ("seed", c_uint64), ("dry_run", c_bool),
    ]


class CacheStats(ctypes.Structure):
    _fields_ = [
        ("n_sequences", c_int32), ("n_pages_used", c_int64), ("n_pages_kept", c_int64), ("n_pages_free", c_int64),
        ("n_pages_shared", c_int64), ("n_pages_offloaded", c_int64), ("n_offloads", c_int64), ("n_restores", c_int64),
        ("page_bytes", c_size_t), ("exact_bytes", c_size_t), ("table_bytes", c_size_t), ("allocated_bytes", c_size_t),
        ("n_asked_tok", c_int64), ("n_matched_tok", c_int64), ("n_evicted_pages", c_int64), ("n_copied_pages", c_int64),
        ("encode_seconds", c_double), ("attend_seconds", c_double),
    ]


class SnapshotInfo(ctypes.Structure):
    _fields_ = [
        ("version", c_int32), ("n_layer", c_int32), ("n_head_kv", c_int32), ("head_dim", c_int32), ("head_dim_v", c_int32),
        ("page_size", c_int32), ("n_sink", c_int32), ("n_recent", c_int32), ("k_ref_block", c_int32),
        ("n_sequences", c_int32), ("n_pages", c_int32), ("n_prefixes", c_int32), ("seed", c_uint64),
        ("file_bytes", c_uint64), ("page_bytes", c_uint64), ("exact_bytes", c_uint64),
    ]


class CudaInfo(ctypes.Structure):
    _fields_ = [
        ("name", c_char * 64), ("compute_major", c_int32), ("compute_minor", c_int32), ("n_multiprocessors", c_int32),
        ("driver_version", c_int32), ("runtime_version", c_int32), ("memory_bytes", c_size_t),
    ]


class CudaStore(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("k_format", ctypes.c_int), ("v_format", ctypes.c_int), ("head_dim", c_int32),
        ("n_head_kv", c_int32), ("page_size", c_int32), ("n_sink", c_int32), ("n_recent", c_int32), ("seed", c_uint64),
        ("n_pages", c_int64), ("n_exact_slots", c_int64), ("pages", c_void_p), ("exact", c_void_p),
    ]


class CudaSizes(ctypes.Structure):
    _fields_ = [("page_bytes", c_size_t), ("exact_bytes", c_size_t), ("canonical_bytes", c_size_t)]


class CudaAppendParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("n_tok", c_int64), ("dtype", ctypes.c_int), ("k", c_void_p), ("v", c_void_p),
        ("row_stride", c_int64), ("slot_mapping", c_void_p), ("seq_ids", c_void_p), ("positions", c_void_p),
        ("page_table", c_void_p), ("page_table_stride", c_int64), ("exact_slots", c_void_p), ("n_not_finite", c_void_p),
        ("k_mean", c_void_p), ("half", ctypes.c_int),
    ]


class CudaAttendParams(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("n_seq", c_int32), ("n_query", c_int32), ("n_head", c_int32), ("dtype", ctypes.c_int),
        ("q", c_void_p), ("out", c_void_p), ("q_token_stride", c_int64), ("q_head_stride", c_int64),
        ("out_token_stride", c_int64), ("out_head_stride", c_int64), ("lse", c_void_p), ("page_table", c_void_p),
        ("page_table_stride", c_int64), ("seq_lens", c_void_p), ("seq_lens_are_64", c_bool), ("max_seq_len", c_int64),
        ("exact_slots", c_void_p), ("softmax_scale", c_float), ("softcap", c_float), ("window", c_int64),
        ("sinks", c_void_p), ("deterministic", c_bool), ("follows_append", c_bool), ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


STRUCTS = {
    "tq_format_info": FormatInfo, "tq_preset": Preset, "tq_executor": Executor, "tq_attend_params": AttendParams,
    "tq_attend_batch": AttendBatch, "tq_cache_params": CacheParams, "tq_cache_stats": CacheStats,
    "tq_snapshot_info": SnapshotInfo, "tq_cuda_info": CudaInfo, "tq_cuda_store": CudaStore, "tq_cuda_sizes": CudaSizes,
    "tq_cuda_append_params": CudaAppendParams, "tq_cuda_attend_params": CudaAttendParams,
}

# Arrays go as addresses: whoever calls keeps the array alive and has checked its type and shape.
_FALLIBLE = {
    "tq_pool_create": [POINTER(c_void_p), c_int32],
    "tq_format_describe": [POINTER(FormatInfo), ctypes.c_int, c_int32],
    "tq_format_from_name": [POINTER(ctypes.c_int), c_char_p],
    "tq_codec_create": [POINTER(c_void_p), ctypes.c_int, c_int32, c_uint64],
    "tq_codec_encode": [c_void_p, c_void_p, c_int64, c_void_p],
    "tq_codec_decode": [c_void_p, c_void_p, c_int64, c_void_p],
    "tq_preset_bits_per_value": [POINTER(c_double), POINTER(Preset), c_int32, c_int32, c_int64],
    "tq_calibration_load": [POINTER(c_void_p), c_char_p],
    "tq_calibration_take_layer": [POINTER(c_void_p), c_void_p, c_int32],
    "tq_cache_create": [POINTER(c_void_p), POINTER(CacheParams)],
    "tq_cache_seq_create": [c_void_p, POINTER(c_int32)],
    "tq_cache_seq_fork": [c_void_p, c_int32, POINTER(c_int32)],
    "tq_cache_seq_publish": [c_void_p, c_int32, c_void_p, c_int64],
    "tq_cache_seq_match": [c_void_p, c_void_p, c_int64, POINTER(c_int32), POINTER(c_int64)],
    "tq_cache_seq_free": [c_void_p, c_int32],
    "tq_cache_append": [c_void_p, c_int32, c_int32, c_int64, c_void_p, c_void_p, POINTER(Executor)],
    "tq_cache_attend": [c_void_p, c_int32, c_int32, POINTER(AttendParams), POINTER(Executor)],
    "tq_cache_prefill": [c_void_p, c_int32, c_int32, c_int64, c_void_p, c_void_p, POINTER(AttendParams), POINTER(Executor)],
    "tq_cache_reserve": [c_void_p, c_int32, c_int64],
    "tq_cache_page_table": [c_void_p, c_int32, c_void_p, c_int32, POINTER(c_int32)],
    "tq_cache_append_slots": [c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_void_p, POINTER(Executor)],
    "tq_cache_attend_batch": [c_void_p, c_int32, POINTER(AttendBatch), POINTER(Executor)],
    "tq_cache_trim": [c_void_p, c_int32, c_int64],
    "tq_cache_read": [c_void_p, c_int32, c_int32, c_int64, c_int64, c_void_p, c_void_p],
    "tq_cache_get_stats": [c_void_p, POINTER(CacheStats)],
    "tq_cache_save": [c_void_p, c_char_p, c_void_p, c_int32],
    "tq_cache_load": [c_void_p, c_char_p, c_void_p, c_int32, POINTER(c_int32)],
    "tq_cache_seq_export": [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_size_t],
    "tq_cache_seq_import": [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_size_t],
    "tq_snapshot_describe": [POINTER(SnapshotInfo), c_char_p, c_bool, POINTER(ctypes.c_int), c_int32],
    "tq_cuda_describe": [POINTER(CudaInfo)],
    "tq_cuda_sizes_get": [POINTER(CudaSizes), POINTER(CudaStore)],
    "tq_cuda_append": [POINTER(CudaStore), POINTER(CudaAppendParams), c_void_p],
    "tq_cuda_workspace_bytes": [POINTER(c_size_t), POINTER(CudaStore), POINTER(CudaAttendParams)],
    "tq_cuda_attend": [POINTER(CudaStore), POINTER(CudaAttendParams), c_void_p],
    "tq_cuda_pages_copy": [POINTER(CudaStore), c_void_p, c_void_p, c_int64, c_void_p],
    "tq_cuda_pages_export": [POINTER(CudaStore), c_void_p, c_int64, c_void_p, c_void_p],
    "tq_cuda_pages_import": [POINTER(CudaStore), c_void_p, c_int64, c_void_p, c_void_p],
}
_OTHER = {
    "tq_version_string": (c_char_p, []),
    "tq_status_string": (c_char_p, [ctypes.c_int]),
    "tq_log_set": (None, [LOG_FN, c_void_p]),
    "tq_head_dim_list": (POINTER(c_int32), [POINTER(c_int32)]),
    "tq_preset_count": (c_int32, []),
    "tq_preset_get": (POINTER(Preset), [c_int32]),
    "tq_calibration_free": (None, [c_void_p]),
    "tq_calibration_model": (c_char_p, [c_void_p]),
    "tq_calibration_bytes": (c_size_t, [c_void_p]),
    "tq_calibration_n_layer": (c_int32, [c_void_p]),
    "tq_attend_params_default": (None, [POINTER(AttendParams)]),
    "tq_attend_batch_default": (None, [POINTER(AttendBatch)]),
    "tq_cache_params_default": (None, [POINTER(CacheParams)]),
    "tq_cache_params_set_preset": (None, [POINTER(CacheParams), POINTER(Preset)]),
    "tq_cuda_store_default": (None, [POINTER(CudaStore)]),
    "tq_cuda_append_params_default": (None, [POINTER(CudaAppendParams)]),
    "tq_cuda_attend_params_default": (None, [POINTER(CudaAttendParams)]),
    "tq_cache_length": (c_int64, [c_void_p, c_int32, c_int32]),
    "tq_codec_free": (None, [c_void_p]),
    "tq_cache_free": (None, [c_void_p]),
    "tq_pool_free": (None, [c_void_p]),
    "tq_pool_executor": (Executor, [c_void_p]),
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


def _find() -> str:
    named = os.environ.get("TURBOQUANT_LIBRARY")
    if named:
        return named
    path = Path(__file__).resolve().parent / "libturboquant.so"
    if not path.exists():
        raise ImportError(f"{path} is not there. Install the package (pip install .), or set TURBOQUANT_LIBRARY to the "
                          "library's path.")
    return str(path)


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(_find())
    for name, arguments in _FALLIBLE.items():
        function = getattr(library, name)
        function.restype, function.argtypes, function.errcheck = ctypes.c_int, arguments, _check
    for name, (result, arguments) in _OTHER.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.tq_log_set(_callback, None)
    return library


lib = _load()
FUNCTIONS = [*_FALLIBLE, *_OTHER]
