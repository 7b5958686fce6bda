# SPDX-License-Identifier: MIT
"""
The Metal kernels against the library, emulated on the CPU (metal_emulator.py). On an Apple machine bench/metal.py runs the
same tests on the GPU: TQ_METAL_DEVICE=1.
"""
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
import libturboquant
from metal_store import NUMBERS, SEED, Layer
from libturboquant import metal_kernels as kernels
from libturboquant.weight_factors import channel_factors

ON_GPU = os.environ.get("TQ_METAL_DEVICE") == "1"
if not ON_GPU:
    import metal_emulator


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(kernels, "launcher", metal_emulator.launch)
        monkeypatch.setattr(metal_emulator, "order", metal_emulator.ASCENDING)


def vectors(rng, head_dim):
    """Ordinary vectors, outliers, and nothing."""
    x = rng.standard_normal((16, head_dim))
    x[1] = 0
    x[2] *= 1e-4
    x[3, 5] = 800
    x[4] *= 3000
    x[5] = 0
    x[5, 3] = 7
    x[6] = 1
    x[7, ::2] = 65504
    x[8] *= 2e-6  # scales below FP16's normal numbers
    x[9] *= 2e-5
    return x.astype(np.float16)


def records(codes, scales, name, head_dim):
    """Of one head, as tq_codec_encode writes them: words have no more than their bytes."""
    parts = [np.array(scales[0, 0]).view(np.uint8).reshape(len(scales[0, 0]), 2), np.array(codes[0, 0]).view(np.uint8)]
    found = np.concatenate(parts, axis=1)
    n_bytes = libturboquant.format_info(name, head_dim).bytes_per_vector
    assert not found[:, n_bytes:].any()
    return found[:, :n_bytes]


# All formats and all head_dims, not all pairs: each is compiled, which takes a second.
NAMES = list(NUMBERS)
ENCODERS = [(f, d) for d in (128, 512) for f in NAMES] + [("sq3", 96), ("sq8", 256), ("tt2", 64), ("tt3", 40), ("sq2", 72)]
ENCODERS += [(NAMES[(3 * k + i) % 7], d) for i, d in enumerate(kernels.HEAD_DIMS) if d not in (128, 512) for k in range(3)]


def test_head_dims():
    assert kernels.HEAD_DIMS == tuple(libturboquant.head_dims())


@pytest.mark.parametrize("name,head_dim", ENCODERS)
def test_encoded_bytes(rng, name, head_dim):
    x = vectors(rng, head_dim)
    codes, scales = kernels.encode(NUMBERS[name], mx.array(x)[None, None], 1, len(x) - 1, SEED)
    np.testing.assert_array_equal(records(codes, scales, name, head_dim), libturboquant.encode(x[1:].astype(np.float32), name))


def test_encoding_twice(rng):
    """Decoded vectors give their bytes again: the encoder's later rounds."""
    for name in ("sq4", "tt4"):
        first = libturboquant.encode(rng.standard_normal((8, 128)).astype(np.float32), name)
        again = libturboquant.decode(first, name, 128).astype(np.float16)
        codes, scales = kernels.encode(NUMBERS[name], mx.array(again)[None, None], 0, 8, SEED)
        np.testing.assert_array_equal(records(codes, scales, name, 128), first)


def steps(rng, n_head_kv, head_dim, largest=32):
    """Factors as libturboquant.Cache.set_key_factors takes them, all residues and both ends among them."""
    found = rng.integers(-largest, largest + 1, (n_head_kv, head_dim)).astype(np.int8)
    found[:, :6] = -largest, largest, -3, -2, -1, 0
    return found


@pytest.mark.parametrize("name,head_dim", [("sq8", 64), ("sq4", 128), ("sq3", 96), ("tt4", 256), ("tt3", 192), ("tt2", 64),
                                           ("sq8", 48), ("tt4", 512), ("tt3", 80)])
def test_encoded_bytes_by_factors(rng, name, head_dim):
    """Of two KV heads in each of two sequences."""
    x = rng.standard_normal((2, 2, 5, head_dim)).astype(np.float16)
    factors = steps(rng, 2, head_dim)
    wanted = x.astype(np.float32) * channel_factors(-factors)[:, None]
    codes, scales = kernels.encode(NUMBERS[name], mx.array(x), 0, 5, SEED, factors=mx.array(factors))
    for i in range(2):
        for head in range(2):
            np.testing.assert_array_equal(records(codes[i:, head:], scales[i:, head:], name, head_dim),
                                          libturboquant.encode(wanted[i, head], name))


def test_bits_of_factors():
    """A last bit hardly ever changes a code."""
    for bits in channel_factors(np.arange(4)).view(np.uint32):
        assert f"0x{bits:08x}u" in kernels.header("encode")


