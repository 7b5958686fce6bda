# SPDX-License-Identifier: MIT
"""
Generate with a GGUF model in llama-cpp-python and a compressed cache.

    python examples/llama_cpp_generate.py MODEL.gguf "Once upon a time" [--preset TQ4] [--n-tok 64]
"""
import argparse

from libturboquant.llama_cpp import Llama

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("prompt")
parser.add_argument("--preset", default="TQ4")
parser.add_argument("--n-tok", type=int, default=64)
parser.add_argument("--n-ctx", type=int, default=4096)
args = parser.parse_args()

llama = Llama(args.model, preset=args.preset, n_ctx=args.n_ctx, verbose=False)
print(args.prompt + llama(args.prompt, max_tokens=args.n_tok, temperature=0)["choices"][0]["text"])
print(llama.kv_cache)
