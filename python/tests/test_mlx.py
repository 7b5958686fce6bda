# SPDX-License-Identifier: MIT
"""TurboQuantKVCache in small random models of MLX-LM, against its own caches."""
import copy
import gc
import json

import mlx.core as mx
import mlx_lm.models.cache as stock
import numpy as np
import pytest
import libturboquant
from conftest import ROOT
from mlx_lm.generate import generate_step, speculative_generate_step
from tiny_mlx import (F16, OTHER_ORDER, SQ8, check_batch, check_padding, divergence, generated_in_batches, ids, logits,
                      make_model, make_sharing_model)
from libturboquant.mlx import TurboQuantKVCache, from_kvcache, install, make_prompt_cache

CALIBRATION = ROOT / "tests/golden/calibration_1.tqcal"  # of 3 layers, the second has none

# As in test_transformers.py; sq2 gives .02.
TOLERANCES = {"f16": (.006, 1e-6), "sq8": (.08, 5e-5)}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def greedy(model, cache, tokens, n=20, **options):
    return [int(token) for token, _ in generate_step(mx.array(tokens[0]), model, max_tokens=n, prompt_cache=cache, **options)]


@pytest.mark.parametrize("formats", [F16, SQ8], ids=["f16", "sq8"])
@pytest.mark.parametrize("parts", [1, 3])
def test_logits(model, formats, parts):
    tokens = ids(300, n_batch=2)
    wanted = logits(model, stock.make_prompt_cache(model), tokens, parts)
    found = logits(model, make_prompt_cache(model, **formats), tokens, parts)
    largest, mean = TOLERANCES[formats["k_format"]]
    assert abs(found - wanted).max() < largest
    assert divergence(wanted, found) < mean


def test_learned_sinks():
    """Of gpt-oss, large enough to change what the model says; every other layer has a window and stays as it is."""
    model, tokens = make_model("gpt_oss"), ids(200, n_batch=2)
    for i, layer in enumerate(model.layers):
        layer.self_attn.sinks = 2 + mx.random.normal((4,), key=mx.random.key(i))
    wanted = logits(model, stock.make_prompt_cache(model), tokens, 3)
    found = logits(model, make_prompt_cache(model, **F16), tokens, 3)
    assert abs(found - wanted).max() < TOLERANCES["f16"][0]


def test_formats_layer_by_layer(llama):
    caches = make_prompt_cache(llama, v_format="sq8", layer_k_formats=["f16", "sq8", "sq4"])
    logits(llama, caches, ids(100))
    stores = [cache._sequences[0].store for cache in caches]
    assert len(set(map(id, stores))) == 3
    # A key takes 128, 66 and 34 bytes of 2 heads.
    page_bytes = [store.stats().page_bytes for store in stores]
    assert page_bytes[0] > page_bytes[1] > page_bytes[2]
    with pytest.raises(libturboquant.ArgumentError, match="2 formats, but 3 layers"):
        make_prompt_cache(llama, layer_v_formats=["sq8", "sq4"])


@pytest.mark.parametrize("options, named", [
    ({"exact_layers": 1}, {"layer_k_formats": ["f16", "tt4", "f16"], "layer_v_formats": ["f16", "tt4", "f16"]}),
    ({"exact_layers": 1, "k_format": "f16"}, {"k_format": "f16", "layer_v_formats": ["f16", "tt4", "f16"]})], ids=str)
def test_exact_layers(llama, options, named):
    """The first and the last one; and with exact keys. Each helps."""
    tokens = ids(300)
    wanted, found = (logits(llama, make_prompt_cache(llama, **each), tokens) for each in (named, options))
    np.testing.assert_array_equal(found, wanted)
    exact, coded = (logits(llama, cache, tokens) for cache in (stock.make_prompt_cache(llama), make_prompt_cache(llama)))
    assert divergence(exact, found) < .9 * divergence(exact, coded)


