# SPDX-License-Identifier: MIT
"""
The kernels of src/kernels/metal as functions of MLX arrays, lazy as MLX's own. docs/metal.md has the arrays.

All launches go through `launcher`, which tests replace by an emulation; nothing else here knows whether there is a GPU.
"""
from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

SQ8, SQ4, SQ3, SQ2, TT4, TT3, TT2 = 2, 3, 4, 5, 9, 10, 11  # tq_format
BITS = {SQ8: 8, SQ4: 4, SQ3: 3, SQ2: 2, TT4: 4, TT3: 3, TT2: 2}
HEAD_DIMS = (32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 512, 576)
BLOCK = 64  # tokens that share a reference, and the unit in which attention is cut
SIMD, GROUP = 32, 256  # threads of a SIMD group, and of a threadgroup of attention
PREFILL_ROWS = 32  # query rows of a threadgroup of prefill
SPLITS_MAX, GROUPS_WANTED = 32, 256  # of a decode call: splits of a row, threadgroups in all


class Kernel(NamedTuple):
    """One kernel: the names of its arrays, in order, and the files of its header."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    files: tuple[str, ...]


_ENCODE_FILES = ("common", "tables", "rotate", "factors", "encode")
_ENCODE = ("rows", "refs", "factors", "signs", "params")
_STORE = ("q", "k_codes", "k_scales", "refs", "v_codes", "v_scales", "k_exact", "v_exact", "factors", "signs", "params")
NO_SINK = -1e30
_ATTEND_FILES = (*_ENCODE_FILES, "trellis", "expand", "attend")
KERNELS = {
    "encode": Kernel(_ENCODE, ("codes", "scales"), _ENCODE_FILES),
    "trellis": Kernel(_ENCODE, ("codes", "scales"), (*_ENCODE_FILES, "trellis")),
    "reference": Kernel(("rows", "starts", "factors", "signs", "params"), ("refs",), _ENCODE_FILES),
    "decode": Kernel(_STORE, ("partial",), (*_ATTEND_FILES, "decode")),
    "combine": Kernel(("partial", "signs", "sinks", "params"), ("out",), (*_ATTEND_FILES, "combine")),
    "prefill": Kernel((*_STORE, "sinks"), ("out",), (*_ATTEND_FILES, "prefill")),
}


def sources() -> Path:
    """The folder of the Metal sources: the wheel's, a checkout's, or what TURBOQUANT_METAL names."""
    named = os.environ.get("TURBOQUANT_METAL")
    here = Path(__file__).resolve().parent
    return Path(named) if named else next((path for path in (here / "metal", here.parent.parent / "src/kernels/metal")
                                           if path.is_dir()), here / "metal")


@functools.cache
def header(name: str) -> str:
    """What stands before a kernel."""
    return "\n".join((sources() / f"{file}.metal").read_text() for file in KERNELS[name].files)


@functools.cache
def body(name: str) -> str:
    """A kernel's body, which MLX wraps in a function."""
    return (sources() / f"bodies/{name}.metal").read_text()


@functools.cache
def _compiled(name: str) -> Callable:
    kernel = KERNELS[name]
    return mx.fast.metal_kernel(name=f"turboquant_{name}", input_names=list(kernel.inputs), output_names=list(kernel.outputs),
                                source=body(name), header=header(name), compile_options={"math_mode": "safe"})


def launch_on_gpu(name: str, template: list[tuple[str, int]], inputs: list[mx.array], grid: tuple[int, int, int],
                  threadgroup: tuple[int, int, int], shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype]) -> list[mx.array]:
    """Put a kernel into MLX's graph; it is compiled when it first runs with these types and template arguments."""
    return _compiled(name)(inputs=inputs, template=template, grid=grid, threadgroup=threadgroup, output_shapes=shapes,
                           output_dtypes=dtypes)


launcher: Callable = launch_on_gpu


