# SPDX-License-Identifier: MIT
"""install(model): every place where a model makes a cache itself gets a compressed one, all others go on as before."""
import pytest
import torch
import libturboquant
from tiny import CACHE, DEVICE, F16, ON_DEVICE, SIZES, SQ8, divergence, generated, ids, logits, make_model, same_tokens, stock
from transformers import (AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, BloomConfig, CLIPVisionConfig,
                          DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration)
from libturboquant.transformers import TurboQuantCache, install, uninstall

FORMATS = SQ8 | {"n_recent": 508} if ON_DEVICE else F16


@pytest.fixture
def model():
    return make_model("llama")


def cache_of(outputs):
    return outputs[CACHE]


def test_generate(model):
    input_ids = ids(2, 150)
    wanted = generated(model, stock(model), input_ids)
    assert install(model, **FORMATS) is model
    for options in ({}, {"num_beams": 2, "max_new_tokens": 4}):
        options = {"max_new_tokens": 24, "do_sample": False} | options
        found = model.generate(input_ids, return_dict_in_generate=True, **options)
        assert type(cache_of(found)) is TurboQuantCache
        if "num_beams" not in options:
            assert same_tokens(model, found.sequences, wanted)
            install(model, **FORMATS)  # same_tokens has set the attention
    assert cache_of(found).get_seq_length() == 153


def test_forward(model):
    input_ids = ids(2, 150)
    wanted = logits(model, stock(model), input_ids)
    install(model, **FORMATS)
    with torch.no_grad():
        found = model(input_ids)
        again = model(input_ids)
        first, rest = input_ids.split(100, dim=1)
        begun = model(first)
        ended = model(rest, **{CACHE: cache_of(begun)})
    assert cache_of(found) is not cache_of(again)
    for each in (found.logits, again.logits, torch.cat([begun.logits, ended.logits], dim=1)):
        assert divergence(wanted, each) < 1e-4
    assert cache_of(ended) is cache_of(begun) and cache_of(begun).get_seq_length() == 150


def test_caches_that_are_passed(model):
    """An empty cache of Transformers is its owner's, and fills as it would."""
    input_ids, mask = ids(2, 150), torch.ones(2, 150, dtype=torch.long, device=DEVICE)
    mask[0, :30] = 0
    wanted = logits(model, stock(model), input_ids, 3, attention_mask=mask)
    install(model)
    own, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for end in (50, 100, 150):
            found.append(model(input_ids[:, end - 50:end], attention_mask=mask[:, :end], **{CACHE: own}).logits)
    assert own.get_seq_length() == 150
    assert divergence(wanted[:, 30:], torch.cat(found, dim=1)[:, 30:]) < 1e-6
    chosen = TurboQuantCache(config=model.config, **FORMATS)
    model.generate(input_ids, max_new_tokens=3, **{CACHE: chosen})
    assert chosen.get_seq_length() == 152


def test_training_and_no_cache(model):
    input_ids = ids(2, 80)
    wanted = model(input_ids, labels=input_ids)
    wanted.loss.backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    install(model)
    found = model(input_ids, labels=input_ids)
    found.loss.backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, gradient)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids, use_cache=False).logits, wanted.logits)


@pytest.mark.parametrize("n_padding", [0, 30])
def test_a_static_cache(model, n_padding):
    """Columns that it has and nobody has written are not seen."""
    input_ids, mask = ids(2, 150), torch.ones(2, 150, dtype=torch.long, device=DEVICE)
    mask[0, :n_padding] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "cache_implementation": "static",
               "disable_compile": True}
    wanted = model.generate(input_ids, **options)
    install(model)
    assert torch.equal(model.generate(input_ids, **options), wanted)


def test_packed_sequences(model):
    """They have a mask of their own, which passes without a compressed cache may have."""
    input_ids = ids(1, 80)
    options = {"position_ids": torch.arange(80, device=DEVICE)[None] % 40, "use_cache": False}
    with torch.no_grad():
        wanted = model(input_ids, **options).logits
        install(model)
        torch.testing.assert_close(model(input_ids, **options).logits, wanted)


def test_uninstall(model):
    input_ids, before = ids(2, 80), set(vars(model))
    model.set_attn_implementation("sdpa")
    wanted = model.generate(input_ids, max_new_tokens=8, do_sample=False)
    assert uninstall(model) is model
    uninstall(install(install(model, "TQ2"), "TQ4"))
    assert set(vars(model)) == before and model.config._attn_implementation == "sdpa"
    found = model.generate(input_ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert type(cache_of(found)) is DynamicCache and torch.equal(found.sequences, wanted)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching(model, monkeypatch, name):
    """Its cache cannot be replaced, which is said before anything runs; uninstall gives the methods back."""
    if not hasattr(model, name):
        pytest.skip("not in this release")
    install(install(model))
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: pytest.fail("the model was called"))
    with pytest.raises(libturboquant.UnsupportedError, match="paged cache of its own.*padded batch.*vLLM.*uninstall"):
        getattr(model, name)(inputs=[[1, 2, 3]], generation_config=None)
    assert getattr(uninstall(model), name).__func__ is getattr(type(model), name)


def test_images():
    """The vision tower keeps its attention."""
    config = LlavaConfig(
        text_config=LlamaConfig(**SIZES), image_token_index=5, image_seq_length=4, vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14))
    model, input_ids = LlavaForConditionalGeneration(config).eval().to(DEVICE), ids(1, 40).clamp_min(8)
    input_ids[0, 3:7] = 5
    install(model, **SQ8)
    found = model.generate(input_ids, pixel_values=torch.zeros(1, 3, 28, 28, device=DEVICE), max_new_tokens=3, do_sample=False,
                           return_dict_in_generate=True)
    assert type(cache_of(found)) is TurboQuantCache and cache_of(found).get_seq_length() == 42
    assert config.vision_config._attn_implementation != "turboquant"


def test_refusals(model):
    with pytest.raises(libturboquant.ArgumentError, match="guard"):
        install(model, guard="maybe")
    with pytest.raises(libturboquant.ArgumentError, match="TQ9"):
        install(model, "TQ9")
    assert model.config._attn_implementation != "turboquant"
    install(model, "TQ2", **SQ8)
    with pytest.raises(libturboquant.ArgumentError, match="TQ9"):
        install(model, "TQ9")  # the model stays as it was
    assert type(cache_of(model.generate(ids(1, 9), max_new_tokens=2, return_dict_in_generate=True))) is TurboQuantCache
    bart = BartForConditionalGeneration(BartConfig(vocab_size=211, d_model=128, encoder_layers=1, decoder_layers=1))
    with pytest.raises(libturboquant.UnsupportedError, match="encoder"):
        install(bart)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=211, hidden_size=256, n_head=4, n_layer=2)).eval()
    with pytest.raises(libturboquant.UnsupportedError, match="Bloom.* computes its attention itself"):
        install(bloom)