def test_values_only(llama):
    """k_format="f16": attention weights are the model's own, to half precision."""
    tokens, caches = ids(300), make_prompt_cache(llama, k_format="f16")
    wanted = stock.make_prompt_cache(llama)
    for cache in (caches, wanted):
        logits(llama, cache, tokens)
    store, seq = caches[0]._sequences[0].store, caches[0]._sequences[0].seq
    k, v = (x.transpose(1, 0, 2) for x in store.read(seq, 0))
    keys, values = (np.array(x[0]) for x in wanted[0].keys_and_values())
    assert abs(k - keys).max() < 2e-3 * abs(keys).max() and abs(v - values).max() > .05 * abs(values).max()


def test_pools(llama):
    """Each layer has one, which caches with the same options share; they have equal parts of tokens and bytes."""
    options = {"max_tok": 3 * 256, "budget_bytes": 3 << 20}
    caches = [make_prompt_cache(llama, **options) for _ in range(2)]
    for cache in caches:
        logits(llama, cache, ids(100))
    stores = [[layer._sequences[0].store for layer in cache] for cache in caches]
    assert len(set(map(id, stores[0]))) == 3 and stores[0] == stores[1]
    with pytest.raises(libturboquant.CacheFullError, match="pages"):
        logits(llama, caches[0], ids(200))
    with pytest.raises(libturboquant.CacheFullError, match="budget"):
        logits(llama, make_prompt_cache(llama, budget_bytes=3 << 10), ids(100))


def calibrated(model, **options):
    return make_prompt_cache(model, calibration=CALIBRATION, **options)


def test_calibration(llama):
    """Each layer takes its own: attention is that of one cache of all layers, and the second layer has no transforms."""
    rng, whole = np.random.default_rng(4), libturboquant.Cache(3, 2, 64, calibration=CALIBRATION)
    seq, plain = whole.seq_create(), make_prompt_cache(llama, factors="off")
    for i, (layer, other) in enumerate(zip(calibrated(llama), plain)):
        k, v, q = (rng.standard_normal((300, n, 64), np.float32) for n in (2, 2, 4))
        found = [attended(cache, q, k, v) for cache in (layer, other)]
        np.testing.assert_array_equal(found[0], whole.prefill(seq, i, q, k, v))
        assert np.array_equal(*found) == (i == 1)


def attended(cache, q, k, v):
    """The attention of [n_tok, n_head, head_dim] as a layer of a model asks for it."""
    queries, keys, values = (mx.array(x[None]).transpose(0, 2, 1, 3) for x in (q, k, v))
    out = libturboquant.mlx.scaled_dot_product_attention(queries, *cache.update_and_fetch(keys, values), cache, .125, "causal")
    return np.array(out.transpose(0, 2, 1, 3))[0]


def test_calibration_in_batches(llama):
    check_batch(llama, lambda model: calibrated(model, **SQ8), [40, 150, 97], 8, OTHER_ORDER["sq8"])
    first, second, _ = calibrated(llama)
    with pytest.raises(libturboquant.ArgumentError, match="do not go together"):
        first.extend(second)


def test_calibration_of_another_model(llama):
    with pytest.raises(libturboquant.ArgumentError, match="golden.*3 layers, not 2: it is of another model"):
        calibrated(make_model(num_hidden_layers=2))
    with pytest.raises(libturboquant.ArgumentError, match="3 layers, not 2"):
        install(make_model(num_hidden_layers=2), calibration=libturboquant.Calibration(CALIBRATION))
    with pytest.raises(libturboquant.ArgumentError, match="2 KV heads of 64 there, not 4 of 64"):
        other = make_model(num_key_value_heads=4)
        logits(other, calibrated(other), ids(20))


def test_calibration_counts_all_layers():
    """Also those that are left to MLX-LM: compressed ones take those of their own number."""
    model = make_model(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=32)
    cache = calibrated(model)
    assert cache[1]._options["layer"] == [1, 1]


