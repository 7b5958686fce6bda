# SPDX-License-Identifier: MIT
"""
The families of docs/models.md, as Transformers and MLX-LM configure them: small models with the real ones' head_dims, query
heads for each KV head, kinds of layers and shared layers; and how a cache of theirs is judged. All experts are used, since any
error may choose others.
"""
import numpy as np

_SIZES = {"vocab_size": 211, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 1, "head_dim": 128, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
_WINDOW = 96  # of layers with a window: less than the prompt has, more than the exact tokens


def _heads(n_head, n_head_kv=1, head_dim=128):
    return {"num_attention_heads": n_head, "num_key_value_heads": n_head_kv, "head_dim": head_dim}


def _plain_heads(n_head, n_head_kv=1, head_dim=128):
    """Of configurations without a head_dim."""
    return {"num_attention_heads": n_head, "num_key_value_heads": n_head_kv, "head_dim": None, "hidden_size": n_head * head_dim}


def _layers(*kinds, times=1):
    return {"layer_types": list(kinds) * times, "num_hidden_layers": len(kinds) * times}


def _experts(**more):
    return {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64} | more


_WINDOWS = {"sliding_window": _WINDOW} | _layers("sliding_attention", "full_attention")
_GEMMA_WINDOWS = {"sliding_window": _WINDOW} | _layers(*["sliding_attention"] * 5, "full_attention")
_DELTA = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "partial_rotary_factor": .25} | _layers(*["linear_attention"] * 3, "full_attention")
_DELTA_EXPERTS = _DELTA | _experts(shared_expert_intermediate_size=64)
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 32}
_LATENT = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "kv_lora_rank": 512, "q_lora_rank": 128,
           "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 2}
_INDEXER = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 64}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}

