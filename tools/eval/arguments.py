# SPDX-License-Identifier: MIT
"""The command line of tq eval, which needs nothing but Python."""
import argparse
from pathlib import Path

from .options import add_options

KINDS = "json", "html", "markdown", "csv"  # of outputs

EXAMPLE = """
A preset is a device of the plug-in (`tq presets`), with options of the plug-in after a colon, which is how one lever at a time
is tried: TQ4 TQ4:recent=0 TQ4:k=tt4,v=tt3,ref=0. docs/eval.md tells what each figure means.

  tq eval model.gguf --text book.txt --context 4096 --presets TQ4 TQ3 --html report.html
"""


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="tq eval",
                                     description="How much of a model's output each KV cache changes, at how many bits.",
                                     epilog=EXAMPLE,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="plain text; one or more")
    parser.add_argument("--chat", type=Path, nargs="+", default=[], metavar="FILE", help="conversations as JSON, which are "
                        "read in the model's own template, with its special tokens")
    parser.add_argument("--context", default="4096", metavar="N[,N...]", help="tokens of a window (4096)")
    parser.add_argument("--presets", nargs="+", default=["TQ6,TQ4,TQ3,TQ2"], metavar="P", help="ours (TQ6,TQ4,TQ3,TQ2)")
    parser.add_argument("--baselines", default="f16,q8_0,q5_1,q5_0,q4_0", metavar="TYPE[,TYPE...]",
                        help="llama.cpp's; q8_0/q4_0 gives keys and values a type each (f16,q8_0,q5_1,q5_0,q4_0)")
    parser.add_argument("--chunks", type=int, default=1, metavar="N", help="windows of each text (1)")
    parser.add_argument("--needle", default="", metavar="N[,N...]", help="also look for needles in that many tokens")
    parser.add_argument("--needle-depths", type=int, default=5, metavar="N", help="from the beginning to the end (5)")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="OUT", help="write the result there")
    parser.add_argument("--work", type=Path, metavar="DIR", default=Path("tq-eval.work"), help="where results "
                        "and references wait for later commands (tq-eval.work)")
    parser.add_argument("--keep", type=float, default=4, metavar="GIB", help="of references; the least lately used go "
                        "first (4)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    add_options(parser)
    args = parser.parse_args(argv)
    args.context, args.needle = numbers(parser, args.context, 256), numbers(parser, args.needle, 512)
    args.presets = split_presets(args.presets)
    args.baselines = [name for name in args.baselines.split(",") if name]
    if args.chunks < 1 or args.needle_depths < 1 or args.threads < 1:
        parser.error("--chunks, --needle-depths and --threads are at least 1")
    if not args.text and not args.chat or args.needle and not args.text:
        parser.error("give --text FILE or --chat FILE; --needle hides its needles in the first --text")
    if not args.keep >= 0:
        parser.error("--keep is at least 0")
    return args


def numbers(parser, text, least):
    parts = [part for part in text.split(",") if part]
    if any(not part.isdecimal() or int(part) < least for part in parts):
        parser.error(f"'{text}' is not a list of whole numbers of at least {least}")
    return sorted({int(part) for part in parts})


def split_presets(words):
    """Commas separate presets, but after a colon they separate the options of one."""
    return [name for word in words for name in ([word] if ":" in word else word.split(",")) if name]
