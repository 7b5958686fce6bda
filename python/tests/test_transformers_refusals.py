# SPDX-License-Identifier: MIT
"""What TurboQuantCache refuses, and that a refusal changes nothing."""
import pickle

import pytest
import torch
import transformers
import libturboquant
import libturboquant.transformers
from tiny import (CACHE, F16, ON_DEVICE, SIZES, SQ8, compressed, ids, logits, make_model, make_shared_model, stock,
                  use_attention_of)
from libturboquant.transformers import TurboQuantCache
from transformers import (AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, BloomConfig, CLIPVisionConfig,
                          LlamaConfig, LlavaConfig, LlavaForConditionalGeneration)


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cache_without_attention(llama, implementation):
    cache = compressed(llama)
    llama.set_attn_implementation(implementation)
    with pytest.raises(libturboquant.ArgumentError, match='set_attn_implementation."turboquant".'):
        llama.generate(ids(1, 20), max_new_tokens=2, **{CACHE: cache})


def test_attention_without_cache(llama):
    llama.set_attn_implementation("turboquant")
    with pytest.raises(libturboquant.ArgumentError, match="pass cache=TurboQuantCache"):
        llama.generate(ids(1, 20), max_new_tokens=2)


def test_gradients(llama):
    cache = compressed(llama)
    use_attention_of(llama, cache)
    with pytest.raises(libturboquant.UnsupportedError, match="no_grad"):
        llama(ids(1, 20), **{CACHE: cache})


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_gradients_of_what_is_kept(name):
    """Also where no query needs any, as with adapters of keys or values only."""
    model = make_model("llama").requires_grad_(False)
    use_attention_of(model, compressed(model))
    getattr(model.model.layers[0].self_attn, name).weight.requires_grad_()
    with pytest.raises(libturboquant.UnsupportedError, match="no_grad"):
        model(ids(1, 20), **{CACHE: compressed(model)})


def test_dropout():
    model = make_model("llama", attention_dropout=.1).train()
    with pytest.raises(libturboquant.UnsupportedError, match="dropout.*eval"):
        logits(model, compressed(model), ids(1, 20))


def test_weights(llama):
    with pytest.raises(libturboquant.UnsupportedError, match="output_attentions"):
        logits(llama, compressed(llama), ids(1, 20), output_attentions=True)


def test_masks(llama):
    with pytest.raises(libturboquant.UnsupportedError, match="4 dimensions"):
        logits(llama, compressed(llama), ids(1, 20), attention_mask=torch.zeros(1, 1, 20, 20))
    cache, mask = compressed(llama), torch.ones(1, 20, dtype=torch.long)
    logits(llama, cache, ids(1, 20), attention_mask=mask)
    with pytest.raises(libturboquant.ArgumentError, match="Pass|pass the whole mask"), torch.no_grad():
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[0, 3] = 0
        llama(ids(1, 1), **{CACHE: cache}, attention_mask=mask)
    with pytest.raises(libturboquant.ArgumentError, match=r"give \[1, 21\]"), torch.no_grad():
        llama(ids(1, 1), **{CACHE: cache}, attention_mask=torch.zeros(1, 5, dtype=torch.long))
    assert cache.get_seq_length() == 20


def test_cache_of_another_model(llama):
    cache, other = compressed(llama), make_model("llama")
    logits(llama, cache, ids(1, 20))
    with pytest.raises(libturboquant.ArgumentError, match="belongs to another model"):
        logits(other, cache, ids(1, 20))
    cache.reset()
    logits(other, cache, ids(1, 20))


def test_config_of_another_model(llama):
    other = LlamaConfig(**(llama.config.to_dict() | {"num_key_value_heads": 4}))
    with pytest.raises(libturboquant.ArgumentError, match="2 KV heads of 64.*made for 4"):
        logits(llama, TurboQuantCache(config=other), ids(1, 20))


def test_other_batch(llama):
    cache = compressed(llama)
    logits(llama, cache, ids(2, 20))
    with pytest.raises(libturboquant.ArgumentError, match="holds a batch of 2"):
        logits(llama, cache, ids(1, 20))


def test_kinds_of_models(llama):
    config = LlamaConfig(**(llama.config.to_dict() | {"head_dim": 100}))
    with pytest.raises(libturboquant.UnsupportedError, match="100"):
        TurboQuantCache(config=config)
    config.layer_types = ["indexed_attention"] * 4
    with pytest.raises(libturboquant.UnsupportedError, match="indexed_attention"):
        TurboQuantCache(config=config)
    config.layer_types = ["sliding_attention"] * 4
    config.sliding_window = 8
    with pytest.raises(libturboquant.UnsupportedError, match="nothing to compress"):
        TurboQuantCache(config=config)


