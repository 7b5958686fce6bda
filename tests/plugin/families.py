# SPDX-License-Identifier: MIT
"""
The families of docs/models.md, as llama.cpp's files have them: hyperparameters of small models with the real ones' head_dims,
query heads for each KV head, kinds of layers and shared layers. All experts are used, since any error may choose others.
"""
import gguf

_WINDOW = 96  # less than the prompt has, more than the exact tokens


def _heads(n_head, n_head_kv=1, head_dim=128):
    return {"attention.head_count": n_head, "attention.head_count_kv": n_head_kv, "attention.key_length": head_dim,
            "attention.value_length": head_dim, "rope.dimension_count": head_dim}


def _plain_heads(n_head, n_head_kv=1, head_dim=128):
    """Of architectures whose heads make up the hidden size."""
    return _heads(n_head, n_head_kv, head_dim) | {"embedding_length": n_head * head_dim}


_EXPERTS = {"expert_count": 2, "expert_used_count": 2, "expert_feed_forward_length": 64, "expert_weights_norm": True,
            "expert_shared_count": 1, "expert_shared_feed_forward_length": 64, "expert_gating_func": 2,
            "leading_dense_block_count": 1}
_WINDOWS = {"block_count": 4, "attention.sliding_window": _WINDOW, "attention.sliding_window_pattern": 4}
_LATENT = _heads(2, 1, 576) | _EXPERTS | {
    "attention.value_length": 512, "attention.key_length_mla": 192, "attention.value_length_mla": 128,
    "rope.dimension_count": 64, "attention.q_lora_rank": 128, "attention.kv_lora_rank": 512}
