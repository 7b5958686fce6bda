# SPDX-License-Identifier: MIT
"""
tq_cuda_* with sequences: what turboquant.Cache is on the CPU, on one device. Memory is torch's; page tables, reference counts
and lengths are the host's. All layers hold the same positions, so one page id stands for a page of each. docs/cuda.md.

Where a torch device is the CPU, libturboquant-cuda.so must be one that computes in host memory: the tests' emulated device.
"""
from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import weight_factors
from ._library import CudaAttendParams, CudaSizes, CudaStore, lib
from .errors import ArgumentError, CacheFullError, UnsupportedError
from .formats import SEED_DEFAULT, Codec, format_info, format_number, preset as find_preset

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PAGE_SIZE = 64
_REFUSED = {
    "calibration": "kernels know no transforms of keys",
    "offload_folder": "pages stay in the device's memory",
    "offload_bytes": "pages stay in the device's memory",
    "budget_bytes": "memory is torch's: bound it by max_tok or max_tokens",
    "dry_run": "a dry run needs no device",
    "n_take_back": "what re-enters the ring is decoded",
    "head_dim_v": "kernels want keys and values of one head_dim",
}


@dataclass(frozen=True)
class DeviceStats:
    """Pages, and bytes of the device's memory. page_bytes: of a page of all layers."""

    n_sequences: int
    n_pages_used: int
    n_pages_free: int
    n_pages_shared: int
    page_bytes: int
    exact_bytes: int
    allocated_bytes: int


class Layer:
    """A layer's struct and the pages behind it."""

    def __init__(self, struct: CudaStore, device: torch.device) -> None:
        self.struct, self.ref, self.device = struct, ctypes.byref(struct), device
        self.sizes = CudaSizes()
        lib.tq_cuda_sizes_get(ctypes.byref(self.sizes), self.ref)
        self.pages = empty_bytes(0, device)
        self.grow(1)
        self.key_factors: np.ndarray | None = None
        self._on_device = empty_bytes(0, device)  # the same
        self.holds_tokens = False  # of some sequence

    def grow(self, n_pages: int) -> None:
        """Room for n_pages; those that there are keep their content."""
        pages = empty_bytes(n_pages * self.sizes.page_bytes, self.device)
        pages[: len(self.pages)].copy_(self.pages)
        self.pages = pages
        self.struct.pages, self.struct.n_pages = pages.data_ptr(), n_pages

    @property
    def factor_bytes(self) -> int:
        return self._on_device.nbytes

    def set_key_factors(self, factors: np.ndarray | None) -> None:
        """As Cache.set_key_factors. The same ones stay where they are, for graphs that have been captured."""
        if factors is not None and not factors.any():
            factors = None
        if factors is self.key_factors or (factors is not None and self.key_factors is not None
                                           and np.array_equal(factors, self.key_factors)):
            return
        if self.holds_tokens:
            raise ArgumentError("a layer holds tokens whose keys have other factors: set them before the first token")
        self.key_factors = factors
        self._on_device = empty_bytes(0, self.device) if factors is None else torch.from_numpy(factors.copy()).to(self.device)
        self.struct.k_factors = None if factors is None else self._on_device.data_ptr()


@dataclass
class _Sequence:
    length: int
    pages: list[int]
    slot: int


def empty_bytes(n: int, device: torch.device) -> torch.Tensor:
    """Uint8 [n], aligned as kernels want it, with anything in it."""
    if device.type == "cuda":  # whose allocator aligns to 512
        return torch.empty(n, dtype=torch.uint8, device=device)
    memory = torch.empty(n + 128, dtype=torch.uint8, device=device)
    return memory[-memory.data_ptr() % 128:][:n]


def use(device: torch.device) -> Any:
    """A context in which calls go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def new_stream(device: torch.device) -> Any:
    """A stream beside the current one; None where they do not exist."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(values: Any, dtype: Any, device: torch.device) -> torch.Tensor:
    """Integers on the device, by a copy that nobody waits for."""
    host = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()


