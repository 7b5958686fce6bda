# SPDX-License-Identifier: MIT
"""
The cache in MLX-LM on Apple GPUs: compressed keys and values as MLX arrays, read by the Metal kernels of metal_kernels.py.
docs/metal.md. Everything is lazy: a layer adds its work to MLX's graph and evaluates nothing.

Tokens that are no sinks are encoded when n_recent tokens have followed them, encode_batch at a time; until then they are exact,
in float16. So those are bounded: n_sink + n_recent + encode_batch, and a prompt's own part while it is attended to.
"""
from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from ctypes import c_int32, c_uint64
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import cache as _cache, metal_kernels as kernels, weight_factors
from ._library import integer
from ._mlx_batch import BatchCache, Factors, Shape
from ._mlx_exact import ExactPrompt
from .errors import ArgumentError, UnsupportedError
from .formats import SEED_DEFAULT, format_info

GROW_TOKENS = 1024  # codes get room for so many tokens more at least, or for an eighth more


class _Options(NamedTuple):
    """A preset and what was said in place of parts of it."""

    k_format: int
    v_format: int
    n_sink: int
    n_recent: int
    has_refs: bool
    encode_batch: int
    seed: int


def _options(encode_batch: int = kernels.BLOCK, **options: Any) -> _Options:
    """Check options. Raises ArgumentError, and UnsupportedError for what the CPU's cache has and this one has not."""
    if "calibration" in options:
        raise UnsupportedError("calibration: the Metal kernels know no transforms of keys; leave it out, or compute on the CPU "
                               "(mx.set_default_device(mx.cpu))")
    other = options.keys() - {"preset", "k_format", "v_format", "n_sink", "n_recent", "k_ref_block", "seed"}
    if other:
        raise UnsupportedError(f"{', '.join(other)}: the cache on an Apple GPU has no such option; it takes k_format, "
                               "v_format, n_sink, n_recent, k_ref_block, encode_batch, seed and factors")
    encode_batch = integer(encode_batch, c_int32, "encode_batch")
    if encode_batch < 1 or kernels.BLOCK % encode_batch != 0:
        raise ArgumentError(f"encode_batch is {encode_batch}; give a divisor of {kernels.BLOCK}")
    on_cpu, ref_block = _cache.Cache(1, 1, 128, max_tok=1, dry_run=True, **options), weight_factors.references_of(options)
    for number in (on_cpu.k_format, on_cpu.v_format):
        if number not in kernels.BITS:
            names = ", ".join(format_info(known).name for known in kernels.BITS)
            raise UnsupportedError(f"{format_info(number).name} has no Metal kernels; there are {names}")
    if ref_block not in (0, kernels.BLOCK):
        raise UnsupportedError(f"k_ref_block is {ref_block}; the Metal kernels have blocks of {kernels.BLOCK}, or 0 for none")
    return _Options(on_cpu.k_format, on_cpu.v_format, on_cpu.n_sink, on_cpu.n_recent, ref_block > 0, encode_batch,
                    integer(options.get("seed", SEED_DEFAULT), c_uint64, "seed"))


def _grown(x: mx.array, n: int) -> mx.array:
    """x [n_batch, n_head_kv, m, ...] with zeros behind, n in all."""
    return mx.concatenate([x, mx.zeros((*x.shape[:2], n - x.shape[2], *x.shape[3:]), x.dtype)], axis=2)


def _written(x: mx.array, rows: mx.array, first: int) -> mx.array:
    """x [n_batch, n_head_kv, m, ...] with rows from `first` on; in place where nobody else has x."""
    return mx.slice_update(x, rows, mx.array([first]), axes=[2])


