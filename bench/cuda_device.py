# SPDX-License-Identifier: MIT
"""The CUDA functions of turboquant.h for benchmarks, on torch's memory and streams."""
import ctypes
import os
import sys
from ctypes import c_size_t, c_void_p
from pathlib import Path

import torch

TQ_DEVICE_CUDA = 1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Library:
    """
    libturboquant.so by the package's prototypes: a failed call raises with the text of its log. One path in a process. The
    package is this tree's, or that of the folder in TQ_PYTHON_SOURCE, for a library of another version.
    """

    def __init__(self, path):
        os.environ["TURBOQUANT_LIBRARY"] = os.path.abspath(path)
        sys.path.insert(0, os.environ.get("TQ_PYTHON_SOURCE", str(Path(__file__).resolve().parent.parent / "python")))
        from libturboquant import _library, formats
        self.types, self.loaded, self._formats = _library, _library.lib, formats

    def format_number(self, name):
        try:
            return self._formats.format_number(name)
        except Exception:  # before 2026-11-30 scalar formats were called tq8, tq4, tq3 and tq2
            return self._formats.format_number(name.replace("sq", "tq"))

    def paged(self, name):
        """tq_paged_*, which is tq_cuda_* in older libraries."""
        try:
            return getattr(self.loaded, f"tq_paged_{name}")
        except AttributeError:
            return getattr(self.loaded, f"tq_cuda_{name}")

    def filled(self, kind, name):
        """A struct of parameters; those of older libraries are not all zeros by default."""
        value = kind()
        try:
            default = self.paged(f"{name}_default")
        except AttributeError:
            return value
        default(ctypes.byref(value))
        return value

    def describe(self):
        info = self.types.CudaInfo()
        self.loaded.tq_cuda_describe(ctypes.byref(info))
        return info


def stream():
    return c_void_p(torch.cuda.current_stream().cuda_stream)


class Cache:
    """A pool of pages, filled with encoded random vectors, every page once; with references and factors they are zeros."""

    def __init__(self, library, k_format, v_format, head_dim, n_head_kv, page_size, n_pages, n_sink=0, n_recent=0, n_seq=0,
                 references=False, factors=False):
        self.api = library
        self.store = store = library.filled(library.types.CudaStore, "store")
        store.device = TQ_DEVICE_CUDA  # older libraries have no others
        store.k_format, store.v_format = map(library.format_number, (k_format, v_format))
        store.head_dim, store.n_head_kv, store.page_size, store.n_pages = head_dim, n_head_kv, page_size, n_pages
        store.n_sink, store.n_recent, store.n_exact_slots = n_sink, n_recent, n_seq
        if references:
            store.k_ref_block = 64
        if factors:
            self.factors = torch.zeros(n_head_kv, head_dim, dtype=torch.int8, device="cuda")
            store.k_factors = self.factors.data_ptr()
        self.sizes = library.types.CudaSizes()
        library.paged("sizes_get")(ctypes.byref(self.sizes), ctypes.byref(store))
        self.pages = torch.zeros(n_pages * self.sizes.page_bytes, dtype=torch.uint8, device="cuda")
        self.exact = torch.zeros(max(2, n_seq * self.sizes.exact_bytes), dtype=torch.uint8, device="cuda")
        store.pages, store.exact = self.pages.data_ptr(), self.exact.data_ptr()

    def append(self, k, v, slots):
        """k, v [n_tok, n_head_kv, head_dim], slots int64 [n_tok]; without sinks and ring."""
        params = self.api.filled(self.api.types.CudaAppendParams, "append_params")
        params.n_tok, params.dtype = k.shape[0], DTYPES[k.dtype]
        params.k, params.v, params.slot_mapping = k.data_ptr(), v.data_ptr(), slots.data_ptr()
        plain = type(self.store).from_buffer_copy(self.store)
        plain.n_sink = plain.n_recent = 0
        self.api.paged("append")(ctypes.byref(plain), ctypes.byref(params), stream())

    def fill(self):
        store, chunk = self.store, 16384
        if getattr(store, "k_ref_block", 0):
            return
        n_tok = store.n_pages * store.page_size
        for first in range(0, n_tok, chunk):
            n = min(chunk, n_tok - first)
            k, v = (torch.randn(n, store.n_head_kv, store.head_dim, dtype=torch.float16, device="cuda") for _ in range(2))
            self.append(k, v, torch.arange(first, first + n, device="cuda"))
        self.exact.view(torch.float16).normal_()
        torch.cuda.synchronize()

    def attend_params(self, q, out, page_table, seq_lens, max_seq_len, n_query=1, deterministic=False):
        """Parameters with a workspace of their own; the tensors must outlive them."""
        params = self.api.filled(self.api.types.CudaAttendParams, "attend_params")
        params.n_seq, params.n_query, params.n_head = page_table.shape[0], n_query, q.shape[-2]
        params.dtype, params.q, params.out = DTYPES[q.dtype], q.data_ptr(), out.data_ptr()
        params.page_table, params.page_table_stride = page_table.data_ptr(), page_table.stride(0)
        params.seq_lens, params.max_seq_len = seq_lens.data_ptr(), max_seq_len
        params.softmax_scale = self.store.head_dim ** -0.5
        params.deterministic = deterministic
        n_bytes = c_size_t()
        self.api.paged("workspace_bytes")(ctypes.byref(n_bytes), ctypes.byref(self.store), ctypes.byref(params))
        params.tensors = (q, out, page_table, seq_lens, torch.zeros(n_bytes.value, dtype=torch.uint8, device="cuda"))
        params.workspace, params.workspace_bytes = params.tensors[-1].data_ptr(), n_bytes.value
        return params

    def attend(self, params):
        self.api.paged("attend")(ctypes.byref(self.store), ctypes.byref(params), stream())