_INDEXER = {"attention.indexer.head_count": 2, "attention.indexer.key_length": 128, "attention.indexer.top_k": 64}
_MAMBA = {"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 4, "ssm.group_count": 1}
_DELTA = {"ssm.inner_size": 128, "ssm.conv_kernel": 4, "ssm.state_size": 32, "ssm.time_step_rank": 4, "ssm.group_count": 2,
          "full_attention_interval": 4, "block_count": 4, "rope.dimension_count": 64,
          "rope.dimension_sections": [11, 11, 10, 0]}
_KDA = {"kda.head_dim": 32, "ssm.conv_kernel": 4, "block_count": 4, "attention.head_count": [2, 2, 2, 2],
        "attention.head_count_kv": [0, 0, 0, 1]}

# What architectures have in common; each takes what it knows.
_COMMON = {"block_count": 2, "context_length": 4096, "embedding_length": 256, "feed_forward_length": 160, "vocab_size": 211,
           "attention.layer_norm_rms_epsilon": 1e-6, "attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 10000.0,
           "logit_scale": 1.0}

# Family: (the architecture, what differs from _COMMON).
FAMILIES = {
    "Llama 3": ("llama", _heads(4)),
    "Llama 4": ("llama4", _heads(5) | _EXPERTS | {"block_count": 4, "interleave_moe_layer_step": 2,
                                                  "attention.chunk_size": _WINDOW}),
    "Qwen2.5": ("qwen2", _plain_heads(7)),
    "Qwen2.5-VL": ("qwen2vl", _plain_heads(7) | {"rope.dimension_sections": [16, 24, 24, 0]}),
    "Qwen3": ("qwen3", _heads(4)),
    "Qwen3-MoE": ("qwen3moe", _heads(8) | _EXPERTS),
    "Qwen3-Next": ("qwen3next", _heads(8, 1, 256) | _EXPERTS | _DELTA),
    "Qwen3.5": ("qwen35", _heads(4, 1, 256) | _DELTA),
    "Qwen3.5-MoE": ("qwen35moe", _heads(8, 1, 256) | _EXPERTS | _DELTA),
    "Gemma 2": ("gemma2", _heads(4, 2, 256) | {"attention.sliding_window": _WINDOW, "attn_logit_softcapping": 50.0,
                                               "final_logit_softcapping": 30.0}),
    "Gemma 3": ("gemma3", _heads(2, 1, 256) | {"attention.sliding_window": _WINDOW, "block_count": 6}),
    "Gemma 3n": ("gemma3n", _heads(4, 1, 256) | {"attention.sliding_window": _WINDOW, "block_count": 25,
                                                 "embedding_length": 128}),
    "Gemma 4": ("gemma4", _heads(8, 1, 512) | {
        "attention.sliding_window": _WINDOW, "block_count": 6, "attention.sliding_window_pattern": [True, True, False] * 2,
        "attention.key_length_swa": 256, "attention.value_length_swa": 256, "attention.shared_kv_layers": 3,
        "embedding_length_per_layer_input": 32, "rope.dimension_count_swa": 256, "rope.freq_base_swa": 10000.0,
        "final_logit_softcapping": 30.0}),
    "gpt-oss": ("gpt-oss", _heads(8, 1, 64) | _EXPERTS | {"attention.sliding_window": _WINDOW, "block_count": 4}),
    "Mistral": ("llama", _heads(4)),
    "Ministral 3": ("mistral3", _heads(4)),
    "Mistral Small 4": ("mistral4", _LATENT | {"attention.key_length": 320, "attention.value_length": 256,
                                               "attention.kv_lora_rank": 256, "attention.key_length_mla": 128}),
    "Phi-3": ("phi3", _plain_heads(4, 4, 96) | {"attention.sliding_window": 262144}),
    "Phi-4": ("phi3", _plain_heads(4)),
    "SmolLM3": ("smollm3", _plain_heads(4) | {"block_count": 4}),
    "DeepSeek V3": ("deepseek2", _LATENT),
    "DeepSeek V3.2": ("deepseek32", _LATENT | _INDEXER),
    "DeepSeek V4": ("deepseek4", _heads(8, 1, 512) | _EXPERTS | _INDEXER | {
        "block_count": 4, "embedding_length": 512, "rope.dimension_count": 64, "attention.q_lora_rank": 64,
        "attention.output_group_count": 8, "attention.output_lora_rank": 32, "attention.compress_ratios": [0, 0, 4, 128],
        "attention.compress_rope_freq_base": 160000.0, "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 2, "hyper_connection.epsilon": 1e-6, "hash_layer_count": 0,
        "swiglu_clamp_exp": 10.0, "expert_weights_scale": 1.0, "expert_gating_func": 4, "attention.sliding_window": _WINDOW}),
    "GLM 4": ("glm4", _heads(16)),
    "GLM 4-MoE": ("glm4moe", _heads(12) | _EXPERTS),
    "GLM 5": ("glm-dsa", _LATENT | _INDEXER | {"attention.key_length_mla": 256, "attention.value_length_mla": 256}),
    "Kimi K2": ("deepseek2", _LATENT),
    "Kimi K3": ("kimi-k3", _LATENT | _KDA | {"attn_res.block_size": 12, "activation.situ_beta": 4.0,
                                             "activation.situ_linear_beta": 25.0, "kda.gate_lower_bound": -5.0,
                                             "expert_latent_length": 64}),
    "Kimi-Linear": ("kimi-linear", _LATENT | _KDA),
    "MiniMax M2": ("minimax-m2", _heads(6) | _EXPERTS | {"rope.dimension_count": 64}),
    "MiniMax M3": ("minimax-m3", _heads(16) | _EXPERTS | _INDEXER | {
        "rope.dimension_count": 64, "attention.indexer.head_count": 1, "attention.indexer.block_size": 4,
        "attention.indexer.local_blocks": 1}),
    "Nemotron 3": ("nemotron_h_moe", _heads(16) | _EXPERTS | _MAMBA | {
        "block_count": 4, "attention.head_count_kv": [0, 0, 0, 1],
        "feed_forward_length": [0, 64, 0, 0]}),
    "Granite 4": ("granitehybrid", _plain_heads(3) | _EXPERTS | _MAMBA | {
        "block_count": 4, "attention.head_count_kv": [0, 0, 0, 1], "ssm.inner_size": 768, "rope.scaling.finetuned": False}),
    "Falcon-H1": ("falcon-h1", _heads(6) | _MAMBA),
    "LFM2": ("lfm2", _plain_heads(4, 1, 64) | {"block_count": 3, "attention.head_count_kv": [0, 0, 1],
                                               "shortconv.l_cache": 3}),
    "Jamba": ("jamba", _plain_heads(4) | _EXPERTS | _MAMBA | {"block_count": 4, "attention.head_count_kv": [0, 0, 1, 0],
                                                              "ssm.inner_size": 1024}),
    "ERNIE 4.5": ("ernie4_5", _heads(8)),
    "ERNIE 4.5-MoE": ("ernie4_5-moe", _plain_heads(5) | _EXPERTS | {"interleave_moe_layer_step": 1}),
    "Seed-OSS": ("seed_oss", _heads(10)),
    "EXAONE 4": ("exaone4", _plain_heads(5) | _WINDOWS),
    "Hunyuan": ("hunyuan-dense", _heads(4)),
    "Hunyuan-MoE": ("hunyuan-moe", _heads(4) | _EXPERTS),
    "OLMo 3": ("olmo2", _plain_heads(5) | _WINDOWS),
    "StarCoder2": ("starcoder2", _plain_heads(12)),
    "Command R": ("command-r", _plain_heads(2, 2)),
    "Command R7B": ("cohere2", _plain_heads(4) | _WINDOWS),
}


def write_hyperparameters(family, path):
    arch, own = FAMILIES[family]
    writer = gguf.GGUFWriter(path, arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for name, value in (_COMMON | own).items():
        add[type(value)](f"{arch}.{name}", value)
    n_vocab = _COMMON["vocab_size"]
    writer.add_tokenizer_model("test")  # of llama.cpp's own tests: tokens have numbers and no text
    writer.add_token_list([f"tok_{i}" for i in range(n_vocab)])
    writer.add_token_scores([0.0] * n_vocab)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
