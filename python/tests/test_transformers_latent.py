# SPDX-License-Identifier: MIT
"""Latent attention (MLA): latents are kept once, and attended to without making keys and values of them."""
import copy
import types

import pytest
import torch
from tiny import CACHE, SIZES, divergence, generated, ids, logits, same_tokens, stock
from transformers import AutoModelForCausalLM, DeepseekV3Config
from libturboquant import UnsupportedError, format_info
from libturboquant.__main__ import main
from libturboquant.commands import plan
from libturboquant.transformers import NAME, TurboQuantCache, install, uninstall

RANK, TURNED = 256, 64
_SHAPE = {"kv_lora_rank": RANK, "q_lora_rank": 64, "qk_rope_head_dim": TURNED, "qk_nope_head_dim": 48, "v_head_dim": 32,
          "num_key_value_heads": 4, "first_k_dense_replace": 4, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}
F16 = {"k_format": "f16"}
# What FP16's rounding of latents costs, and its flips where sums are taken in another order: a tenth and less is found.
ROUNDED, FLIPPED = 1e-6, 1e-7


@pytest.fixture
def model():
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**SIZES | _SHAPE)).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # logits of attention as large as a trained model's
        for layer in model.model.layers:
            layer.self_attn.q_b_proj.weight.mul_(2)
    return model


