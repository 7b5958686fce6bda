# SPDX-License-Identifier: MIT
"""Formats, presets, and coding single vectors."""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._library import FormatInfo, Preset as _Preset, integer, lib
from .buffers import address, floats, view, writable
from .errors import ArgumentError

SEED_DEFAULT = 0x7475726271756E74
"""TQ_SEED_DEFAULT: the seed of the rotation's signs that the presets use."""


@dataclass(frozen=True)
class Format:
    """How one head vector is stored, at one head_dim (docs/formats.md has the bytes)."""

    name: str
    number: int
    description: str
    bits: int
    head_dim: int
    bytes_per_vector: int
    bits_per_value: float
    ratio_to_f16: float


@dataclass(frozen=True)
class Preset:
    """Formats of keys and values, and how many tokens stay exact."""

    name: str
    description: str
    k_format: int
    v_format: int
    n_sink: int
    n_recent: int
    k_ref_block: int
    index: int

    def bits_per_value(self, head_dim: int, n_head_kv: int, n_tok: int) -> float:
        """Mean bits of a value of keys and values in a store of n_tok tokens, everything counted."""
        out = ctypes.c_double()
        lib.tq_preset_bits_per_value(ctypes.byref(out), lib.tq_preset_get(self.index), head_dim, n_head_kv, n_tok)
        return out.value


def format_number(name: str | int) -> int:
    """tq_format of a name such as "sq4". Raises UnsupportedError for an unknown one, with the names that there are."""
    if not isinstance(name, str):
        return integer(name, ctypes.c_int, "format")
    out = ctypes.c_int()
    lib.tq_format_from_name(ctypes.byref(out), name.encode(errors="replace"))
    return out.value


def exact_ends(formats: Sequence[str | int | None] | None, fmt: str | int | None, n_layer: int, exact_layers: int
               ) -> Sequence[str | int | None] | None:
    """
    The formats of keys, or of values, of a cache of n_layer layers: `formats` or else `fmt` for each, but "f16" for the first
    and the last exact_layers of them; `formats` as it is where exact_layers is 0. Raises ArgumentError where no layer would be
    left.
    """
    n = integer(exact_layers, ctypes.c_int32, "exact_layers")
    if n < 0 or (n > 0 and 2 * n >= n_layer):
        most = (n_layer - 1) // 2
        raise ArgumentError(f"exact_layers is {n}, of {n_layer} layers: give the number of layers at each end that stay exact, "
                            f"0 to {most} here")
    if n == 0:
        return formats
    middle = ([fmt] * n_layer if formats is None else list(formats))[n : n_layer - n]
    return ["f16"] * n + middle + ["f16"] * n


def format_info(name: str | int, head_dim: int = 128) -> Format:
    """Describe a format. Raises UnsupportedError for an unknown one, or a head_dim that has no rotation."""
    info, number = FormatInfo(), format_number(name)
    lib.tq_format_describe(ctypes.byref(info), number, head_dim)
    return Format(info.name.decode(), number, info.description.decode(), info.bits, info.head_dim, info.bytes_per_vector,
                  info.bits_per_value, info.ratio_to_f16)


def _preset_of(index: int, raw: _Preset) -> Preset:
    return Preset(raw.name.decode(), raw.description.decode(), raw.k_format, raw.v_format, raw.n_sink, raw.n_recent,
                  raw.k_ref_block, index)


def presets() -> dict[str, Preset]:
    """All presets by name, in the library's order."""
    found: dict[str, Preset] = {}
    while raw := lib.tq_preset_get(len(found)):  # a null pointer is behind the last
        found[raw.contents.name.decode()] = _preset_of(len(found), raw.contents)
    return found


def preset(name: str) -> Preset:
    """A preset by name, in upper or lower case. Raises ArgumentError with the names that there are."""
    known = presets()
    found = known.get(name.upper()) if isinstance(name, str) else None
    if found is None:
        raise ArgumentError(f"unknown preset {name!r}; the presets are {', '.join(known)}")
    return found


def head_dims() -> list[int]:
    """The head_dims that have a rotation."""
    n = ctypes.c_int32()
    found = lib.tq_head_dim_list(ctypes.byref(n))
    return found[: n.value]


class Codec:
    """One format at one head_dim. Immutable, so any thread may use it. Encoding gives the same bytes on all machines."""

    def __init__(self, name: str | int, head_dim: int, seed: int = SEED_DEFAULT) -> None:
        self._handle = ctypes.c_void_p()
        self.format = format_info(name, head_dim)
        lib.tq_codec_create(ctypes.byref(self._handle), self.format.number, head_dim, seed)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            lib.tq_codec_free(self._handle)

    def encode(self, x: Any) -> np.ndarray:
        """x [n, head_dim], float32, to uint8 [n, bytes_per_vector]. Raises ArgumentError (NaN, infinity or above 65504)."""
        vectors = floats(x, (None, self.format.head_dim), "x")
        out = np.empty((len(vectors), self.format.bytes_per_vector), np.uint8)
        lib.tq_codec_encode(self._handle, address(vectors), len(vectors), address(out))
        return out

    def decode(self, encoded: Any, out: Any = None) -> np.ndarray:
        """uint8 [n, bytes_per_vector] to float32 [n, head_dim], into `out` if given."""
        array = view(encoded, "encoded")
        if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != self.format.bytes_per_vector:
            raise ArgumentError(f"encoded: has type {array.dtype} and shape {list(array.shape)}; give uint8 "
                                f"[any, {self.format.bytes_per_vector}]")
        array = np.ascontiguousarray(array)
        vectors = writable(out, (len(array), self.format.head_dim), "out")
        lib.tq_codec_decode(self._handle, address(array), len(array), address(vectors))
        return vectors


def encode(x: Any, name: str | int = "sq4", seed: int = SEED_DEFAULT) -> np.ndarray:
    """x [n, head_dim] to uint8 [n, bytes_per_vector]; a Codec for one call."""
    vectors = floats(x, (None, None), "x")
    return Codec(name, vectors.shape[1], seed).encode(vectors)


def decode(encoded: Any, name: str | int, head_dim: int, seed: int = SEED_DEFAULT) -> np.ndarray:
    """The inverse of encode: float32 [n, head_dim]."""
    return Codec(name, head_dim, seed).decode(encoded)
