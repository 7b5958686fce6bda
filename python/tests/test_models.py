# SPDX-License-Identifier: MIT
"""
The families of docs/models.md in Transformers: small random models of the real shapes, with install() and without, or the
reason for which a family is refused.
"""
import contextlib
import sys

import pytest
import torch
import transformers
import libturboquant
from conftest import ROOT
from families import FAMILIES, N_SKIPPED, N_TOK, PAGES, PARTS, PEAKED, SQ8, SQ8_MAX, TQ4_MAX, Comparison, settings
from tiny import CACHE, ids
from transformers.cache_utils import DummyLayer
from libturboquant.transformers import TurboQuantCache, TurboQuantLayer, install, uninstall

sys.path.insert(0, str(ROOT / "tests"))
import models_page  # noqa: E402

_QUERIES_AND_KEYS = ("q_proj", "k_proj", "qkv_proj")
_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
# Kinds of layers without keys and values.
_WITHOUT_KEYS = ("linear_attention", "conv", "moe", "mlp")


def make_config(family):
    name, options = settings(family)
    return getattr(transformers, name)(**options) if hasattr(transformers, name) else None


def make_model(config, seed=1):
    """Of a text configuration, with attention that is as peaked as a trained model's."""
    torch.manual_seed(seed)
    if config.model_type == "qwen2_5_vl_text":  # which has no model of its own
        whole = transformers.Qwen2_5_VLConfig(text_config=config.to_dict(), vision_config={
            "hidden_size": 32, "num_heads": 2, "depth": 1, "intermediate_size": 32, "out_hidden_size": config.hidden_size})
        model = transformers.Qwen2_5_VLForConditionalGeneration(whole)
    elif config.model_type == "mistral4":
        model = transformers.Mistral4ForCausalLM(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.eval().float()
    with torch.no_grad():
        for module in model.get_decoder().modules():
            head_dim = getattr(module, "qk_head_dim", getattr(module, "head_dim", 1))
            gain = PEAKED * (getattr(module, "scaling", head_dim ** -.5) * head_dim ** .5) ** -.5
            has_norms = any(hasattr(module, name) for name in _NORMS)
            for name, part in module.named_children():
                if name in _NORMS and hasattr(part, "weight"):
                    part.weight.fill_(gain - 1 if part.weight.abs().max() == 0 else gain)  # some norms add 1
                elif isinstance(part, torch.nn.Linear):
                    std = part.weight.shape[1] ** -.5
                    part.weight.normal_(std=gain * std if name in _QUERIES_AND_KEYS and not has_norms else std)
                    if name == "q_b_proj":  # of latent attention, whose keys come from what values come from
                        part.weight.mul_(gain ** 2)
        embedding = model.get_input_embeddings().weight
        embedding.normal_()
        output = model.get_output_embeddings().weight
        if output is not embedding:
            output.normal_(std=2 * output.shape[1] ** -.5)
    return model


class Run:
    """A model's later logits, with the cache that it makes by itself, which is then in `cache`."""

    def __init__(self, model):
        self.model, self.tokens, self.cache = model, ids(1, N_TOK), None

    def __call__(self, positions=None, **options):
        install(self.model, **options)
        found = self.stock(positions)
        uninstall(self.model)
        assert type(self.cache) is TurboQuantCache
        return found

    @torch.no_grad()
    def stock(self, positions=None):
        self.cache, found, begin = None, [], 0
        for n in PARTS:
            more = {} if positions is None else {"position_ids": positions[:, begin:begin + n]}
            out = self.model(self.tokens[:, begin:begin + n], use_cache=True, **{CACHE: self.cache}, **more)
            self.cache, begin = out[CACHE], begin + n
            found.append(out.logits)
        return torch.cat(found, dim=1)[:, N_SKIPPED:].numpy()


@contextlib.contextmanager
def swapped_pages():
    update = TurboQuantLayer.update

    def swapped(layer, keys, values, *args, **kwargs):
        if layer.n_columns == 0:
            values = torch.cat([values[:, :, begin:begin + 64] for begin in PAGES], dim=2)
            if layer.is_latent:
                keys = torch.cat([keys[:, :, begin:begin + 64] for begin in PAGES], dim=2)
        return update(layer, keys, values, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TurboQuantLayer, "update", swapped)
        yield


def comparison(model):
    run = Run(model)
    return Comparison(run.stock(), run, swapped_pages())


def answer_of(cache, name):
    """What the page says of a model of this configuration whose cache this is."""
    kinds = getattr(cache.config, "layer_types", None) or []
    left = dict.fromkeys(f"`{kind}`" for layer, kind in zip(cache.layers, kinds)
                         if not isinstance(layer, (TurboQuantLayer, DummyLayer)) and kind not in _WITHOUT_KEYS)
    if not left:
        return f"compressed (`{name}`)"
    return f"partly: layers of full attention; {' and '.join(left)} as Transformers has it (`{name}`)"


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    name, _ = settings(family)
    config = make_config(family)
    if config is None:
        models_page.check("Transformers", {family: f"{models_page.ABSENT} (`{name}`)"})
        return
    model = make_model(config)
    try:
        install(model)
    except libturboquant.UnsupportedError as error:
        assert config._attn_implementation != "turboquant"
        models_page.check("Transformers", {family: f"refused: {error} (`{name}`)"})
        return
    uninstall(model)
    compare = comparison(model)
    compare.check()
    models_page.check("Transformers", {family: answer_of(compare.run.cache, name)})


def test_the_page_has_all_families():
    assert tuple(FAMILIES) == models_page.FAMILIES


@pytest.mark.parametrize("family", ["Llama 3", "Qwen3.5", "Gemma 4", "gpt-oss", "Phi-3", "GLM 4", "Falcon-H1", "OLMo 3"])
def test_wrong_positions_are_found(family):
    """From the prompt's second part on all are one too many. Swapped pages are found everywhere: they are the unit."""
    compare = comparison(make_model(make_config(family)))
    positions = torch.arange(N_TOK)
    positions[PARTS[0]:] += 1
    assert compare.of(positions=positions[None], **SQ8) > 5 * SQ8_MAX


@pytest.mark.parametrize("family", ["Qwen2.5", "Qwen2.5-VL", "Seed-OSS"])
def test_missing_references_are_found(family):
    """Of keys that have a bias, as these families have."""
    model, generator = make_model(make_config(family)), torch.Generator().manual_seed(1)
    for name, bias in model.named_parameters():
        if name.endswith("k_proj.bias"):
            torch.nn.init.normal_(bias, std=5, generator=generator)
    compare = comparison(model)
    assert compare.of(preset="TQ4") < TQ4_MAX < compare.of(preset="TQ4", k_ref_block=0)