@pytest.mark.parametrize("has_factors", [False, True])
def test_references(rng, has_factors):
    """Means and what is coded against them are the library's bytes."""
    factors = steps(rng, 2, 128) if has_factors else None
    layer = Layer(rng, "tt4", "sq4", 128, 300, 1, n_recent=32, factors=factors)
    rows, factors = mx.array(layer.k)[None], None if factors is None else mx.array(factors)
    starts = [layer.n_sink, *range(64, layer.coded, 64)]
    refs = kernels.encode_references(rows, starts, 32, SEED, factors)
    wanted = layer.arrays
    n = len(starts)
    assert mx.array_equal(refs, wanted.refs[:, :, :n])
    codes, scales = kernels.encode(NUMBERS["tt4"], rows, layer.n_sink, layer.coded - layer.n_sink, SEED, layer.n_sink, refs,
                                   factors)
    span = slice(layer.n_sink, layer.coded)
    assert mx.array_equal(codes, wanted.k_codes[:, :, span]) and mx.array_equal(scales, wanted.k_scales[:, :, span])


def check(layer, rng, group, tolerance=2e-4, dtype=mx.float32):
    q = rng.standard_normal((group * len(layer.k), layer.n_query, layer.head_dim)).astype(np.float32)
    q = np.array(mx.array(q).astype(dtype).astype(mx.float32))
    wanted, found = layer.attend(q, .1), layer.kernel_attend(q, .1, dtype)
    assert np.isfinite(found).all()
    assert abs(found - wanted).max() < tolerance * abs(wanted).max()
    return found


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 128, 129, 196, 1000])
def test_decode_lengths(rng, length):
    check(Layer(rng, "tt4", "tt4", 128, length, 1), rng, 2)


@pytest.mark.parametrize("formats", [("sq8", "tt4"), ("tt3", "tt2"), ("sq4", "sq4"), ("sq3", "sq2"), ("sq8", "sq8")])
def test_decode_formats(rng, formats):
    check(Layer(rng, *formats, 128, 300, 1, has_refs=formats[0] != "sq4"), rng, 2)


@pytest.mark.parametrize("i", range(len(kernels.HEAD_DIMS)))
def test_decode_head_dims(rng, i):
    check(Layer(rng, "tt3", "sq3", kernels.HEAD_DIMS[i], 300, 2, n_recent=32), rng, 1)
    check(Layer(rng, NAMES[i % 7], NAMES[(i + 4) % 7], kernels.HEAD_DIMS[i], 140, 1, n_recent=16), rng, 3)


@pytest.mark.parametrize("formats", [("sq8", "tt4"), ("tt4", "tt4"), ("tt3", "tt2"), ("tt2", "sq4"), ("sq4", "sq2")])
def test_decode_formats_at_512(rng, formats):
    check(Layer(rng, *formats, 512, 150, 1, n_recent=16), rng, 7)


@pytest.mark.parametrize("group,n_query", [(1, 1), (1, 4), (3, 1), (4, 2), (5, 1), (5, 3), (6, 1), (7, 1), (8, 1), (2, 8)])
def test_decode_rows(rng, group, n_query):
    check(Layer(rng, "sq4", "sq4", 64, 210, n_query, n_recent=16, n_batch=16), rng, group)


@pytest.mark.parametrize("n_batch", [1, 16, 64])
def test_decode_while_tokens_leave(rng, n_batch):
    """Queries of one call that see different tokens encoded."""
    layer = Layer(rng, "sq4", "sq4", 64, 200, 6, n_recent=30, n_batch=n_batch)
    assert n_batch > 1 or len(set(layer.query_ends)) > 1
    check(layer, rng, 1)


def test_decode_with_a_long_ring(rng):
    check(Layer(rng, "sq4", "sq4", 64, 500, 1, n_recent=300), rng, 1)


def test_decode_with_many_splits(rng):
    layer = Layer(rng, "sq2", "sq2", 64, 5000, 1, n_head_kv=1, has_refs=False)
    check(layer, rng, 1)


@pytest.mark.parametrize("head_dim,length,n_query,group", [(64, 100, 100, 2), (64, 300, 70, 3), (64, 65, 33, 1),
                                                           (128, 260, 40, 2), (96, 200, 30, 2), (256, 150, 20, 2),
                                                           *((d, 140, 20, 2) for d in kernels.HEAD_DIMS if d % 64)])
def test_prefill(rng, head_dim, length, n_query, group):
    check(Layer(rng, "tt4", "tt4", head_dim, length, n_query, n_recent=32), rng, group)


@pytest.mark.parametrize("head_dim", [64, 512])
@pytest.mark.parametrize("formats", [("sq8", "tt4"), ("tt3", "tt2"), ("sq3", "sq2")])
def test_prefill_formats(rng, formats, head_dim):
    check(Layer(rng, *formats, head_dim, 200, 40, n_sink=0, n_recent=16, n_batch=1, has_refs=formats[0] == "sq8"), rng, 1)