def words(fmt: int, head_dim: int) -> int:
    """uint32 of a vector's codes; the last may have bits left over, which are 0."""
    return -(-head_dim * BITS[fmt] // 32)


@functools.cache
def signs(head_dim: int, seed: int) -> mx.array:
    """The rotation's signs, uint32 [rounds, head_dim / 32 rounded up] and padding: bit i of a round's word k negates element
    32 k + i."""
    mask, found = (1 << 64) - 1, []

    def following(state: int) -> tuple[int, int]:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return state, z ^ (z >> 31)

    for stream in range(3 if head_dim < 64 else 2 if head_dim < 128 else 1):
        state, drawn = following(seed ^ (head_dim << 32 | stream))[1], []
        for _ in range(-(-head_dim // 64)):
            state, bits = following(state)
            drawn += [bits & 0xFFFFFFFF, bits >> 32]
        found += drawn[: -(-head_dim // 32)]
    return mx.array(np.array(found + [0] * 16, np.uint32))


def _ints(*values: int) -> mx.array:
    """Parameters. MLX passes arrays of fewer than 8 elements in another address space than the kernels take."""
    return mx.array(np.array([*values, *[0] * 8], np.int32))


def reference_words(head_dim: int) -> int:
    """uint32 of a reference: its sq8 codes, then a word with its scale."""
    return words(SQ8, head_dim) + 1


def _factors_or_none(factors: mx.array | None) -> mx.array:
    """What a kernel without factors is given does not matter."""
    return mx.zeros(8, mx.int8) if factors is None else factors


def encode_references(rows: mx.array, starts: Sequence[int], window: int, seed: int, factors: mx.array | None = None
                      ) -> mx.array:
    """
    The means of rows [start, start + window) of float16 [n_batch, n_head_kv, n_rows, head_dim], coded: uint32 [n_batch,
    n_head_kv, n_starts, reference_words]. factors, int8 [n_head_kv, head_dim], as of libturboquant.Cache.set_key_factors.
    """
    n_batch, n_head_kv, n_rows, head_dim = rows.shape
    n = len(starts)
    inputs = [rows, _ints(*starts), _factors_or_none(factors), signs(head_dim, seed), _ints(window, n_rows, n, n_head_kv)]
    template = [("D", head_dim), ("HAS_FACTORS", int(factors is not None))]
    return launcher("reference", template, inputs, (SIMD, n, n_batch * n_head_kv), (SIMD, 1, 1),
                    [(n_batch, n_head_kv, n, reference_words(head_dim))], [mx.uint32])[0]


def encode(fmt: int, rows: mx.array, first: int, n: int, seed: int, position: int = 0, refs: mx.array | None = None,
           factors: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """
    Rows [first, first + n) of float16 [n_batch, n_head_kv, n_rows, head_dim], the first at `position`, against references and
    by factors if given: codes uint32 [n_batch, n_head_kv, n, words], scales float16 [n_batch, n_head_kv, n].
    """
    n_batch, n_head_kv, n_rows, head_dim = rows.shape
    n_blocks = 0 if refs is None else refs.shape[2]
    inputs = [rows, mx.zeros(8, mx.uint32) if refs is None else refs, _factors_or_none(factors), signs(head_dim, seed),
              _ints(first, position, n_rows, n_blocks, n, n_head_kv)]
    template = [("D", head_dim), ("FORMAT", fmt), ("HAS_REF", int(refs is not None)), ("HAS_FACTORS", int(factors is not None))]
    shapes = [(n_batch, n_head_kv, n, words(fmt, head_dim)), (n_batch, n_head_kv, n)]
    codes, scales = launcher("trellis" if fmt >= TT4 else "encode", template, inputs, (SIMD, n, n_batch * n_head_kv),
                             (SIMD, 1, 1), shapes, [mx.uint32, mx.float16])
    return codes, scales


class Arrays(NamedTuple):
    """What a layer holds. The first two dimensions are [n_batch, n_head_kv]; the third has room for more than is there."""

    k_codes: mx.array  # uint32 [.., capacity, words], the capacity a multiple of BLOCK
    k_scales: mx.array  # float16 [.., capacity]
    refs: mx.array  # uint32 [.., capacity / BLOCK, reference_words]
    v_codes: mx.array
    v_scales: mx.array
    k_exact: mx.array  # float16 [.., exact capacity, head_dim]
    v_exact: mx.array


class Extent(NamedTuple):
    """Which tokens the arrays hold, and what queries see; src/kernels/metal/attend.metal says more."""

    length: int  # tokens, the queries' own included
    n_sink: int
    n_recent: int
    n_batch: int  # tokens that are encoded at a time
    coded: int  # tokens below were encoded before this call
    first_exact: int  # position of the exact vector that follows the sinks
    n_exact: int


def _sinks_of_heads(sinks: mx.array | None, n_batch: int, n_head: int) -> mx.array:
    """In base 2, float32 [n_batch * n_head] and padding; ones that weigh nothing if there are none."""
    if sinks is None:
        return mx.full((n_batch * n_head + 8,), NO_SINK, mx.float32)
    return mx.concatenate([mx.tile(sinks.astype(mx.float32) * 1.4426950408889634, n_batch), mx.zeros(8)])


def attend(q: mx.array, arrays: Arrays, k_format: int, v_format: int, has_refs: bool, extent: Extent, softmax_scale: float,
           seed: int, sinks: mx.array | None = None, factors: mx.array | None = None) -> mx.array:
    """
    Causal attention of q [n_batch, n_head, n_query, head_dim], the last positions of a sequence: the same shape. sinks
    [n_head]: learned logits that count in the softmax's denominator only. factors: those that keys were encoded with.
    """
    n_batch, n_head, n_query, head_dim = q.shape
    n_head_kv = arrays.k_exact.shape[1]
    group, n_rows = n_head // n_head_kv, n_query * (n_head // n_head_kv)
    n_heads = n_batch * n_head_kv
    rows_max = 8 if head_dim <= 128 else 4 if head_dim <= 320 else 2  # of a threadgroup of decode, for which it has registers
    n_tiles = -(-n_rows // rows_max)
    end = max(extent.coded, max(extent.length - extent.n_recent, 0) // extent.n_batch * extent.n_batch, extent.n_sink)
    n_blocks = -(-end // BLOCK) if end > extent.n_sink else 0
    n_splits = max(1, min(GROUPS_WANTED // max(n_heads * n_tiles, 1), -(-n_blocks // (GROUP // SIMD)), SPLITS_MAX))
    split_blocks = -(-n_blocks // n_splits)
    scale_log2 = struct.unpack("i", struct.pack("f", softmax_scale * 1.4426950408889634))[0]
    params = _ints(n_query, group, extent.length, extent.n_sink, extent.n_recent, extent.n_batch, extent.coded,
                   arrays.k_codes.shape[2], extent.first_exact, extent.n_exact, arrays.k_exact.shape[2], n_splits, split_blocks,
                   scale_log2, n_head_kv)
    rotation = signs(head_dim, seed)
    inputs, of_heads = [q, *arrays, _factors_or_none(factors), rotation, params], _sinks_of_heads(sinks, n_batch, n_head)
    template = [("D", head_dim), ("KF", k_format), ("VF", v_format), ("HAS_REF", int(has_refs)),
                ("HAS_FACTORS", int(factors is not None))]
    if n_rows > (16 if head_dim <= 128 else 8):
        grid = (GROUP, -(-n_rows // PREFILL_ROWS), n_heads)
        return launcher("prefill", template, [*inputs, of_heads], grid, (GROUP, 1, 1), [q.shape], [q.dtype])[0]
    rows = -(-n_rows // n_tiles)
    partial = launcher("decode", [*template, ("ROWS", rows)], inputs, (GROUP * (n_splits + 1), n_tiles, n_heads),
                       (GROUP, 1, 1), [(n_heads, n_splits + 1, n_rows, head_dim + 2)], [mx.float32])[0]
    return launcher("combine", [("D", head_dim)], [partial, rotation, of_heads, params], (SIMD, n_rows, n_heads), (SIMD, 1, 1),
                    [q.shape], [q.dtype])[0]