def test_calibration_is_saved_by_name(llama, tmp_path):
    path, file, tokens = str(tmp_path / "prompt.safetensors"), tmp_path / "x.tqcal", ids(200)
    file.write_bytes(CALIBRATION.read_bytes())
    cache = make_prompt_cache(llama, calibration=file)
    logits(llama, cache, tokens)
    stock.save_prompt_cache(path, cache)
    other = TurboQuantKVCache()
    with pytest.raises(libturboquant.SnapshotError, match="another calibration"):
        other.state = dict(cache[0].state.items()) | {"options": json.dumps(cache[2]._options)}
    wanted = logits(llama, cache, ids(10, seed=9))
    del cache
    assert np.array_equal(logits(llama, stock.load_prompt_cache(path), ids(10, seed=9)), wanted)
    gc.collect()  # models and caches refer to each other
    file.unlink()
    with pytest.raises(OSError, match="x.tqcal"):
        stock.load_prompt_cache(path)


def test_few_bits_are_worse(llama):
    tokens = ids(300)
    wanted = logits(llama, stock.make_prompt_cache(llama), tokens)
    assert divergence(wanted, logits(llama, make_prompt_cache(llama, k_format="sq2", v_format="sq2"), tokens)) > 1e-3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype):
    model, tokens = make_model(dtype=dtype), ids(200)
    wanted = logits(model, stock.make_prompt_cache(model), tokens)
    assert divergence(wanted, logits(model, make_prompt_cache(model, **SQ8), tokens)) < 2e-3


def test_generation(model):
    tokens = ids(100)
    wanted = greedy(model, stock.make_prompt_cache(model), tokens)
    assert greedy(model, make_prompt_cache(model, **F16), tokens) == wanted
    assert greedy(model, make_prompt_cache(model, **F16), tokens, prefill_step_size=17) == wanted


def test_speculative(llama):
    """The draft's guesses are mostly wrong, so that both caches are trimmed at each step."""
    draft, tokens = make_model(seed=2), ids(60)
    cache = make_prompt_cache(llama, **F16) + make_prompt_cache(draft, **F16)
    found = [int(token) for token, *_ in speculative_generate_step(
        mx.array(tokens[0]), llama, draft, max_tokens=20, prompt_cache=cache, num_draft_tokens=3)]
    assert found == greedy(llama, stock.make_prompt_cache(llama), tokens)


def test_saved_by_the_stock_functions(llama, tmp_path):
    path, tokens, cache = str(tmp_path / "prompt.safetensors"), ids(200), make_prompt_cache(llama, **SQ8)
    logits(llama, cache, tokens)
    stock.save_prompt_cache(path, cache, {"note": "kept"})
    loaded, metadata = stock.load_prompt_cache(path, return_metadata=True)
    assert metadata == {"note": "kept"} and all(isinstance(each, TurboQuantKVCache) for each in loaded)
    assert loaded[0].offset == 200
    more = ids(10, seed=9)
    assert np.array_equal(logits(llama, loaded, more), logits(llama, cache, more))


def test_generating_copies_no_state(llama, monkeypatch):
    cache = make_prompt_cache(llama, **SQ8)
    monkeypatch.setattr(TurboQuantKVCache, "_save", lambda self: pytest.fail("the state was made"))
    greedy(llama, cache, ids(100), prefill_step_size=20)
    assert cache[0].offset > 100


def test_trim_and_copies(llama):
    tokens, cache = ids(300), make_prompt_cache(llama, **F16)
    wanted = logits(llama, cache, tokens)
    other = copy.deepcopy(cache)
    assert stock.can_trim_prompt_cache(other) and stock.trim_prompt_cache(other, 100) == 100
    assert (cache[0].offset, other[0].offset) == (300, 200)
    np.testing.assert_allclose(logits(llama, other, tokens[:, 200:]), wanted[:, 200:], atol=OTHER_ORDER["f16"])
    assert stock.trim_prompt_cache(other, 1000) == 300 and other[0].empty()


def exact(model):
    return make_prompt_cache(model, **F16)


