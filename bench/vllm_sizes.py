#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How many times BF16's tokens vLLM's blocks hold with each preset, by the arithmetic of pages: docs/vllm.md, Sizing."""
import argparse

from libturboquant import presets
from libturboquant.vllm import options
from libturboquant.vllm.pages import PageFormat


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-head-kv", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 32768, 131072], help="tokens of a request")
    args = parser.parse_args()
    print("preset,page_bytes,window_tokens," + ",".join(map(str, args.lengths)))
    for name, preset in presets().items():
        pages = PageFormat(preset.k_format, preset.v_format, args.n_head_kv, args.head_dim, args.head_dim, options.N_SINK,
                           preset.n_recent)
        n_bytes, n_window = pages.page_bytes(args.block_size), pages.window_tokens(args.block_size)
        row = []
        for length in args.lengths:
            n_pages = -(-length // args.block_size) + -(-preset.n_recent // n_window) + 1
            row.append(length * pages.exact_token_bytes / (n_pages * n_bytes))
        print(f"{name},{n_bytes},{n_window}," + ",".join(f"{ratio:.2f}" for ratio in row))


if __name__ == "__main__":
    main()