@pytest.mark.parametrize("n_query", [1, 3, 40])
@pytest.mark.parametrize("formats,head_dim,has_refs", [(("tt4", "sq4"), 64, True), (("sq4", "sq4"), 128, False),
                                                       (("tt3", "sq2"), 96, True), (("sq3", "tt4"), 40, True),
                                                       (("tt2", "tt4"), 512, True)])
def test_factors(rng, formats, head_dim, has_refs, n_query):
    """Queries meet encoded keys by their factors, exact ones as they came."""
    factors = steps(rng, 2, head_dim, 12)
    layer = Layer(rng, *formats, head_dim, 200, n_query, n_recent=32, has_refs=has_refs, factors=factors)
    check(layer, rng, 2)
    layer.factors, q = None, rng.standard_normal((4, n_query, head_dim)).astype(np.float32)
    assert abs(layer.kernel_attend(q, .1) - layer.attend(q, .1)).max() > .1


@pytest.mark.parametrize("n_query", [1, 40])
def test_learned_sinks(rng, n_query):
    layer = Layer(rng, "sq4", "sq4", 64, 150, n_query)
    q, sinks = rng.standard_normal((4, n_query, 64)).astype(np.float32), np.float32([-50, 0, 3, 9])
    wanted, found = layer.attend(q, .1, sinks), layer.kernel_attend(q, .1, sinks=sinks)
    assert abs(found - wanted).max() < 2e-4 * abs(wanted).max()
    assert abs(wanted - layer.attend(q, .1))[2:].max() > .01


@pytest.mark.parametrize("dtype,tolerance", [(mx.float16, 2e-3), (mx.bfloat16, 1e-2)])
def test_types(rng, dtype, tolerance):
    check(Layer(rng, "sq4", "sq4", 64, 150, 1), rng, 1, tolerance, dtype)
    check(Layer(rng, "sq4", "sq4", 64, 150, 40), rng, 1, tolerance, dtype)


@pytest.mark.skipif(ON_GPU, reason="the GPU has an order of its own")
def test_any_order_of_threads(rng, monkeypatch):
    """The same bits whatever runs first: no barrier is missing."""
    x = mx.array(vectors(rng, 64))[None, None]
    decode, prefill = Layer(rng, "sq4", "sq4", 64, 210, 3), Layer(rng, "sq4", "sq4", 64, 150, 40)
    found = []
    for order in range(6):
        monkeypatch.setattr(metal_emulator, "order", order)
        q = np.random.default_rng(1).standard_normal((2, 40, 64)).astype(np.float32)
        found.append([np.array(part).tobytes() for part in (
            *kernels.encode(NUMBERS["tt4"], x, 0, 8, SEED), *kernels.encode(NUMBERS["sq4"], x, 0, 8, SEED),
            kernels.encode_references(x, [0, 4], 5, SEED), decode.kernel_attend(q[:, :3], .1), prefill.kernel_attend(q, .1))])
    assert all(each == found[0] for each in found)


ENCODER_TYPES = (["half", "uint", "int8_t", "uint", "int"], ["uint", "half"])
STORE_TYPES = ["uint", "half", "uint", "uint", "half", "half", "half", "int8_t", "uint", "int"]


@pytest.mark.skipif(ON_GPU or not shutil.which("clang++"), reason="clang++ is what knows address spaces")
@pytest.mark.parametrize("name,template,types", [
    ("encode", [128, 4, 1, 1], ENCODER_TYPES), ("trellis", [96, 10, 1, 0], ENCODER_TYPES),
    ("reference", [192, 1], (["half", "int", "int8_t", "uint", "int"], ["uint"])),
    ("decode", [128, 9, 4, 1, 1, 8], (["float", *STORE_TYPES], ["float"])),
    ("combine", [64], (["float", "uint", "float", "int"], ["half"])),
    ("prefill", [256, 2, 11, 1, 1], (["half", *STORE_TYPES, "float"], ["half"]))])
def test_address_spaces(name, template, types):
    of_store = ["D", "KF", "VF", "HAS_REF", "HAS_FACTORS", "ROWS"]
    names = {1: ["D"], 2: ["D", "HAS_FACTORS"], 4: ["D", "FORMAT", "HAS_REF", "HAS_FACTORS"], 5: of_store, 6: of_store}
    arguments = list(zip(names[len(template)], template))
    assert metal_emulator.address_space_faults(name, arguments, *types) == ""
    if name == "decode":
        wrong = kernels.header(name).replace("threadgroup const level_table &table", "thread const level_table &table")
        assert "error" in metal_emulator.address_space_faults(name, arguments, *types, wrong)
