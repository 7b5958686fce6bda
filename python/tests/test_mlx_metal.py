# SPDX-License-Identifier: MIT
"""
TurboQuantMetalKVCache in small random models of MLX-LM, against the CPU's cache and MLX-LM's own; its kernels are emulated, or
with TQ_METAL_DEVICE=1 run on an Apple GPU.
"""
import copy
import os

import mlx.core as mx
import mlx_lm.models.cache as stock
import numpy as np
import pytest
import libturboquant
import libturboquant.mlx
from mlx_lm.generate import generate_step, speculative_generate_step
from tiny_mlx import (SQ8, check_batch, check_like, check_padding, divergence, generated_in_batches, ids, logits, make_model,
                      make_sharing_model, with_outliers)
from libturboquant import metal_kernels
from libturboquant._mlx_batch import Factors
from libturboquant.mlx import TurboQuantKVCache, TurboQuantMetalKVCache, install, make_prompt_cache

ON_GPU = os.environ.get("TQ_METAL_DEVICE") == "1"
if not ON_GPU:
    import metal_emulator
# Of logits that a row gets in a batch and by itself: sums are in another order, so a code may be another one (check_like).
ATOL = .1
# Every token is encoded as soon as it may be, as the CPU does.
LIKE_CPU = {"encode_batch": 1, "n_recent": 16}
SMALL = {"num_hidden_layers": 2}  # the emulation takes a second for some 100,000 pairs of query and key


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(metal_kernels, "launcher", metal_emulator.launch)


@pytest.fixture(scope="module")
def llama():
    return make_model("llama", **SMALL)


def metal(model, **options):
    libturboquant.mlx._reach_attention(model)
    return [TurboQuantMetalKVCache(**options) for _ in model.layers]


def cpu(model, **options):
    libturboquant.mlx._reach_attention(model)
    return [TurboQuantKVCache(**options) for _ in model.layers]


def greedy(model, cache, tokens, n=8, **options):
    return [int(token) for token, _ in generate_step(mx.array(tokens[0]), model, max_tokens=n, prompt_cache=cache, **options)]


@pytest.mark.parametrize("formats", [{}, SQ8, {"k_format": "sq4", "v_format": "sq2", "k_ref_block": 0}],
                         ids=["TQ4", "sq8", "sq4 sq2"])
@pytest.mark.parametrize("parts", [1, 4])
def test_like_the_cpu(llama, formats, parts):
    tokens = ids(100)
    exact = logits(llama, stock.make_prompt_cache(llama), tokens, parts)
    wanted = logits(llama, cpu(llama, n_recent=16, **formats), tokens, parts)
    check_like(logits(llama, metal(llama, **LIKE_CPU, **formats), tokens, parts), wanted, exact)


def test_learned_sinks():
    """Of gpt-oss; every other layer has a window and stays as it is."""
    model, tokens = make_model("gpt_oss"), ids(40)
    for i, layer in enumerate(model.layers):
        layer.self_attn.sinks = 2 + mx.random.normal((4,), key=mx.random.key(i))
    found = [logits(model, stock.make_prompt_cache(model), tokens, 3)]
    for kind in (TurboQuantKVCache, TurboQuantMetalKVCache):
        libturboquant.mlx._reach_attention(model)
        options = {"n_recent": 16} if kind is TurboQuantKVCache else LIKE_CPU
        cache = [kind(**options) if type(layer) is stock.KVCache else layer for layer in stock.make_prompt_cache(model)]
        found.append(logits(model, cache, tokens, 3))
    check_like(found[2], found[1], found[0])


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n"])
def test_layers_that_share_keys(kind):
    """Rows are appended once, and attended to by each of them. Parts are short, so that little is coded meanwhile."""
    model, tokens, found = make_sharing_model(kind), ids(60), []
    libturboquant.mlx._reach_attention(model)
    for of_device in (TurboQuantKVCache, TurboQuantMetalKVCache):
        options = {"n_recent": 16} if of_device is TurboQuantKVCache else LIKE_CPU
        cache = [of_device(**options) if type(layer) is stock.KVCache else layer for layer in stock.make_prompt_cache(model)]
        found.append(logits(model, cache, tokens, 12))
    check_like(found[1], found[0], logits(model, stock.make_prompt_cache(model), tokens, 12))


