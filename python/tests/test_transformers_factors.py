# SPDX-License-Identifier: MIT
"""
Factors from the weights in Transformers: models with outlier keys, which compute the same as models without. tiny.py's models
are made to have them by scaling channels of keys up and the same ones of queries down, before RoPE.
"""
import copy
import warnings

import numpy as np
import pytest
import torch
import transformers
import libturboquant
from tiny import (BACKEND, CACHE, DEVICE, F16, ON_DEVICE, SIZES, compressed, divergence, generated, ids, logits,
                  make_model, stock, use_attention_of)
from libturboquant import _torch_stores as stores
from libturboquant.transformers import TurboQuantCache

HALVES, QUARTER = np.arange(64) % 32, np.where(np.arange(64) < 16, np.arange(64) % 8, np.arange(64))
# Options of small models, and which channels RoPE turns together: those with the same number.
KINDS = {
    "llama": ({}, HALVES), "qwen2": ({}, HALVES), "qwen3": ({}, HALVES), "olmo2": ({}, HALVES),
    "cohere": ({}, np.arange(64) // 2),
    "gemma3": ({"layer_types": ["full_attention"] * 4}, HALVES), "phi3": ({"hidden_size": 256}, HALVES),
    "glm": ({"partial_rotary_factor": .5}, np.where(np.arange(64) < 32, np.arange(64) // 2, np.arange(64))),
    "gpt_neox": ({"hidden_size": 256, "num_key_value_heads": 4, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": .25}}, QUARTER),
    "qwen2_vl": ({}, HALVES)}
PRESET = {"k_format": None, "v_format": "sq8", "n_recent": 16}


def make(kind):
    options, _ = KINDS[kind]
    if kind != "qwen2_vl":
        return make_model(kind, **options)
    torch.manual_seed(1)
    ropes = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    text = SIZES | {"hidden_size": 256, "rope_parameters": ropes}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 256, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config).to(DEVICE).eval()


def attentions(model):
    return [module for name, module in model.named_modules()
            if any(hasattr(module, part) for part in ("k_proj", "qkv_proj", "query_key_value", "c_attn"))
            and "visual" not in name]


@torch.no_grad()
def scale(module, factors):
    """Multiply keys of a module by factors [head_dim] before RoPE and divide queries by them, in weights only."""
    f, parts = torch.as_tensor(factors, dtype=torch.float32, device=DEVICE), []
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if norms[0] is not None:
        for norm, by in zip(norms, (1 / f, f)):
            offset = 1 if "Gemma" in type(norm).__name__ else 0
            n = len(norm.weight) // len(f)
            norm.weight.copy_((norm.weight + offset) * by.repeat(n) - offset)
        return
    if hasattr(module, "k_proj"):
        parts = [(module.q_proj, (1 / f).repeat(module.q_proj.out_features // len(f))),
                 (module.k_proj, f.repeat(module.k_proj.out_features // len(f)))]
    elif hasattr(module, "qkv_proj"):
        n_kv = SIZES["num_key_value_heads"]
        n_head = module.qkv_proj.out_features // len(f) - 2 * n_kv
        parts = [(module.qkv_proj, torch.cat([(1 / f).repeat(n_head), f.repeat(n_kv), torch.ones_like(f).repeat(n_kv)]))]
    else:
        parts = [(module.query_key_value, torch.cat([1 / f, f, torch.ones_like(f)]).repeat(SIZES["num_attention_heads"]))]
    for linear, rows in parts:
        linear.weight.mul_(rows[:, None])
        if linear.bias is not None:
            linear.bias.mul_(rows)


def make_with_outliers(kind):
    """Every fifth of the channels' numbers is up to 64 times larger in keys."""
    model, numbers = make(kind), KINDS[kind][1]
    for i, module in enumerate(attentions(model)):
        chance = np.random.default_rng(i)
        scale(module, np.where(chance.random(64) < .2, 64.0, 1.0)[numbers] * 2 ** chance.random(64)[numbers])
    return model


def kl(model, input_ids, wanted, **options):
    return divergence(wanted, logits(model, compressed(model, **PRESET | options), input_ids, parts=2))


@pytest.mark.parametrize("kind", KINDS)
def test_outliers(kind):
    """They cost nothing: the same divergence as in the model without them, where without factors it is many times as much."""
    plain, model, input_ids = make(kind), make_with_outliers(kind), ids(1, 200)
    wanted = logits(plain, stock(plain), input_ids)
    assert abs(divergence(wanted, logits(model, stock(model), input_ids))) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = kl(model, input_ids, wanted)
    assert found < 2 * kl(plain, input_ids, wanted) < .2 * kl(model, input_ids, wanted, factors="off")


# .0013 and .0051; without factors .12 and .30.
@pytest.mark.parametrize("preset, limit", [("TQ4", .01), ("TQ3", .03)])
def test_key_biases(preset, limit):
    """As Qwen2.5 has them in its first and last layers: of 40 in pairs that queries hardly look at."""
    model, input_ids = make_model("qwen2"), ids(1, 300)
    for i in (0, 3):
        attention, is_large = model.model.layers[i].self_attn, np.random.default_rng(i).random(32) < .2
        with torch.no_grad():
            attention.k_proj.bias.copy_(torch.from_numpy(np.tile(40.0 * is_large, 4)))
            attention.q_proj.weight.mul_(torch.from_numpy(np.tile(np.where(is_large, 1 / 16, 1), 8))[:, None].to(model.device))
    wanted = logits(model, stock(model), input_ids)
    assert kl(model, input_ids, wanted, preset=preset) < limit < kl(model, input_ids, wanted, preset=preset, factors="off")


@pytest.mark.parametrize("kind", KINDS)
def test_angles(kind):
    """Of pairs, from token to token: those of the model's rotary embedding."""
    model, numbers = make(kind), KINDS[kind][1]
    partners, angles = libturboquant._torch_factors.rope(attentions(model)[0], 64)
    ropes = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq") and "visual" not in name}
    wanted = next((found for name, found in ropes.items() if "full" in name and "original" not in name), None)
    wanted = next(iter(ropes.values())) if wanted is None else wanted
    n = 2 * len(wanted)
    assert (numbers[partners] == numbers).all() and (partners != np.arange(64)).sum() == n
    np.testing.assert_allclose(np.sort(angles[:n]), np.sort(wanted.cpu().numpy().repeat(2)), rtol=1e-5)
    assert (angles[n:] == 0).all()


def quarters(cache):
    found = [cache.store.key_factors(layer._number) for layer in cache._compressed]
    return [None if factors is None else factors.tolist() for factors in found]


@pytest.fixture(scope="module")
def model():
    return make_with_outliers("qwen2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_rounds_nothing(dtype):
    """While all keys are exact, logits are those without factors; next to nothing is so small that half floats cut it."""
    model, input_ids = make_with_outliers("llama").to(dtype), ids(2, 60)
    options = {"n_recent": 508} if ON_DEVICE else {}
    found = [logits(model, compressed(model, factors=factors, **options), input_ids, 3) for factors in ("weights", "off")]
    assert abs(found[0] - found[1]).max() < 1e-3 * abs(found[1]).max()


def test_nothing_of_a_request_matters(model):
    """Factors are those of the weights, whatever comes first."""
    found = []
    for input_ids in (ids(1, 200), torch.full((1, 100), 7, device=DEVICE), ids(1, 1), ids(3, 20)):
        cache = compressed(model, **PRESET)
        logits(model, cache, input_ids)
        found.append(quarters(cache))
    assert None not in found[0] and found.count(found[0]) == 4
    cache.reset()
    logits(model, cache, ids(1, 10))
    assert quarters(cache) == found[0]


def test_the_library_has_them(model):
    """In quarters of an octave; a copy that goes on with another model gets a store of its own, and hurts nobody."""
    cache, other_model = compressed(model, **PRESET), make_with_outliers("llama")
    logits(model, cache, ids(1, 100))
    assert any((np.array(layer) % 4 != 0).any() for layer in quarters(cache))
    copied, single = copy.deepcopy(cache), compressed(other_model, **PRESET)
    copied.reset()
    wanted = logits(other_model, single, ids(1, 80))
    assert torch.equal(logits(other_model, copied, ids(1, 80)), wanted) and quarters(copied) == quarters(single)
    again = compressed(model, **PRESET)
    logits(model, again, ids(1, 100))
    assert torch.equal(logits(model, cache, ids(1, 9, seed=3)), logits(model, again, ids(1, 9, seed=3)))


@pytest.mark.skipif(BACKEND != "emulated", reason="the CPU's caches want the model there, too")
@pytest.mark.parametrize("options", [{}, {"k_ref_block": 0}])
def test_a_device_has_the_cpus(options, monkeypatch):
    """A key bias counts as far as references leave it, which a device has like the CPU."""
    model = make_with_outliers("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias += torch.linspace(-3, 3, len(layer.self_attn.k_proj.bias))
    found = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(stores, "DEVICE_TYPES", devices)
        cache = compressed(model, **PRESET | options)
        logits(model, cache, ids(1, 20))
        assert cache.store.device_kind == ("cuda" if devices else "cpu")
        found.append(quarters(cache))
    assert found[0] == found[1] and None not in found[0]


def test_weights_stay_as_they_are(model):
    before, other = copy.deepcopy(model.state_dict()), stock(model)
    wanted = logits(model, other, ids(1, 50))
    logits(model, compressed(model), ids(1, 50))
    assert all(torch.equal(before[name], found) for name, found in model.state_dict().items())
    assert torch.equal(logits(model, stock(model), ids(1, 50)), wanted)
    logits(model, other, ids(1, 5, seed=8))  # goes on where it was


def test_exact_keys_have_none(model):
    if not ON_DEVICE:
        cache = compressed(model, **F16)
        logits(model, cache, ids(1, 20))
        assert quarters(cache) == [None] * 4


class Adapted(torch.nn.Module):
    """What an adapter makes of a projection, which has no weights by its own name."""

    def __init__(self, base, seed):
        super().__init__()
        self.base_layer, self.in_features = base, base.in_features
        torch.manual_seed(seed)
        self.down, self.up = torch.nn.Linear(base.in_features, 4, bias=False), torch.nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + .02 * self.up(self.down(x))


def test_adapters():
    model, input_ids = make_with_outliers("llama"), ids(1, 200)
    for i, module in enumerate(attentions(model)):
        module.q_proj, module.k_proj = Adapted(module.q_proj, i).to(DEVICE), Adapted(module.k_proj, 9 + i).to(DEVICE)
    wanted = logits(model, stock(model), input_ids)
    assert kl(model, input_ids, wanted) < .2 * kl(model, input_ids, wanted, factors="off")


def test_copies_and_crops(model):
    cache, prompt = compressed(model, **PRESET), ids(1, 150)
    logits(model, cache, prompt)
    other = copy.deepcopy(cache)
    other.crop(-20)
    more = ids(1, 20, seed=8)
    single = compressed(model, **PRESET)
    logits(model, single, prompt[:, :130])
    assert divergence(logits(model, single, more), logits(model, other, more)) < 1e-3
    assert cache.get_seq_length() == 150 and quarters(other) == quarters(cache)


def test_files(model, tmp_path):
    """They hold the factors: a cache that is loaded goes on as it was."""
    path, cache = tmp_path / "x.tqs", compressed(model, **PRESET)
    logits(model, cache, ids(2, 100))
    cache.save(path)
    n = cache.store.stats().n_sequences
    assert n == 2

    def load(name):
        return TurboQuantCache.load(tmp_path / name, model.config, device=DEVICE if ON_DEVICE else None)

    loaded = load("x.tqs")
    assert quarters(loaded) == quarters(cache) and len(loaded.seqs) == 2
    more = ids(2, 5, seed=9)
    torch.testing.assert_close(logits(model, loaded, more), logits(model, cache, more), rtol=0,
                               atol=2e-3 if BACKEND == "cuda" else 0)
    loaded.save(tmp_path / "again.tqs")
    assert quarters(load("again.tqs")) == quarters(cache)
    without = compressed(model, factors="off", **PRESET)
    logits(model, without, ids(2, 100))
    without.save(path)
    loaded = load("x.tqs")
    logits(model, loaded, more)
    assert quarters(loaded) == [None] * 4
    loaded.reset()
    logits(model, loaded, more)
    assert quarters(loaded) == quarters(cache)


# ---- projections that are not known ----

@pytest.fixture
def unknown():
    return make_model("gpt2", hidden_size=256, num_key_value_heads=4, num_hidden_layers=3)


def key_formats(cache):
    return {libturboquant.format_info(fmt).name for fmt in cache._key_formats}


def test_unknown_projections(unknown):
    """A preset's keys get 8 bits, and a warning says why and what to do; generation works as ever."""
    cache, input_ids = compressed(unknown, preset="TQ3", k_format=None, v_format=None), ids(2, 150)
    match = "projections.*GPT2Attention.*keys have 8 bits, not those of TQ3.*k_format=.*off"
    with pytest.warns(UserWarning, match=match) as told:
        found = logits(unknown, cache, input_ids, parts=3)
    assert len([each for each in told if each.category is UserWarning]) == 1
    assert key_formats(cache) == {"sq8"} and cache.get_seq_length() == 150
    chosen = compressed(unknown, preset="TQ3", k_format="sq8", v_format=None, factors="off")
    assert torch.equal(found, logits(unknown, chosen, input_ids, parts=3))
    cache.reset()
    assert divergence(logits(unknown, stock(unknown), input_ids), logits(unknown, cache, input_ids)) < 5e-3
    assert generated(unknown, cache, torch.cat([input_ids, ids(2, 3)], dim=1), n=4).shape == (2, 157)


@pytest.mark.parametrize("options, wanted, is_told", [
    ({"k_format": "sq4"}, "sq4", True), ({"k_format": "sq8"}, "sq8", False),
    ({"preset": "TQ3", "factors": "off"}, "tt3", False),
    ({"layer_k_formats": ["sq4"] * 3}, "sq4", True)], ids=str)
def test_formats_that_were_chosen(unknown, options, wanted, is_told):
    """They stay, with a warning if they are of few bits."""
    cache = TurboQuantCache(config=unknown.config, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        logits(unknown, cache, ids(1, 30))
    told = [str(each.message) for each in told if "projections" in str(each.message)]
    assert key_formats(cache) == {wanted} and len(told) == is_told
    assert all("keys have the format that was asked for" in message for message in told)


def test_unknown_projections_in_a_later_layer():
    """Refused before there is any output: formats are the whole cache's."""
    model = make_model("llama")
    model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(_refuse_few)
    cache = compressed(model, **PRESET)
    with pytest.raises(libturboquant.UnsupportedError, match='LlamaAttention.*layer 2.*k_format="sq8", factors="off"'):
        logits(model, cache, ids(1, 20))
    assert logits(model, compressed(model, factors="off"), ids(1, 20)).isfinite().all()


def _refuse_few(module, given):
    if given[0].shape[1] > 100:
        raise ValueError("this projection takes few tokens")


def test_choices(model):
    for factors in ("on", True, 1):
        with pytest.raises(libturboquant.ArgumentError, match="'weights', 'off'"):
            compressed(model, factors=factors)
    with pytest.raises(libturboquant.ArgumentError, match="calibration"):
        compressed(model, factors="weights", calibration="x.tqcal")


def test_compiled_model(model):
    cache = compressed(model, **PRESET)
    wanted = logits(model, compressed(model, **PRESET), ids(1, 40))
    use_attention_of(model, cache)
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager")(ids(1, 40), **{CACHE: cache}).logits
    assert None not in quarters(cache) and divergence(wanted, found) < 1e-3


def formats_held(cache, tmp_path):
    cache.save(tmp_path / "a.tqs")
    return [libturboquant.format_info(number).name for number in libturboquant.describe_snapshot(tmp_path / "a.tqs").k_formats]


def test_the_guard_raises_a_layer(tmp_path):
    """Before its first token a layer whose logits are spread too widely for the preset gets better keys; others keep theirs."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight *= 30
    plain = compressed(make_model("llama"), preset="TQ3", k_format=None, v_format=None)
    logits(make_model("llama"), plain, ids(1, 20))
    assert formats_held(plain, tmp_path) == ["tt3"] * 4
    raised = compressed(model, preset="TQ3", k_format=None, v_format=None)
    with pytest.warns(UserWarning, match=r"TQ3 would move the logits of 1 layers.*layer 2 (tt4|sq8)\)"):
        logits(model, raised, ids(1, 150))
    held = formats_held(raised, tmp_path)
    assert held[:2] + held[3:] == ["tt3"] * 3 and held[2] in ("tt4", "sq8")
    again = TurboQuantCache.load(tmp_path / "a.tqs", model.config)
    assert torch.equal(logits(model, again, ids(1, 3)), logits(model, raised, ids(1, 3)))


@pytest.mark.skipif(ON_DEVICE, reason="devices have no f16 format")
def test_exact_layers(tmp_path, unknown):
    """They are no choice of formats: the guard, and 8 bits for projections that are not known, are for the layers between."""
    model, options = make_model("llama"), {"preset": "TQ3", "k_format": None, "v_format": None, "exact_layers": 1}
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight *= 30
    cache = compressed(model, **options)
    with pytest.warns(UserWarning, match="would move the logits of 1 layers.*layer 2"):
        logits(model, cache, ids(1, 150))
    held = formats_held(cache, tmp_path)
    assert held[0] == held[3] == "f16" and held[1] == "tt3" and held[2] in ("tt4", "sq8")
    again = TurboQuantCache.load(tmp_path / "a.tqs", model.config)
    assert torch.equal(logits(model, again, ids(1, 3)), logits(model, cache, ids(1, 3)))
    cache = compressed(unknown, **options)
    with pytest.warns(UserWarning, match="keys have 8 bits"):
        logits(unknown, cache, ids(1, 30))
    assert formats_held(cache, tmp_path) == ["f16", "sq8", "f16"]


def test_every_layer_is_judged_behind_its_norm(tmp_path):
    """
    Norms far from one make up for large projections, as in real models. Layers that are judged before their turn are judged,
    and have the factors, as when they come.
    """
    found = []
    for guard in ("raise", "warn"):
        model = make_model("llama")
        with torch.no_grad():
            for i, layer in enumerate(model.model.layers):
                scale = torch.exp2(torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(i)))
                layer.input_layernorm.weight.copy_(scale / 50)
                for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    projection.weight *= 50 / scale
        cache = compressed(model, preset="TQ3", k_format=None, v_format=None, guard=guard)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            logits(model, cache, ids(1, 20))
        assert not any("move" in str(each.message) for each in told)
        assert formats_held(cache, tmp_path) == ["tt3"] * 4
        found.append(quarters(cache))
    assert found[0] == found[1]


@pytest.mark.parametrize("guard, chosen", [("warn", None), ("raise", "tt3"), ("off", None)])
def test_the_guard_leaves_formats(tmp_path, guard, chosen, recwarn):
    """That were chosen, or where it is told to; it warns unless it is off."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight *= 30
    cache = compressed(model, preset="TQ3", k_format=chosen, v_format=None, guard=guard)
    logits(model, cache, ids(1, 20))
    assert formats_held(cache, tmp_path) == ["tt3"] * 4
    told = [str(each.message) for each in recwarn if "would move by more than 1" in str(each.message)]
    assert len(told) == (guard != "off") and all("compressed layer 2" in text for text in told)


def test_guards_that_do_not_exist():
    with pytest.raises(libturboquant.ArgumentError, match="'raise', 'warn', 'off'"):
        compressed(make_model("llama"), guard="on")
