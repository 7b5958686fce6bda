#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Make a GGUF with random weights: a small one, to test shapes that the real test model does not have, or a large one, to
measure speed and memory, which do not depend on the values.

Needs the packages gguf and numpy (scripts/setup.sh puts them into build/deps/venv). The same arguments give the same bytes.
A small one's vocabulary is one token per byte, so every text can be tokenized and the output layer is small; --n-vocab adds
tokens that no text has.

    make_tiny_gguf.py --arch qwen2 out.gguf
    make_tiny_gguf.py --arch llama --head-dim 80 --n-head-kv 1 out.gguf
    make_tiny_gguf.py --arch llama --large out.gguf                     Llama 3 8B's sizes, Q4_0: 4.5 GB, in seconds
"""
import argparse
import sys
from dataclasses import dataclass, fields

import gguf
import numpy as np

# Logits of random weights are nearly equal, and then any attention gives the same mean of values. Queries and keys this much
# larger make the softmax pick a few tokens, as a trained model's does.
QK_GAIN = 1.5


@dataclass
class Shape:
    """What the command line can change, with an architecture's default."""
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int = 512
    n_ctx: int = 8192
    n_vocab: int = 0  # 0: as many as there must be
    window: int = 0
    head_dim_swa: int = 0  # of gemma4's layers with a window
    n_shared: int = 0  # so many of gemma4's last layers attend to earlier ones' keys and values; gemma3n's beyond 20 do


ARCHS = {
    "llama": Shape(3, 256, 4, 2, 64),
    "qwen2": Shape(4, 256, 4, 2, 64),
    "qwen2vl": Shape(4, 256, 4, 2, 64),
    "qwen3": Shape(3, 256, 4, 2, 128),
    "gemma2": Shape(4, 256, 4, 2, 128, window=128),
    "gemma3": Shape(6, 256, 2, 1, 256, window=128),
    "gemma3n": Shape(25, 128, 4, 2, 64, n_ff=256, window=128),
    "gemma4": Shape(8, 256, 4, 2, 256, window=128, head_dim_swa=128, n_shared=4),
    "phi3": Shape(3, 384, 4, 2, 96),
    "gpt-oss": Shape(4, 256, 8, 2, 64, window=128),
    "mpt": Shape(3, 256, 4, 4, 64),
    "deepseek2": Shape(3, 256, 4, 1, 576),
}
LARGE = Shape(32, 4096, 32, 8, 128, n_ff=14336, n_ctx=131072, n_vocab=128256)
N_EXPERT = 4
GEMMA3N_ALTUP, GEMMA3N_LAUREL, GEMMA3N_PER_LAYER = 4, 64, 256
MLA_LATENT, MLA_ROPE, MLA_NOPE, MLA_VALUE, MLA_Q_LORA = 512, 64, 128, 128, 128


def byte_tokens():
    """The printable stand-ins of the 256 bytes in GPT-2's byte-level vocabularies."""
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    others = [b for b in range(256) if b not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]


def add_vocabulary(writer, n_vocab):
    tokens = ["<unk>", "<s>", "</s>"] + byte_tokens() + ["th"]
    tokens += [f"[{i}]" for i in range(len(tokens), n_vocab)]
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["t h"])  # llama.cpp wants at least one
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    return len(tokens)


class Weights:
    """Random tensors under ggml's names. Shapes are given as [out, in]; ggml prints them reversed."""

    file_type = gguf.LlamaFileType.MOSTLY_F16

    def __init__(self, writer, seed):
        self.writer = writer
        self.rng = np.random.default_rng(seed)

    def matrix(self, name, *shape, gain=1.0):
        x = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(gain / np.sqrt(shape[-1]))
        self.writer.add_tensor(name + ".weight", x.astype(np.float16))

    def norm(self, name, n, gain=1.0):
        x = np.float32(gain) * (1 + 0.1 * self.rng.standard_normal(n, dtype=np.float32))
        self.writer.add_tensor(name + ".weight", x.astype(np.float32))

    def bias(self, name, *shape, std=0.1, suffix=".bias"):
        x = np.float32(std) * self.rng.standard_normal(shape, dtype=np.float32)
        self.writer.add_tensor(name + suffix, x)


Q4_0 = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])  # of 32 values, each of them scale * (code - 8)
CODES_STD = np.sqrt(np.mean((np.arange(16) - 8) ** 2))


