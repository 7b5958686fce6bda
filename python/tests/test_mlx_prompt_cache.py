# SPDX-License-Identifier: MIT
"""What MLX-LM tests of its own caches, of compressed ones: generation that goes on, trimming, files, batches, masks, LRU."""
import copy

import mlx.core as mx
import mlx_lm.models.cache as stock
import numpy as np
import pytest
import libturboquant
from mlx_lm.generate import generate_step
from mlx_lm.models.base import create_attention_mask
from tiny_mlx import F16, OTHER_ORDER, SQ8, ids, logits, make_model
from libturboquant.mlx import TurboQuantKVCache, make_prompt_cache


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def mixed():
    """A model whose first and last layers have a window."""
    return make_model(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=32)


def steps(model, tokens, n, cache):
    """n steps of generation: tokens, and log-probabilities."""
    found = list(generate_step(mx.array(tokens), model, prompt_cache=cache, max_tokens=n))
    return [int(token) for token, _ in found], np.array([np.array(row) for _, row in found])


def test_generation_goes_on(llama):
    """With a cache that has generated a part."""
    prompt = ids(100)[0]
    tokens, wanted = steps(llama, prompt, 6, make_prompt_cache(llama, **F16))
    cache = make_prompt_cache(llama, **F16)
    first, found = steps(llama, prompt, 2, cache)
    rest, more = steps(llama, tokens[2:3], 3, cache)
    # MLX-LM is a step ahead: the cache holds what it yielded, and the third token is what comes next.
    assert first == tokens[:2] and rest == tokens[3:6]
    np.testing.assert_allclose(np.concatenate([found, more]), wanted[[0, 1, 3, 4, 5]], atol=OTHER_ORDER["f16"])


def test_generation_goes_back(llama):
    """By trimming what was generated: then the same comes again."""
    cache = make_prompt_cache(llama, **F16)
    logits(llama, cache, ids(100))
    last, before = ids(1, seed=9)[0], cache[0].offset
    tokens, wanted = steps(llama, last, 3, cache)
    n = cache[0].offset - before
    assert n > 2 and stock.trim_prompt_cache(cache, n) == n and cache[0].offset == before
    again, found = steps(llama, last, 3, cache)
    assert again == tokens
    np.testing.assert_allclose(found, wanted, atol=OTHER_ORDER["f16"])


def test_all_caches_have_to_be_trimmable(llama):
    cache = make_prompt_cache(llama)
    logits(llama, cache, ids(20))
    assert stock.trim_prompt_cache([stock.ArraysCache(2), *cache], 5) == 0 and cache[0].offset == 20
    assert stock.trim_prompt_cache(cache, 7) == 7 and stock.trim_prompt_cache(cache, 40) == 13
    assert cache[0].empty() and cache[0].size() == 0 and stock.trim_prompt_cache(cache, 1) == 0


def saved(cache, tmp_path):
    stock.save_prompt_cache(str(tmp_path / "prompt.safetensors"), cache)
    return stock.load_prompt_cache(str(tmp_path / "prompt.safetensors"))


@pytest.mark.parametrize("n_tok", [20, 80])
def test_files_of_several_kinds(mixed, tmp_path, n_tok):
    cache = make_prompt_cache(mixed, **SQ8)
    logits(mixed, cache, ids(n_tok))
    loaded = saved(cache, tmp_path)
    assert [type(each) for each in loaded] == [stock.RotatingKVCache, TurboQuantKVCache, stock.RotatingKVCache]
    more = ids(5, seed=9)
    np.testing.assert_array_equal(logits(mixed, loaded, more), logits(mixed, cache, more))


def test_files_of_batches(llama, tmp_path):
    """Rows of different lengths."""
    singles = [make_prompt_cache(llama, **SQ8) for _ in range(2)]
    for n, cache in zip((30, 90), singles):
        logits(llama, cache, ids(n, seed=n))
    batch = [layers[0].merge(layers) for layers in zip(*singles)]
    loaded, more = saved(batch, tmp_path), ids(4, seed=9, n_batch=2)
    assert loaded[0].offset.tolist() == [30, 90]
    np.testing.assert_array_equal(logits(llama, loaded, more), logits(llama, batch, more))


