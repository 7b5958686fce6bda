# SPDX-License-Identifier: MIT
"""Small random models of MLX-LM."""
import copy
import importlib
import json

import mlx.core as mx
import numpy as np
from families import divergence
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 192, "num_attention_heads": 4,
         "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 211}
SQ8 = {"k_format": "sq8", "v_format": "sq8"}
HALVES = np.arange(64) % 32
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
    mx.random.seed(seed)  # for the parameters that keep the model's own values
    model = module.Model(module.ModelArgs.from_dict(sizes))
    rng, scale = np.random.default_rng(seed), .9 / sizes["hidden_size"] ** .5

    def draw(x):
        return mx.array(scale * rng.standard_normal(x.shape) if x.ndim > 1 else np.array(x)).astype(dtype)

    model.update(tree_map(draw, model.parameters()))
    model.eval()
    return model


def attentions(model):
    return [module for _, module in model.named_modules()
            if any(name in module for name in ("k_proj", "qkv_proj", "query_key_value"))]


def scale(module, factors):
    """Multiply keys of a module by factors [head_dim] before RoPE and divide queries by them, in weights only."""
    def rows(linear, by):
        for name in ("weight", "scales", "biases", "bias"):
            if name in linear and not (name == "weight" and "scales" in linear):
                x = linear[name]
                linear[name] = (x.T * mx.array(by, mx.float32)).T.astype(x.dtype)

    n, one = len(factors), np.ones_like(factors)
    if "k_norm" in module:
        for norm, by in ((module.q_norm, 1 / factors), (module.k_norm, factors)):
            norm.weight = norm.weight * mx.array(by)
    elif "k_proj" in module:
        rows(module.q_proj, np.tile(1 / factors, module.q_proj.weight.shape[0] // n))
        rows(module.k_proj, np.tile(factors, module.k_proj.weight.shape[0] // n))
    elif "qkv_proj" in module:
        rows(module.qkv_proj, np.concatenate([np.tile(1 / factors, 4), np.tile(factors, 2), np.tile(one, 2)]))
    else:
        rows(module.query_key_value, np.tile(np.concatenate([1 / factors, factors, one]), 4))


def with_outliers(model, numbers=HALVES):
    """Every fifth of the channels' numbers is 64 times larger in keys."""
    for i, module in enumerate(attentions(model)):
        scale(module, np.where(np.random.default_rng(i).random(64) < .2, 64.0, 1.0)[numbers].astype(np.float32))
    return model


def ids(n_tok, seed=3, n_batch=1):
    return np.random.default_rng(seed).integers(2, SIZES["vocab_size"], (n_batch, n_tok))


def logits(model, cache, tokens, parts=1):
    """Logits of all tokens [n_batch, n_tok], given to the model in so many parts."""
    found = [model(mx.array(part), cache=cache).astype(mx.float32) for part in np.array_split(tokens, parts, axis=1)]
    return np.array(mx.concatenate(found, axis=1))


# Where sums are added up in another order, a value may be rounded or coded the other way (check_like): a fifth of what the
# format itself moves a logit by, .006 and .04.
OTHER_ORDER = {"f16": .0012, "sq8": .008}


def check_like(found, wanted, exact):
    """
    Logits of two caches with the same codes, but where sums are added up in another order: a vector that is nearly between two
    codes may get the other one. On 8 models that moved .0014 of what coding moves, at most; the largest logit moved .06 of it.
    """
    assert divergence(wanted, found) < .01 * divergence(exact, wanted)
    assert abs(found - wanted).max() < .2 * abs(exact - wanted).max()


def check_batch(model, make_cache, lengths, n_more, atol):
    """Three rows get in a batch what each gets by itself, however they came together; filter, extract, merge, extend."""
    caches = [make_cache(model) for _ in lengths]
    for i, n in enumerate(lengths):
        logits(model, caches[i], ids(n, seed=i))
    more = [ids(n_more, seed=10 + i) for i in range(3)]
    alone = [logits(model, copy.deepcopy(caches[i]), more[i]) for i in range(3)]
    batch = [layers[0].merge(layers[:2]) for layers in zip(*caches)]
    for layer, single in zip(batch, caches[2]):
        layer.extend(single.merge([single]))
        assert layer.offset.tolist() == lengths
        layer.filter(mx.array([2, 0]))
    found = logits(model, batch, np.concatenate([more[2], more[0]]))
    np.testing.assert_allclose(found, np.concatenate([alone[2], alone[0]]), atol=atol)
    row = [layer.extract(1) for layer in batch]
    assert row[0].offset == lengths[0] + n_more
    assert np.isfinite(logits(model, row, more[1])).all()
    assert batch[0].offset.tolist() == [lengths[2] + n_more, lengths[0] + n_more]


def check_padding(model, make_cache, lengths, side, atol):
    """Rows of a batch get with padding on that side what each gets by itself."""
    n = max(lengths)
    tokens, alone = np.zeros((len(lengths), n), np.int64), []
    for row, length in enumerate(lengths):
        real = ids(length, seed=row)
        tokens[row, n - length:] = real[0]
        if side == "right":
            tokens[row] = np.roll(tokens[row], length - n)
        alone.append(logits(model, make_cache(model), real)[0])
    cache, padding = make_cache(model), [n - length for length in lengths]
    for layer in cache:
        layer.prepare(**({"left_padding": padding} if side == "left" else {"right_padding": padding, "lengths": lengths}))
    found = logits(model, cache, tokens, parts=3)
    for layer in cache:
        layer.finalize()
    for row, length in enumerate(lengths):
        place = slice(n - length, n) if side == "left" else slice(0, length)
        np.testing.assert_allclose(found[row, place], alone[row], atol=atol)
    assert cache[0].offset.tolist() == lengths and cache[0].size() == n


def generated_in_batches(model, prompts, n):
    """n tokens for each prompt by MLX-LM's continuous batching, two at a time, with the caches that the model makes."""
    generator = BatchGenerator(model, completion_batch_size=2, prefill_batch_size=2, prefill_step_size=16)
    uids = generator.insert(prompts, max_tokens=[n] * len(prompts))
    found = {uid: [] for uid in uids}
    for _ in range(400):
        for response in generator.next_generated():
            found[response.uid].append(int(response.token))
        if all(len(tokens) == n for tokens in found.values()):
            break
    return [found[uid] for uid in uids]


def make_sharing_model(kind):
    """Whose last layers share the keys of one before them: Gemma 4 E2B, or Gemma 3n, in small."""
    layers = (["sliding_attention"] * 2 + ["full_attention"]) * 3
    common = {"hidden_size": 128, "num_hidden_layers": 9, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 64,
              "rms_norm_eps": 1e-6, "vocab_size": 211, "vocab_size_per_layer_input": 211, "num_key_value_heads": 2,
              "num_kv_shared_layers": 5, "hidden_size_per_layer_input": 32, "sliding_window": 32, "layer_types": layers,
              "final_logit_softcapping": 30.0, "model_type": kind}
    mx.random.seed(1)
    if kind == "gemma4_text":
        module = importlib.import_module("mlx_lm.models.gemma4_text")
        ropes = {"full_attention": {"partial_rotary_factor": .25, "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
        return module.Model(module.ModelArgs.from_dict(common | {
            "global_head_dim": 64, "sliding_window_pattern": 3, "rope_parameters": ropes}))
    module = importlib.import_module("mlx_lm.models.gemma3n")
    text = common | {
        "max_position_embeddings": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "intermediate_size": [128] * 9,
        "activation_sparsity_pattern": [0.0] * 9, "altup_num_inputs": 2, "altup_active_idx": 0, "altup_coef_clip": 120.0,
        "altup_correct_scale": True, "laurel_rank": 16, "rope_scaling": None}
    return module.Model(module.ModelArgs.from_dict({"model_type": "gemma3n", "text_config": text}))


def save(model, folder):
    """Write a model for mlx_lm.load, with a tokenizer of words: w5 is token 5, and 1 the end."""
    save_model(folder, model)
    config = {name: value for name, value in vars(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    names = {1: "</s>", 2: "?"}
    tokenizer = Tokenizer(models.WordLevel({names.get(i, f"w{i}"): i for i in range(SIZES["vocab_size"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="</s>", chat_template=template
                            ).save_pretrained(folder)
    return folder


def words(tokens):
    return " ".join(f"w{token}" for token in tokens)
