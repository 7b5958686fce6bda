# SPDX-License-Identifier: MIT
"""Small random models of MLX-LM."""
import importlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 192, "num_attention_heads": 4,
         "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 211}
TQ8 = {"k_format": "tq8", "v_format": "tq8"}
F16 = {"k_format": "f16", "v_format": "f16", "k_ref_block": 0}


def make_model(kind="llama", seed=1, dtype=mx.float32, **options):
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    sizes = SIZES | {"model_type": kind} | options
    if kind == "qwen3":
        sizes |= {"head_dim": 64, "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": True}
    elif kind == "gpt_oss":
        sizes |= {"head_dim": 64, "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        sizes["sliding_window"] = 64
    else:
        sizes |= {"hidden_size": 256}
    model = module.Model(module.ModelArgs.from_dict(sizes))
    rng, scale = np.random.default_rng(seed), .9 / sizes["hidden_size"] ** .5

    def draw(x):
        return mx.array(scale * rng.standard_normal(x.shape) if x.ndim > 1 else np.array(x)).astype(dtype)

    model.update(tree_map(draw, model.parameters()))
    model.eval()
    return model


def ids(n_tok, seed=3, n_batch=1):
    return np.random.default_rng(seed).integers(2, SIZES["vocab_size"], (n_batch, n_tok))


def logits(model, cache, tokens, parts=1):
    """Logits of all tokens [n_batch, n_tok], given to the model in so many parts."""
    found = [model(mx.array(part), cache=cache).astype(mx.float32) for part in np.array_split(tokens, parts, axis=1)]
    return np.array(mx.concatenate(found, axis=1))


def divergence(p_logits, q_logits):
    """Mean KL divergence of the second from the first, in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (np.float64(p_logits), np.float64(q_logits)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())