class LargeWeights(Weights):
    """
    Matrices in Q4_0. Random numbers for each of them would take minutes, so a matrix is a part of a pool of blocks, which all
    of the same scale share: it begins anywhere in it, and takes no memory of its own.
    """

    file_type = gguf.LlamaFileType.MOSTLY_Q4_0

    def __init__(self, writer, seed, s, n_vocab):
        super().__init__(writer, seed)
        self.pool_blocks = s.n_embd * max(n_vocab, s.n_ff, s.n_head * s.head_dim) // 32 + 4096
        self.pools = {}

    def pool(self, scale):
        if scale not in self.pools:
            blocks = np.frombuffer(self.rng.bytes(self.pool_blocks * Q4_0.itemsize), Q4_0).copy()
            # Codes have a mean of -.5, so the sign changes.
            blocks["scale"] = np.where(blocks["codes"][:, 0] & 1, np.float16(scale), np.float16(-scale))
            self.pools[scale] = blocks
        return self.pools[scale]

    def matrix(self, name, *shape, gain=1.0):
        *n_out, n_in = shape
        n = int(np.prod(n_out)) * n_in // 32
        pool = self.pool(float(gain / np.sqrt(n_in) / CODES_STD))
        at = self.rng.integers(len(pool) - n)
        rows = pool[at:at + n].view(np.uint8).reshape(*n_out, n_in // 32 * Q4_0.itemsize)
        self.writer.add_tensor(name + ".weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q4_0)


def has_window(i):
    """gemma4: does layer i see a window only? Every second one does."""
    return i % 2 == 0


def add_attention(w, arch, s, i):
    """Plain attention of layer i (all but deepseek2)."""
    blk = f"blk.{i}."
    head_dim = s.head_dim_swa if s.head_dim_swa and has_window(i) else s.head_dim
    n_q, n_kv = s.n_head * head_dim, s.n_head_kv * head_dim
    if arch in ("phi3", "mpt"):
        w.matrix(blk + "attn_qkv", n_q + 2 * n_kv, s.n_embd, gain=QK_GAIN)
    else:
        qk_normed = arch in ("qwen3", "gemma3", "gemma3n", "gemma4")
        # gemma3n and gemma4 do not divide logits by the root of head_dim.
        norm_gain = QK_GAIN / head_dim ** 0.25 if arch in ("gemma3n", "gemma4") else QK_GAIN
        is_shared = i >= s.n_layer - s.n_shared  # gemma3n's files have weights that nothing uses
        w.matrix(blk + "attn_q", n_q, s.n_embd, gain=1.0 if qk_normed else QK_GAIN)
        if not is_shared:
            w.matrix(blk + "attn_k", n_kv, s.n_embd, gain=1.0 if qk_normed else QK_GAIN)
            w.matrix(blk + "attn_v", n_kv, s.n_embd)
        if qk_normed:
            w.norm(blk + "attn_q_norm", head_dim, gain=norm_gain)
        if qk_normed and not is_shared:
            w.norm(blk + "attn_k_norm", head_dim, gain=norm_gain)
    w.matrix(blk + "attn_output", s.n_embd, n_q)
    if arch in ("qwen2", "qwen2vl", "gpt-oss"):
        w.bias(blk + "attn_q", n_q)
        # Qwen2's key biases reach magnitudes of 100 and more in its first and last layers.
        w.bias(blk + "attn_k", n_kv, std=40.0 if arch != "gpt-oss" and i in (0, s.n_layer - 1) else 0.1)
        w.bias(blk + "attn_v", n_kv)
    if arch == "gpt-oss":
        w.bias(blk + "attn_output", s.n_embd)
        w.bias(blk + "attn_sinks", s.n_head, std=1.0, suffix=".weight")


def add_latent_attention(w, s, i):
    """deepseek2: keys are one latent of 512 and 64 rotary values, values are the latent."""
    blk = f"blk.{i}."
    w.matrix(blk + "attn_q_a", MLA_Q_LORA, s.n_embd)
    w.norm(blk + "attn_q_a_norm", MLA_Q_LORA)
    w.matrix(blk + "attn_q_b", s.n_head * (MLA_NOPE + MLA_ROPE), MLA_Q_LORA, gain=QK_GAIN)
    w.matrix(blk + "attn_kv_a_mqa", MLA_LATENT + MLA_ROPE, s.n_embd)
    w.norm(blk + "attn_kv_a_norm", MLA_LATENT)
    w.matrix(blk + "attn_k_b", s.n_head, MLA_LATENT, MLA_NOPE, gain=QK_GAIN)
    w.matrix(blk + "attn_v_b", s.n_head, MLA_VALUE, MLA_LATENT)
    w.matrix(blk + "attn_output", s.n_embd, s.n_head * MLA_VALUE)


def add_altup(w, s, n_vocab):
    """gemma3n's own, of all layers."""
    n_all = GEMMA3N_PER_LAYER * s.n_layer
    w.matrix("per_layer_token_embd", n_vocab, n_all)
    w.matrix("per_layer_model_proj", n_all, s.n_embd)
    w.norm("per_layer_proj_norm", GEMMA3N_PER_LAYER)
    w.matrix("altup_proj", GEMMA3N_ALTUP - 1, s.n_embd, s.n_embd)
    w.matrix("altup_unembd_proj", GEMMA3N_ALTUP - 1, s.n_embd, s.n_embd)


def add_altup_layer(w, s, i):
    """gemma3n's own, of layer i."""
    blk = f"blk.{i}."
    w.matrix(blk + "inp_gate", GEMMA3N_PER_LAYER, s.n_embd)
    w.matrix(blk + "proj", s.n_embd, GEMMA3N_PER_LAYER)
    w.norm(blk + "post_norm", s.n_embd)
    w.matrix(blk + "altup_correct_coef", GEMMA3N_ALTUP, GEMMA3N_ALTUP)
    w.norm(blk + "altup_correct_scale", s.n_embd)
    w.matrix(blk + "altup_predict_coef", GEMMA3N_ALTUP ** 2, GEMMA3N_ALTUP)
    w.matrix(blk + "altup_router", GEMMA3N_ALTUP, s.n_embd)
    w.norm(blk + "altup_router_norm", s.n_embd)
    w.matrix(blk + "laurel_l", GEMMA3N_LAUREL, s.n_embd)
    w.matrix(blk + "laurel_r", s.n_embd, GEMMA3N_LAUREL)
    w.norm(blk + "laurel_post_norm", s.n_embd)


def add_feed_forward(w, arch, s, i):
    blk = f"blk.{i}."
    if arch == "gpt-oss":
        w.matrix(blk + "ffn_gate_inp", N_EXPERT, s.n_embd)
        w.bias(blk + "ffn_gate_inp", N_EXPERT)
        for name, n_out, n_in in (("gate", s.n_ff, s.n_embd), ("up", s.n_ff, s.n_embd), ("down", s.n_embd, s.n_ff)):
            w.matrix(f"{blk}ffn_{name}_exps", N_EXPERT, n_out, n_in)
            w.bias(f"{blk}ffn_{name}_exps", N_EXPERT, n_out)
        return
    if arch == "phi3":
        w.matrix(blk + "ffn_up", 2 * s.n_ff, s.n_embd)
    else:
        w.matrix(blk + "ffn_up", s.n_ff, s.n_embd)
        if arch != "mpt":
            w.matrix(blk + "ffn_gate", s.n_ff, s.n_embd)
    w.matrix(blk + "ffn_down", s.n_embd, s.n_ff)


def add_tensors(w, arch, s, n_vocab):
    w.matrix("token_embd", n_vocab, s.n_embd)
    w.norm("output_norm", s.n_embd)
    if arch != "gemma2":
        w.matrix("output", n_vocab, s.n_embd, gain=2.0)
    if arch == "gemma4":
        w.writer.add_tensor("rope_freqs.weight", np.ones(s.head_dim // 2, dtype=np.float32))
    if arch == "gemma3n":
        add_altup(w, s, n_vocab)
    for i in range(s.n_layer):
        blk = f"blk.{i}."
        w.norm(blk + "attn_norm", s.n_embd)
        if arch == "deepseek2":
            add_latent_attention(w, s, i)
        else:
            add_attention(w, arch, s, i)
        # gemma2 ties the output layer to the embedding; a small gain would leave it with the last token as the only answer.
        post_gain = 4.0 if arch == "gemma2" else 0.5 if arch == "gemma3n" else 1.0
        if arch in ("gemma2", "gemma3", "gemma3n", "gemma4", "gpt-oss"):
            w.norm(blk + "post_attention_norm", s.n_embd, gain=post_gain)
        if arch != "gpt-oss":
            w.norm(blk + "ffn_norm", s.n_embd)
        if arch in ("gemma2", "gemma3", "gemma3n", "gemma4"):
            w.norm(blk + "post_ffw_norm", s.n_embd, gain=post_gain)
        if arch == "gemma3n":
            add_altup_layer(w, s, i)
        add_feed_forward(w, arch, s, i)


def add_hyperparameters(writer, arch, s, n_vocab, file_type):
    writer.add_name("tiny random weights")  # a name with "phi3" in it would make llama.cpp want Phi-3's special tokens
    writer.add_block_count(s.n_layer)
    writer.add_context_length(s.n_ctx)
    writer.add_embedding_length(s.n_embd)
    writer.add_feed_forward_length(s.n_ff)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_head_kv)
    writer.add_vocab_size(n_vocab)
    writer.add_file_type(file_type)
    if arch == "mpt":
        writer.add_layer_norm_eps(1e-5)
        writer.add_max_alibi_bias(8.0)
        return
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if arch == "deepseek2":
        writer.add_key_length(MLA_LATENT + MLA_ROPE)
        writer.add_value_length(MLA_LATENT)
        writer.add_key_length_mla(MLA_NOPE + MLA_ROPE)
        writer.add_value_length_mla(MLA_VALUE)
        writer.add_rope_dimension_count(MLA_ROPE)
        writer.add_q_lora_rank(MLA_Q_LORA)
        writer.add_kv_lora_rank(MLA_LATENT)
        writer.add_leading_dense_block_count(s.n_layer)
        writer.add_expert_feed_forward_length(s.n_ff)
        writer.add_expert_shared_count(1)
        return
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.head_dim)
    if arch == "qwen2vl":
        # Pairs that turn by time, height and width.
        n_pairs = s.head_dim // 2
        writer.add_rope_dimension_sections([n_pairs - 2 * (n_pairs // 3), n_pairs // 3, n_pairs // 3, 0])
    if s.window:
        writer.add_sliding_window(s.window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if arch == "gemma4":
        writer.add_uint32("gemma4.attention.key_length_swa", s.head_dim_swa)
        writer.add_uint32("gemma4.attention.value_length_swa", s.head_dim_swa)
        writer.add_uint32("gemma4.attention.shared_kv_layers", s.n_shared)
        writer.add_array("gemma4.attention.sliding_window_pattern", [has_window(i) for i in range(s.n_layer)])
        writer.add_uint32("gemma4.embedding_length_per_layer_input", 0)
        writer.add_uint32("gemma4.rope.dimension_count_swa", s.head_dim_swa)
        writer.add_float32("gemma4.rope.freq_base_swa", 10000.0)
        writer.add_final_logit_softcapping(30.0)
    if arch == "gpt-oss":
        writer.add_expert_count(N_EXPERT)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(s.n_ff)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Make a GGUF with random weights.")
    parser.add_argument("--arch", required=True, choices=sorted(ARCHS))
    parser.add_argument("--large", action="store_true", help="the sizes of Llama 3 8B, and matrices in Q4_0")
    parser.add_argument("--seed", type=int, default=1)
    for name in (field.name.replace("_", "-") for field in fields(Shape)):
        parser.add_argument("--" + name, type=int, help="default: the architecture's, or the large model's")
    parser.add_argument("out")
    return parser.parse_args()


def main():
    args = parse_arguments()
    if args.large and args.arch != "llama":
        sys.exit("make_tiny_gguf.py: --large is for --arch llama")
    shape = LARGE if args.large else ARCHS[args.arch]
    given = {name: getattr(args, name) for name in vars(shape) if getattr(args, name) is not None}
    shape = Shape(**{**vars(shape), **given})
    if args.arch == "deepseek2" and ("head_dim" in given or "n_head_kv" in given):
        sys.exit("make_tiny_gguf.py: deepseek2 has one latent of fixed size; --head-dim and --n-head-kv do not apply")
    if args.arch in ("qwen2", "qwen2vl", "phi3", "mpt") and shape.n_embd != shape.n_head * shape.head_dim:
        sys.exit(f"make_tiny_gguf.py: {args.arch} needs --n-embd = --n-head * --head-dim")
    if args.large and any(n % 32 for n in (shape.n_embd, shape.n_ff, shape.n_head * shape.head_dim)):
        sys.exit("make_tiny_gguf.py: Q4_0 needs multiples of 32 for --n-embd, --n-ff and --n-head * --head-dim")
    writer = gguf.GGUFWriter(args.out, args.arch)
    n_vocab = add_vocabulary(writer, shape.n_vocab)
    weights = LargeWeights(writer, args.seed, shape, n_vocab) if args.large else Weights(writer, args.seed)
    add_hyperparameters(writer, args.arch, shape, n_vocab, weights.file_type)
    add_tensors(weights, args.arch, shape, n_vocab)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
