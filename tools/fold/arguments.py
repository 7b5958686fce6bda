# SPDX-License-Identifier: MIT
"""The command line of tq fold, which needs nothing but Python."""
import argparse
from pathlib import Path

from eval.options import add_host_options

EPILOG = """
Rows of queries are multiplied, and rows of keys divided, by powers of two: blocks of weights keep their codes, and the model
computes the same. Any KV cache of few bits loses less then, llama.cpp's own among them. docs/fold.md tells more.

  tq fold model.gguf -o folded.gguf
  llama-server -m folded.gguf -ctk q8_0 -ctv q8_0
"""


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="tq fold",
                                     description="Write an equal model whose keys have no channels that outweigh the others.",
                                     epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file, which stays as it is")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the new GGUF file")
    parser.add_argument("--force", action="store_true", help="write over OUT where it exists")
    parser.add_argument("--check", choices=("logits", "weights"), default="logits", help="how the new file is compared with "
                        "the old one: also by what llama.cpp computes with both, or by its weights only (logits, where "
                        "llama.cpp is found)")
    add_host_options(parser)
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("--threads is at least 1")
    return args
