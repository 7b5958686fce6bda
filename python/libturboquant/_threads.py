# SPDX-License-Identifier: MIT
"""
The pools of threads, one for each number of threads, that all caches of the process share; and the threads of a framework, on
which its caches run instead. A framework's threads spin between two operations, and on a busy machine threads next to them take
their cores just before they are needed.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

from ._library import Executor, OpenMP, lib


class Pool:
    """tq_pool: one run at a time, so a second thread that comes meanwhile works alone."""

    def __init__(self, n_threads: int) -> None:
        self._handle = ctypes.c_void_p()
        lib.tq_pool_create(ctypes.byref(self._handle), n_threads)
        self._executor = lib.tq_pool_executor(self._handle)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def executor(self) -> Iterator[ctypes.POINTER(Executor) | None]:
        """The argument `executor` of a call; None (the caller's thread alone) while another thread uses the pool."""
        if not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            yield ctypes.byref(self._executor)
        finally:
            self._lock.release()


class OpenMPThreads:
    """tq_openmp: the threads that a library's OpenMP regions run on, n_threads of them. Any number of threads may use it."""

    def __init__(self, library: ctypes.CDLL, n_threads: int) -> None:
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        functions = (ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in names)
        self._runtime = OpenMP(n_threads, *functions)
        self._executor = lib.tq_openmp_executor(self._runtime)

    @contextlib.contextmanager
    def executor(self) -> Iterator[ctypes.POINTER(Executor)]:
        """As a pool's."""
        yield ctypes.byref(self._executor)


_openmp_library: ctypes.CDLL | None = None
_openmp: dict[int, OpenMPThreads] = {}


def use_openmp_of(path: str) -> None:
    """From now on there are `openmp` threads: those of this library, which is loaded, if it has GCC's or LLVM's OpenMP."""
    global _openmp_library
    try:
        library = ctypes.CDLL(path)
        OpenMPThreads(library, 1)
    except (OSError, AttributeError):
        return
    _openmp_library = library


def openmp(n_threads: int) -> OpenMPThreads | None:
    """None where they do not exist."""
    if _openmp_library is None:
        return None
    if n_threads not in _openmp:
        _openmp[n_threads] = OpenMPThreads(_openmp_library, n_threads)
    return _openmp[n_threads]


_pools: dict[int, Pool] = {}
_pools_lock = threading.Lock()


def pool(n_threads: int) -> Pool:
    """Lives until the process ends: its threads sleep when idle."""
    with _pools_lock:
        if n_threads not in _pools:
            _pools[n_threads] = Pool(n_threads)
        return _pools[n_threads]


def default_n_threads() -> int:
    """The processors that this process may use, at most 16: attention is then limited by memory."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, 16))


def _forget_after_fork() -> None:
    """A forked child has none of the threads; their handles are left alone, since freeing them would never end. Nor may it
    use the parent's OpenMP."""
    global _pools_lock, _openmp_library
    _pools_lock, _openmp_library = threading.Lock(), None
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
