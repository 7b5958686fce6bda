# SPDX-License-Identifier: MIT
"""The command line of tq calibrate, which needs nothing but Python."""
import argparse
from pathlib import Path

from eval.options import add_options

EPILOG = """
What was learnt holds for one model; a few thousand tokens of what it will read are enough. docs/calibrate.md tells more.

  tq calibrate model.gguf --text book.txt code.txt -o model.tqcal
  TQ_GGML=calibration=model.tqcal tq run --preset TQ3 model.gguf
"""


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="tq calibrate",
                                     description="Learn from texts how to code a model's keys, for less error at the same "
                                                 "bits.",
                                     epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="plain text; one or more")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the calibration, OUT.tqcal")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens of a window (2048)")
    parser.add_argument("--chunks", type=int, default=2, metavar="N", help="windows of each text (2)")
    parser.add_argument("--sinks", type=int, default=4, metavar="N", help="first tokens that the cache keeps exact (4)")
    parser.add_argument("--recent", type=int, default=64, metavar="N", help="last tokens that it keeps exact (64)")
    parser.add_argument("--ref", type=int, default=64, metavar="N", help="tokens that share a reference; 0: none (64)")
    parser.add_argument("--order", choices=("same", "halves"), default="same", help="of a head's channels: the same as in "
                        "llama.cpp, for llama.cpp, or two halves where it has pairs side by side, for Transformers with models "
                        "of architecture llama (same)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write there what each layer and head gains")
    add_options(parser)
    args = parser.parse_args(argv)
    if args.context < 256 or min(args.chunks, args.threads) < 1 or min(args.sinks, args.recent, args.ref) < 0:
        parser.error("--context is at least 256, --chunks and --threads at least 1, --sinks, --recent and --ref at least 0")
    if args.context <= args.sinks + args.recent:
        parser.error("--context must be more than --sinks and --recent together: nothing else is coded")
    return args
