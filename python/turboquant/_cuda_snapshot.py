# SPDX-License-Identifier: MIT
"""
A device's sequences in files: docs/snapshot.md. They go through a turboquant.Cache of the same options, so that the library
alone writes, checks and refuses files.

The CPU subtracts references from keys where a device subtracts one mean, and its exact keys are whole. So the mean becomes the
reference of all blocks and is added to exact keys. That rounds, so what a device has goes into the file, too: behind the rows
one sequence without tokens for each, whose exact data are the device's, and a last one whose exact data hold the means.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ._cuda import FP16_MAX, DeviceStore, stream, to_device, use
from ._library import lib
from .cache import Cache
from .errors import UnsupportedError
from .formats import Codec, format_info

# Of pages that are on their way.
CHUNK_BYTES = 64 << 20
# Begins the values' part of the last sequence's exact data.
_MARK = np.frombuffer(b"keys less a mean", np.uint8)


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
        n_refs = -(-store.page_size // store.k_ref_block) if store.k_ref_block and store.n_recent else 0
        for layer in store.layers:
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
        """Head pages of keys and of values without references, which is how a device exports them."""
        return [self._heads(pages, side)[:, :, : self.store.page_size * (side.code_bytes + 2)] for side in self.sides[number]]

    def export(self, ids: Sequence[int], first_page: int, n_coded: int, means: Sequence[np.ndarray | None]) -> np.ndarray:
        """A sequence's pages, from first_page on; means: of each layer the reference of all its blocks, as records of tq8."""
        store, pages = self.store, np.zeros((len(ids), self.page_bytes), np.uint8)
        positions = (first_page * store.page_size + np.arange(len(ids) * store.page_size)).reshape(len(ids), -1)
        page, slot = np.nonzero((positions < store.n_sink) | (positions >= n_coded))
        device_ids = to_device(ids, np.int32, store.device)
        for number, layer in enumerate(store.layers):
            plain = self._plain(pages, number)
            exported = torch.empty(len(ids), layer.sizes.canonical_bytes, dtype=torch.uint8, device=store.device)
            with use(store.device):
                lib.tq_cuda_pages_export(layer.ref, device_ids.data_ptr(), len(ids), exported.data_ptr(), stream(store.device))
            heads = exported.cpu().numpy().reshape(len(ids), store.n_head_kv, -1)
            plain[0][:], plain[1][:] = np.split(heads, [plain[0].shape[2]], axis=2)
            for codes, scales, ref_codes, ref_scales in self._parts(pages, number):
                # A device's memory is never cleared: what else is there belongs to nobody's file.
                codes[page, :, slot] = scales[page, :, slot] = 0
                if means[number] is not None:
                    ref_codes[:], ref_scales[:] = means[number][:, None, 2:], means[number][:, None, :2]
        return pages

    def restore(self, pages: np.ndarray, ids: Sequence[int]) -> None:
        """The device's pages `ids` become these."""
        store, device_ids = self.store, to_device(ids, np.int32, self.store.device)
        for number, layer in enumerate(store.layers):
            content = torch.from_numpy(np.concatenate(self._plain(pages, number), axis=2)).to(store.device)
            with use(store.device):
                lib.tq_cuda_pages_import(layer.ref, device_ids.data_ptr(), len(ids), content.data_ptr(), stream(store.device))

    def has_references(self, pages: np.ndarray) -> bool:
        """Are keys coded against others than zeros?"""
        return any(part.any() for number in range(len(self.sides)) for part in self._parts(pages, number)[0][2:])