def test_exact_latents_give_what_expanded_ones_give(model):
    input_ids, mask = ids(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[0, :40] = 0
    for more in ({}, {"attention_mask": mask}):
        wanted = logits(model, stock(model), input_ids, 3, **more)
        found = logits(model, TurboQuantCache(model.config, **F16), input_ids, 3, **more)
        first = 40 if more else 0
        assert divergence(wanted[:, first:], found[:, first:]) < ROUNDED
    assert not any("turboquant" in name or name == "expand_kv" for part in model.modules() for name in vars(part))
    cache = TurboQuantCache(model.config, n_recent=508)
    assert same_tokens(model, generated(model, cache, input_ids), generated(model, stock(model), input_ids))


def test_chunks_do_not_matter(model):
    input_ids = ids(2, 200)
    whole, parts = (logits(model, TurboQuantCache(model.config), input_ids, n) for n in (1, 7))
    assert divergence(whole, parts) < FLIPPED


@pytest.mark.parametrize("options, key_format, high", [({"preset": "TQ6"}, "sq8", 1e-4), ({"preset": "TQ3"}, "sq8", 1e-4),
                                                       ({"k_format": "tt4"}, "tt4", 2e-2)])
def test_formats_and_divergence(model, options, key_format, high, recwarn):
    input_ids = ids(1, 300)
    wanted = logits(model, stock(model), input_ids)
    cache = TurboQuantCache(model.config, **options)
    assert 0 < divergence(wanted, logits(model, cache, input_ids)) < high
    assert format_info(cache.store.k_format).name == key_format
    assert not [w for w in recwarn if "turboquant" in str(w.message)]


def test_memory(model):
    """A latent is there once: in 8 bits 320 bytes and a norm of it, where Transformers keeps 640 in BF16."""
    cache = TurboQuantCache(model.config, n_sink=0, n_recent=0)
    logits(model, cache, ids(1, 1280))
    n_bytes = cache.store.stats().page_bytes / cache.store.page_size
    assert n_bytes == len(model.model.layers) * (RANK + TURNED + 2)


def test_plan_and_doctor(model, capsys):
    n_tok = 1000
    planned, cache = plan.read_model(model.config), TurboQuantCache(model.config, max_tok=n_tok)
    logits(model, cache, ids(1, n_tok))
    assert planned.counted("TQ4", n_tok, 1, 128).allocated_bytes == cache.nbytes
    assert planned.bf16_bytes(n_tok) == n_tok * len(model.model.layers) * (RANK + TURNED) * 2
    assert main(["doctor", "deepseek_v3"]) == 0
    assert "latents of 512 and 64 turned channels, of 8 bits at least" in capsys.readouterr().out


def test_crop_copy_and_files(model, tmp_path):
    input_ids = ids(2, 120)
    cache = TurboQuantCache(model.config, n_take_back=8)
    wanted = logits(model, cache, input_ids)
    logits(model, cache, ids(2, 5, seed=9))
    cache.crop(-5)
    assert cache.get_seq_length() == 120
    other = copy.deepcopy(cache)
    cache.save(tmp_path / "cache.tqs")
    loaded = TurboQuantCache.load(tmp_path / "cache.tqs", model.config, n_take_back=8)
    step = ids(2, 3, seed=11)
    found = [logits(model, each, step) for each in (cache, other, loaded)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    again = logits(model, TurboQuantCache(model.config, n_take_back=8), torch.cat([input_ids, step], dim=1))
    assert divergence(again[:, :120], wanted) < FLIPPED and divergence(again[:, 120:], found[0]) < FLIPPED


def test_install_leaves_no_traces(model):
    input_ids = ids(1, 60)
    wanted = generated(model, stock(model), input_ids)
    install(model, **F16)
    assert torch.equal(model.generate(input_ids, max_new_tokens=24, do_sample=False), wanted)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(-1)
    assert not torch.equal(twin.model.layers[0].self_attn.expand_kv(torch.ones(1, 1, 1, RANK), torch.ones(1, 1, 1, TURNED))[1],
                           model.model.layers[0].self_attn.expand_kv(torch.ones(1, 1, 1, RANK), torch.ones(1, 1, 1, TURNED))[1])
    uninstall(model)
    assert not any("turboquant" in name or name == "expand_kv" for part in model.modules() for name in vars(part))
    assert torch.equal(generated(model, stock(model), input_ids), wanted)


def test_weights_may_change(model):
    """Weights that are merged, moved or converted after the first pass are used as they are then."""
    input_ids = ids(1, 60)
    logits(model, TurboQuantCache(model.config, **F16), input_ids)
    with torch.no_grad():
        model.model.layers[0].self_attn.kv_b_proj.weight.mul_(.5)
    found = logits(model, TurboQuantCache(model.config, **F16), input_ids)
    assert divergence(logits(model, stock(model), input_ids), found) < ROUNDED
    model.to(torch.bfloat16)
    found = logits(model, TurboQuantCache(model.config, **F16), input_ids)
    assert divergence(logits(model, stock(model), input_ids), found) < 1e-3


def test_unknown_ways_are_refused(model, monkeypatch):
    attention = type(model.model.layers[0].self_attn)
    expand = attention.expand_kv
    monkeypatch.setattr(attention, "expand_kv", lambda self, *args: tuple(x.abs() for x in expand(self, *args)))
    with pytest.raises(UnsupportedError, match="DeepseekV3Attention makes keys and values from latents in a way"):
        logits(model, TurboQuantCache(model.config), ids(1, 20))
    monkeypatch.undo()
    logits(model, TurboQuantCache(model.config), ids(1, 20))
    plain = [layer.self_attn.kv_b_proj for layer in model.model.layers]
    for other in (torch.nn.Sequential, Adapted, Quantized, lambda linear: linear.to("meta"),
                  lambda linear: linear.to(torch.float8_e4m3fn)):
        for layer, linear in zip(model.model.layers, plain):
            layer.self_attn.kv_b_proj = other(copy.deepcopy(linear))
        with pytest.raises(UnsupportedError, match="no plain weight in memory"):
            logits(model, TurboQuantCache(model.config), ids(1, 20))


class Adapted(torch.nn.Module):
    """As PEFT's LoRA: the weight of what is adapted, which is not all that it does."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.more = linear, torch.nn.Linear(linear.in_features, linear.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.more(x)


class Quantized(torch.nn.Module):
    """As PyTorch's dynamically quantized layers: weight is a method."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return self.linear(x)


def test_gradients_are_refused(model):
    model.set_attn_implementation(NAME)
    with pytest.raises(UnsupportedError, match="no gradients"):
        model(input_ids=ids(1, 20), **{CACHE: TurboQuantCache(model.config)})
    model.requires_grad_(False)
    model.model.layers[1].self_attn.kv_b_proj.weight.requires_grad_()
    with pytest.raises(UnsupportedError, match="no gradients"):
        model(input_ids=ids(1, 20), **{CACHE: TurboQuantCache(model.config)})


def test_autocast(model):
    input_ids = ids(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, TurboQuantCache(model.config, **F16), input_ids)
        assert divergence(logits(model, stock(model), input_ids).float(), found.float()) < 1e-3


def test_exact_layers(model):
    cache = TurboQuantCache(model.config, exact_layers=1)
    logits(model, cache, ids(1, 40))
    assert [format_info(number).name for number in cache._key_formats] == ["f16", "sq8", "sq8", "f16"]


def test_what_others_have_put_there_stays(model):
    attention = model.model.layers[0].self_attn
    attention.expand_kv = other = types.MethodType(type(attention).expand_kv, attention)
    uninstall(install(model))
    assert attention.expand_kv is other


def test_devices_refuse(model, monkeypatch):
    import libturboquant.transformers
    monkeypatch.setattr(libturboquant.transformers, "is_device", lambda device: True)
    with pytest.raises(UnsupportedError, match="only served on the CPU"):
        logits(model, TurboQuantCache(model.config), ids(1, 20))
