# SPDX-License-Identifier: MIT
"""
A device's sequences in files: docs/snapshot.md. They go through a turboquant.Cache of the same options, so that only the
library writes, checks and refuses files. Codes, references and exact vectors are the CPU's, bit for bit, in another
arrangement.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ._cuda import DeviceStore, stream, to_device, use
from ._library import lib
from .cache import Cache
from .errors import UnsupportedError
from .formats import format_info

# Of pages that are on their way.
CHUNK_BYTES = 64 << 20


class _Side(NamedTuple):
    """Where the head pages of a layer's keys or values lie in a page; n_refs: references in each of them."""

    begin: int
    stride: int
    code_bytes: int
    n_refs: int


class _Pages:
    """Pages as the CPU has them, uint8 [n, page_bytes]."""

    def __init__(self, store: DeviceStore) -> None:
        self.store = store
        self.sides: list[list[_Side]] = []
        self.page_bytes = 0
        for layer in store.layers:
            block = layer.struct.k_ref_block
            n_refs = store.page_size // block if block else 0
            self.sides.append([self._side(layer.struct.k_format, n_refs), self._side(layer.struct.v_format, 0)])

    def _side(self, number: int, n_refs: int) -> _Side:
        store, n_bytes = self.store, format_info(number, self.store.head_dim).bytes_per_vector
        stride = -(-(store.page_size * n_bytes + n_refs * (store.head_dim + 2)) // 64) * 64
        side = _Side(self.page_bytes, stride, n_bytes - 2, n_refs)
        self.page_bytes += store.n_head_kv * stride
        return side

    @property
    def chunk(self) -> int:
        return max(CHUNK_BYTES // self.page_bytes, 1)

    def _heads(self, pages: np.ndarray, side: _Side) -> np.ndarray:
        n_head = self.store.n_head_kv
        return pages[:, side.begin: side.begin + n_head * side.stride].reshape(len(pages), n_head, side.stride)

    def _parts(self, pages: np.ndarray, number: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Of keys and values of a layer: codes and scales [n, n_head_kv, page_size, bytes], and those of the references."""
        found = []
        for side in self.sides[number]:
            heads, at, parts = self._heads(pages, side), 0, []
            for n, n_bytes in ((self.store.page_size, side.code_bytes), (self.store.page_size, 2),
                               (side.n_refs, self.store.head_dim), (side.n_refs, 2)):
                parts.append(heads[:, :, at: at + n * n_bytes].reshape(*heads.shape[:2], n, n_bytes))
                at += n * n_bytes
            found.append(tuple(parts))
        return found

    def _plain(self, pages: np.ndarray, number: int) -> list[np.ndarray]:
        """Head pages of keys and of values without what fills them up, which is how a device exports them."""
        n_bytes = [self.store.page_size * (side.code_bytes + 2) + side.n_refs * (self.store.head_dim + 2)
                   for side in self.sides[number]]
        return [self._heads(pages, side)[:, :, :n] for side, n in zip(self.sides[number], n_bytes)]

    def export(self, ids: Sequence[int], first_page: int, n_coded: int) -> np.ndarray:
        """A sequence's pages, from first_page on."""
        store, pages = self.store, np.zeros((len(ids), self.page_bytes), np.uint8)
        positions = (first_page * store.page_size + np.arange(len(ids) * store.page_size)).reshape(len(ids), -1)
        is_coded = (positions >= store.n_sink) & (positions < n_coded)
        device_ids = to_device(ids, np.int32, store.device)
        for number, layer in enumerate(store.layers):
            plain = self._plain(pages, number)
            exported = torch.empty(len(ids), layer.sizes.canonical_bytes, dtype=torch.uint8, device=store.device)
            with use(store.device):
                lib.tq_cuda_pages_export(layer.ref, device_ids.data_ptr(), len(ids), exported.data_ptr(), stream(store.device))
            heads = exported.cpu().numpy().reshape(len(ids), store.n_head_kv, -1)
            plain[0][:], plain[1][:] = np.split(heads, [plain[0].shape[2]], axis=2)
            # A device's memory is never cleared: what else is there belongs to nobody's file.
            for codes, scales, ref_codes, ref_scales in self._parts(pages, number):
                page, slot = np.nonzero(~is_coded)
                codes[page, :, slot] = scales[page, :, slot] = 0
                if ref_codes.shape[2]:
                    page, block = np.nonzero(~is_coded.reshape(len(ids), ref_codes.shape[2], -1).any(axis=2))
                    ref_codes[page, :, block] = ref_scales[page, :, block] = 0
        return pages

    def restore(self, pages: np.ndarray, ids: Sequence[int]) -> None:
        """The device's pages `ids` become these."""
        store, device_ids = self.store, to_device(ids, np.int32, self.store.device)
        for number, layer in enumerate(store.layers):
            content = torch.from_numpy(np.concatenate(self._plain(pages, number), axis=2)).to(store.device)
            with use(store.device):
                lib.tq_cuda_pages_import(layer.ref, device_ids.data_ptr(), len(ids), content.data_ptr(), stream(store.device))


def _exact_places(store: DeviceStore, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact positions, and which vectors they are."""
    sinks = np.arange(min(store.n_sink, length))
    ring = np.arange(max(store.n_sink, length - store.n_recent), length)
    return np.concatenate([sinks, ring]), np.concatenate([sinks, store.n_sink + ring % max(store.n_recent, 1)])


def _exact_shape(store: DeviceStore) -> tuple[int, ...]:
    return len(store.layers), 2, store.n_head_kv, store.n_sink + store.n_recent, store.head_dim


# ---- to the CPU ----

def save(store: DeviceStore, seqs: Sequence[int], path: str | os.PathLike, options: dict[str, Any]) -> None:
    """Write sequences to a file that a cache with these options loads."""
    store.check_finite(int(store.n_not_finite))
    n_pages = sum(-(-store.length(seq) // store.page_size) for seq in seqs)
    options = options | {"page_size": store.page_size, "max_tok": max(n_pages, 1) * store.page_size}
    host = Cache(len(store.layers), store.n_head_kv, store.head_dim, **options)
    try:
        for number in range(len(store.layers)):
            host.set_key_factors(number, store.key_factors(number))
        host.save(path, _to_host(store, seqs, host))
    finally:
        host.close()


def _to_host(store: DeviceStore, seqs: Sequence[int], host: Cache) -> list[int]:
    """Sequences of the CPU's cache with the content of the device's."""
    layout = _Pages(store)
    rows: list[int] = []
    for i, seq in enumerate(seqs):
        n_shared, parent = max(((_n_common(store, seqs[j], seq), -j) for j in range(i)), default=(0, 0))
        rows.append(host.seq_fork(rows[-parent]) if n_shared else host.seq_create())
        length = store.length(seq)
        places = _exact_places(store, length)[1]
        exact = np.zeros(_exact_shape(store), np.float16)
        exact[:, :, :, places] = store._exact[:, store.slots([seq])[0]].cpu().numpy()[:, :, :, places]
        n_coded = store._n_coded(length)
        ids, n_pages, begin = store.coded_pages(seq), -(-length // store.page_size), n_shared
        while True:
            end = min(begin + layout.chunk, n_pages)
            pages = np.zeros((end - begin, layout.page_bytes), np.uint8)
            if begin < len(ids):
                coded = ids[begin:end]
                pages[: len(coded)] = layout.export(coded, begin, n_coded)
            host.seq_import(rows[-1], min(end * store.page_size, length), begin, pages, exact)
            begin = end
            if end == n_pages:
                break
    return rows


def _n_common(store: DeviceStore, a: int, b: int) -> int:
    """Full pages that two sequences begin with and share. One that is not full may hold more than one of them knows of."""
    n = min(store._n_coded(store.length(seq)) for seq in (a, b)) // store.page_size
    same = [one == other for one, other in zip(store.coded_pages(a)[:n], store.coded_pages(b)[:n])]
    return same.index(False) if False in same else n


# ---- from the CPU ----

def move(host: Cache, seqs: Sequence[int], store: DeviceStore) -> list[int]:
    """Sequences of a device's empty cache with the content of the CPU's."""
    lengths = [host.length(seq) for seq in seqs]
    if any(host.length(seq, number) != length for seq, length in zip(seqs, lengths) for number in range(host.n_layer)):
        raise UnsupportedError("layers hold different numbers of tokens, which a device's cache cannot: load it on the CPU")
    for number in range(host.n_layer):
        store.set_key_factors(number, host.key_factors(number))
    layout, found = _Pages(store), store.seq_create(len(seqs))
    tables = [host.page_table(seq)[: store._n_pages(length)].tolist() for seq, length in zip(seqs, lengths)]
    places = dict.fromkeys(page for table in tables for page in table)
    places = dict(zip(places, store._take(len(places))))
    missing = set(places)
    for seq, table in zip(seqs, tables):
        for begin in range(0, len(table), layout.chunk):
            part = table[begin: begin + layout.chunk]
            fresh = [i for i, page in enumerate(part) if page in missing]
            if not fresh:
                continue
            pages = np.empty((len(part), layout.page_bytes), np.uint8)
            host.seq_export(seq, begin, pages)
            layout.restore(pages[fresh], [places[part[i]] for i in fresh])
            missing.difference_update(part)
    for seq, length, table in zip(found, lengths, tables):
        store.seq_fill(seq, length, [places[page] for page in table])
    store._release(list(places.values()))  # whom they belong to now
    for seq, slot in zip(seqs, store.slots(found)):
        store._exact[:, slot].copy_(torch.from_numpy(_exact_of(host, seq, store)))
    if store.max_tokens is not None:
        store.reserve(found, [0] * len(found))
    return found


def _exact_of(host: Cache, seq: int, store: DeviceStore) -> np.ndarray:
    """What a device holds exact, which the CPU may have coded: a sequence that was cropped keeps what was."""
    exact = np.zeros(_exact_shape(store), np.float16)
    for number in range(len(store.layers)):
        for first, n, places in _runs(*_exact_places(store, host.length(seq))):
            for side, rows in enumerate(host.read(seq, number, first, n)):
                exact[number, side][:, places] = rows.transpose(1, 0, 2)
    return exact


def _runs(positions: np.ndarray, places: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Positions that follow each other: the first, their number, and their places."""
    if len(positions) == 0:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    return [(int(positions[a]), b - a, places[a:b]) for a, b in zip(cuts, cuts[1:])]
