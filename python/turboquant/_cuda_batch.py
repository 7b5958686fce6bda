# SPDX-License-Identifier: MIT
"""
The rows of a batch on a device, and a forward pass over them. Lengths live on the device and are advanced there, and what all
layers of a pass need is computed once, there, so that a step of decoding never waits and can be captured in a CUDA graph.
"""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ._cuda import DTYPES, DeviceStore, Layer, empty_bytes, is_capturing, new_stream, stream, to_device, use
from ._library import CudaAppendParams, CudaAttendParams, cuda_append, lib
from .errors import ArgumentError, UnsupportedError

# Tokens of a row that are appended before their queries attend, at most: a part of a prompt.
CHUNK_MAX = 4096
# A chunk is smaller where kernels would need more scratch than this, as pairs without a kernel for prompts do: the library says
# how much a call needs on this device.
WORKSPACE_MAX = 64 << 20
# Query rows of a KV head that a call takes.
_ROWS_MAX = 65536
# tq_cuda_append_half.
_BOTH, _ENCODE, _STORE = range(3)


class _Step(NamedTuple):
    """One append and one attention: tokens [begin, end) of the pass."""

    begin: int
    end: int
    positions: torch.Tensor
    seq_ids: torch.Tensor
    slots: torch.Tensor
    lens: torch.Tensor


class _Part(NamedTuple):
    """Rows [row, row + n_rows) with equally many tokens; `tokens`: which columns they are, None: all."""

    row: int
    n_rows: int
    tokens: torch.Tensor | None
    steps: list[_Step]