def test_full_cache_holds_what_it_held(llama):
    cache = compressed(llama, max_tok=256)
    logits(llama, cache, ids(1, 200))
    with pytest.raises(libturboquant.CacheFullError):
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
    with pytest.raises(libturboquant.ArgumentError, match="layer 2"):
        logits(model, cache, input_ids)
    assert [cache.store.length(cache.seqs[0], layer) for layer in range(4)] == [50] * 4
    with torch.no_grad():
        weight.copy_(kept)
    again, fresh = logits(model, cache, ids(1, 5)), compressed(model, **F16)
    logits(model, fresh, input_ids)
    assert torch.equal(again, logits(model, fresh, ids(1, 5)))


def test_crop_takes_a_negative_number(llama):
    with pytest.raises(libturboquant.ArgumentError, match="negative"):
        compressed(llama).crop(5)


def test_stock_caches_still_work(llama):
    wanted = logits(llama, stock(llama), ids(1, 20))
    with pytest.raises(libturboquant.ArgumentError):
        use_attention_of(llama, compressed(llama))
        llama.generate(ids(1, 20), max_new_tokens=2)
    assert torch.equal(logits(llama, stock(llama), ids(1, 20)), wanted)


def test_attention_of_the_models_own():
    """It is no use to tell who has chosen the implementation to choose it."""
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=211, hidden_size=256, n_head=4, n_layer=2)).eval()
    model.set_attn_implementation("turboquant")
    with pytest.raises(libturboquant.UnsupportedError, match="Bloom.* computes its attention itself") as refusal:
        logits(model, TurboQuantCache(config=model.config), ids(1, 20))
    assert "set_attn_implementation" not in str(refusal.value)


def test_images():
    """The vision tower has no cache: the message says how to switch only the text part, and that works."""
    config = LlavaConfig(
        text_config=LlamaConfig(**SIZES), image_token_index=5, image_seq_length=4, vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14))
    model, input_ids = LlavaForConditionalGeneration(config).eval(), ids(1, 40).clamp_min(8)
    input_ids[0, 3:7] = 5
    given = {"input_ids": input_ids, "pixel_values": torch.zeros(1, 3, 28, 28), "max_new_tokens": 3, "do_sample": False}
    model.set_attn_implementation("turboquant")
    with pytest.raises(libturboquant.UnsupportedError, match="CLIPAttention.*text_config.*turboquant"):
        model.generate(**given, **{CACHE: TurboQuantCache(config=model.config)})
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation({"text_config": "turboquant"})
    cache = TurboQuantCache(config=model.config, **SQ8)
    model.generate(**given, **{CACHE: cache})
    assert cache.get_seq_length() == 42


def test_a_pass_without_the_cache_that_was_given(llama):
    cache = compressed(llama)
    use_attention_of(llama, cache)
    with pytest.raises(libturboquant.ArgumentError, match="guidance_scale"):
        llama.generate(ids(1, 20), max_new_tokens=2, guidance_scale=1.5, **{CACHE: cache})


def test_encoders():
    config = BartConfig(vocab_size=211, d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
    model = BartForConditionalGeneration(config).eval()
    model.set_attn_implementation("turboquant")
    with pytest.raises(libturboquant.UnsupportedError, match="encoder|causal mask"):
        model.generate(ids(1, 20), max_new_tokens=2)


def test_pickling(llama):
    with pytest.raises(TypeError, match="save.. it"):
        pickle.dumps(compressed(llama))


@pytest.mark.skipif(not ON_DEVICE, reason="the CPU serves them")
def test_shared_keys_on_a_device():
    model = make_shared_model("gemma3n")
    with pytest.raises(libturboquant.UnsupportedError, match="share the keys and values of others"):
        logits(model, compressed(model), ids(1, 20))


def test_unserved_layers(llama):
    """One head_dim that has no rotation, in one layer, is no reason to refuse a model, unless that is asked for."""
    config = LlamaConfig(**SIZES, per_layer_config={2: {"head_dim": 100}})
    with pytest.raises(libturboquant.UnsupportedError, match=r"layer 2 cannot be compressed \(head_dim 100"):
        TurboQuantCache(config=config, unserved="refuse")
    with pytest.raises(libturboquant.ArgumentError, match="unserved"):
        TurboQuantCache(config=config, unserved="maybe")
    latent = TurboQuantCache(config=transformers.DeepseekV3Config(num_hidden_layers=2), unserved="refuse")
    assert all(layer.is_latent for layer in latent.layers)  # which is served: test_transformers_latent.py


def test_keys_of_another_layer(llama):
    cache = compressed(llama)
    use_attention_of(llama, cache)
    rows, module = torch.zeros(1, 2, 3, 64).to(llama.device), llama.model.layers[0].self_attn
    handles = cache.update(rows, rows, 0)
    attend = libturboquant.transformers.attention_forward
    with torch.no_grad():
        attend(module, torch.zeros(1, 4, 3, 64).to(llama.device), *handles, None)
        with pytest.raises(libturboquant.UnsupportedError, match="another layer has brought"):
            attend(module, torch.zeros(1, 4, 3, 64).to(llama.device), *handles, None)
    assert cache.layers[0].n_columns == 3
