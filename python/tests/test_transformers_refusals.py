# SPDX-License-Identifier: MIT
"""What TurboQuantCache refuses, and that a refusal changes nothing."""
import pytest
import torch
import turboquant
from tiny import CACHE, F16, ON_DEVICE, compressed, ids, logits, make_model, stock, use_attention_of
from turboquant.transformers import TurboQuantCache
from transformers import LlamaConfig


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cache_without_attention(llama, implementation):
    cache = compressed(llama)
    llama.set_attn_implementation(implementation)
    with pytest.raises(turboquant.ArgumentError, match='set_attn_implementation."turboquant".'):
        llama.generate(ids(1, 20), max_new_tokens=2, **{CACHE: cache})


def test_attention_without_cache(llama):
    llama.set_attn_implementation("turboquant")
    with pytest.raises(turboquant.ArgumentError, match="pass cache=TurboQuantCache"):
        llama.generate(ids(1, 20), max_new_tokens=2)


def test_gradients(llama):
    cache = compressed(llama)
    use_attention_of(llama, cache)
    with pytest.raises(turboquant.UnsupportedError, match="no_grad"):
        llama(ids(1, 20), **{CACHE: cache})


def test_dropout():
    model = make_model("llama", attention_dropout=.1).train()
    with pytest.raises(turboquant.UnsupportedError, match="dropout.*eval"):
        logits(model, compressed(model), ids(1, 20))


def test_weights(llama):
    with pytest.raises(turboquant.UnsupportedError, match="output_attentions"):
        logits(llama, compressed(llama), ids(1, 20), output_attentions=True)


def test_masks(llama):
    with pytest.raises(turboquant.UnsupportedError, match="4 dimensions"):
        logits(llama, compressed(llama), ids(1, 20), attention_mask=torch.zeros(1, 1, 20, 20))
    cache, mask = compressed(llama), torch.ones(1, 20, dtype=torch.long)
    logits(llama, cache, ids(1, 20), attention_mask=mask)
    with pytest.raises(turboquant.ArgumentError, match="Pass|pass the whole mask"), torch.no_grad():
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[0, 3] = 0
        llama(ids(1, 1), **{CACHE: cache}, attention_mask=mask)
    with pytest.raises(turboquant.ArgumentError, match=r"give \[1, 21\]"), torch.no_grad():
        llama(ids(1, 1), **{CACHE: cache}, attention_mask=torch.zeros(1, 5, dtype=torch.long))
    assert cache.get_seq_length() == 20


def test_cache_of_another_model(llama):
    cache, other = compressed(llama), make_model("llama")
    logits(llama, cache, ids(1, 20))
    with pytest.raises(turboquant.ArgumentError, match="belongs to another model"):
        logits(other, cache, ids(1, 20))
    cache.reset()
    logits(other, cache, ids(1, 20))


def test_config_of_another_model(llama):
    other = LlamaConfig(**(llama.config.to_dict() | {"num_key_value_heads": 4}))
    with pytest.raises(turboquant.ArgumentError, match="2 KV heads of 64.*made for 4"):
        logits(llama, TurboQuantCache(config=other), ids(1, 20))


def test_other_batch(llama):
    cache = compressed(llama)
    logits(llama, cache, ids(2, 20))
    with pytest.raises(turboquant.ArgumentError, match="holds a batch of 2"):
        logits(llama, cache, ids(1, 20))


def test_kinds_of_models(llama):
    config = LlamaConfig(**(llama.config.to_dict() | {"head_dim": 100}))
    with pytest.raises(turboquant.UnsupportedError, match="100"):
        TurboQuantCache(config=config)
    config.layer_types = ["hybrid"] * 4
    with pytest.raises(turboquant.UnsupportedError, match="hybrid"):
        TurboQuantCache(config=config)
    config.layer_types = ["sliding_attention"] * 4
    config.sliding_window = 8
    with pytest.raises(turboquant.UnsupportedError, match="nothing to compress"):
        TurboQuantCache(config=config)


def test_full_cache_holds_what_it_held(llama):
    cache = compressed(llama, max_tok=256)
    logits(llama, cache, ids(1, 200))
    with pytest.raises(turboquant.CacheFullError):
        logits(llama, cache, ids(1, 150))
    assert cache.get_seq_length() == cache.store.length(cache.seqs[0]) == 200
    assert logits(llama, cache, ids(1, 10)).isfinite().all()


@pytest.mark.skipif(ON_DEVICE, reason="devices tell of such keys at the next pass: test_cuda.py")
def test_failing_layer_is_rolled_back():
    """A layer in the middle makes an infinite key: the layers before it forget the tokens again."""
    model = make_model("llama")
    cache, input_ids = compressed(model, **F16), ids(1, 50)
    logits(model, cache, input_ids)
    weight = model.model.layers[2].self_attn.k_proj.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(float("inf"))
    with pytest.raises(turboquant.ArgumentError, match="layer 2"):
        logits(model, cache, input_ids)
    assert [cache.store.length(cache.seqs[0], layer) for layer in range(4)] == [50] * 4
    with torch.no_grad():
        weight.copy_(kept)
    again, fresh = logits(model, cache, ids(1, 5)), compressed(model, **F16)
    logits(model, fresh, input_ids)
    assert torch.equal(again, logits(model, fresh, ids(1, 5)))


def test_crop_takes_a_negative_number(llama):
    with pytest.raises(turboquant.ArgumentError, match="negative"):
        compressed(llama).crop(5)


def test_stock_caches_still_work(llama):
    wanted = logits(llama, stock(llama), ids(1, 20))
    with pytest.raises(turboquant.ArgumentError):
        use_attention_of(llama, compressed(llama))
        llama.generate(ids(1, 20), max_new_tokens=2)
    assert torch.equal(logits(llama, stock(llama), ids(1, 20)), wanted)
