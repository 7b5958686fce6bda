# SPDX-License-Identifier: MIT
"""
Pages of one shape, in memory of PyTorch's that somebody else owns. A page holds what one block of vLLM's holds of one layer:
the library's encoded page, then room for n_sink exact tokens. Nothing in it depends on the sequence: it may be shared, copied,
dropped and filled again at any offset.
"""
from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import _library, _threads
from .._library import CudaAppendParams, CudaAttendParams, CudaSizes, CudaStore, PagedExact

PAGE_ALIGN = 64
PAGE_TOKENS_STEP, PAGE_TOKENS_MAX = 16, 256
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HALF_MAX = 65504.0

_threads.use_openmp_of(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))


@dataclass(frozen=True)
class Batch:
    """
    The sequences of one call. page_table: int32 [n_seq, any]; seq_lens: int32 or int64 [n_seq], tokens with those of the
    queries; query_starts: int32 [n_seq + 1]; n_query: the most queries of one sequence; max_len: no sequence is longer.
    """

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_starts: torch.Tensor
    n_query: int
    max_len: int


@dataclass(frozen=True)
class Window:
    """Exact pages: float16 [n_pages, n_head_kv, tokens of a page, head_dim + head_dim_v], and their table [n_seq, any]."""

    pages: torch.Tensor
    page_table: torch.Tensor