def test_one_by_one(llama):
    """Decoding token by token gives what a prompt at once gives."""
    tokens = ids(40)
    exact = logits(llama, stock.make_prompt_cache(llama), tokens)
    wanted = logits(llama, cpu(llama, n_recent=16), tokens)
    check_like(logits(llama, metal(llama, **LIKE_CPU), tokens, parts=40), wanted, exact)


def test_batches_are_encoded_later_but_to_the_same_bytes(llama):
    tokens, coded = ids(150), []
    for options in (LIKE_CPU, {"n_recent": 16}):
        cache = metal(llama, **options)
        logits(llama, cache, tokens, parts=5)
        coded.append([x[:, :, 4:128] for x in cache[0].state[1:3]])
        assert cache[0].offset == 150
    assert all(mx.array_equal(a, b) for a, b in zip(*coded))


def test_outlier_keys(tmp_path):
    """Factors come from the weights as on the CPU, and keys are coded by them; files hold them."""
    model, tokens, path = with_outliers(make_model("qwen2", **SMALL)), ids(90), str(tmp_path / "prompt.safetensors")
    exact = logits(model, stock.make_prompt_cache(model), tokens)
    caches = {name: make(model, **options) for name, make, options in (
        ("cpu", cpu, {"n_recent": 16}), ("metal", metal, LIKE_CPU), ("off", metal, LIKE_CPU | {"factors": "off"}))}
    found = {name: logits(model, cache, tokens, parts=2) for name, cache in caches.items()}
    check_like(found["metal"], found["cpu"], exact)
    assert divergence(exact, found["metal"]) < .2 * divergence(exact, found["off"])
    factors = [[layer._factors for layer in caches[name]] for name in ("cpu", "metal")]
    assert factors[0] == factors[1] and all(each.quarters for each in factors[0])
    stock.save_prompt_cache(path, caches["metal"])
    loaded, more = stock.load_prompt_cache(path), ids(8, seed=9)
    assert [layer._factors for layer in loaded] == factors[1]
    assert np.array_equal(logits(model, loaded, more), logits(model, caches["metal"], more))


