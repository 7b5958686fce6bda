# SPDX-License-Identifier: MIT
"""Caches of the library for models of PyTorch: on its threads, and in memory of its allocator."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from . import _threads, cache as _cache
from ._library import ALLOC_FN, FREE_FN, Allocator

DEVICE_PAGE_SIZE = 64
"""Tokens of a page on a device, unless page_size says otherwise."""

# Kinds of torch devices whose caches are TQ_DEVICE_CUDA's; the tests' emulated device is in the CPU's memory.
DEVICE_TYPES = {"cuda"}


def is_device(device: torch.device) -> bool:
    return device.type in DEVICE_TYPES


class HostStore(_cache.Cache):
    @staticmethod
    def _threads(n_threads: int) -> Any:
        """PyTorch's, if there are as many as its own operations have: a region of another size makes it start others."""
        found = _threads.openmp(n_threads) if n_threads == torch.get_num_threads() else None
        return found or _threads.pool(n_threads)


class _TorchMemory:
    """tq_allocator: memory of a device from PyTorch's allocator, so that it is counted there and what is free is shared."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._tensors = device, {}
        self.struct = Allocator(None, ALLOC_FN(self._alloc), FREE_FN(self._free))

    def _alloc(self, _user: int | None, n_bytes: int) -> int | None:
        try:
            memory = torch.empty(max(n_bytes, 1), dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return None
        self._tensors[memory.data_ptr()] = memory
        return memory.data_ptr()

    def _free(self, _user: int | None, address: int) -> None:
        self._tensors.pop(address, None)


class DeviceStore(_cache.Cache):
    """A cache on a CUDA device, on whose current stream all calls work."""

    def __init__(self, device: torch.device, *args: Any, **options: Any) -> None:
        self.device, self._stream, self._handle = device, 0, None
        memory = _TorchMemory(device) if device.type == "cuda" else None  # else the emulated device's own
        with self._here():
            super().__init__(*args, **{"page_size": DEVICE_PAGE_SIZE} | options, device="cuda",
                             allocator=None if memory is None else memory.struct)
        self._handle.memory = memory

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            if self._handle and stream != self._stream:
                self._stream = stream
                self.set_stream(stream)
            yield

    def _executor_of(self, n_score: int) -> Any:
        return contextlib.nullcontext()


def _on_stream(name: str) -> Any:
    method = getattr(_cache.Cache, name)

    @functools.wraps(method)
    def call(self: DeviceStore, *args: Any, **options: Any) -> Any:
        with self._here():
            return method(self, *args, **options)

    return call


for _name in ("seq_create", "seq_fork", "seq_free", "seq_match", "seq_publish", "trim", "reserve", "read", "save", "load",
              "seq_export", "seq_import", "set_key_factors"):
    setattr(DeviceStore, _name, _on_stream(_name))