class PageFormat:
    """Formats and shape of one layer. Immutable."""

    def __init__(self, k_format: int, v_format: int, n_head_kv: int, head_dim: int, head_dim_v: int, n_sink: int,
                 n_recent: int) -> None:
        self.k_format, self.v_format = k_format, v_format
        self.n_head_kv, self.head_dim, self.head_dim_v = n_head_kv, head_dim, head_dim_v
        self.n_sink, self.n_recent = n_sink, n_recent

    def _store(self, n_tokens: int) -> CudaStore:
        return CudaStore(k_format=self.k_format, v_format=self.v_format, head_dim=self.head_dim,
                         head_dim_v=self.head_dim_v, n_head_kv=self.n_head_kv, page_size=n_tokens)

    def _sink_offset(self, n_tokens: int) -> int:
        sizes = CudaSizes()
        _library.lib.tq_paged_sizes_get(sizes, self._store(n_tokens))
        return sizes.page_bytes

    @property
    def exact_token_bytes(self) -> int:
        """Of a token of all KV heads in a window or as a sink."""
        return self.n_head_kv * (self.head_dim + self.head_dim_v) * 2

    def page_bytes(self, n_tokens: int) -> int:
        """Of a page of so many tokens, a multiple of them. Raises for a shape that the library does not have."""
        align = math.lcm(PAGE_ALIGN, n_tokens)
        used = self._sink_offset(n_tokens) + self.n_sink * self.exact_token_bytes
        return -(-used // align) * align

    def window_tokens(self, n_tokens: int) -> int:
        """
        Tokens of an exact page next to pages of n_tokens: the most that fit into the memory of one, and divide n_tokens, so
        that blocks of both end at the same tokens.
        """
        room = self.page_bytes(n_tokens) // self.exact_token_bytes
        return max((n for n in range(1, n_tokens + 1) if n_tokens % n == 0 and n <= room), default=1)

    def append(self, pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
               factors: np.ndarray | None) -> None:
        """
        Encode tokens. pages: uint8 [n_pages, tokens, bytes of a token]; slots: int64 [n], page * tokens + offset, negative:
        nowhere; keys [n, n_head_kv, head_dim] and values likewise.
        """
        store = self._open(pages, factors)
        keys, values = _rows(keys), _rows(values)
        params = CudaAppendParams(n_tok=len(slots), dtype=_DTYPES[keys.dtype], k=keys.data_ptr(), v=values.data_ptr(),
                                  row_stride=keys.stride(0), v_row_stride=values.stride(0), slot_mapping=slots.data_ptr())
        with _executor() as executor:
            params.executor = _pointer(executor)
            _library.lib.tq_paged_append(store, params, None)
        if self.n_sink:
            self._keep_sinks(pages, slots, keys, values)

    def _keep_sinks(self, pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Of every page, since nobody knows which is a sequence's first."""
        n_tokens = pages.shape[1]
        offsets = slots % n_tokens
        chosen = ((slots >= 0) & (offsets < self.n_sink)).nonzero().flatten()
        if len(chosen):
            room = torch.as_strided(pages, (len(pages), self.n_sink * self.exact_token_bytes), (pages.stride(0), 1),
                                    pages.storage_offset() + self._sink_offset(n_tokens))
            room = room.view(torch.float16).unflatten(1, (self.n_head_kv, self.n_sink, -1))
            _put(room, slots[chosen] // n_tokens, offsets[chosen], keys[chosen], values[chosen])

    def attend(self, pages: torch.Tensor, window: Window, batch: Batch, query: torch.Tensor, out: torch.Tensor, scale: float,
               factors: np.ndarray | None, softcap: float = 0.0, sinks: torch.Tensor | None = None) -> None:
        """query [n, n_head, head_dim] and out [n, n_head, head_dim_v], of one type; sinks: learned, float32 [n_head]."""
        store = self._open(pages, factors)
        query = query if query.stride(-1) == 1 else query.contiguous()
        exact = PagedExact(n_sink=self.n_sink, n_recent=self.n_recent, pages=window.pages.data_ptr(),
                           n_pages=len(window.pages), page_size=window.pages.shape[2],
                           page_stride_bytes=window.pages.stride(0) * 2, page_table=window.page_table.data_ptr(),
                           page_table_stride=window.page_table.stride(0), sink_offset_bytes=self._sink_offset(pages.shape[1]))
        params = CudaAttendParams(n_seq=len(batch.seq_lens), n_query=batch.n_query, n_head=query.shape[1],
                                  dtype=_DTYPES[query.dtype], q=query.data_ptr(), out=out.data_ptr(),
                                  q_token_stride=query.stride(0), q_head_stride=query.stride(1),
                                  out_token_stride=out.stride(0), out_head_stride=out.stride(1),
                                  page_table=batch.page_table.data_ptr(), page_table_stride=batch.page_table.stride(0),
                                  seq_lens=batch.seq_lens.data_ptr(), seq_lens_are_64=batch.seq_lens.dtype == torch.int64,
                                  max_seq_len=batch.max_len, softmax_scale=scale, softcap=softcap,
                                  query_starts=batch.query_starts.data_ptr())
        params.sinks = None if sinks is None else sinks.data_ptr()
        params.exact_pages = ctypes.pointer(exact)
        with _executor() as executor:
            params.executor = _pointer(executor)
            _library.lib.tq_paged_attend(store, params, None)

    def _open(self, pages: torch.Tensor, factors: np.ndarray | None) -> CudaStore:
        store = self._store(pages.shape[1])
        store.n_pages, store.pages, store.page_stride_bytes = len(pages), pages.data_ptr(), pages.stride(0)
        store.k_factors = None if factors is None else factors.ctypes.data
        return store


def keep_exact(window: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Tokens to exact pages (Window.pages). slots: int64 [n], page * tokens + offset, negative: nowhere."""
    n_tokens = window.shape[2]
    if bool((slots < 0).any()):
        chosen = (slots >= 0).nonzero().flatten()
        slots, keys, values = slots[chosen], keys[chosen], values[chosen]
    _put(window, slots // n_tokens, slots % n_tokens, keys, values)


def _put(room: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """As the library rounds what it encodes: no NaN, and nothing that FP16 cannot hold."""
    rows = torch.cat((keys, values), -1).float()
    room[pages, :, offsets] = rows.nan_to_num(nan=0.0, posinf=HALF_MAX, neginf=-HALF_MAX).clamp_(-HALF_MAX, HALF_MAX).half()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[n, heads, width] whose heads lie together."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _pointer(executor: Any) -> Any:
    """A member of a struct, from an argument of a call."""
    return None if executor is None else ctypes.pointer(executor._obj)


def _executor() -> Any:
    """PyTorch's threads, as many as its own operations have: between two of them others would take their cores."""
    n_threads = torch.get_num_threads()
    return (_threads.openmp(n_threads) or _threads.pool(n_threads)).executor()