@pytest.mark.parametrize("is_trimmed", [False, True])
def test_files_of_empty_caches(llama, tmp_path, is_trimmed):
    """Of new ones, and of those that all tokens were taken from. Options are kept."""
    cache = make_prompt_cache(llama, preset="TQ3")
    if is_trimmed:
        logits(llama, cache, ids(20))
        stock.trim_prompt_cache(cache, 20)
    loaded = saved(cache, tmp_path)
    assert all(each.empty() and each.offset == 0 for each in loaded)
    wanted = logits(llama, make_prompt_cache(llama, preset="TQ3"), ids(200))
    np.testing.assert_array_equal(logits(llama, loaded, ids(200)), wanted)


def test_bytes_grow_and_are_counted_by_row(llama):
    cache, other = make_prompt_cache(llama), make_prompt_cache(llama)
    assert cache[0].nbytes == 0
    sizes = []
    for _ in range(3):
        logits(llama, cache, ids(256))
        sizes.append(cache[0].nbytes)
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    logits(llama, other, ids(256))
    assert cache[0].merge([cache[0], other[0]]).nbytes > cache[0].nbytes


def test_batches_with_empty_caches(llama):
    """One has read nothing yet: each row is what it is by itself, whichever comes first."""
    full, more = make_prompt_cache(llama, **F16), ids(6, seed=9)
    logits(llama, full, ids(50))
    wanted = np.concatenate([logits(llama, copy.deepcopy(cache), more) for cache in (full, make_prompt_cache(llama, **F16))])
    for order in ([0, 1], [1, 0]):
        pair = [full, make_prompt_cache(llama, **F16)]
        batch = [layers[0].merge(layers) for layers in zip(*(pair[i] for i in order))]
        assert batch[0].offset.tolist() == [[50, 0][i] for i in order] and not batch[0].empty()
        found = logits(llama, batch, np.concatenate([more, more]))
        np.testing.assert_allclose(found[order], wanted, atol=OTHER_ORDER["f16"])
    empty = make_prompt_cache(llama, **F16)[0]
    merged = empty.merge([empty, empty])
    assert merged.empty() and merged.extract(1).empty() and merged.offset.tolist() == [0, 0]


def test_masks(llama):
    """None or "causal", whatever is held."""
    caches = make_prompt_cache(llama)
    for n_tok in (16, 1):
        assert create_attention_mask(mx.zeros((1, 1, 8)), caches[0]) is None
        assert create_attention_mask(mx.zeros((1, 4, 8)), caches[0]) == "causal"
        with pytest.raises(libturboquant.UnsupportedError, match="mask as an array"):
            create_attention_mask(mx.zeros((1, 4, 8)), caches[0], return_array=True)
        logits(llama, caches, ids(n_tok))


def test_the_servers_prompts(llama):
    """MLX-LM's LRU finds the longest beginning, by trimming what is longer, and keeps its bound in bytes."""
    lru, prompt = stock.LRUPromptCache(max_size=3), ids(60)[0].tolist()
    cache = make_prompt_cache(llama, **F16)
    logits(llama, cache, np.array([prompt]))
    lru.insert_cache("model", prompt, cache)
    assert lru.nbytes == sum(each.nbytes for each in cache) and lru.fetch_nearest_cache("other", prompt)[0] is None
    found, rest = lru.fetch_nearest_cache("model", prompt + [5, 6])
    assert rest == [5, 6] and found[0].offset == 60 and found[0] is not cache[0]
    changed = prompt[:40] + [7, 8, 9]
    found, rest = lru.fetch_nearest_cache("model", changed)
    assert rest == [7, 8, 9] and found[0].offset == 40 and cache[0].offset == 60
    fresh = make_prompt_cache(llama, **F16)
    np.testing.assert_allclose(logits(llama, found, np.array([rest])), logits(llama, fresh, np.array([changed]))[:, 40:],
                               atol=OTHER_ORDER["f16"])
    longer = make_prompt_cache(llama, **F16)
    logits(llama, longer, np.array([prompt + [5]]))
    lru.insert_cache("model", prompt + [5], longer)
    assert len(lru) == 1  # the shorter one is what trimming leaves
    lru.trim_to(n_bytes=1)
    assert len(lru) == 0 and lru.nbytes == 0
