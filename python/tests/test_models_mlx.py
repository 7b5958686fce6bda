# SPDX-License-Identifier: MIT
"""
The families of docs/models.md in MLX-LM on the CPU: small random models of the configurations that Transformers has, with
compressed caches and MLX-LM's own, or the reason for which a family is refused.
"""
import contextlib
import os
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as stock
import numpy as np
import pytest
import transformers
import libturboquant
from conftest import ROOT
from families import FAMILIES, N_SKIPPED, N_TOK, PAGES, PARTS, PEAKED, Comparison, settings
from mlx_lm.utils import _get_classes
from tiny_mlx import ids
from libturboquant.mlx import TurboQuantKVCache, make_prompt_cache

sys.path.insert(0, str(ROOT / "tests"))
import models_page  # noqa: E402

_QUERIES_AND_KEYS = ("q_proj", "k_proj", "qkv_proj")
_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
_LINEAR_ATTENTION = {"linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 2, "head_dim": 32,
                                            "short_conv_kernel_size": 4}, "model_max_length": 4096, "num_experts": 2,
                     "num_experts_per_token": 2, "moe_intermediate_size": 64, "rope_theta": 1e4}
# What MLX-LM calls by other names than Transformers does, or does not find in its configuration; "whole": the kind of a model
# whose text part this is.
OTHER = {
    "Llama 4": {"rope_theta": 5e5, "whole": "llama4", "num_local_experts": 1, "num_experts_per_tok": 1},
    "Qwen3-MoE": {"num_experts": 2},
    "Gemma 3n": {"rope_local_base_freq": 1e4, "rope_theta": 1e6, "rope_scaling": None},
    "GLM 5": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "Kimi-Linear": _LINEAR_ATTENTION,
    "Kimi K3": _LINEAR_ATTENTION | {"model_type": "kimi_k3", "num_hidden_layers": 4, "q_lora_rank": 64},
    "MiniMax M2": {"shared_intermediate_size": 64, "rotary_dim": 64},
    "Granite 4": {"layer_types": ["mamba", "attention"], "position_embedding_type": "nope"},
    "LFM2": {"block_dim": 256},
    "EXAONE 4": {"sliding_window_pattern": "LG"},
    "OLMo 3": {"rope_theta": 5e5},
    "Command R7B": {"sliding_window_pattern": 2},
}
# Those that `make test` has: one of each kind, in seconds.
QUICK = ("Llama 3", "gpt-oss", "Mistral Small 4", "Falcon-H1")
CHOSEN = QUICK if os.environ.get("TQ_TEST_QUICK") else FAMILIES


@pytest.fixture(autouse=True, scope="module")
def cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def make_config(family):
    """As config.json has it."""
    name, options = settings(family)
    if hasattr(transformers, name):
        found = getattr(transformers, name)(**options).to_dict()
        ropes = found.get("rope_parameters") or {}
        found |= {key: ropes[key] for key in ("rope_theta", "partial_rotary_factor") if key in ropes} | {"rope_scaling": None}
        found["head_dim"] = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    else:
        found = options
    found |= OTHER.get(family, {})
    if "whole" in found:
        return {"model_type": found["whole"], "text_config": found}
    return found


def make_model(config):
    """Of MLX-LM's class for it; None if it has none."""
    try:
        classes = _get_classes(config)
    except ValueError:
        config = {"model_type": config["model_type"].removesuffix("_text"), "text_config": config}
        try:
            classes = _get_classes(config)
        except ValueError:
            return None
    mx.random.seed(1)
    model = classes[0](classes[1].from_dict(config))
    model.eval()
    rng = np.random.default_rng(1)

    def draw(shape, gain):
        return mx.array(np.float32(gain * shape[-1] ** -.5) * rng.standard_normal(shape, dtype=np.float32))

    for module in model.modules():
        scaling, head_dim = (getattr(module, name, None) for name in ("scale", "head_dim"))
        gain = PEAKED * (scaling * head_dim ** .5) ** -.5 if isinstance(scaling, float) and head_dim else PEAKED
        has_norms = any(name in module for name in _NORMS)
        for name, part in module.children().items():
            if name in _NORMS and isinstance(part, nn.Module) and "weight" in part:
                weight = mx.ones(part.weight.shape)
                part.weight = weight * (gain + 1 - round(part(weight).max().item()))  # some norms add 1
            elif isinstance(part, nn.Embedding):  # the output layer too, in many models
                part.weight = draw(part.weight.shape, 2)
            elif isinstance(part, nn.Linear) or type(part).__name__ in ("SwitchLinear", "MultiLinear"):
                part.weight = draw(part.weight.shape, gain if name in _QUERIES_AND_KEYS and not has_norms else 1)
    return model


class Run:
    """A model's later logits with compressed caches, which are then in `caches`."""

    def __init__(self, model):
        self.model, self.tokens, self.caches = model, ids(N_TOK), None

    def __call__(self, **options):
        self.caches = make_prompt_cache(self.model, **options)
        return self.with_caches(self.caches)

    def with_caches(self, caches):
        found = [np.array(self.model(mx.array(part), cache=caches).astype(mx.float32))
                 for part in np.split(self.tokens, np.cumsum(PARTS)[:-1], axis=1)]
        return np.concatenate(found, axis=1)[:, N_SKIPPED:]


@contextlib.contextmanager
def swapped_pages():
    update = TurboQuantKVCache.update_and_fetch

    def swapped(cache, keys, values):
        if keys.shape[2] == PARTS[0]:
            values = mx.concatenate([values[:, :, begin:begin + 64] for begin in PAGES], axis=2)
        return update(cache, keys, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TurboQuantKVCache, "update_and_fetch", swapped)
        yield


def answer_of(caches, name):
    kinds = dict.fromkeys(f"`{type(cache).__name__}`" for cache in caches
                          if not isinstance(cache, (TurboQuantKVCache, stock.ArraysCache)))
    if not kinds:
        return f"compressed (`{name}`)"
    return f"partly: layers with a plain KVCache; {' and '.join(kinds)} as MLX-LM has it (`{name}`)"


@pytest.mark.parametrize("family", CHOSEN)
def test_family(family):
    config = make_config(family)
    model, name = make_model(config), config["model_type"]
    if model is None:
        models_page.check("MLX-LM", {family: f"{models_page.ABSENT} (`{name}`)"})
        return
    name = type(model).__module__.rpartition(".")[2]
    try:
        make_prompt_cache(model)
    except libturboquant.UnsupportedError as error:
        models_page.check("MLX-LM", {family: f"refused: {error} (`{name}`)"})
        return
    run = Run(model)
    compare = Comparison(run.with_caches(stock.make_prompt_cache(model)), run, swapped_pages())
    compare.check()
    models_page.check("MLX-LM", {family: answer_of(run.caches, name)})