def test_merge_filter_extract_extend(llama):
    check_batch(llama, exact, [40, 150, 97], 8, OTHER_ORDER["f16"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(llama, side):
    check_padding(llama, exact, [40, 64, 50], side, OTHER_ORDER["f16"])


def test_batch_generator(llama):
    """Requests of different lengths, more than run at once."""
    prompts = [ids(n, seed=n)[0].tolist() for n in (7, 60, 33, 90)]
    install(llama, **F16)
    try:
        found = generated_in_batches(llama, prompts, 10)
    finally:
        del llama.make_cache
    assert found == [greedy(llama, stock_caches(llama), np.array([prompt]), n=10) for prompt in prompts]


def stock_caches(model):
    return [stock.KVCache() for _ in model.layers]


def test_windows_are_left_to_mlx(capsys):
    model = make_model(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=32)
    tokens, cache = ids(120), make_prompt_cache(model, **F16)
    assert [type(each) for each in cache] == [stock.RotatingKVCache, TurboQuantKVCache, stock.RotatingKVCache]
    assert "1 of 3 layers compressed" in capsys.readouterr().err
    make_prompt_cache(model, **F16)
    assert capsys.readouterr().err == ""
    np.testing.assert_allclose(logits(model, cache, tokens), logits(model, model.make_cache(), tokens), atol=.006)


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end the tests."""


class Interrupts:
    """In place of a model's module: its next call raises."""

    def __call__(self, *arguments, **options):
        raise Interrupted


def interrupt(model, cache, layer, part, tokens):
    """Give tokens to the model, whose layer raises in its part."""
    kept = getattr(model.layers[layer], part)
    setattr(model.layers[layer], part, Interrupts())
    with pytest.raises(Interrupted):
        logits(model, cache, tokens)
    setattr(model.layers[layer], part, kept)


def check_going_back(model, make_cache, n_before, n_batch=1):
    """What comes after interrupted passes is what there would be without them."""
    for layer, part in ((0, "self_attn"), (1, "mlp"), (2, "post_attention_layernorm")):
        cache, fresh = make_cache(model), make_cache(model)
        for each in (cache, fresh):
            if n_before:
                logits(model, each, ids(n_before, n_batch=n_batch))
        interrupt(model, cache, layer, part, ids(40, seed=5, n_batch=n_batch))
        assert [each.size() for each in cache] == [n_before] * len(cache)
        for n, seed in ((9, 6), (1, 7)):
            tokens = ids(n, seed=seed, n_batch=n_batch)
            np.testing.assert_array_equal(logits(model, cache, tokens), logits(model, fresh, tokens))


@pytest.mark.parametrize("n_batch", [1, 3])
@pytest.mark.parametrize("n_before", [0, 50, 200])
def test_interrupted_pass(llama, n_before, n_batch):
    check_going_back(llama, lambda model: make_prompt_cache(model, n_recent=508, **SQ8), n_before, n_batch)


def test_interrupted_attention(llama, monkeypatch):
    """Between a layer's keys and what comes of them."""
    cache, fresh = exact(llama), exact(llama)
    for each in (cache, fresh):
        logits(llama, each, ids(50))
    with monkeypatch.context() as patch:
        patch.setattr(TurboQuantKVCache, "attend", Interrupts())
        with pytest.raises(Interrupted):
            logits(llama, cache, ids(8, seed=4))
    np.testing.assert_array_equal(logits(llama, cache, ids(9, seed=5)), logits(llama, fresh, ids(9, seed=5)))


@pytest.mark.parametrize("n_before", [10, 100])
def test_interrupted_pass_with_windows(n_before):
    """A window goes back until it is full; then that is said."""
    model = make_model(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=64)
    cache, fresh = exact(model), exact(model)
    for each in (cache, fresh):
        logits(model, each, ids(n_before))
    interrupt(model, cache, 2, "mlp", ids(5, seed=4))
    if n_before > 64:
        with pytest.raises(libturboquant.ArgumentError, match="interrupted.*new cache"):
            logits(model, cache, ids(5, seed=5))
        return
    np.testing.assert_array_equal(logits(model, cache, ids(9, seed=5)), logits(model, fresh, ids(9, seed=5)))


def test_bytes(llama):
    cache = make_prompt_cache(llama)
    logits(llama, cache, ids(2000), parts=4)
    values = 2000 * 2 * 2 * 64
    assert 8 * cache[0].nbytes / values < 1.1 * libturboquant.preset("TQ4").bits_per_value(64, 2, 2048)
    assert not hasattr(cache[0], "bits")


def test_memory_is_given_back(llama):
    cache = make_prompt_cache(llama)
    logits(llama, cache, ids(200))
    store = cache[0]._sequences[0].store
    used = store.stats().n_pages_used
    del cache
    assert store.stats().n_pages_used < used


def test_refusals(llama):
    cache = make_prompt_cache(llama)
    with pytest.raises(libturboquant.UnsupportedError, match="window"):
        cache[0].make_mask(5, window_size=3)
    logits(llama, cache, ids(20))
    with pytest.raises(libturboquant.ArgumentError, match="batch of 1"):
        logits(llama, cache, ids(20, n_batch=2))
    with pytest.raises(libturboquant.ArgumentError, match="another model"):
        logits(make_model(num_key_value_heads=4), cache, ids(20))
    with pytest.raises(libturboquant.ArgumentError, match="do not go together"):
        make_prompt_cache(llama)[0].extend(make_prompt_cache(llama, preset="TQ3")[0])
    with pytest.raises(libturboquant.ArgumentError, match="unknown preset"):
        make_prompt_cache(llama, preset="TQ5")
    with pytest.raises(TypeError):
        keys, values = make_prompt_cache(llama)[0].update_and_fetch(mx.zeros((1, 2, 4, 64)), mx.zeros((1, 2, 4, 64)))
        mx.fast.scaled_dot_product_attention(mx.zeros((1, 4, 4, 64)), keys, values, scale=1.0)


BAD_OPTIONS = [
    {"preset": "TQ5"}, {"preset": None}, {"k_fromat": "sq8"}, {"k_format": "tq9"}, {"v_format": 1 << 32}, {"n_sink": -1},
    {"n_recent": "many"}, {"page_size": 0}, {"max_tok": -1}, {"n_threads": 0}, {"n_layer": 3}, {"head_dim_v": 64},
    {"dry_run": True}, {"seed": -1}, {"budget_bytes": -1}, {"k_ref_block": 3}, {"calibration_layer": 1}, {"exact_layers": 2},
    {"exact_prefill": "yes"},
    {"layer_k_formats": ["sq8", "sq8", "tq9"]}, {"offload_folder": "/nowhere", "offload_bytes": 1 << 20}]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_options_are_checked_when_given(llama, capsys, options):
    """Not when the first tokens come, which in a server is when a client waits; and none is announced as applied."""
    for call in (make_prompt_cache, install):
        with pytest.raises(libturboquant.TurboQuantError):
            call(llama, **options)
    assert capsys.readouterr().err == "" and not hasattr(llama.make_cache, "is_turboquant")
    if "layer_k_formats" not in options:
        with pytest.raises(libturboquant.TurboQuantError):
            TurboQuantKVCache(**options)


def test_options_of_other_types(llama, tmp_path):
    """Integers of NumPy and paths are no reason to fail later, either."""
    options = {"n_sink": np.int32(4), "offload_folder": tmp_path, "offload_bytes": np.int64(1 << 22), "budget_bytes": 1 << 26}
    assert np.isfinite(logits(llama, make_prompt_cache(llama, max_tok=1 << 12, **options), ids(20))).all()


@pytest.mark.parametrize("generate", [generate_step, speculative_generate_step])
@pytest.mark.parametrize("start", [0, 5000])
def test_kv_bits_are_refused(llama, generate, start):
    """MLX-LM would leave a cache that it cannot convert as it is, without a word. Refused before the first token, also where
    conversion would only come later."""
    models = [llama] * (2 if generate is speculative_generate_step else 1)
    cache = [layer for _ in models for layer in make_prompt_cache(llama)]
    options = {"prompt_cache": cache, "max_tokens": 3, "quantized_kv_start": start}
    with pytest.raises(libturboquant.UnsupportedError, match="compressed already.*Leave kv_bits"):
        next(generate(mx.array(ids(20)[0]), *models, kv_bits=8, **options))
    cache = [layer for _ in models for layer in make_prompt_cache(llama)]
    assert len(list(generate(mx.array(ids(20)[0]), *models, **(options | {"prompt_cache": cache})))) == 3


@pytest.mark.parametrize("formats", [F16, SQ8], ids=["f16", "sq8"])
@pytest.mark.parametrize("n_batch", [1, 2])
def test_from_kvcache(llama, formats, n_batch):
    """After a prompt that was read exactly: what the cache holds is that of one which read it itself, but for what coding
    moved in that."""
    prompt, more, exact = ids(200, n_batch=n_batch), ids(20, n_batch=n_batch, seed=9), stock.make_prompt_cache(llama)
    logits(llama, exact, prompt, 3)
    held = [np.array(x) for layer in exact for x in layer.keys_and_values()]
    caches = from_kvcache(llama, exact, **formats)
    assert np.all(np.array(caches[0].offset) == 200)
    read = caches[0]._sequences[0].store.read(caches[0]._sequences[0].seq, 0)
    for x, kept in zip(read, held):
        np.testing.assert_allclose(x.transpose(1, 0, 2), kept[0], atol=.02 * abs(kept).max())
    found = logits(llama, caches, more)
    assert all(np.array_equal(x, y) for x, y in zip(held, (x for layer in exact for x in layer.keys_and_values())))
    wanted = logits(llama, exact, more)
    largest, mean = TOLERANCES[formats["k_format"]]
    assert abs(found - wanted).max() < largest and divergence(wanted, found) < mean
    assert all(cache.empty() for cache in from_kvcache(llama, stock.make_prompt_cache(llama)))


def test_from_kvcache_takes_other_caches_over():
    model = make_model(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=32)
    prompt, more, exact = ids(100), ids(20, seed=9), stock.make_prompt_cache(model)
    logits(model, exact, prompt)
    caches = from_kvcache(model, exact, **F16)
    assert [ours is theirs for ours, theirs in zip(caches, exact)] == [True, False, True]
    wanted = logits(model, copy.deepcopy(exact), more)
    assert abs(logits(model, caches, more) - wanted).max() < TOLERANCES["f16"][0]
    with pytest.raises(libturboquant.UnsupportedError, match="nothing to compress"):
        from_kvcache(model, caches)


@pytest.mark.parametrize("step", [2048, 31])
def test_exact_prefill(llama, step):
    """The prompt's logits are MLX-LM's own, bit for bit; what is generated is what it is after from_kvcache."""
    prompt, exact, caches = mx.array(ids(200)[0]), stock.make_prompt_cache(llama), make_prompt_cache(llama, exact_prefill=True)
    wanted, found = (logits(llama, cache, ids(200), 3) for cache in (exact, caches))
    np.testing.assert_array_equal(found, wanted)
    assert caches[0].nbytes > 200 * 2 * 2 * 64 * 4  # of float32
    more, coded = ids(1, seed=9), from_kvcache(llama, exact)
    np.testing.assert_array_equal(logits(llama, caches, more), logits(llama, coded, more))
    assert caches[0].nbytes == coded[0].nbytes and len(caches[0]._sequences[0].held) == 201
    wanted, found = (next(generate_step(prompt, llama, prompt_cache=cache, prefill_step_size=step))
                     for cache in (from_kvcache(llama, read_by(llama, prompt[:-1])),
                                   make_prompt_cache(llama, exact_prefill=True)))
    assert found[0] == wanted[0]


def test_exact_prefill_that_begins_with_one_token(llama):
    """As in a row with padding before it."""
    cache, tokens, found = make_prompt_cache(llama, exact_prefill=True), ids(80), []
    for part in np.split(tokens, [1, 70], axis=1):
        found.append(logits(llama, cache, part))
    wanted = logits(llama, stock.make_prompt_cache(llama), tokens)
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=1e-5)
    assert cache[0]._exact_bytes() > 0


def read_by(model, tokens):
    """MLX-LM's own caches, which have read tokens."""
    caches = stock.make_prompt_cache(model)
    model(tokens[None], cache=caches)
    return caches


def test_exact_prefill_ends_with_what_is_kept(llama, tmp_path):
    """Rows that a server keeps, files, and what drafts were taken back from are coded; copies of a prompt are not yet."""
    caches, path, more = make_prompt_cache(llama, exact_prefill=True), str(tmp_path / "x.safetensors"), ids(9, seed=9)
    logits(llama, caches, ids(200))
    batch = [layer.merge([layer]) for layer in caches]
    row, copied = [layer.extract(0) for layer in batch], copy.deepcopy(caches)
    assert [each[0]._exact_bytes() > 0 for each in (caches, batch, row, copied)] == [True, True, False, True]
    assert stock.trim_prompt_cache(copied, 0) == 0 and copied[0]._exact_bytes() == 0
    stock.save_prompt_cache(path, caches)
    loaded, coded = stock.load_prompt_cache(path), from_kvcache(llama, read_by(llama, mx.array(ids(200)[0])))
    wanted = logits(llama, coded, more)
    for each in (row, copied, loaded):
        np.testing.assert_array_equal(logits(llama, each, more), wanted)


def test_exact_prefill_in_batches(llama):
    check_padding(llama, lambda model: make_prompt_cache(model, exact_prefill=True), [40, 64, 50], "left", OTHER_ORDER["f16"])
    prompts = [ids(n, seed=n)[0].tolist() for n in (7, 60, 33, 90)]
    options = {"exact_prefill": True, "n_recent": 16, **SQ8}
    wanted = [greedy(llama, make_prompt_cache(llama, **options), np.array([prompt]), n=10) for prompt in prompts]
    try:
        assert generated_in_batches(install(llama, **options), prompts, 10) == wanted
    finally:
        del llama.make_cache


def test_exact_prefill_is_interrupted(llama):
    check_going_back(llama, lambda model: make_prompt_cache(model, exact_prefill=True), 50)


def test_exact_prefill_with_shared_keys():
    model, tokens = make_sharing_model("gemma4_text"), ids(120)
    wanted = logits(model, stock.make_prompt_cache(model), tokens, 3)
    np.testing.assert_array_equal(logits(model, make_prompt_cache(model, exact_prefill=True), tokens, 3), wanted)


@pytest.fixture
def installed():
    return install(make_model(), **F16)


@pytest.mark.parametrize("make", [
    stock.make_prompt_cache, lambda model, n: stock.make_prompt_cache(model, max_kv_size=n),
    lambda model, n: make_prompt_cache(model, max_kv_size=n),
    lambda model, n: next(generate_step(mx.array(ids(5)[0]), model, max_kv_size=n))],
    ids=["positional", "keyword", "own", "generate_step"])
def test_a_bound_is_refused(installed, make):
    """MLX-LM drops the oldest tokens behind max_kv_size; a compressed cache would hold all without a word."""
    with pytest.raises(libturboquant.UnsupportedError, match="max_kv_size is 64.*leave it out"):
        make(installed, 64)
    make(installed, None)


def test_a_bound_is_refused_where_models_make_their_caches():
    model = make_model(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=32)
    install(install(model, **F16), **F16)
    with pytest.raises(libturboquant.UnsupportedError, match="max_kv_size"):
        stock.make_prompt_cache(model, 64)


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n"])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_layers_that_share_keys(kind, parts):
    """Their rows are appended once, and attended to by each of them."""
    model, tokens = make_sharing_model(kind), ids(120, n_batch=2)
    caches = stock.make_prompt_cache(model)
    wanted, found = logits(model, caches, tokens, parts), make_prompt_cache(model, **F16)
    got = logits(model, found, tokens, parts)
    kept = [cache for cache in found if isinstance(cache, TurboQuantKVCache)]
    assert len(kept) == 1 and kept[0].offset.tolist() == [120, 120]
    assert divergence(wanted, got) < 1e-6 and abs(got - wanted).max() < .005 * abs(wanted).max()


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n"])
def test_shared_keys_in_batches(kind):
    """With padding: requests of different lengths."""
    model = make_sharing_model(kind)
    prompts = [ids(n, seed=n)[0].tolist() for n in (7, 60, 33)]
    wanted = [greedy(model, stock.make_prompt_cache(model), np.array([prompt]), n=6) for prompt in prompts]
    assert generated_in_batches(install(model, **F16), prompts, 6) == wanted


def test_shared_keys_before_they_are_there(llama):
    with pytest.raises(libturboquant.ArgumentError, match="no layer has brought yet"):
        make_prompt_cache(llama)[0].keys_and_values()