class DeviceStore:
    """
    Options as in turboquant.Cache; max_tokens: reserve so many for each sequence when it begins, and refuse more.
    For one thread at a time.
    """

    closed = False

    def __init__(self, device: torch.device, n_layer: int, n_head_kv: int, head_dim: int, *, preset: str = "TQ4",
                 k_format: str | int | None = None, v_format: str | int | None = None, n_sink: int | None = None,
                 n_recent: int | None = None, k_ref_block: int | None = None,
                 layer_k_formats: Sequence[str | int] | None = None, layer_v_formats: Sequence[str | int] | None = None,
                 page_size: int = PAGE_SIZE, max_tok: int | None = None, max_tokens: int | None = None,
                 seed: int = SEED_DEFAULT, n_threads: int | None = None, **refused: Any) -> None:
        if refused.get("n_take_back") == 0:
            del refused["n_take_back"]
        for name in refused:
            raise UnsupportedError(f"{name} is not there on a CUDA device: {_REFUSED[name]}")
        self.device, self.n_head_kv, self.head_dim, self.head_dim_v = device, n_head_kv, head_dim, head_dim
        self.page_size, self.max_tokens = page_size, max_tokens
        chosen = find_preset(preset)
        self.n_sink = chosen.n_sink if n_sink is None else n_sink
        self.n_recent = chosen.n_recent if n_recent is None else n_recent
        self.k_ref_block = chosen.k_ref_block if k_ref_block is None else k_ref_block
        self._seed = seed
        self._max_pages = None if max_tok is None else -(-max_tok // page_size)
        keys = layer_k_formats or [chosen.k_format if k_format is None else k_format] * n_layer
        values = layer_v_formats or [chosen.v_format if v_format is None else v_format] * n_layer
        with use(device):
            structs = [self._struct(k, v) for k, v in zip(keys, values)]
            for struct in {(struct.k_format, struct.v_format): struct for struct in structs}.values():
                self._refuse_without_kernel(struct)
            self.layers = [Layer(struct, device) for struct in structs]
        # A layer of each pair of formats.
        self.variants = list({(layer.struct.k_format, layer.struct.v_format): layer for layer in self.layers}.values())
        self.n_pages = 1  # the library wants some
        self._refs = [0]
        self._free_pages = [0]
        self._exact = torch.empty(n_layer, 0, 2, n_head_kv, self.n_sink + self.n_recent, head_dim, dtype=torch.float16,
                                  device=device)
        self._free_slots: list[int] = []
        self._sequences: dict[int, _Sequence] = {}
        self._n_created = 0
        self.n_not_finite = torch.zeros(1, dtype=torch.int32, device=device)

    def _struct(self, k_format: str | int, v_format: str | int) -> CudaStore:
        struct = CudaStore()
        lib.tq_cuda_store_default(ctypes.byref(struct))
        struct.k_format, struct.v_format = format_number(k_format), format_number(v_format)
        struct.head_dim, struct.n_head_kv, struct.page_size = self.head_dim, self.n_head_kv, self.page_size
        struct.n_sink, struct.n_recent, struct.seed = self.n_sink, self.n_recent, self._seed
        struct.k_ref_block = self.k_ref_block if self.n_recent else 0  # as on the CPU: references are means of the ring
        return struct

    def _refuse_without_kernel(self, struct: CudaStore) -> None:
        """Attend to an empty sequence: the library knows whether it can."""
        struct, params = CudaStore.from_buffer_copy(struct), CudaAttendParams()
        lib.tq_cuda_attend_params_default(ctypes.byref(params))
        scratch = empty_bytes(1 << 20, self.device).zero_()
        struct.n_pages = struct.n_exact_slots = 1
        params.n_seq, params.n_head = 1, self.n_head_kv
        for owner, name in ((struct, "pages"), (struct, "exact"), (params, "q"), (params, "out"), (params, "page_table"),
                            (params, "seq_lens"), (params, "workspace")):
            setattr(owner, name, scratch.data_ptr())
        params.workspace_bytes = len(scratch)
        try:
            lib.tq_cuda_attend(ctypes.byref(struct), ctypes.byref(params), stream(self.device))
        except UnsupportedError as error:
            names = [format_info(number, self.head_dim).name for number in (struct.k_format, struct.v_format)]
            raise UnsupportedError(
                f"keys in {names[0]} with values in {names[1]} cannot be on a CUDA device ({error}). Name a pair, as "
                'k_format="sq4", v_format="sq4"', error.status) from error

    # ---- sequences ----

    def seq_create(self, n: int = 1) -> list[int]:
        """The ids of n new, empty sequences."""
        self._need_slots(n)
        return [self._add(_Sequence(0, [], self._free_slots.pop())) for _ in range(n)]

    def seq_fork(self, seq: int) -> int:
        """The id of a sequence with the content of another, whose pages it shares; what is exact is copied."""
        parent = self._sequences[seq]
        self._need_slots(1)
        pages = parent.pages[: self._n_pages(parent.length)]
        for page in pages:
            self._refs[page] += 1
        slot = self._free_slots.pop()
        self._exact[:, slot].copy_(self._exact[:, parent.slot])
        return self._add(_Sequence(parent.length, pages, slot))

    def seq_free(self, seq: int) -> None:
        sequence = self._sequences.pop(seq)
        self._release(sequence.pages)
        self._free_slots.append(sequence.slot)
        if not self._sequences:  # what comes next may be of another model
            self.n_not_finite.zero_()
        self._note_emptiness()

    def key_factors(self, layer: int) -> np.ndarray | None:
        return self.layers[layer].key_factors

    def set_key_factors(self, layer: int, factors: np.ndarray | None) -> None:
        """As Cache.set_key_factors."""
        self.layers[layer].set_key_factors(factors)

    def _note_emptiness(self) -> None:
        if not any(sequence.length for sequence in self._sequences.values()):
            for layer in self.layers:
                layer.holds_tokens = False

    def length(self, seq: int, layer: int = 0) -> int:
        return self._sequences[seq].length

    def slots(self, seqs: Sequence[int]) -> list[int]:
        """The exact slots of sequences."""
        return [self._sequences[seq].slot for seq in seqs]

    def page_tables(self, seqs: Sequence[int]) -> np.ndarray:
        """Int32 [n_seq, most pages], -1 where there is none."""
        pages = [self._sequences[seq].pages for seq in seqs]
        table = np.full((len(pages), max(map(len, pages))), -1, np.int32)
        for row, ids in enumerate(pages):
            table[row, : len(ids)] = ids
        return table

    def coded_pages(self, seq: int) -> list[int]:
        """The pages that hold something."""
        sequence = self._sequences[seq]
        return sequence.pages[: self._n_pages(sequence.length)]

    def seq_fill(self, seq: int, length: int, pages: Sequence[int]) -> None:
        """An empty sequence gets so many tokens, in pages that it shares. What is exact is for the caller to write."""
        for page in pages:
            self._refs[page] += 1
        self._sequences[seq] = _Sequence(length, list(pages), self._sequences[seq].slot)
        for layer in self.layers:
            layer.holds_tokens |= length > 0

    def _add(self, sequence: _Sequence) -> int:
        self._n_created += 1
        self._sequences[self._n_created] = sequence
        return self._n_created

    def _n_coded(self, length: int) -> int:
        """The end of the positions that pages hold, sinks among them."""
        coded = length - self.n_recent
        return coded if coded > self.n_sink else 0

    def _n_pages(self, length: int) -> int:
        return -(-self._n_coded(length) // self.page_size)

    def _need_slots(self, n: int) -> None:
        before = self._exact.shape[1]
        if n <= len(self._free_slots):
            return
        after = before + max(n - len(self._free_slots), before // 4)
        exact = self._exact.new_empty(len(self.layers), after, *self._exact.shape[2:])
        exact[:, :before].copy_(self._exact)
        self._exact = exact
        self._free_slots += range(before, after)
        for number, layer in enumerate(self.layers):
            layer.struct.exact, layer.struct.n_exact_slots = exact[number].data_ptr(), after

    # ---- pages ----

    def _release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free_pages.append(page)

    def _take(self, n: int) -> list[int]:
        """n pages of nobody's. Pools grow one after the other, so that of one layer alone there are two at a time."""
        missing = n - len(self._free_pages)
        if missing > 0:
            n_pages = self.n_pages + missing
            if self._max_pages is not None and n_pages > self._max_pages:
                raise CacheFullError(f"the cache is full: {n_pages} pages of {self.page_size} tokens are needed and max_tok "
                                     f"allows {self._max_pages}")
            if self.max_tokens is None:
                n_pages = max(n_pages, min(self.n_pages + max(self.n_pages // 4, 16), self._max_pages or 1 << 31))
            with use(self.device):
                for layer in self.layers:
                    layer.grow(n_pages)
            self._free_pages = [*range(n_pages - 1, self.n_pages - 1, -1), *self._free_pages]
            self._refs += [0] * (n_pages - self.n_pages)
            self.n_pages = n_pages
        taken = [self._free_pages.pop() for _ in range(n)]
        for page in taken:
            self._refs[page] = 1
        return taken

    def _shared_tail(self, sequence: _Sequence) -> int | None:
        """The page that the sequence writes next, if it holds something and others use it, too."""
        first, rest = divmod(self._n_coded(sequence.length), self.page_size)
        return sequence.pages[first] if rest and self._refs[sequence.pages[first]] > 1 else None

    def _n_reserved(self, sequence: _Sequence, n_tok: int) -> int:
        """How many tokens more a sequence must have room for so that n_tok can come."""
        if self.max_tokens is None:
            return n_tok
        if sequence.length + n_tok > self.max_tokens:
            raise CacheFullError(f"a sequence has {sequence.length} tokens and gets {n_tok} more, but the cache was made with "
                                 f"max_tokens={self.max_tokens}")
        return self.max_tokens - sequence.length

    def _missing(self, sequence: _Sequence, n_tok: int) -> tuple[int, int | None]:
        """How many pages must be added so that n_tok tokens can come, and the shared page to be copied first, if any."""
        after = sequence.length + self._n_reserved(sequence, n_tok)
        shared = self._shared_tail(sequence) if self._n_coded(after) > self._n_coded(sequence.length) else None
        return max(self._n_pages(after) - len(sequence.pages), 0), shared

    def is_ready(self, seqs: Sequence[int], n_tok: Sequence[int]) -> bool:
        """Do sequences own all pages that n_tok[i] tokens more need?"""
        return all(self._missing(self._sequences[seq], n) == (0, None) for seq, n in zip(seqs, n_tok))

    def reserve(self, seqs: Sequence[int], n_tok: Sequence[int]) -> None:
        """Make sequences own the pages that n_tok[i] tokens more need, and those of max_tokens in all."""
        rows, missing, users = [], 0, {}
        for seq, n in zip(seqs, n_tok):
            sequence = self._sequences[seq]
            n_new, shared = self._missing(sequence, n)
            if shared is not None:
                users[shared] = users.get(shared, 0) + 1
                if users[shared] == self._refs[shared]:  # the last user keeps it
                    shared = None
            rows.append((sequence, n_new, shared))
            missing += n_new + (shared is not None)
        fresh = self._take(missing)
        copies = []
        for sequence, n_new, shared in rows:
            if shared is not None:
                copies.append((shared, fresh[-1]))
                self._release([shared])
                sequence.pages[self._n_coded(sequence.length) // self.page_size] = fresh.pop()
            for _ in range(n_new):
                sequence.pages.append(fresh.pop())
        if copies:
            self._copy(*zip(*copies))

    def _copy(self, from_pages: Sequence[int], to_pages: Sequence[int]) -> None:
        sources, targets = (to_device(pages, np.int32, self.device) for pages in (from_pages, to_pages))
        with use(self.device):
            for layer in self.layers:
                lib.tq_cuda_pages_copy(layer.ref, sources.data_ptr(), targets.data_ptr(), len(sources), stream(self.device))

    def advance(self, seq: int, n_tok: int) -> None:
        """The device has appended n_tok tokens, or is about to, in pages that were reserved; negative: it has not."""
        self._sequences[seq].length += n_tok

    # ---- what is held ----

    def trim(self, seq: int, n_tok: int, held: Sequence[int] | None = None) -> None:
        """
        Keep the first n_tok tokens. Which are exact follows from a sequence's length here: those that become so again are
        decoded into the ring. held: what each layer really holds, where a forward pass was interrupted.
        """
        sequence = self._sequences[seq]
        if sequence.length <= n_tok:  # also where this was interrupted and comes again
            return
        begin = max(self.n_sink, n_tok - self.n_recent)
        for number in range(len(self.layers)):
            end = min(self._n_coded(sequence.length if held is None else held[number]), n_tok)
            if end > begin:
                self._restore(number, sequence, begin, end)
        sequence.length, n_pages = n_tok, self._n_pages(n_tok)
        unused = sequence.pages[n_pages:]
        del sequence.pages[n_pages:]
        self._release(unused)
        self._note_emptiness()

    def _restore(self, number: int, sequence: _Sequence, begin: int, end: int) -> None:
        rows = torch.from_numpy(self._decode(number, sequence, begin, end)).to(self.device, torch.float16)
        entries = torch.from_numpy(self.n_sink + np.arange(begin, end) % self.n_recent).to(self.device)
        self._exact[number, sequence.slot][:, :, entries] = rows

    def _decode(self, number: int, sequence: _Sequence, begin: int, end: int) -> np.ndarray:
        """Coded positions [begin, end) as float32 [keys and values, n_head_kv, end - begin, head_dim]."""
        layer, size = self.layers[number], self.page_size
        first = begin // size
        pages = to_device(sequence.pages[first: -(-end // size)], np.int32, self.device)
        exported = torch.empty(len(pages), layer.sizes.canonical_bytes, dtype=torch.uint8, device=self.device)
        with use(self.device):
            lib.tq_cuda_pages_export(layer.ref, pages.data_ptr(), len(pages), exported.data_ptr(), stream(self.device))
        heads = exported.cpu().numpy().reshape(len(pages), self.n_head_kv, -1)
        begin, end = begin - first * size, end - first * size
        sides, at = [], 0
        for number_of_format, block in ((layer.struct.k_format, layer.struct.k_ref_block), (layer.struct.v_format, 0)):
            codec = Codec(number_of_format, self.head_dim, self._seed)
            n_bytes, n_refs = size * codec.format.bytes_per_vector, size // block if block else 0
            rows = self._decode_plane(codec, heads[:, :, at: at + n_bytes], size, begin, end)
            at += n_bytes
            if block:
                n_bytes, begin_ref = n_refs * (self.head_dim + 2), begin // block
                references = self._decode_plane(Codec("sq8", self.head_dim, self._seed), heads[:, :, at: at + n_bytes], n_refs,
                                                begin_ref, -(-end // block))
                rows += references[:, np.arange(begin, end) // block - begin_ref]
                at += n_bytes
            if not sides and layer.key_factors is not None:
                rows *= weight_factors.channel_factors(layer.key_factors)[:, None]
            sides.append(rows)
        return np.stack(sides)

    def _decode_plane(self, codec: Codec, plane: np.ndarray, n: int, begin: int, end: int) -> np.ndarray:
        """Of the n vectors of each head page [n_pages, n_head_kv, bytes] those from begin to end: [n_head_kv, end - begin,
        head_dim]."""
        codes, scales = np.split(plane, [n * (codec.format.bytes_per_vector - 2)], axis=2)
        records = np.concatenate([part.reshape(*plane.shape[:2], n, -1) for part in (scales, codes)], axis=3)
        records = records.transpose(1, 0, 2, 3).reshape(self.n_head_kv, -1, records.shape[3])[:, begin:end]
        return codec.decode(records.reshape(-1, records.shape[2])).reshape(self.n_head_kv, end - begin, self.head_dim)

    def read(self, seq: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """All keys and values of a layer, float32 [length, n_head_kv, head_dim]. For looking at them."""
        sequence = self._sequences[seq]
        out = np.empty((2, self.n_head_kv, sequence.length, self.head_dim), np.float32)
        coded = self._n_coded(sequence.length)
        if coded:
            out[:, :, self.n_sink: coded] = self._decode(layer, sequence, self.n_sink, coded)
        exact = self._exact[layer, sequence.slot].cpu().numpy()
        for position in [*range(min(self.n_sink, sequence.length)), *range(max(self.n_sink, coded), sequence.length)]:
            ring = self.n_sink + position % max(self.n_recent, 1)
            out[:, :, position] = exact[:, :, position if position < self.n_sink else ring]
        keys, values = out.transpose(0, 2, 1, 3)
        return keys, values

    def stats(self) -> DeviceStats:
        page_bytes = sum(layer.sizes.page_bytes for layer in self.layers)
        exact_bytes = self._exact.numel() * 2
        return DeviceStats(len(self._sequences), self.n_pages - len(self._free_pages), len(self._free_pages),
                           sum(n > 1 for n in self._refs), page_bytes, exact_bytes,
                           self.n_pages * page_bytes + exact_bytes + sum(layer.factor_bytes for layer in self.layers))

    def check_finite(self, n: int) -> None:
        """n: what n_not_finite was, as far as is known."""
        if n:
            raise ArgumentError(f"{n} keys or values of earlier forward passes have NaN, infinity or a magnitude above 65504; "
                                "the cache holds other numbers in their place: reset() it")
