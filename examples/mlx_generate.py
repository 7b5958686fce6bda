# SPDX-License-Identifier: MIT
"""
Generate with an MLX-LM model and a compressed cache, on the CPU.

    python examples/mlx_generate.py MODEL "Once upon a time" [--preset TQ4] [--n-tok 64]
"""
import argparse

import mlx.core as mx
import mlx_lm

from libturboquant.mlx import make_prompt_cache

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("prompt")
parser.add_argument("--preset", default="TQ4")
parser.add_argument("--n-tok", type=int, default=64)
args = parser.parse_args()

mx.set_default_device(mx.cpu)
model, tokenizer = mlx_lm.load(args.model)
cache = make_prompt_cache(model, preset=args.preset)
print(args.prompt + mlx_lm.generate(model, tokenizer, args.prompt, max_tokens=args.n_tok, prompt_cache=cache))
print(f"{cache[0].offset} tokens in {sum(layer.nbytes for layer in cache)} bytes")
