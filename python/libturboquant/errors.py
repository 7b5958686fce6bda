# SPDX-License-Identifier: MIT
"""Exceptions: one for each status of turboquant.h, with the text that the library logged."""
from __future__ import annotations


class TurboQuantError(Exception):
    """A call failed. `status` is the number of turboquant.h's tq_status, or 0 if the Python side refused."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ArgumentError(TurboQuantError, ValueError):
    """An argument is wrong, or does not fit another one."""


class RangeError(TurboQuantError, IndexError):
    """A slot, position, sequence or layer that does not exist."""


class CacheFullError(TurboQuantError, MemoryError):
    """The cache has no free page left; nothing was changed."""


class OutOfMemoryError(TurboQuantError, MemoryError):
    """An allocation failed; nothing was changed."""


class SnapshotError(TurboQuantError, OSError):
    """A file cannot be read or written, is damaged, or holds another cache."""


class UnsupportedError(TurboQuantError, NotImplementedError):
    """A head_dim, format, instruction set, model or option that the library does not have; the text says what it has."""


class DeviceError(TurboQuantError, RuntimeError):
    """A thread or a device failed."""


# By the numbers that turboquant.h pins.
_BY_STATUS: dict[int, type[TurboQuantError]] = {
    -1: ArgumentError,
    -2: ArgumentError,
    -3: ArgumentError,
    -4: RangeError,
    -10: OutOfMemoryError,
    -11: CacheFullError,
    -12: DeviceError,
    -13: DeviceError,
    -20: SnapshotError,
    -21: SnapshotError,
    -22: SnapshotError,
    -30: UnsupportedError,
    -31: UnsupportedError,
    -32: UnsupportedError,
    -33: DeviceError,
}


def of_status(status: int, message: str) -> TurboQuantError:
    """The exception for a status; the plain base class for one that this version does not know."""
    return _BY_STATUS.get(status, TurboQuantError)(message, status)