def rows_with_outliers(rng, n_head_kv, n_tok, head_dim):
    """
    Keys and values [1, n_head_kv, n_tok, head_dim] such as models have: keys with a few channels that outweigh the others a
    hundred times, by biases that turn slowly with the position.
    """
    scales = np.exp(rng.standard_normal((n_head_kv, 1, head_dim)))
    biases = 60 * rng.standard_normal((n_head_kv, 1, head_dim)) * (rng.random((n_head_kv, 1, head_dim)) < .06)
    half = np.arange(head_dim) % (head_dim // 2)
    angles = np.arange(n_tok)[:, None] * 10000.0 ** (-2 * half / head_dim)
    keys = biases * np.cos(angles) + scales * rng.standard_normal((n_head_kv, n_tok, head_dim))
    values = np.exp(.5 * rng.standard_normal((n_head_kv, 1, head_dim))) * rng.standard_normal((n_head_kv, n_tok, head_dim))
    steps = np.clip(np.rint(4 * np.log2(np.sqrt((keys**2).mean(axis=1)))), -32, 32).astype(np.int8)
    return *(mx.array(x[None].astype(np.float16)) for x in (keys, values)), steps


def sides_of_pages(cache, n_tok):
    """
    Of a CPU's cache of one layer and one sequence, keys and values: codes [n_head_kv, n_tok, bytes], scales, codes and scales
    of references, as docs/snapshot.md and docs/formats.md lay them out.
    """
    store, seq = cache._sequences[0].store, cache._sequences[0].seq
    pages, at, found = np.empty((-(-n_tok // store.page_size), store.stats().page_bytes), np.uint8), 0, []
    store.seq_export(seq, 0, pages)
    for fmt, n_ref in ((store.k_format, store.page_size // cache._options["k_ref_block"]), (store.v_format, 0)):
        parts = [[], [], [], []]
        for _ in range(store.n_head_kv):
            code_bytes = libturboquant.format_info(fmt, store.head_dim).bytes_per_vector - 2
            for part, (n, width) in zip(parts, ((store.page_size, code_bytes), (store.page_size, 2), (n_ref, store.head_dim),
                                                (n_ref, 2))):
                part.append(pages[:, at : at + n * width].reshape(-1, width))
                at += n * width
            at = -(-at // 64) * 64
        found.append([np.stack(part) for part in parts])
    assert at == pages.shape[1]
    return found


PARITY = [("TQ6", 64, {"n_sink": 0}), ("TQ4", 128, {}), ("TQ3", 192, {"n_sink": 9}), ("TQ2", 96, {"encode_batch": 64}),
          ("TQ4", 128, {"k_format": "sq3", "v_format": "sq2"})]


@pytest.mark.parametrize("has_factors", [True, False], ids=["factors", "none"])
@pytest.mark.parametrize("preset, head_dim, options", PARITY, ids=str)
def test_codes_of_real_keys(monkeypatch, preset, head_dim, options, has_factors):
    """
    The same bytes as on the CPU, however the rows come: codes, scales, references. And the same attention, but for rounding,
    where the same tokens are encoded.
    """
    rng = np.random.default_rng(7)
    k, v, steps = rows_with_outliers(rng, 2, 206, head_dim)
    monkeypatch.setattr(libturboquant._mlx_batch, "_find_factors", lambda *_: Factors.of(steps if has_factors else None))
    common = {"preset": preset, "n_recent": 16, "k_ref_block": 64} | options
    encode_batch = common.pop("encode_batch", 1)
    caches = TurboQuantKVCache(**common, page_size=64), TurboQuantMetalKVCache(**common, encode_batch=encode_batch)
    for cache in caches:
        for part in (slice(0, 5), slice(5, 130), slice(130, 131), slice(131, 200)):
            cache.append(k[:, :, part], v[:, :, part])
    sequence = caches[1]._sequences[0]
    arrays, first, end = sequence.arrays, sequence._options.n_sink, sequence.coded
    assert end == (184 if encode_batch == 1 else 128)

    def same(x, wanted, begin, end):
        found = np.ascontiguousarray(np.array(x)[0]).view(np.uint8).reshape(2, x.shape[2], -1)
        return np.array_equal(found[:, begin:end], wanted[:, begin:end])

    (codes, scales, ref_codes, ref_scales), (v_codes, v_scales, *_) = sides_of_pages(caches[0], 200)
    refs = np.concatenate([ref_codes, ref_scales, 0 * ref_scales], axis=2)
    assert same(arrays.k_codes, codes, first, end) and same(arrays.k_scales, scales, first, end)
    assert same(arrays.v_codes, v_codes, first, end) and same(arrays.v_scales, v_scales, first, end)
    assert same(arrays.refs, refs, first // 64, -(-end // 64))
    q, found = mx.array(rng.standard_normal((1, 4, 6, head_dim), np.float32)), []
    for cache in caches:
        handles = cache.update_and_fetch(*(x[:, :, 200:].astype(mx.float32) for x in (k, v)))
        found.append(np.array(cache.attend(q, *(handle.rows for handle in handles), .02)))
    assert encode_batch > 1 or abs(found[0] - found[1]).max() < 1e-3 * abs(found[0]).max()


def test_better_than_nothing(llama):
    tokens = ids(120)
    wanted = logits(llama, stock.make_prompt_cache(llama), tokens)
    assert divergence(wanted, logits(llama, metal(llama, **SQ8, n_recent=16), tokens)) < 5e-5
    assert divergence(wanted, logits(llama, metal(llama, n_recent=16), tokens)) < 1e-2


def like_cpu(model):
    return metal(model, **LIKE_CPU)


def test_batch(llama):
    check_batch(llama, like_cpu, [20, 90, 47], 3, ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(llama, side):
    check_padding(llama, like_cpu, [20, 40], side, ATOL)


def test_batch_generator(llama, monkeypatch):
    """Requests of different lengths, more than run at once."""
    monkeypatch.setattr(libturboquant.mlx, "cache_class", lambda: TurboQuantMetalKVCache)
    prompts = [ids(n, seed=n)[0].tolist() for n in (7, 30, 18)]
    install(llama, **LIKE_CPU)
    try:
        found = generated_in_batches(llama, prompts, 4)
    finally:
        del llama.make_cache
    assert found == [greedy(llama, like_cpu(llama), np.array([prompt]), n=4) for prompt in prompts]


@pytest.mark.parametrize("kept", [2, 70, 90])
def test_trim(llama, kept):
    """As the CPU trims: to the sinks, into what is encoded, into what is exact."""
    tokens, more, found = ids(100), ids(40, seed=5), []
    for cache in (metal(llama, **LIKE_CPU), cpu(llama, n_recent=16), stock.make_prompt_cache(llama)):
        logits(llama, cache, tokens)
        assert stock.can_trim_prompt_cache(cache) and stock.trim_prompt_cache(cache, 100 - kept) == 100 - kept
        found.append(logits(llama, cache, more, parts=2))
        assert cache[0].offset == kept + 40
    check_like(*found)


def test_generation(llama):
    tokens = ids(60)
    wanted = greedy(llama, cpu(llama, n_recent=16), tokens)
    assert greedy(llama, metal(llama, **LIKE_CPU), tokens, prefill_step_size=25) == wanted
    draft = make_model(seed=2, **SMALL)
    cache = metal(llama, **LIKE_CPU) + metal(draft, **LIKE_CPU)
    found = [int(token) for token, *_ in speculative_generate_step(
        mx.array(tokens[0]), llama, draft, max_tokens=8, prompt_cache=cache, num_draft_tokens=3)]
    assert found == wanted


def test_copies_and_files(llama, tmp_path):
    path, tokens, more = str(tmp_path / "prompt.safetensors"), ids(100), ids(8, seed=9)
    cache = metal(llama, **LIKE_CPU)
    logits(llama, cache, tokens)
    stock.save_prompt_cache(path, cache, {"note": "kept"})
    loaded, metadata = stock.load_prompt_cache(path, return_metadata=True)
    assert metadata == {"note": "kept"} and all(type(each) is TurboQuantMetalKVCache for each in loaded)
    copied = copy.deepcopy(cache)
    wanted = logits(llama, cache, more)
    assert np.array_equal(logits(llama, loaded, more), wanted)
    assert copied[0].offset == 100 and np.array_equal(logits(llama, copied, more), wanted)


def test_exact_prefill(llama, tmp_path):
    """Prompts have MLX-LM's own logits; a file of one that is not over goes on with it; then it is what one that was given the
    same keys is."""
    path, own = str(tmp_path / "x.safetensors"), stock.make_prompt_cache(llama)
    caches = metal(llama, exact_prefill=True, **LIKE_CPU)
    first, second = np.split(ids(100), [60], axis=1)
    np.testing.assert_array_equal(logits(llama, caches, first), logits(llama, own, first))
    stock.save_prompt_cache(path, caches)
    caches = stock.load_prompt_cache(path)
    np.testing.assert_array_equal(logits(llama, caches, second), logits(llama, own, second))
    coded = metal(llama, **LIKE_CPU)
    for ours, theirs, layer in zip(coded, own, llama.layers):
        ours.append(*theirs.keys_and_values(), layer)
    for i in range(2):
        token = ids(1, seed=i)
        np.testing.assert_allclose(logits(llama, caches, token), logits(llama, coded, token), atol=1e-5)
    assert caches[0].nbytes == coded[0].nbytes


def zeros(name, template, inputs, grid, threadgroup, shapes, dtypes):
    return [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes)]


def test_bytes(llama, monkeypatch):
    """The compressed copy is the only one."""
    monkeypatch.setattr(metal_kernels, "launcher", zeros)
    cache = metal(llama, preset="TQ4")
    for part in np.array_split(ids(1200), 6, axis=1):
        logits(llama, cache, part)
    layer = cache[0]
    exact = 2 * 2 * 2 * 64 * (4 + 64 + 64)
    arrays = layer._sequences[0].arrays
    assert arrays.k_exact.shape[2] == 4 + 64 + 64
    room = arrays.k_codes.shape[2]
    assert layer.nbytes - exact < 1.1 * room * 2 * 2 * 34 and room <= 1200 + metal_kernels.BLOCK + 1024
    assert not hasattr(layer, "bits")
    with pytest.raises(libturboquant.UnsupportedError, match="kv_bits"):
        layer.to_quantized


def test_nothing_is_evaluated(llama, monkeypatch):
    monkeypatch.setattr(metal_kernels, "launcher", zeros)
    cache = metal(llama)
    monkeypatch.setattr(mx, "eval", lambda *arrays: pytest.fail("evaluated"))
    out = llama(mx.array(ids(200)), cache=cache)
    out = llama(mx.array(ids(1)), cache=cache)
    monkeypatch.undo()
    mx.eval(out)


@pytest.mark.skipif(ON_GPU, reason="pretends to have one")
def test_chosen_on_a_gpu(llama, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    with pytest.raises(libturboquant.UnsupportedError, match="Apple GPUs"):
        make_prompt_cache(llama)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert {type(layer) for layer in make_prompt_cache(llama, n_recent=32)} == {TurboQuantMetalKVCache}
    monkeypatch.undo()
    assert {type(layer) for layer in make_prompt_cache(llama)} == {TurboQuantKVCache}


def test_refusals(llama):
    keys = mx.zeros((1, 2, 4, 64))
    for options, words in (({"n_threads": 2}, "no such option"), ({"calibration": "x"}, "on the CPU"),
                           ({"k_format": "f16"}, "no Metal kernels"),
                           ({"encode_batch": 48}, "divisor"), ({"k_ref_block": 32}, "blocks of 64"),
                           ({"n_sink": -1}, "counts from 0"), ({"seed": -1}, "seed"),
                           ({"preset": "TQ5"}, "unknown preset")):
        with pytest.raises(libturboquant.TurboQuantError, match=words):
            TurboQuantMetalKVCache(**options)
    cache = TurboQuantMetalKVCache()
    with pytest.raises(libturboquant.UnsupportedError, match="head_dims"):
        cache.update_and_fetch(mx.zeros((1, 2, 4, 80)), mx.zeros((1, 2, 4, 64)))
    with pytest.raises(libturboquant.UnsupportedError, match="window"):
        cache.make_mask(5, window_size=3)
    cache.update_and_fetch(keys, keys)
    with pytest.raises(libturboquant.ArgumentError, match="interrupted"):
        cache.update_and_fetch(keys, keys)
    cache.attend(mx.zeros((1, 4, 4, 64)), keys, keys, 1.0)
    with pytest.raises(libturboquant.ArgumentError, match="batch of 1"):
        cache.update_and_fetch(mx.zeros((2, 2, 4, 64)), mx.zeros((2, 2, 4, 64)))


@pytest.mark.parametrize("n_tok", [10, 100])
def test_append_without_queries(llama, n_tok):
    """What from_kvcache makes holds what a cache that attended would."""
    rng = np.random.default_rng(4)
    q, k, v, more = (mx.array(rng.standard_normal((1, n, m, 64), np.float32)) for n, m in (
        (4, n_tok), (2, n_tok), (2, n_tok), (2, 1)))
    appended, attended = TurboQuantMetalKVCache(**LIKE_CPU), TurboQuantMetalKVCache(**LIKE_CPU)
    appended.append(k, v)
    attended.update_and_fetch(k, v)
    attended.attend(q, k, v, .125)
    assert appended.offset == attended.offset == n_tok
    found = []
    for cache in (appended, attended):
        cache.update_and_fetch(more, more)
        found.append(np.array(cache.attend(q[:, :, :1], more, more, .125)))
    np.testing.assert_array_equal(*found)