class Batch:
    """n_rows sequences of a store. The tensors stay where they are as long as rows and capacity do, as CUDA graphs want."""

    def __init__(self, store: DeviceStore, n_rows: int) -> None:
        self.store, self.device, self.n_rows = store, store.device, n_rows
        self.row_ids = torch.arange(n_rows, dtype=torch.int32, device=self.device)
        self.lens = torch.zeros(n_rows, dtype=torch.int32, device=self.device)
        self.exact_slots = torch.zeros_like(self.lens)
        self.page_table = torch.full((n_rows, 1), -1, dtype=torch.int32, device=self.device)
        # Of steps of decoding by all rows, which CUDA graphs keep; and of all other calls.
        self._workspaces = {True: empty_bytes(0, self.device), False: empty_bytes(0, self.device)}
        self._offsets = torch.arange(CHUNK_MAX, device=self.device)
        self._zeros = torch.zeros(CHUNK_MAX, dtype=torch.int32, device=self.device)
        self._side = new_stream(self.device)
        # Layers of this pass whose first half of the append is on its way, and the events behind it.
        self._encoded: dict[Layer, Any] = {}
        self._parts: list[_Part] = []
        self._is_whole = True
        self._kept: np.ndarray | None = None
        self._workspace_bytes: dict[tuple[int, int, int, int], int] = {}
        self.forget()
        self._append, self._attend = CudaAppendParams(), CudaAttendParams()
        lib.tq_cuda_append_params_default(ctypes.byref(self._append))
        lib.tq_cuda_attend_params_default(ctypes.byref(self._attend))
        self._append_ref, self._attend_ref = ctypes.byref(self._append), ctypes.byref(self._attend)

    def forget(self) -> None:
        """The sequences are gone."""
        self.is_stale = True  # the sequences are others, or have changed beside append
        self.end()
        self.is_capturing = False
        # What n_not_finite was at the last pass that the device has begun. A new one: a copy may be on its way to the old.
        self._n_not_finite = torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    @property
    def nbytes(self) -> int:
        tensors = (self.row_ids, self.lens, self.exact_slots, self.page_table, *self._workspaces.values(), self._offsets,
                   self._zeros)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def capacity(self) -> int:
        """No sequence is longer than this without another page table."""
        return self.page_table.shape[1] * self.store.page_size + self.store.n_sink + self.store.n_recent

    # ---- a pass ----

    def look(self) -> bool:
        """Is what begins now captured in a CUDA graph?"""
        self.is_capturing = is_capturing(self.device)
        return self.is_capturing

    def begin(self, seqs: Sequence[int], n_tok: int, kept: np.ndarray | None, n_head: int) -> None:
        """
        A pass brings n_tok columns of the rows `seqs`; kept [n_rows, n_tok]: which are tokens, None: all. The host's lengths
        are advanced, and the device's on its stream.
        """
        store = self.store
        store.check_finite(int(self._n_not_finite[0]))
        if store.max_tokens is None:
            self._refuse_capture("its cache grows")
        counts = [n_tok] * self.n_rows if kept is None else kept.sum(axis=1).tolist()
        self.end()
        self._lengths = [store.length(seq) for seq in seqs]
        if not store.is_ready(seqs, counts):
            self._refuse_capture("a page is needed")
            store.reserve(seqs, counts)
            self._write_table(seqs)
        if self.is_stale:
            self._refuse_capture("sequences have changed")
            self._write_table(seqs)
            self.lens.copy_(to_device([store.length(seq) for seq in seqs], np.int32, self.device), non_blocking=True)
            self.exact_slots.copy_(to_device(store.slots(seqs), np.int32, self.device), non_blocking=True)
            self.is_stale = False
        if not self.is_capturing:
            self._n_not_finite.copy_(store.n_not_finite, non_blocking=True)
        self._kept = kept
        self._cut(counts, n_tok, n_head)
        self._encoded.clear()
        # With references one of a row: means of the ring may have earlier tokens of a pass.
        if self.is_capturing and self._is_whole and n_tok <= min(store.n_recent, 1 if store.k_ref_block else n_tok):
            self._encode_first()
        for seq, n in zip(seqs, counts):
            store.advance(seq, n)

    def trim(self, seqs: Sequence[int], lengths: Sequence[int], held: list[list[int]]) -> None:
        """Keep so many tokens of each row. held: what rows have in each layer, but for one that was interrupted."""
        self.is_stale = True
        if self._number is not None:
            held[self._number] = list(self._lengths)
            for (first, n_rows, n_tok), status in zip(self._calls, self._statuses):
                for row in range(first, first + n_rows if status == 0 else first):
                    held[self._number][row] += n_tok
        for row, (seq, length) in enumerate(zip(seqs, lengths)):
            self.store.trim(seq, length, [of_layer[row] for of_layer in held])
        self.end()

    def end(self) -> None:
        """The pass is over, with what it has appended or without."""
        self._number: int | None = None  # the layer that came last
        self._lengths: list[int] = []  # of the rows before the pass
        self._calls: list[tuple[int, int, int]] = []  # what that began to append: first row, number of rows, tokens of each
        self._statuses: list[int] = []  # and of the calls that returned

    def _refuse_capture(self, why: str) -> None:
        if self.is_capturing:
            raise ArgumentError(f"a CUDA graph is being captured, but {why}: make the cache with max_tokens=, and run a step "
                                "like the captured one before it")

    def _write_table(self, seqs: Sequence[int]) -> None:
        table = self.store.page_tables(seqs)
        width = table.shape[1]
        if width > self.page_table.shape[1]:
            room = width if self.store.max_tokens is not None else max(width + width // 4, 16)
            self.page_table = torch.full((self.n_rows, room), -1, dtype=torch.int32, device=self.device)
        self.page_table[:, :width].copy_(to_device(table, np.int32, self.device), non_blocking=True)

    def _cut(self, counts: Sequence[int], n_tok: int, n_head: int) -> None:
        """The pass's parts and steps; and the lengths after it."""
        self._is_whole = self._kept is None
        if self._is_whole:
            self._parts = [self._part(0, self.n_rows, None, n_tok, n_head)]
            advance = n_tok
        else:
            columns = [None if count == n_tok else to_device(np.flatnonzero(kept), np.int64, self.device)
                       for count, kept in zip(counts, self._kept)]
            self._parts = [self._part(row, 1, columns[row], count, n_head) for row, count in enumerate(counts) if count]
            advance = to_device(counts, np.int32, self.device)
        self.lens.add_(advance)

    def _encode_first(self) -> None:
        """
        What the pass pushes out of the rings stands there already: encode it for all layers now, on a stream of its own, so
        that no layer but the first waits for it. Not outside of graphs, where launches hold the host up.
        """
        part = self._parts[0]
        self._set_places(part, part.steps[0])
        a = self._append
        a.half, a.k, a.v = _ENCODE, None, None
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with use(self.device):
            for layer in self.store.layers:
                lib.tq_cuda_append(layer.ref, self._append_ref, 0 if self._side is None else self._side.cuda_stream)
                self._encoded[layer] = None if self._side is None else self._side.record_event()

    def _part(self, row: int, n_rows: int, tokens: torch.Tensor | None, n_tok: int, n_head: int) -> _Part:
        chunk = self._chunk(n_rows, n_tok, n_head)
        lens, steps = self.lens[row: row + n_rows], []
        for begin in range(0, n_tok, chunk):
            end = min(begin + chunk, n_tok)
            positions = lens[:, None] + self._offsets[: end - begin]
            if begin:
                positions += begin
            seq_ids = self._zeros[: end - begin] if n_rows == 1 else self.row_ids
            if n_rows > 1 and end - begin > 1:
                seq_ids = self.row_ids[:, None].expand(n_rows, end - begin).reshape(-1)
            # When the last step runs, the lengths are those after the pass.
            ends = lens if end == n_tok else lens + end
            steps.append(_Step(begin, end, positions, seq_ids, self._slots(row, positions), ends))
        return _Part(row, n_rows, tokens, steps)

    def _slots(self, row: int, positions: torch.Tensor) -> torch.Tensor:
        """With sinks or ring only the sign of a slot is read."""
        if self.store.n_sink + self.store.n_recent > 0:
            return positions
        size = self.store.page_size
        return self.page_table[row: row + len(positions)].gather(1, positions // size) * size + positions % size

    def _chunk(self, n_rows: int, n_tok: int, n_head: int) -> int:
        """Tokens of a step; its workspace is there afterwards."""
        group = n_head // self.store.n_head_kv
        chunk = min(n_tok, CHUNK_MAX, _ROWS_MAX // group)
        while chunk > 1 and self._bytes(n_rows, chunk, n_head) > WORKSPACE_MAX:
            chunk = 1 << (chunk - 1).bit_length() - 1  # the next smaller power of two
        for n in {chunk, n_tok % chunk or chunk}:
            is_decoding, needed = self._is_decoding(n_rows, n), self._bytes(n_rows, n, n_head)
            if needed > self._workspaces[is_decoding].numel():
                self._refuse_capture("more scratch is needed")
                self._workspaces[is_decoding] = empty_bytes(0, self.device)  # so that there are never two
                self._workspaces[is_decoding] = empty_bytes(needed, self.device).zero_()
        return chunk

    def _is_decoding(self, n_rows: int, n_query: int) -> bool:
        return n_query == 1 and n_rows == self.n_rows

    def _workspace(self, n_rows: int, n_query: int, n_head: int) -> torch.Tensor:
        """A call leaves its counters zero; but where one of another shape has its own, there may be results of this one."""
        is_decoding = self._is_decoding(n_rows, n_query)
        workspace = self._workspaces[is_decoding]
        if not is_decoding:
            workspace[: self._bytes(n_rows, n_query, n_head)].zero_()
        return workspace

    def _bytes(self, n_rows: int, n_query: int, n_head: int) -> int:
        key = (n_rows, n_query, n_head, self.capacity)
        found = self._workspace_bytes.get(key)
        if found is None:
            params, out = self._attend, ctypes.c_size_t()
            params.n_seq, params.n_query, params.n_head, params.max_seq_len = key
            sizes = []
            with use(self.device):
                for layer in self.store.variants:
                    lib.tq_cuda_workspace_bytes(ctypes.byref(out), layer.ref, self._attend_ref)
                    sizes.append(out.value)
            found = self._workspace_bytes[key] = max(sizes)
        return found

    # ---- a layer ----

    def attend(self, number: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float,
               softcap: float | None, sinks: torch.Tensor | None) -> torch.Tensor:
        """
        Append a layer's rows [n_rows, n_head_kv, n_tok, head_dim] and attend with their queries [n_rows, n_head, n_tok,
        head_dim]: [n_rows, n_tok, n_head, head_dim].
        """
        if query.dtype not in DTYPES:
            raise UnsupportedError(f"the model computes in {query.dtype}; CUDA kernels take float32, float16 and bfloat16")
        layer = self.store.layers[number]
        if not query.dtype == keys.dtype == values.dtype:
            keys, values = keys.to(query.dtype), values.to(query.dtype)
        query, keys, values = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        out = (torch.empty if self._is_whole else torch.zeros)(*query.shape[:3], self.store.head_dim_v, dtype=query.dtype,
                                                               device=self.device)
        params = self._attend
        params.softmax_scale, params.softcap, params.n_head = scaling, softcap or 0, query.shape[2]
        params.sinks = None if sinks is None else sinks.data_ptr()
        self._start(number)
        with use(self.device):
            for part in self._parts:
                if self._is_whole:
                    self._attend_part(layer, part, query, keys, values, out)
                    continue
                rows = slice(part.row, part.row + part.n_rows)
                taken = [x[rows] for x in (query, keys, values)]
                if part.tokens is not None:
                    taken = [x.index_select(1, part.tokens) for x in taken]
                result = out[rows] if part.tokens is None else torch.empty_like(taken[0])
                self._attend_part(layer, part, *taken, result)
                if part.tokens is not None:
                    out[rows].index_copy_(1, part.tokens, result)
        return out

    def append(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The first half of attend, for a pass without padding."""
        layer = self.store.layers[number]
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        self._start(number)
        with use(self.device):
            for part in self._parts:
                for step in part.steps:
                    self._append_step(layer, part, step, keys[:, step.begin: step.end], values[:, step.begin: step.end])

    def _start(self, number: int) -> None:
        self._number = None
        self._calls, self._statuses = [], []
        self._number = number

    def _attend_part(self, layer: Layer, part: _Part, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                     out: torch.Tensor) -> None:
        for step in part.steps:
            if len(part.steps) == 1:
                self._step(layer, part, step, query, keys, values, out)
                continue
            cut = slice(step.begin, step.end)
            result = out[:, cut] if part.n_rows == 1 else torch.empty_like(out[:, cut])
            self._step(layer, part, step, query[:, cut], keys[:, cut], values[:, cut], result)
            if part.n_rows > 1:
                out[:, cut] = result

    def _step(self, layer: Layer, part: _Part, step: _Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
              out: torch.Tensor) -> None:
        """All [n_rows, tokens of the step, head, head_dim]; `out` is contiguous."""
        query, q_stride = _token_stride(query, False)
        workspace = self._workspace(part.n_rows, step.end - step.begin, query.shape[2])
        self._append_step(layer, part, step, keys, values)  # nothing is launched between this and attention
        a, p = self._append, self._attend
        p.n_seq, p.n_query, p.dtype, p.q, p.out = part.n_rows, step.end - step.begin, a.dtype, query.data_ptr(), out.data_ptr()
        p.q_token_stride, p.q_head_stride = q_stride, query.stride(2)
        p.page_table, p.page_table_stride, p.exact_slots = a.page_table, a.page_table_stride, a.exact_slots
        p.seq_lens, p.max_seq_len = step.lens.data_ptr(), self.capacity
        p.follows_append = True
        p.workspace, p.workspace_bytes = workspace.data_ptr(), workspace.numel()
        lib.tq_cuda_attend(layer.ref, self._attend_ref, stream(self.device))

    def _append_step(self, layer: Layer, part: _Part, step: _Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        keys, row_stride = _token_stride(keys, True)
        values, value_stride = _token_stride(values, True)
        if row_stride != value_stride:
            keys, values, row_stride = keys.contiguous(), values.contiguous(), 0
        self._set_places(part, step)
        a = self._append
        a.dtype, a.row_stride = DTYPES[keys.dtype], row_stride
        a.k, a.v, a.n_not_finite = keys.data_ptr(), values.data_ptr(), self.store.n_not_finite.data_ptr()
        a.half = _BOTH
        if layer in self._encoded:
            a.half, encoded = _STORE, self._encoded.pop(layer)
            if encoded is not None:
                torch.cuda.current_stream(self.device).wait_event(encoded)
        self._calls.append((part.row, part.n_rows, step.end - step.begin))
        layer.holds_tokens = True
        cuda_append(self._statuses, layer.ref, self._append_ref, stream(self.device))

    def _set_places(self, part: _Part, step: _Step) -> None:
        """Where the tokens of a step go."""
        a, table_stride = self._append, self.page_table.stride(0)
        a.n_tok = part.n_rows * (step.end - step.begin)
        a.slot_mapping, a.seq_ids, a.positions = step.slots.data_ptr(), step.seq_ids.data_ptr(), step.positions.data_ptr()
        a.page_table = self.page_table.data_ptr() + 4 * part.row * table_stride
        a.page_table_stride, a.exact_slots = table_stride, self.exact_slots.data_ptr() + 4 * part.row


def _token_stride(x: torch.Tensor, heads_together: bool) -> tuple[torch.Tensor, int]:
    """x [n_rows, n_tok, head, head_dim], copied if it must be so that tokens of all rows are equally far apart; that distance,
    0: contiguous."""
    n_rows, n_tok, n_head, head_dim = x.shape
    by_row, by_token, by_head, by_element = x.stride()
    if by_element == 1 and (not heads_together or n_head == 1 or by_head == head_dim):
        if n_rows * n_tok == 1:
            return x, 0
        if n_tok == 1:
            return x, by_row
        if n_rows == 1 or by_row == n_tok * by_token:
            return x, by_token
    return x.contiguous(), 0
