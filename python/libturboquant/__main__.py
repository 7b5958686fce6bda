# SPDX-License-Identifier: MIT
"""
python -m libturboquant doctor | eval | plan | mlx. docs/python.md.

Exit codes: 0; 1, something is missing, refused or does not work, as one line on stderr says; 2, words that mean nothing; 130,
stopped by Ctrl-C.
"""
from __future__ import annotations

import argparse
import json
import sys

from .commands import CommandError, Parser, doctor, evaluate, mlx, plan
from .errors import TurboQuantError

_COMMANDS = {
    "doctor": (doctor, "what is installed and tested here, and what install() would do with a model", """
examples:
  python -m libturboquant doctor                     the library, its kernels, CUDA, and the packages that it works with
  python -m libturboquant doctor ./Qwen2.5-0.5B      also each layer of a model: compressed, kept or refused, and why
  python -m libturboquant doctor ./Qwen3 --engine mlx    the same in MLX-LM
  python -m libturboquant doctor gemma3_text         the same of a kind of models, with nothing downloaded

Ends with 1 if the library has no kernels for this machine, or the model is refused."""),
    "eval": (evaluate, "how far presets move a model's output on a text, at how many bits", """
Reads the first tokens of the text with the model's own cache and with each preset, and compares the distributions of the
next token: the smaller the KL divergence, the better; the row "own, another algorithm" is what only rounding gives. Bits are
those of all that the compressed layers keep at that context. The figures are those of `tq eval` (docs/eval.md). Progress is on
stderr.

example:
  python -m libturboquant eval ./Qwen2.5-0.5B book.txt --context 4096 --presets TQ4,TQ3"""),
    "plan": (plan, "what context a machine or a card holds, with a BF16 cache and with presets", """
Counts pages, the exact window and first tokens, and tables as the library does, in a dry run of its cache. Layers that are not
compressed count in BF16.

examples:
  python -m libturboquant plan ./Qwen2.5-7B --memory 24                     a card of 24 GiB, with the weights of the folder
  python -m libturboquant plan qwen2 --memory 80 --weights 15 --batch 16    default sizes, 16 sequences"""),
}


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m libturboquant", description="A language model's KV cache in 2 to 4 bits a value: what works here, what "
        "it costs in quality, what it saves.", epilog="`COMMAND --help` has options and examples.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary, epilog) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=epilog,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON, for programs")
    commands.add_parser("mlx", help="MLX-LM's commands with compressed caches: " + ", ".join(mlx.COMMANDS))
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    try:
        if words[:1] == ["mlx"]:  # whose commands have options of their own
            return mlx.run(words[1:])
        args = parse(words)
        module = _COMMANDS[args.command][0]
        found, status = module.run(args)
        print(json.dumps(found, indent=1) if args.json else module.text(found), flush=True)
        return status
    except KeyboardInterrupt:
        print("\nturboquant: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (CommandError, TurboQuantError, OSError) as error:
        print(f"turboquant: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
