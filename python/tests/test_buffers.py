# SPDX-License-Identifier: MIT
"""What may be given as an array, and that float32 is not copied."""
import array

import numpy as np
import pytest
import libturboquant
from libturboquant.buffers import floats, integers, writable


def test_float32_is_not_copied(rng):
    x = rng.standard_normal((3, 2, 64), np.float32)
    assert np.shares_memory(floats(x, (None, 2, 64), "x"), x)
    assert np.shares_memory(floats(memoryview(x), (3, 2, 64), "x"), x)
    pointer = libturboquant.Pointer(x.ctypes.data, x.shape)
    assert np.shares_memory(floats(pointer, (3, 2, 64), "x"), x)


def test_others_are_converted(rng):
    x = rng.standard_normal((4, 64), np.float32)
    assert np.array_equal(floats(x.astype(np.float64), (4, 64), "x"), x)
    assert np.array_equal(floats(x.T.copy().T, (4, 64), "x"), x)
    assert floats(x.astype(np.float16), (4, 64), "x").dtype == np.float32
    assert integers(array.array("i", [1, 2]), np.int64, "ids").tolist() == [1, 2]


def test_refusals(rng):
    x = rng.standard_normal((4, 64), np.float32)
    with pytest.raises(libturboquant.ArgumentError, match=r"x: has shape \[4, 64\]; give \[any, 32\]"):
        floats(x, (None, 32), "x")
    with pytest.raises(libturboquant.ArgumentError, match="ids: a value does not fit in 32 bits"):
        integers([1 << 40], np.int32, "ids")
    with pytest.raises(libturboquant.ArgumentError, match="give contiguous float32"):
        writable(np.zeros((4, 64)), (4, 64), "out")
    x.flags.writeable = False
    with pytest.raises(libturboquant.ArgumentError, match="read-only"):
        writable(x, (4, 64), "out")


def test_dlpack_of_torch(rng):
    torch = pytest.importorskip("torch")
    x = torch.arange(128, dtype=torch.float32).reshape(2, 64)
    assert floats(x, (2, 64), "x").ctypes.data == x.data_ptr()
    out = torch.zeros(2, 64)
    libturboquant.Codec("f16", 64).decode(libturboquant.encode(x, "f16"), out)
    assert torch.equal(out, x)
    with pytest.raises(libturboquant.ArgumentError, match="without gradient"):
        floats(x.requires_grad_(), (2, 64), "x")
    with pytest.raises(libturboquant.ArgumentError, match="float32"):
        floats(torch.zeros(2, 64, dtype=torch.bfloat16), (2, 64), "x")


def test_dlpack_of_mlx():
    mx = pytest.importorskip("mlx.core")
    x = mx.arange(128, dtype=mx.float32).reshape(2, 64)
    assert np.array_equal(libturboquant.decode(libturboquant.encode(x, "f16"), "f16", 64), np.arange(128).reshape(2, 64))