def _exact_places(store: DeviceStore, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact positions, and which vectors they are."""
    sinks = np.arange(min(store.n_sink, length))
    ring = np.arange(max(store.n_sink, length - store.n_recent), length)
    return np.concatenate([sinks, ring]), np.concatenate([sinks, store.n_sink + ring % max(store.n_recent, 1)])


def _exact_shape(store: DeviceStore | Cache, n_layer: int) -> tuple[int, ...]:
    return n_layer, 2, store.n_head_kv, store.n_sink + store.n_recent, store.head_dim


# ---- to the CPU ----

def save(store: DeviceStore, seqs: Sequence[int], path: str | os.PathLike, options: dict[str, Any],
         more: Callable[[Cache], list[int]]) -> None:
    """Write sequences to a file that a cache with these options loads; more: makes others, to stand behind them."""
    store.check_finite(int(store.n_not_finite))
    n_pages = sum(-(-store.length(seq) // store.page_size) for seq in seqs)
    options = options | {"page_size": store.page_size, "max_tok": max(n_pages, 1) * store.page_size}
    host = Cache(len(store.layers), store.n_head_kv, store.head_dim, **options)
    try:
        host.save(path, [*_to_host(store, seqs, host), *more(host)])
    finally:
        host.close()


def _to_host(store: DeviceStore, seqs: Sequence[int], host: Cache) -> list[int]:
    """Sequences of the CPU's cache with the content of the device's, and those that its means need."""
    layout, means = _Pages(store), [None if mean is None else mean.cpu().numpy()
                                    for mean in (layer.key_mean for layer in store.layers)]
    has_means = any(mean is not None for mean in means)
    if has_means and (store.n_recent == 0 or store.n_sink + store.n_recent < 2):
        raise UnsupportedError("a cache whose keys have lost their mean needs n_recent of 1 and two exact tokens to be saved: "
                               "make it with k_ref_block=0, or with the preset's n_sink and n_recent")
    codec = Codec("tq8", store.head_dim, store._seed)
    references = [None if mean is None else codec.encode(mean) for mean in means]
    rows: list[int] = []
    own: list[np.ndarray] = []
    for i, seq in enumerate(seqs):
        n_shared, parent = max(((_n_common(store, seqs[j], seq), -j) for j in range(i)), default=(0, 0))
        rows.append(host.seq_fork(rows[-parent]) if n_shared else host.seq_create())
        length = store.length(seq)
        places = _exact_places(store, length)[1]
        exact, own_exact = (np.zeros(_exact_shape(store, len(store.layers)), np.float16) for _ in range(2))
        found = store._exact[:, store.slots([seq])[0]].cpu().numpy()[:, :, :, places]
        own_exact[:, :, :, places] = exact[:, :, :, places] = found
        for number, mean in enumerate(means):
            if mean is not None:
                keys = found[number, 0] + mean[:, None]
                exact[number, 0][:, places] = keys.clip(-FP16_MAX, FP16_MAX)
        own.append(own_exact)
        n_coded = store._n_coded(length)
        ids, n_pages, begin = store.coded_pages(seq), -(-length // store.page_size), n_shared
        while True:
            end = min(begin + layout.chunk, n_pages)
            pages = np.zeros((end - begin, layout.page_bytes), np.uint8)
            if begin < len(ids):
                coded = ids[begin:end]
                pages[: len(coded)] = layout.export(coded, begin, n_coded, references)
            host.seq_import(rows[-1], min(end * store.page_size, length), begin, pages, exact)
            begin = end
            if end == n_pages:
                break
    return rows + (_mean_sequences(host, own, means) if has_means else [])


def _n_common(store: DeviceStore, a: int, b: int) -> int:
    """Full pages that two sequences begin with and share. One that is not full may hold more than one of them knows of."""
    n = min(store._n_coded(store.length(seq)) for seq in (a, b)) // store.page_size
    same = [one == other for one, other in zip(store.coded_pages(a)[:n], store.coded_pages(b)[:n])]
    return same.index(False) if False in same else n


def _mean_sequences(host: Cache, own: Sequence[np.ndarray], means: Sequence[np.ndarray | None]) -> list[int]:
    last = np.zeros_like(own[0])
    for number, mean in enumerate(means):
        if mean is not None:
            last[number, 0, :, :2] = mean.view(np.float16).reshape(len(mean), 2, -1)
    last[0, 1].reshape(-1).view(np.uint8)[: len(_MARK)] = _MARK
    seqs = []
    for exact in (*own, last):
        seqs.append(host.seq_create())
        host.seq_import(seqs[-1], 0, 0, None, exact)
    return seqs


# ---- from the CPU ----

def split(host: Cache, seqs: list[int], exact_bytes: int) -> tuple[list[int], list[int]]:
    """Which of a file's sequences are rows, and which those that a device's means need; exact_bytes: what the file says."""
    exact = np.zeros(_exact_shape(host, host.n_layer), np.float16)
    if len(seqs) % 2 == 0 or exact.nbytes != exact_bytes or any(host.length(seq) for seq in seqs[len(seqs) // 2:]):
        return seqs, []
    host.seq_export(seqs[-1], exact=exact)
    if not np.array_equal(exact[0, 1].reshape(-1).view(np.uint8)[: len(_MARK)], _MARK):
        return seqs, []
    return seqs[: len(seqs) // 2], seqs[len(seqs) // 2:]


def move(host: Cache, seqs: Sequence[int], of_means: Sequence[int], store: DeviceStore) -> list[int]:
    """Sequences of a device's empty cache with the content of the CPU's. of_means: what `split` has found."""
    lengths = [host.length(seq) for seq in seqs]
    if any(host.length(seq, number) != length for seq, length in zip(seqs, lengths) for number in range(host.n_layer)):
        raise UnsupportedError("layers hold different numbers of tokens, which a device's cache cannot: load it on the CPU")
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
            if not of_means and layout.has_references(pages):
                raise UnsupportedError(
                    "keys are coded against references of blocks, as the CPU's caches have them, where a device's has one "
                    "mean: stay on the CPU, or run the prompt again. Files of caches with k_ref_block=0 serve both, and one "
                    "that a device wrote goes there by load(device=)")
            layout.restore(pages[fresh], [places[part[i]] for i in fresh])
            missing.difference_update(part)
    for seq, length, table in zip(found, lengths, tables):
        store.seq_fill(seq, length, [places[page] for page in table])
    store._release(list(places.values()))  # whom they belong to now
    for i, (seq, slot) in enumerate(zip(seqs, store.slots(found))):
        exact = _bytes_of(host, of_means[i], store) if of_means else _exact_of(host, seq, store)
        store._exact[:, slot].copy_(torch.from_numpy(exact))
    means = _bytes_of(host, of_means[-1], store)[:, 0, :, :2] if of_means else [None] * len(store.layers)
    for layer, mean in zip(store.layers, means):
        layer.has_settled = True
        if mean is not None and mean.any():
            layer.set_mean(np.ascontiguousarray(mean).reshape(store.n_head_kv, -1).view(np.float32))
    if store.max_tokens is not None:
        store.reserve(found, [0] * len(found))
    return found


def _bytes_of(host: Cache, seq: int, store: DeviceStore) -> np.ndarray:
    exact = np.empty(_exact_shape(store, len(store.layers)), np.float16)
    host.seq_export(seq, exact=exact)
    return exact


def _exact_of(host: Cache, seq: int, store: DeviceStore) -> np.ndarray:
    """What a device holds exact, which the CPU may have coded: a sequence that was cropped keeps what was."""
    exact = np.zeros(_exact_shape(store, len(store.layers)), np.float16)
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
