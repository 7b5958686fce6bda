# SPDX-License-Identifier: MIT
"""Rows of PyTorch's tensors through a batch of the library."""
from __future__ import annotations

import numpy as np
import torch

from . import cache as _cache
from ._library import BatchRows
from ._torch_stores import is_device
from .errors import UnsupportedError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # tq_dtype


def attend_rows(batch: _cache.Batch, number: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                kept: np.ndarray | None, scaling: float, softcap: float | None, sinks: torch.Tensor | None,
                is_shared: bool = False, out_dim: int = 0) -> torch.Tensor:
    """query [n_batch, n_head, n_query, head_dim], of the last tokens; keys and values [n_batch, n_head_kv, n_tok, head_dim];
    kept [n_batch, n_tok]: which are tokens, None: all. Returns [n_batch, n_query, n_head, head_dim], or of each the first
    out_dim values."""
    device, dtype = query.device, query.dtype
    # Torch converts on all threads. A device's kernels take what models compute in.
    if device.type == "cpu" and not is_device(device):
        query, keys, values = query.float(), keys.float(), values.float()
    elif dtype not in DTYPES:
        raise UnsupportedError(f"the model computes in {dtype}; CUDA kernels take float32, float16 and bfloat16")
    else:
        keys, values = keys.to(dtype), values.to(dtype)
    n_batch, n_head, n_query, _ = query.shape
    with_query = None if kept is None else kept[:, kept.shape[1] - n_query:]
    places, q_places = (None if rows is None or rows.all() else torch.from_numpy(np.flatnonzero(rows)).to(device)
                        for rows in (kept, with_query))
    rows, n_queries = BatchRows(), None
    if n_query < keys.shape[2]:
        n_queries = np.full(n_batch, n_query, np.int64) if with_query is None else with_query.sum(axis=1, dtype=np.int64)
    (query, q_stride, rows.q_head_stride), (keys, k_stride, _), (values, v_stride, _) = (
        _token_rows(x, where, heads_together)
        for x, where, heads_together in ((query, q_places, False), (keys, places, True), (values, places, True)))
    out = torch.empty(len(query), n_head, out_dim or values.shape[2], dtype=query.dtype, device=device)
    rows.dtype, rows.q, rows.k, rows.v, rows.out = (DTYPES[query.dtype], query.data_ptr(), keys.data_ptr(), values.data_ptr(),
                                                    out.data_ptr())
    rows.q_token_stride, rows.k_token_stride, rows.v_token_stride = q_stride, k_stride, v_stride
    rows.softmax_scale, rows.softcap = scaling, softcap or 0
    rows.sinks = None if sinks is None else sinks.data_ptr()
    rows.out_dim = out_dim
    rows.is_shared, rows.n_query = is_shared, None if n_queries is None else n_queries.ctypes.data
    if len(keys):
        batch.attend(number, rows)
    if q_places is not None:  # a row of padding gives zeros
        out = out.new_zeros(n_batch * n_query, *out.shape[1:]).index_copy_(0, q_places, out)
    return out.view(n_batch, n_query, n_head, -1).to(dtype)


def _token_rows(x: torch.Tensor, places: torch.Tensor | None, heads_together: bool) -> tuple[torch.Tensor, int, int]:
    """
    x [n_batch, n_head, n_tok, head_dim] as [tokens, n_head, head_dim], copied only where tokens are not equally far apart, or
    heads, if they must, do not lie together; and how far apart tokens and heads are.
    """
    x = x.transpose(1, 2)
    n_batch, n_tok, n_head, head_dim = x.shape
    by_row, by_token, by_head, by_element = x.stride()
    is_even = n_batch == 1 or by_row == n_tok * by_token or n_tok == 1
    if by_element != 1 or not is_even or (heads_together and n_head > 1 and by_head != head_dim):
        x = x.contiguous()
        by_token, by_row, by_head = n_head * head_dim, n_tok * n_head * head_dim, head_dim
    stride = by_row if n_tok == 1 else by_token
    rows = x.as_strided((n_batch * n_tok, n_head, head_dim), (stride, by_head, 1))
    if places is not None:
        rows, stride, by_head = rows.index_select(0, places), n_head * head_dim, head_dim
    return rows, stride, by_head