class _Sequence:
    """One sequence: its arrays, n_batch = 1, which are replaced and never changed, so that copies may share them. Lazy."""

    def __init__(self, options: _Options, shape: Shape, factors: np.ndarray | None) -> None:
        self._options, self.shape = options, shape
        self.factors = None if factors is None else mx.array(factors)
        self.arrays = self._empty_arrays()
        self.length = self.coded = 0  # tokens; those below `coded` are encoded, as far as they are no sinks

    def __len__(self) -> int:
        return self.length

    def fork(self) -> _Sequence:
        return copy.copy(self)

    def trim(self, length: int) -> None:
        """What is encoded stays encoded."""
        self.length, self.coded = length, min(self.coded, length)

    def attend(self, queries: mx.array | None, keys: mx.array, values: mx.array, scale: float = 1,
               sinks: mx.array | None = None) -> mx.array | None:
        options, begin, n_before = self._options, self._first_exact(), self._n_exact()
        self._keep_exact(n_before, keys.astype(mx.float16), values.astype(mx.float16))
        self.length += keys.shape[2]
        extent = self._extent()
        end = max(self.length - options.n_recent, 0) // options.encode_batch * options.encode_batch
        if end > begin:
            self._encode(begin, end)
        out = None if queries is None else self._attend(queries, extent, scale, sinks)
        if end > begin:
            self._forget_exact(end - begin, extent.n_exact)
            self.coded = end
        return out

    def attend_again(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        return self._attend(queries, self._extent(), scale, sinks)

    def _attend(self, queries: mx.array, extent: kernels.Extent, scale: float, sinks: mx.array | None) -> mx.array:
        options = self._options
        return kernels.attend(queries, self.arrays, options.k_format, options.v_format, options.has_refs, extent, scale,
                              options.seed, sinks, self.factors)

    def _extent(self) -> kernels.Extent:
        options = self._options
        return kernels.Extent(self.length, options.n_sink, options.n_recent, options.encode_batch, self.coded,
                              self._first_exact(), self._n_exact())

    def _exact_capacity(self) -> int:
        return self._options.n_sink + self._options.n_recent + self._options.encode_batch

    def _empty_arrays(self) -> kernels.Arrays:
        n_head_kv, head_dim, _ = self.shape
        lead, options = (1, n_head_kv), self._options

        def codes(fmt: int) -> list[mx.array]:
            return [mx.zeros((*lead, kernels.BLOCK, kernels.words(fmt, head_dim)), mx.uint32),
                    mx.zeros((*lead, kernels.BLOCK), mx.float16)]

        exact = mx.zeros((*lead, self._exact_capacity(), head_dim), mx.float16)
        refs = mx.zeros((*lead, 1, kernels.reference_words(head_dim)), mx.uint32)
        return kernels.Arrays(*codes(options.k_format), refs, *codes(options.v_format), exact, exact)

    def _first_exact(self) -> int:
        """The position of the exact vector that follows the sinks, and of the first that is not encoded."""
        return max(self.coded, self._options.n_sink)

    def _n_exact(self) -> int:
        return min(self.length, self._options.n_sink) + max(self.length - self._first_exact(), 0)

    def _keep_exact(self, n: int, keys: mx.array, values: mx.array) -> None:
        """Rows behind the n exact ones. A long prompt part makes longer arrays, until its tokens are encoded."""
        fits = n + keys.shape[2] <= self.arrays.k_exact.shape[2]

        def added(x: mx.array, rows: mx.array) -> mx.array:
            return _written(x, rows, n) if fits else mx.concatenate([x[:, :, :n], rows], axis=2)

        self.arrays = self.arrays._replace(k_exact=added(self.arrays.k_exact, keys), v_exact=added(self.arrays.v_exact, values))

    def _forget_exact(self, n_coded: int, n_exact: int) -> None:
        """Drop what was encoded from the exact arrays, which get their usual size again."""
        n_sink = self._options.n_sink

        def rest(x: mx.array) -> mx.array:
            kept = mx.concatenate([x[:, :, :n_sink], x[:, :, n_sink + n_coded : n_exact]], axis=2)
            return _grown(kept, self._exact_capacity())

        self.arrays = self.arrays._replace(k_exact=rest(self.arrays.k_exact), v_exact=rest(self.arrays.v_exact))

    def _encode(self, begin: int, end: int) -> None:
        """Encode positions [begin, end), which follow the sinks in the exact arrays."""
        options, arrays = self._options, self.arrays
        capacity = arrays.k_codes.shape[2]
        if end > capacity:
            wanted = max(end, capacity + max(GROW_TOKENS, capacity // 8))
            n = -(-wanted // kernels.BLOCK) * kernels.BLOCK
            sizes = {"k_codes": n, "k_scales": n, "refs": n // kernels.BLOCK, "v_codes": n, "v_scales": n}
            arrays = arrays._replace(**{name: _grown(getattr(arrays, name), size) for name, size in sizes.items()})
        first = options.n_sink
        refs = None
        if options.has_refs:
            # A block's reference is made with its first token, and stays when the block is trimmed.
            starts = [begin] if begin == options.n_sink or begin % kernels.BLOCK == 0 else []
            starts += range(begin // kernels.BLOCK * kernels.BLOCK + kernels.BLOCK, end, kernels.BLOCK)
            if starts:
                made = kernels.encode_references(arrays.k_exact, [p - begin + first for p in starts], options.n_recent,
                                                 options.seed, self.factors)
                arrays = arrays._replace(refs=_written(arrays.refs, made, starts[0] // kernels.BLOCK))
            refs = arrays.refs
        found = {}
        for side, fmt, *of_keys in (("k", options.k_format, refs, self.factors), ("v", options.v_format)):
            rows = getattr(arrays, f"{side}_exact")
            codes, scales = kernels.encode(fmt, rows, first, end - begin, options.seed, begin, *of_keys)
            found[f"{side}_codes"] = _written(getattr(arrays, f"{side}_codes"), codes, begin)
            found[f"{side}_scales"] = _written(getattr(arrays, f"{side}_scales"), scales, begin)
        self.arrays = arrays._replace(**found)


class TurboQuantMetalKVCache(BatchCache):
    """
    The cache of one layer on an Apple GPU. Options: k_format, v_format, n_sink, n_recent and k_ref_block in place of the
    preset's; encode_batch, how many tokens are encoded at a time (a divisor of 64); seed; factors, as on the CPU. Each
    sequence of a batch has launches of its own.
    """

    def __init__(self, preset: str = "TQ4", **options: Any) -> None:
        super().__init__({"preset": preset, **options})
        _options(**self._used_options())

    def _make(self, shape: Shape) -> _Sequence:
        _, head_dim, head_dim_v = shape
        if head_dim not in kernels.HEAD_DIMS or head_dim_v != head_dim:
            raise UnsupportedError(f"keys of {head_dim} and values of {head_dim_v}: the Metal kernels have head_dims "
                                   f"{', '.join(map(str, kernels.HEAD_DIMS))}, the same for both")
        return _Sequence(_options(**self._used_options()), shape, self._factors.array)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, with the room that they have for more. Arrays that copies share count in each."""
        of_sequences = (x for sequence in self._coded() for x in (*sequence.arrays, sequence.factors) if x is not None)
        return sum(x.nbytes for x in of_sequences) + self._exact_bytes()

    # ---- what save_prompt_cache and load_prompt_cache call ----

    @property
    def state(self) -> list[str | mx.array]:
        """What it is, in JSON, and the arrays of all sequences; MLX-LM evaluates them after each part of a prompt."""
        held, arrays = [], []
        for sequence in self._sequences:
            if sequence is None:
                held.append(None)
                continue
            coded, exact = (sequence.held, sequence.exact) if isinstance(sequence, ExactPrompt) else (sequence, ())
            held.append([coded.length, coded.coded, coded.shape, len(exact)])
            arrays += [*coded.arrays, *exact]
        said = {"options": self._options, "batched": self._batched, "sequences": held, "key_factors": self._factors}
        return [json.dumps(said), *arrays]

    @state.setter
    def state(self, value: Sequence[str | mx.array]) -> None:
        said, arrays = json.loads(value[0]), iter(value[1:])
        self.__init__(**said["options"])
        self._batched, self._sequences, self._factors = said["batched"], [], Factors(*said["key_factors"])
        for held in said["sequences"]:
            sequence = None
            if held is not None:
                length, coded, shape, *n_exact = held  # files from before 2026-12 do not have the last one
                sequence = self._make(tuple(shape))
                sequence.length, sequence.coded = length, coded
                sequence.arrays = kernels.Arrays(*(next(arrays) for _ in kernels.Arrays._fields))
                sequence = self._wrapped(sequence, tuple(next(arrays) for _ in range(sum(n_exact))))
            self._sequences.append(sequence)
        self._left = [0] * len(self._sequences)
