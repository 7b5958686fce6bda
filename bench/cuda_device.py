# SPDX-License-Identifier: MIT
"""The CUDA functions of turboquant.h for benchmarks, on torch's memory and streams. Structures mirror the header."""
import ctypes
from ctypes import POINTER, Structure, c_bool, c_char, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p

import torch

FORMATS = {"tq8": 2, "tq4": 3, "tq3": 4, "tq2": 5, "tt4": 9, "tt3": 10, "tt2": 11}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Info(Structure):
    _fields_ = [("name", c_char * 64), ("compute_major", c_int32), ("compute_minor", c_int32), ("n_multiprocessors", c_int32),
                ("driver_version", c_int32), ("runtime_version", c_int32), ("memory_bytes", c_size_t)]


class Store(Structure):
    _fields_ = [("struct_size", c_size_t), ("k_format", c_int32), ("v_format", c_int32), ("head_dim", c_int32),
                ("n_head_kv", c_int32), ("page_size", c_int32), ("n_sink", c_int32), ("n_recent", c_int32), ("seed", c_uint64),
                ("n_pages", c_int64), ("n_exact_slots", c_int64), ("pages", c_void_p), ("exact", c_void_p)]


class Sizes(Structure):
    _fields_ = [("page_bytes", c_size_t), ("exact_bytes", c_size_t), ("canonical_bytes", c_size_t)]


class AppendParams(Structure):
    _fields_ = [("struct_size", c_size_t), ("n_tok", c_int64), ("dtype", c_int32), ("k", c_void_p), ("v", c_void_p),
                ("row_stride", c_int64), ("slot_mapping", c_void_p), ("seq_ids", c_void_p), ("positions", c_void_p),
                ("page_table", c_void_p), ("page_table_stride", c_int64), ("exact_slots", c_void_p), ("n_not_finite", c_void_p)]


class AttendParams(Structure):
    _fields_ = [("struct_size", c_size_t), ("n_seq", c_int32), ("n_query", c_int32), ("n_head", c_int32), ("dtype", c_int32),
                ("q", c_void_p), ("out", c_void_p), ("q_token_stride", c_int64), ("q_head_stride", c_int64),
                ("out_token_stride", c_int64), ("out_head_stride", c_int64), ("lse", c_void_p), ("page_table", c_void_p),
                ("page_table_stride", c_int64), ("seq_lens", c_void_p), ("seq_lens_are_64", c_bool), ("max_seq_len", c_int64),
                ("exact_slots", c_void_p), ("softmax_scale", c_float), ("softcap", c_float), ("window", c_int64),
                ("sinks", c_void_p), ("deterministic", c_bool), ("workspace", c_void_p), ("workspace_bytes", c_size_t)]


LOG = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p)


class Library:
    """libturboquant.so; a failed call raises with the text from its log."""

    def __init__(self, path):
        self.loaded = ctypes.CDLL(path)
        self.last = ""
        self.callback = LOG(self.keep)
        self.loaded.tq_log_set(self.callback, None)

    def keep(self, user, level, message):
        self.last = message.decode()

    def call(self, name, *arguments):
        status = getattr(self.loaded, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} gave {status}: {self.last}")

    def filled(self, kind, default):
        value = kind()
        getattr(self.loaded, default)(ctypes.byref(value))
        assert value.struct_size == ctypes.sizeof(kind), f"{kind.__name__} does not mirror turboquant.h"
        return value

    def describe(self):
        info = Info()
        self.call("tq_cuda_describe", ctypes.byref(info))
        return info


def stream():
    return c_void_p(torch.cuda.current_stream().cuda_stream)


class Cache:
    """A pool of pages, filled with encoded random vectors, every page once."""

    def __init__(self, library, k_format, v_format, head_dim, n_head_kv, page_size, n_pages, n_sink=0, n_recent=0, n_seq=0):
        self.loaded = library
        self.store = store = library.filled(Store, "tq_cuda_store_default")
        store.k_format, store.v_format = FORMATS[k_format], FORMATS[v_format]
        store.head_dim, store.n_head_kv, store.page_size, store.n_pages = head_dim, n_head_kv, page_size, n_pages
        store.n_sink, store.n_recent, store.n_exact_slots = n_sink, n_recent, n_seq
        self.sizes = Sizes()
        library.call("tq_cuda_sizes_get", ctypes.byref(self.sizes), ctypes.byref(store))
        self.pages = torch.zeros(n_pages * self.sizes.page_bytes, dtype=torch.uint8, device="cuda")
        self.exact = torch.zeros(max(2, n_seq * self.sizes.exact_bytes), dtype=torch.uint8, device="cuda")
        store.pages, store.exact = self.pages.data_ptr(), self.exact.data_ptr()

    def append(self, k, v, slots):
        """k, v [n_tok, n_head_kv, head_dim], slots int64 [n_tok]; without sinks and ring."""
        params = self.loaded.filled(AppendParams, "tq_cuda_append_params_default")
        params.n_tok, params.dtype = k.shape[0], DTYPES[k.dtype]
        params.k, params.v, params.slot_mapping = k.data_ptr(), v.data_ptr(), slots.data_ptr()
        plain = Store.from_buffer_copy(self.store)
        plain.n_sink = plain.n_recent = 0
        self.loaded.call("tq_cuda_append", ctypes.byref(plain), ctypes.byref(params), stream())

    def fill(self):
        store, chunk = self.store, 16384
        n_tok = store.n_pages * store.page_size
        for first in range(0, n_tok, chunk):
            n = min(chunk, n_tok - first)
            k, v = (torch.randn(n, store.n_head_kv, store.head_dim, dtype=torch.float16, device="cuda") for _ in range(2))
            self.append(k, v, torch.arange(first, first + n, device="cuda"))
        self.exact.view(torch.float16).normal_()
        torch.cuda.synchronize()

    def attend_params(self, q, out, page_table, seq_lens, max_seq_len, n_query=1, deterministic=False):
        """Parameters with a workspace of their own; the tensors must outlive them."""
        params = self.loaded.filled(AttendParams, "tq_cuda_attend_params_default")
        params.n_seq, params.n_query, params.n_head = page_table.shape[0], n_query, q.shape[-2]
        params.dtype, params.q, params.out = DTYPES[q.dtype], q.data_ptr(), out.data_ptr()
        params.page_table, params.page_table_stride = page_table.data_ptr(), page_table.stride(0)
        params.seq_lens, params.max_seq_len = seq_lens.data_ptr(), max_seq_len
        params.softmax_scale = self.store.head_dim ** -0.5
        params.deterministic = deterministic
        n_bytes = c_size_t()
        self.loaded.call("tq_cuda_workspace_bytes", ctypes.byref(n_bytes), ctypes.byref(self.store), ctypes.byref(params))
        params.tensors = (q, out, page_table, seq_lens, torch.zeros(n_bytes.value, dtype=torch.uint8, device="cuda"))
        params.workspace, params.workspace_bytes = params.tensors[-1].data_ptr(), n_bytes.value
        return params

    def attend(self, params):
        self.loaded.call("tq_cuda_attend", ctypes.byref(self.store), ctypes.byref(params), stream())
