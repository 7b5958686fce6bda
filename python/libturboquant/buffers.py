# SPDX-License-Identifier: MIT
"""Arrays in and out without copies: whatever has the buffer protocol, DLPack or NumPy's array interface, and raw addresses."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ArgumentError


@dataclass(frozen=True)
class Pointer:
    """Float32 values at an address of host memory, contiguous. Whoever makes one keeps the memory alive during the call."""

    address: int
    shape: tuple[int, ...]

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "<f4", "shape": self.shape, "data": (self.address, False)}


def view(x: Any, name: str) -> np.ndarray:
    """x as an array, without a copy where it is one already. Raises ArgumentError if it is not in host memory."""
    if isinstance(x, np.ndarray):
        return x
    try:
        if hasattr(x, "__dlpack__"):
            return np.from_dlpack(x)
        return np.asarray(x)
    except (TypeError, ValueError, OverflowError, RuntimeError, BufferError) as error:
        raise ArgumentError(f"{name}: cannot be viewed as an array of host memory ({error}). Give float32 values on the CPU, "
                            "without gradient: x.detach().float().cpu() in PyTorch, x.astype(mx.float32) in MLX") from error


def floats(x: Any, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    """
    A contiguous float32 view of x; a copy only if x is float16, float64 or not contiguous. `shape`: what it must have, None for
    any size. Raises ArgumentError.
    """
    array = view(x, name)
    if array.dtype.kind != "f":
        raise ArgumentError(f"{name}: has type {array.dtype}; give float32")
    if array.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, array.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ArgumentError(f"{name}: has shape {list(array.shape)}; give [{wanted}]")
    return np.ascontiguousarray(array, dtype=np.float32)


def integers(x: Any, dtype: type, name: str) -> np.ndarray:
    """A contiguous [n] array of int32 or int64. Raises ArgumentError, also where a value does not fit."""
    array = view(x, name)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ArgumentError(f"{name}: give a list of integers")
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ArgumentError(f"{name}: a value does not fit in {limits.bits} bits")
    return np.ascontiguousarray(array, dtype=dtype)


def writable(x: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A view of x to write to, or a new array if x is None. x must be float32 and contiguous. Raises ArgumentError."""
    if x is None:
        return np.empty(shape, np.float32)
    array = view(x, name)
    if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
        raise ArgumentError(f"{name}: has type {array.dtype} and shape {list(array.shape)}; give contiguous float32 of "
                            f"{list(shape)}")
    _check_writable(array, x, name)
    return array


def _check_writable(array: np.ndarray, x: Any, name: str) -> None:
    # DLPack before version 1 cannot say that memory is writable, and NumPy then takes it as read-only.
    if not array.flags.writeable and (isinstance(x, np.ndarray) or not hasattr(x, "__dlpack__")):
        raise ArgumentError(f"{name}: is read-only")


def raw_bytes(x: Any, name: str, is_written: bool) -> np.ndarray:
    """A view of memory that the library reads or writes as it is. The caller checks its size. Raises ArgumentError."""
    array = view(x, name)
    if not array.flags.c_contiguous or array.dtype.hasobject:
        raise ArgumentError(f"{name}: give a contiguous array of numbers, as np.ascontiguousarray makes it")
    if is_written:
        _check_writable(array, x, name)
    return array


def address(array: np.ndarray | None) -> int | None:
    """What the library gets; None is NULL."""
    return None if array is None else array.ctypes.data
