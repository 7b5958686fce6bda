# SPDX-License-Identifier: MIT
"""
A language model's KV cache in 2 to 4 bits a value, with attention on the compressed bytes.

libturboquant.Cache is the cache; libturboquant.transformers and libturboquant.mlx put it into Transformers and MLX-LM.
docs/python.md.
"""
import sys as _sys

try:
    from ._library import lib as _lib
except ImportError as _error:
    # `python -m libturboquant` begins here, too, and ends in one line.
    if _sys.argv[:1] == ["-m"] and ("-m", "libturboquant") in zip(_sys.orig_argv, _sys.orig_argv[1:]):
        _sys.exit(f"turboquant: {_error}")
    raise
from .buffers import Pointer
from .cache import Batch, Cache, Calibration, Snapshot, Stats, describe_snapshot
from .errors import (ArgumentError, CacheFullError, DeviceError, OutOfMemoryError, RangeError, SnapshotError,
                     TurboQuantError, UnsupportedError)
from .formats import (SEED_DEFAULT, Codec, Format, Preset, decode, encode, format_info, head_dims, preset, presets)

__version__ = _lib.tq_version_string().decode()


def cpu_name() -> str | None:
    """The instruction set of the kernels: "avx512", "avx2", "neon" or "scalar"; None if TQ_CPU names one that is not here."""
    name = _lib.tq_cpu_name()
    return name.decode() if name else None


__all__ = [
    "SEED_DEFAULT", "ArgumentError", "Batch", "Cache", "CacheFullError", "Calibration", "Codec", "DeviceError", "Format",
    "OutOfMemoryError", "Pointer", "Preset", "RangeError", "Snapshot", "SnapshotError", "Stats", "TurboQuantError",
    "UnsupportedError", "cpu_name", "decode", "describe_snapshot", "encode", "format_info", "head_dims", "preset", "presets",
]