# Family: (the configuration's class in Transformers, what differs from _SIZES).
FAMILIES = {
    "Llama 3": ("LlamaConfig", _heads(4)),
    "Llama 4": ("Llama4TextConfig", _heads(5) | _experts(intermediate_size_mlp=160, interleave_moe_layer_step=2,
                                                         attention_chunk_size=_WINDOW, num_hidden_layers=4)),
    "Qwen2.5": ("Qwen2Config", _plain_heads(7)),
    "Qwen2.5-VL": ("Qwen2_5_VLTextConfig", _plain_heads(7) | _MROPE),
    "Qwen3": ("Qwen3Config", _heads(4)),
    "Qwen3-MoE": ("Qwen3MoeConfig", _heads(8) | _experts()),
    "Qwen3-Next": ("Qwen3NextConfig", _heads(8, head_dim=256) | _DELTA_EXPERTS),
    "Qwen3.5": ("Qwen3_5TextConfig", _heads(4, head_dim=256) | _DELTA),
    "Qwen3.5-MoE": ("Qwen3_5MoeTextConfig", _heads(8, head_dim=256) | _DELTA_EXPERTS),
    "Gemma 2": ("Gemma2Config", _heads(4, 2, 256) | _WINDOWS),
    "Gemma 3": ("Gemma3TextConfig", _heads(2, 1, 256) | _GEMMA_WINDOWS),
    "Gemma 3n": ("Gemma3nTextConfig", _heads(4, 1, 256) | {"sliding_window": _WINDOW, "num_kv_shared_layers": 3}
                 | _layers(*["sliding_attention"] * 2, "full_attention", times=2)
                 | {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6,
                    "vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 32}),
    "Gemma 4": ("Gemma4TextConfig", _heads(8, 1, 256) | {"sliding_window": _WINDOW, "num_kv_shared_layers": 3}
                | _layers(*["sliding_attention"] * 2, "full_attention", times=2)
                | {"vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 32, "global_head_dim": 512}),
    "gpt-oss": ("GptOssConfig", _heads(8, head_dim=64) | _experts(sliding_window=_WINDOW)
                | _layers("sliding_attention", "full_attention", times=2)),
    "Mistral": ("MistralConfig", _heads(4) | {"sliding_window": None}),
    "Ministral 3": ("Ministral3Config", _heads(4)),
    "Mistral Small 4": ("Mistral4Config", _LATENT | _experts(kv_lora_rank=256, qk_nope_head_dim=64, head_dim=128)),
    "Phi-3": ("Phi3Config", _plain_heads(4, 4, 96) | {"sliding_window": 262144}),
    "Phi-4": ("Phi3Config", _plain_heads(4)),
    "SmolLM3": ("SmolLM3Config", _plain_heads(4) | {"no_rope_layers": [1, 0]}),
    "DeepSeek V3": ("DeepseekV3Config", _LATENT),
    "DeepSeek V3.2": ("DeepseekV32Config", _LATENT | _INDEXER),
    "DeepSeek V4": ("DeepseekV4Config", _heads(4, head_dim=512) | {"q_lora_rank": 64, "sliding_window": _WINDOW}),
    "GLM 4": ("Glm4Config", _heads(16)),
    "GLM 4-MoE": ("Glm4MoeConfig", _heads(12) | _experts(n_routed_experts=2, first_k_dense_replace=1)),
    "GLM 5": ("GlmMoeDsaConfig", _LATENT | _INDEXER | {"qk_nope_head_dim": 192, "v_head_dim": 256}),
    "Kimi K2": ("DeepseekV3Config", _LATENT),  # the text part of Kimi_K25Config
    "Kimi K3": ("KimiK3Config", _LATENT),
    "Kimi-Linear": ("KimiLinearConfig", _LATENT | _layers(*["linear_attention"] * 3, "full_attention")),
    "MiniMax M2": ("MiniMaxM2Config", _heads(6) | _experts()),
    "MiniMax M3": ("MiniMaxM3VLTextConfig", _heads(16) | _experts() | _layers("full_attention", "minimax_m3_sparse")),
    "Nemotron 3": ("NemotronHConfig", _heads(16) | {
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention"], "mamba_num_heads": 4,
        "mamba_head_dim": 64, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 32, "n_routed_experts": 2,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64}),
    "Granite 4": ("GraniteMoeHybridConfig", _plain_heads(3) | _MAMBA | {
        "mamba_d_head": 192, "num_local_experts": 2, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
        "attention_multiplier": 1 / 128} | _layers("linear_attention", "full_attention")),
    "Falcon-H1": ("FalconH1Config", _heads(6) | _MAMBA | {"mamba_d_ssm": 128, "mamba_d_head": 32}),
    "LFM2": ("Lfm2Config", _plain_heads(4, 1, 64) | _layers("conv", "conv", "full_attention")),
    "Jamba": ("JambaConfig", _plain_heads(4) | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
                                                "num_experts_per_tok": 2, "mamba_d_state": 16}),
    "ERNIE 4.5": ("Ernie4_5Config", _heads(8)),
    "ERNIE 4.5-MoE": ("Ernie4_5_MoeConfig", _plain_heads(5) | {"moe_num_experts": 2, "moe_k": 2, "moe_intermediate_size": 64,
                                                               "moe_layer_start_index": 1}),
    "Seed-OSS": ("SeedOssConfig", _heads(10)),
    "EXAONE 4": ("Exaone4Config", _plain_heads(5) | _WINDOWS),
    "Hunyuan": ("HunYuanDenseV1Config", _heads(4)),
    "Hunyuan-MoE": ("HunYuanMoEV1Config", _heads(4) | _experts(moe_topk=2)),
    "OLMo 3": ("Olmo3Config", _plain_heads(5) | _WINDOWS),
    "StarCoder2": ("Starcoder2Config", _plain_heads(12) | {"sliding_window": _WINDOW, "num_hidden_layers": 1}),
    "Command R": ("CohereConfig", _plain_heads(2, 2)),
    "Command R7B": ("Cohere2Config", _plain_heads(4) | {"head_dim": 128} | _WINDOWS),
}


def settings(family):
    """The name of the configuration's class, and what it is made with."""
    name, own = FAMILIES[family]
    return name, {key: value for key, value in (_SIZES | own).items() if key != "head_dim" or value is not None}


# Logits of random weights are nearly equal, and then any attention gives the same mean of values: queries and keys are this
# much larger.
PEAKED = 1.7
PARTS = (224, 56, *[1] * 8)  # of the tokens: a prompt in parts and some steps
N_TOK = sum(PARTS)
N_SKIPPED = 96  # first tokens whose logits are not compared: most that they see is exact
PAGES = (0, 128, 64, 192)  # where the pages of the prompt's first part begin that have values of others: the second and third
SQ8 = {"k_format": "sq8", "v_format": "sq8"}
# Divergences, as fractions of what swapped pages of values cost: docs/testing.md has what was found.
SQ8_MAX, TQ4_MAX = .001, .06
SWAPPED_MIN = .002  # divergence of swapped pages, as a fraction of that of unrelated tokens: .0038 at least


def divergence(p_logits, q_logits):
    """Mean KL divergence of the second from the first, in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (np.float64(p_logits), np.float64(q_logits)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


class Comparison:
    """
    How far a model's logits are from those of the engine's own cache, `exact`, as a fraction of what two swapped pages cost.
    run(**options): logits [n_batch, n_tok, n_vocab] with a compressed cache; swapped: a context in which it swaps pages.
    """

    def __init__(self, exact, run, swapped):
        self.exact, self.run, self.unit = exact, run, 1.0
        with swapped:
            self.unit = self.of(**SQ8)
        assert self.unit > SWAPPED_MIN * divergence(exact, np.roll(exact, 37, axis=1))

    def of(self, **options):
        return divergence(self.exact, self.run(**options)) / self.unit

    def check(self):
        assert self.of(**SQ8) < SQ8_MAX
        assert self.of(preset="TQ4") < TQ4_MAX
