#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Copy a GGUF model of architecture llama into one that computes the same with outlier keys: RoPE pairs of keys are scaled up,
and the same pairs of queries down. Such channels make other caches collapse; a good one does not mind.

    make_outlier_gguf.py IN.gguf OUT.gguf [--factor 30] [--share 1.0] [--seed 1]

Each pair of each KV head of each layer is scaled, with probability `share`, by a factor that is log-uniform from 1 to `factor`.
The weights' blocks (Q4_1, Q8_0 or plain floats) keep their codes: only their scales change.
"""
import argparse
import mmap
import shutil

import gguf
import numpy as np

# type: (dtype of a block's scales or of the values, scales or values at its front, bytes of a block, values of a block)
BLOCKS = {"Q4_0": (np.float16, 1, 18, 32), "Q4_1": (np.float16, 2, 20, 32), "Q5_0": (np.float16, 1, 22, 32),
          "Q5_1": (np.float16, 2, 24, 32), "Q8_0": (np.float16, 1, 34, 32), "F16": (np.float16, 1, 2, 1),
          "F32": (np.float32, 1, 4, 1)}


def scale_rows(data, tensor, factors):
    """Multiply row i of a weight matrix by factors[i], in the file's bytes."""
    dtype, n_scales, block_bytes, block_values = BLOCKS[tensor.tensor_type.name]
    n_columns, n_rows = (int(n) for n in tensor.shape)
    start = int(tensor.data_offset)
    blocks = np.frombuffer(data, np.uint8, count=int(tensor.n_bytes), offset=start)
    blocks = blocks.reshape(n_rows, n_columns // block_values, block_bytes)
    front = n_scales * np.dtype(dtype).itemsize
    scales = blocks[:, :, :front].copy().view(dtype) * factors[:, None, None].astype(np.float32)
    blocks[:, :, :front] = scales.astype(dtype).view(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--factor", type=float, default=30)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    reader = gguf.GGUFReader(args.input)
    value = {name: field.contents() for name, field in reader.fields.items() if name.startswith(("llama.", "general.arch"))}
    n_head, n_head_kv = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]
    n_pairs = value["llama.embedding_length"] // n_head // 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    chance = np.random.default_rng(args.seed)
    shutil.copyfile(args.input, args.output)
    with open(args.output, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for layer in range(value["llama.block_count"]):
            pairs = args.factor ** chance.random((n_head_kv, n_pairs))
            pairs[chance.random(pairs.shape) >= args.share] = 1
            heads = np.repeat(pairs, 2, axis=1)  # llama.cpp's order of this architecture has pairs side by side
            scale_rows(data, tensors[f"blk.{layer}.attn_k.weight"], heads.ravel())
            scale_rows(data, tensors[f"blk.{layer}.attn_q.weight"], 1 / np.repeat(heads, n_head // n_head_kv, axis=0).ravel())


if __name__ == "__main__":
    main()
