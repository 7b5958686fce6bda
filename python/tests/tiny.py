# SPDX-License-Identifier: MIT
"""
Small random models of Transformers, and generation with and without the cache. TQ_TEST_BACKEND says where the cache is: cpu;
emulated, on tests/cuda's device in host memory; or cuda, with the models.
"""
import contextlib
import ctypes
import os

import pytest
import torch
import transformers
from transformers import (AutoModelForCausalLM, CohereConfig, DynamicCache, Gemma2Config, Gemma3TextConfig, GlmConfig,
                          GPT2Config, GPTNeoXConfig, GptOssConfig, LlamaConfig, Olmo2Config, Phi3Config, Qwen2Config,
                          Qwen3Config)
import libturboquant.transformers
from libturboquant.transformers import TurboQuantCache

BACKEND = os.environ.get("TQ_TEST_BACKEND", "cpu")
ON_DEVICE = BACKEND != "cpu"
DEVICE = "cuda" if BACKEND == "cuda" else "cpu"
if BACKEND == "emulated":
    libturboquant._torch_stores.DEVICE_TYPES.add("cpu")
    emulated = ctypes.CDLL(os.environ["TQ_CUDA_LIBRARY"])  # with functions for tests: tests/cuda/emulated_device.c
# What models of this version of Transformers call the argument.
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) > (5, 17) else "past_key_values"

SIZES = {"vocab_size": 211, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": None, "initializer_range": .08}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig,
           "gpt_oss": GptOssConfig, "cohere": CohereConfig, "glm": GlmConfig, "gpt2": GPT2Config, "gpt_neox": GPTNeoXConfig,
           "olmo2": Olmo2Config, "phi3": Phi3Config}
# Models with layers that have a recurrent state: instead of attention, or (falcon_h1, zamba2, zaya) next to it.
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}
_DELTA = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
_TURNS = {"layer_types": ["linear_attention", "full_attention"] * 2}
RECURRENT = {
    "falcon_h1": ("FalconH1Config", _MAMBA | {"mamba_d_ssm": 128, "mamba_d_head": 32}),
    "zamba2": ("Zamba2Config", {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_d_state": 16,
                                "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 64, "chunk_size": 32,
                                "num_key_value_heads": 4}),
    "zaya": ("ZayaConfig", {}),
    "bamba": ("BambaConfig", _MAMBA | {"attn_layer_indices": [1, 3], "mamba_d_head": 64}),
    "jamba": ("JambaConfig", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 16}),
    "granite": ("GraniteMoeHybridConfig", _MAMBA | _TURNS | {"mamba_d_head": 64, "num_local_experts": 2,
                                                             "num_experts_per_tok": 1, "shared_intermediate_size": 64}),
    "nemotron_h": ("NemotronHConfig", {"layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"],
                                       "mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 16, "n_groups": 1,
                                       "chunk_size": 32}),
    "qwen3_next": ("Qwen3NextConfig", _DELTA | _EXPERTS | _TURNS | {"shared_expert_intermediate_size": 64}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2, "hidden_size": 256}),
}
# Models whose last layers share the keys and values of others, with head_dims and windows of their own in each kind of layer.
SHARED = {
    "gemma3n": ("Gemma3nTextConfig", {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6}),
    "gemma4": ("Gemma4TextConfig", {"global_head_dim": 128, "num_global_key_value_heads": 1}),
}
_SHARED = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
           "sliding_window": 16, "vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 32}
# The 8-bit formats, as a preset once was.
SQ8 = {"k_format": "sq8", "v_format": "sq8"}


@contextlib.contextmanager
def captured():
    """As if the stream were captured in a CUDA graph; the emulated device runs at once what a graph would keep."""
    emulated.tq_emulated_capture(True)
    try:
        yield
    finally:
        emulated.tq_emulated_capture(False)


def make_model(kind="llama", dtype=torch.float32, seed=1, **options):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**SIZES | options)).to(DEVICE, dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def _make_newer_model(name, options):
    if not hasattr(transformers, name):
        pytest.skip(f"this version of Transformers has no {name}")
    torch.manual_seed(1)
    config = getattr(transformers, name)(**(SIZES | options))
    model = AutoModelForCausalLM.from_config(config).to(DEVICE, torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def make_recurrent_model(kind):
    return _make_newer_model(*RECURRENT[kind])


def make_shared_model(kind, **changes):
    name, options = SHARED[kind]
    return _make_newer_model(name, _SHARED | options | changes)


def ids(n_batch, n_tok, seed=3):
    return torch.randint(2, SIZES["vocab_size"], (n_batch, n_tok), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Exact but for rounding to FP16.
EXACT = {"n_recent": 508}
F16 = {"k_format": "f16", "v_format": "f16", "k_ref_block": 0}


def compressed(model, **options):
    if ON_DEVICE and options.get("k_format") == "f16":  # which there is not: exact as long as there is room
        options |= SQ8 | EXACT
    return TurboQuantCache(config=model.config, **({"max_tok": 1 << 16} | SQ8 | options))


def stock(model):
    return DynamicCache(config=model.config)


def use_attention_of(model, cache):
    # Some versions say that "sdpa" caps logits.
    caps = getattr(model.config, "attn_logit_softcapping", None) is not None
    stock_attention = "sdpa" if model._supports_sdpa and not caps else "eager"
    model.set_attn_implementation("turboquant" if isinstance(cache, TurboQuantCache) else stock_attention)


def generated(model, cache, input_ids, n=24, **options):
    """Tokens, the prompt's among them; greedy unless options say otherwise."""
    use_attention_of(model, cache)
    torch.manual_seed(5)
    return model.generate(input_ids, max_new_tokens=n, **{CACHE: cache}, **({"do_sample": False} | options))


@torch.no_grad()
def logits(model, cache, input_ids, parts=1, **options):
    """Logits of all tokens, given to the model in so many parts."""
    use_attention_of(model, cache)
    found, mask = [], options.pop("attention_mask", None)
    for part in input_ids.tensor_split(parts, dim=1):
        if mask is not None:
            options["attention_mask"] = mask[:, : cache.get_seq_length() + part.shape[1]]
        found.append(model(part, use_cache=True, **{CACHE: cache}, **options).logits.float())
    return torch.cat(found, dim=1)


def divergence(p_logits, q_logits):
    """Mean KL divergence of the second from the first, in nats."""
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def same_tokens(model, found, wanted):
    """
    Are generated tokens the same? Where a GPU has computed, a row may go another way at a token that the stock cache finds
    nearly as likely as its own.
    """
    if torch.equal(found, wanted) or BACKEND != "cuda":
        return torch.equal(found, wanted)
    use_attention_of(model, None)
    for mine, other in zip(found, wanted):
        differ = (mine != other).nonzero()
        if len(differ):
            at = int(differ[0])
            first = int((other != SIZES["pad_token_id"]).nonzero()[0])
            scores = model(other[None, first:at]).logits[0, -1].float()
            if scores[other[at]] - scores[mine[at]] > .05:
                return False
    return found.shape == wanted.shape
