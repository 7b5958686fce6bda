# SPDX-License-Identifier: MIT
"""Factors from the weights in MLX-LM: models with outlier keys, which compute the same as models without."""
import copy
import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as stock
import numpy as np
import pytest
import libturboquant
from conftest import ROOT
from mlx_lm.generate import generate_step
from tiny_mlx import (F16, HALVES, SQ8, attentions, check_batch, divergence, ids, logits, make_model, make_sharing_model,
                      with_outliers)
from libturboquant.mlx import TurboQuantKVCache, from_kvcache, install, make_prompt_cache

# Options of small models, and which channels RoPE turns together: those with the same number.
KINDS = {
    "llama": ({}, HALVES), "qwen2": ({}, HALVES), "qwen3": ({}, HALVES), "phi3": ({}, HALVES),
    "cohere": ({"head_dim": 64, "layer_norm_eps": 1e-5, "logit_scale": 1.0, "rope_theta": 1e4}, np.arange(64) // 2),
    "gpt_neox": ({"num_key_value_heads": 4, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "rotary_emb_base": 10000,
                  "rotary_pct": .25}, np.where(np.arange(64) < 16, np.arange(64) % 8, np.arange(64)))}
PRESET = {"v_format": "sq8", "n_recent": 16}


def make(kind, **options):
    mx.random.seed(1)  # of biases
    return make_model(kind, **KINDS[kind][0] | options)


@pytest.fixture(scope="module")
def model():
    return with_outliers(make("qwen2"))


def kl(model, tokens, wanted, **options):
    return divergence(wanted, logits(model, make_prompt_cache(model, **PRESET | options), tokens, parts=2))


@pytest.mark.parametrize("kind", KINDS)
def test_outliers(kind):
    """They cost nothing: the same divergence as in the model without them, where without factors it is many times as much."""
    plain, model, tokens = make(kind), with_outliers(make(kind), KINDS[kind][1]), ids(160)
    wanted = logits(plain, stock.make_prompt_cache(plain), tokens)
    assert abs(divergence(wanted, logits(model, stock.make_prompt_cache(model), tokens))) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = kl(model, tokens, wanted)
    assert found < 2 * kl(plain, tokens, wanted) < .2 * kl(model, tokens, wanted, factors="off")


@pytest.mark.parametrize("kind", KINDS)
def test_angles(kind):
    partners, angles = libturboquant._mlx_batch._rope(attentions(make(kind))[0], 64)
    numbers = KINDS[kind][1]
    n = 16 if kind == "gpt_neox" else 64
    assert (numbers[partners] == numbers).all() and (partners != np.arange(64)).sum() == n
    base = 1e6 if kind == "qwen2" else 1e4
    np.testing.assert_allclose(angles[:n], base ** (-2 * numbers[:n] / n), rtol=.01)
    assert (angles[n:] == 0).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_quantized_weights(dtype):
    model, tokens = make("llama", dtype=dtype), ids(120)
    nn.quantize(model, group_size=64, bits=4)
    model = with_outliers(model)
    wanted = logits(model, stock.make_prompt_cache(model), tokens)
    assert kl(model, tokens, wanted) < .2 * kl(model, tokens, wanted, factors="off")


def factors(cache):
    return [layer._factors.quarters for layer in cache]


def test_exact_keys_are_as_they_came(model):
    """While all keys are exact, logits are those without factors."""
    found = [logits(model, make_prompt_cache(model, factors=each), ids(60, n_batch=2), 3) for each in ("weights", "off")]
    assert np.array_equal(*found)


def test_nothing_of_a_request_matters(model):
    found = []
    for tokens in (ids(100), np.full((1, 80), 7), ids(1), ids(20, n_batch=3)):
        cache = make_prompt_cache(model)
        logits(model, cache, tokens)
        found.append(factors(cache))
    assert None not in found[0] and found.count(found[0]) == 4
    stock.trim_prompt_cache(cache, 1000)
    logits(model, cache, ids(9, n_batch=3))
    assert factors(cache) == found[0]


def test_exact_keys_have_none(model):
    cache = make_prompt_cache(model, **F16)
    logits(model, cache, ids(20))
    assert factors(cache) == [None] * 3


def test_batches(model):
    """Merged, extended, filtered, extracted: factors come along; other layers' caches are refused."""
    check_batch(model, lambda model: make_prompt_cache(model, **SQ8), [40, 150, 97], 8, .02)
    cache, empty = make_prompt_cache(model), make_prompt_cache(model)
    logits(model, cache, ids(30))
    merged = cache[0].merge([empty[0], cache[0]])
    assert merged._factors == cache[0]._factors and copy.deepcopy(merged)._factors == cache[0]._factors
    with pytest.raises(libturboquant.ArgumentError, match="do not go together"):
        cache[0].extend(cache[1])
    others = make_prompt_cache(make("qwen2"))
    logits(make("qwen2"), others, ids(30))
    with pytest.raises(libturboquant.ArgumentError, match="different factors"):
        cache[0].extend(others[0])


def test_another_model_after_all_was_trimmed(model):
    """The cache has its factors then, and none of the first one's."""
    other, cache = with_outliers(make("qwen2", seed=2)), make_prompt_cache(model)
    logits(model, cache, ids(100))
    before = factors(cache)
    stock.trim_prompt_cache(cache, 100)
    found, fresh = logits(other, cache, ids(100)), make_prompt_cache(other)
    assert np.array_equal(found, logits(other, fresh, ids(100)))
    assert factors(cache) == factors(fresh) != before


@pytest.mark.parametrize("options", [{}, {"factors": "off"}], ids=["weights", "off"])
def test_saved_by_the_stock_functions(model, tmp_path, options):
    path, cache = str(tmp_path / "prompt.safetensors"), make_prompt_cache(model, **PRESET | options)
    logits(model, cache, ids(100))
    stock.save_prompt_cache(path, cache)
    loaded = stock.load_prompt_cache(path)
    assert factors(loaded) == factors(cache)
    assert [layer._sequences[0].store for layer in loaded] == [layer._sequences[0].store for layer in cache]
    assert np.array_equal(logits(model, loaded, ids(10, seed=9)), logits(model, cache, ids(10, seed=9)))


def test_loaded_where_its_cache_is_gone(model, tmp_path):
    """The file brings the factors, and other caches of the model go on to share the pool."""
    path, cache = str(tmp_path / "prompt.safetensors"), make_prompt_cache(model, **PRESET)
    logits(model, cache, ids(100))
    wanted, before = logits(model, copy.deepcopy(cache), ids(10, seed=9)), factors(cache)
    stock.save_prompt_cache(path, cache)
    del cache
    loaded, other = stock.load_prompt_cache(path), make_prompt_cache(model, **PRESET)
    logits(model, other, ids(20))
    assert factors(loaded) == before
    assert other[0]._sequences[0].store is loaded[0]._sequences[0].store
    assert np.array_equal(logits(model, loaded, ids(10, seed=9)), wanted)


def test_files_from_before(model):
    """Without a word of factors: its keys have none. With those that had scaled keys in Python: refused."""
    cache, other = make_prompt_cache(model, factors="off")[0], TurboQuantKVCache()
    rows = mx.zeros((1, 2, 4, 64))
    handles = cache.update_and_fetch(rows, rows)
    cache.attend(mx.zeros((1, 4, 4, 64)), handles[0].rows, handles[1].rows, 1.0)
    said = dict(cache.state.items()) | {"options": json.dumps({"preset": "TQ4"})}
    del said["instead"]
    for factors in ({}, {"factors": "[null, {}]"}):
        other.state = said | factors
        assert other.offset == 4 and other._factors.quarters is None
    with pytest.raises(libturboquant.SnapshotError, match="run the prompt again"):
        other.state = said | {"factors": "[[[1, -1]], {}]"}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_were_read_exactly(kind, monkeypatch):
    """from_kvcache codes keys by the factors that a pass finds, the weights of the norm before counted."""
    model, tokens = with_outliers(make(kind), KINDS[kind][1]), ids(100)
    for layer in model.layers:
        norm = layer.input_layernorm
        norm.weight = norm.weight * mx.exp(.3 * mx.random.normal(norm.weight.shape))
    exact, cache = stock.make_prompt_cache(model), make_prompt_cache(model)
    logits(model, exact, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read = from_kvcache(model, exact)
    monkeypatch.setattr(libturboquant.weight_factors, "_known", libturboquant.weight_factors.Known())
    logits(model, cache, tokens)
    assert None not in factors(read) and factors(read) == factors(cache)


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n"])
def test_layers_that_share_keys(kind, monkeypatch):
    """Queries of all of them get the factors of the keys that they share."""
    rng = np.random.default_rng(5)
    monkeypatch.setattr(libturboquant.weight_factors, "of_module",
                        lambda *_, **__: (4 * rng.integers(-3, 4, (2, 64), np.int8), 1.0))
    model, tokens = make_sharing_model(kind), ids(120, n_batch=2)
    wanted = logits(model, stock.make_prompt_cache(model), tokens)
    cache = make_prompt_cache(model, n_recent=200)  # so that all keys are exact
    found = logits(model, cache, tokens, 3)
    assert any(isinstance(each, TurboQuantKVCache) and each._factors.quarters for each in cache)
    assert abs(found - wanted).max() < .005 * abs(wanted).max()


@pytest.fixture
def unknown():
    return make_model("gpt2", n_ctx=512, n_positions=512, n_embd=256, n_head=4, n_layer=2, num_key_value_heads=4,
                      layer_norm_epsilon=1e-5)


def test_unknown_projections(unknown):
    """A preset's keys get 8 bits, and a warning says why and what to do."""
    cache, tokens = make_prompt_cache(unknown, preset="TQ3"), ids(100)
    with pytest.warns(UserWarning, match="projections.*Attention.*keys have 8 bits, not those of TQ3.*k_format=.*off"):
        found = logits(unknown, cache, tokens, 3)
    chosen = make_prompt_cache(unknown, preset="TQ3", k_format="sq8", factors="off")
    assert np.array_equal(found, logits(unknown, chosen, tokens, 3))
    copied = copy.deepcopy(cache)
    assert np.array_equal(logits(unknown, copied, ids(5)), logits(unknown, chosen, ids(5)))


def test_formats_that_were_chosen(unknown):
    tokens = ids(100)
    with pytest.warns(UserWarning, match="keys have the format that was asked for"):
        found = logits(unknown, make_prompt_cache(unknown, k_format="sq4"), tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert np.array_equal(found, logits(unknown, make_prompt_cache(unknown, k_format="sq4", factors="off"), tokens))
        logits(unknown, make_prompt_cache(unknown, **SQ8), tokens)


def test_choices(model):
    calibration = ROOT / "tests/golden/calibration_1.tqcal"
    for call in (make_prompt_cache, install):
        with pytest.raises(libturboquant.ArgumentError, match="'weights', 'off'"):
            call(model, factors="on")
        with pytest.raises(libturboquant.ArgumentError, match="calibration"):
            call(model, factors="weights", calibration=calibration)
    cache = make_prompt_cache(model, calibration=calibration)
    logits(model, cache, ids(20))
    assert factors(cache) == [None] * 3


def test_generation(model):
    tokens = mx.array(ids(100)[0])
    found = [[int(token) for token, _ in generate_step(tokens, model, max_tokens=12, prompt_cache=cache)]
             for cache in (stock.make_prompt_cache(model), make_prompt_cache(model, **SQ8))]
    assert found[0] == found[1]
