# SPDX-License-Identifier: MIT
"""Formats, presets, encode and decode."""
import numpy as np
import pytest
import libturboquant


def test_formats():
    sq4 = libturboquant.format_info("sq4", 128)
    assert (sq4.bits, sq4.bytes_per_vector, sq4.bits_per_value) == (4, 66, 4.125)
    with pytest.raises(libturboquant.UnsupportedError, match="sq4, sq3"):
        libturboquant.format_info("q4_0")
    with pytest.raises(libturboquant.UnsupportedError, match="100"):
        libturboquant.format_info("sq4", 100)


def test_presets():
    assert list(libturboquant.presets()) == ["TQ6", "TQ4", "TQ3", "TQ2"]
    assert 4 < libturboquant.preset("TQ4").bits_per_value(128, 8, 32768) < 4.4
    assert libturboquant.preset("tq4").name == "TQ4"
    with pytest.raises(libturboquant.ArgumentError, match="the presets are TQ6, TQ4"):
        libturboquant.preset("TQ9")


def test_head_dims():
    assert {64, 80, 96, 128, 256} <= set(libturboquant.head_dims())


# Relative squared error of the codes on normal values (docs/formats.md), with room for the sample.
@pytest.mark.parametrize("name, error", [("sq8", 2e-4), ("sq4", .0105), ("tt4", .0060), ("tt2", .0800), ("f16", 1e-6)])
def test_round_trip(rng, name, error):
    x = rng.standard_normal((64, 128), np.float32)
    encoded = libturboquant.encode(x, name)
    assert encoded.shape == (64, libturboquant.format_info(name, 128).bytes_per_vector)
    decoded = libturboquant.decode(encoded, name, 128)
    assert ((decoded - x) ** 2).sum() / (x**2).sum() < error


def test_codec_writes_to_out(rng):
    x = rng.standard_normal((4, 64), np.float32)
    codec = libturboquant.Codec("sq4", 64)
    out = np.zeros((4, 64), np.float32)
    assert codec.decode(codec.encode(x), out) is out
    assert np.array_equal(out, libturboquant.decode(libturboquant.encode(x, "sq4"), "sq4", 64))


def test_seed_matters(rng):
    x = rng.standard_normal((4, 64), np.float32)
    assert not np.array_equal(libturboquant.encode(x, "sq4", seed=1), libturboquant.encode(x, "sq4", seed=2))


def test_refusals(rng):
    x = rng.standard_normal((4, 64), np.float32)
    with pytest.raises(libturboquant.ArgumentError, match="NaN|finite"):
        libturboquant.encode(np.full((1, 64), np.nan, np.float32))
    with pytest.raises(libturboquant.ArgumentError, match="give float32"):
        libturboquant.encode(np.ones((1, 64), np.int32))
    with pytest.raises(libturboquant.ArgumentError, match=r"give \[any, 64\]"):
        libturboquant.Codec("sq4", 64).encode(x[0])
    with pytest.raises(libturboquant.ArgumentError, match="uint8"):
        libturboquant.decode(libturboquant.encode(x, "sq4"), "sq3", 64)


def test_error_is_the_status_of_the_header():
    with pytest.raises(libturboquant.TurboQuantError) as caught:
        libturboquant.format_info("sq4", 100)
    assert caught.value.status == -30
