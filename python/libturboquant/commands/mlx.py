# SPDX-License-Identifier: MIT
"""
python -m libturboquant mlx COMMAND: the commands of MLX-LM that make prompts' caches, with compressed ones. They take our
options, which begin with --kv-, and all of their own but those for caches of MLX-LM.
"""
from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import libturboquant
from libturboquant.errors import TurboQuantError, UnsupportedError
from libturboquant.weight_factors import CHOICES, chosen

from . import CommandError, Parser, at_least, first_line
from .models import faults_of, need_mlx

COMMANDS = {
    "generate": "a text that goes on from a prompt",
    "chat": "a conversation in the terminal",
    "server": "a server with the API of OpenAI's",
    "cache_prompt": "a prompt's compressed cache in a file, for `generate --prompt-cache-file`",
    "perplexity": "how well a model predicts a data set, through the compressed cache",
    "evaluate": "tasks of lm-evaluation-harness, through the compressed cache",
    "benchmark": "tokens a second of prompts and of generation",
}
# Options of MLX-LM that compressed caches cannot have: the shortest word that means them, and what to do.
_COMPRESSED = "keys and values are compressed already, in the formats of --kv-preset: leave it out, or run `mlx_lm.{command}`"
_REFUSED = {
    "--kv-bits": ("--kv-b", _COMPRESSED), "--kv-group-size": ("--kv-g", _COMPRESSED),
    "--quantized-kv-start": ("--qua", _COMPRESSED),
    "--max-kv-size": ("--max-k", "a compressed cache holds all tokens and drops none: leave it out, or run `mlx_lm.{command}`, "
                      "whose cache has a bound"),
}
_ALL_PROMPTS = ("perplexity", "evaluate")  # what they measure are texts that are read, not generated
_MODELS = "a folder with config.json, as mlx_lm.convert writes it, or a name on the Hugging Face Hub (owner/model)"
_FOLDER_BYTES = "8GB"
_PROG = "python -m libturboquant mlx"


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the command's own. What is wrong with ours ends the program before a model is loaded."""
    if not words or words[0] in ("-h", "--help"):
        _front().parse_args(words)
    if words[0] not in COMMANDS:
        _front().error(f"unknown command {words[0]!r}: the commands that make caches are {', '.join(COMMANDS)}")
    command, words = words[0], words[1:]
    parser = Parser(prog=f"{_PROG} {command}", add_help=False, allow_abbrev=False,
                    usage=f"{_PROG} {command} [options of turboquant] [options of mlx_lm.{command}]",
                    description=f"mlx_lm.{command} with compressed caches: {COMMANDS[command]}.")
    _add_options(parser, command)
    args, rest = parser.parse_known_args(words)
    args.command, args.parser, args.is_help = command, parser, bool({"-h", "--help"} & set(rest))
    if not args.is_help:
        _refuse(parser, command, [word.partition("=")[0] for word in rest])
        args.options = _options(args)
    return args, rest


def _front() -> argparse.ArgumentParser:
    """The parser of words that do not begin with a command."""
    lines = "\n".join(f"  {name:<14}{what}" for name, what in COMMANDS.items())
    parser = Parser(prog=_PROG, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="MLX-LM's commands with compressed caches.",
                    epilog=f"commands:\n{lines}\n\n`COMMAND --help` has our options, which begin with --kv-, and MLX-LM's own.")
    parser.add_argument("command", metavar="COMMAND", help="one of those below, and its options")
    return parser


def _add_options(parser: argparse.ArgumentParser, command: str) -> None:
    group = parser.add_argument_group("options of turboquant")
    group.add_argument("--kv-preset", metavar="NAME", default="TQ4",
                       help=f"formats of keys and values: {', '.join(libturboquant.presets())} (default: %(default)s)")
    group.add_argument("--kv-k-format", metavar="NAME", help="keys' format in place of the preset's, as sq8; f16 keeps keys "
                       "exact and compresses values only")
    group.add_argument("--kv-v-format", metavar="NAME", help="values' format in place of the preset's")
    group.add_argument("--kv-exact-layers", metavar="N", type=at_least(0), help="keep keys and values of the first and the "
                       "last N compressed layers exact")
    group.add_argument("--kv-n-sink", metavar="N", type=at_least(0), help="keep the first N tokens exact, in place of the "
                       "preset's number")
    group.add_argument("--kv-n-recent", metavar="N", type=at_least(0), help="keep the last N tokens exact, in place of the "
                       "preset's number")
    group.add_argument("--kv-exact-prefill", action="store_true", default=None, help="read prompts with exact keys and values, "
                       "and compress these before a prompt's last token is read; until then they take their memory")
    group.add_argument("--kv-calibration", metavar="FILE", help="what `tq calibrate` learnt of the model")
    group.add_argument("--kv-factors", metavar="NAME", choices=CHOICES,
                       help="factors for channels of keys: weights, from the model's (default without a calibration), or off")
    if command == "server":
        group.add_argument("--kv-cache-folder", metavar="DIR", help="also keep the caches of prompts in files there, where a "
                           "server that is started again finds them")
        group.add_argument("--kv-cache-folder-bytes", metavar="SIZE", type=_size, default=_FOLDER_BYTES, help="of all files "
                           "there; those used longest ago are removed (default: %(default)s; 500MB, 2GB, or bytes)")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([MG])B?)?", text.strip().upper())
    n = int(float(found[1]) * {"M": 10**6, "G": 10**9, None: 1}[found[2]]) if found else 0
    if n < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size: give 500MB, 2GB, or a number of bytes")
    return n


def _refuse(parser: argparse.ArgumentParser, command: str, words: list[str]) -> None:
    """End the program for options that are not for compressed caches, or do not exist."""
    for word in words:
        for option, (shortest, cure) in _REFUSED.items():
            if option.startswith(word) and word.startswith(shortest):
                parser.error(f"{option}: {cure.format(command=command)}")
        if word.startswith("--kv-"):
            known = [option for action in parser._actions for option in action.option_strings]
            parser.error(f"unknown option {word} of {command}; the options are {', '.join(known)}")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of libturboquant.mlx.install that were given, checked as far as that can be done without a model."""
    names = ("k_format", "v_format", "exact_layers", "n_sink", "n_recent", "exact_prefill", "calibration", "factors")
    found = {name: getattr(args, f"kv_{name}") for name in names if getattr(args, f"kv_{name}") is not None}
    error = args.parser.error
    if args.command in _ALL_PROMPTS and "exact_prefill" in found:
        error(f"--kv-exact-prefill: {args.command} reads its texts as prompts, so nothing compressed would be measured: leave "
              "it out")
    if getattr(args, "kv_cache_folder", None) is not None:
        try:
            Path(args.kv_cache_folder).mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are nobody else's business
        except OSError as fault:
            error(f"--kv-cache-folder {args.kv_cache_folder}: {fault.strerror}: give a folder that can be written to")
        if not os.access(args.kv_cache_folder, os.W_OK | os.X_OK):
            error(f"--kv-cache-folder {args.kv_cache_folder} cannot be written to: give another folder")
    need_mlx()
    from libturboquant.mlx import cache_class
    of_layers = {"exact_layers", "calibration"}  # what a single layer does not have
    try:
        if "calibration" in found:
            found["calibration"] = libturboquant.Calibration(found["calibration"]).path
        chosen(found.get("factors"), found.get("calibration"))
        of_each = {name: value for name, value in found.items() if name not in of_layers}
        cache_class()(args.kv_preset, **of_each)
        if found.get("exact_layers"):
            cache_class()(args.kv_preset, **of_each | {"k_format": "f16", "v_format": "f16"})
    except TurboQuantError as fault:
        error(str(fault))
    return {"preset": args.kv_preset} | found


def run(words: list[str]) -> int:
    args, rest = parse(words)
    command = args.command
    if args.is_help:
        print(args.parser.format_help(), flush=True)  # the command's own follows
        need_mlx()
    try:
        module = importlib.import_module(f"mlx_lm.{command}")
    except ImportError as error:
        raise CommandError(f"mlx_lm.{command} cannot be imported ({first_line(error)}): pip install 'mlx-lm[{command}]'"
                           ) from error
    if not args.is_help:
        _change(module, command, args)
    sys.argv = [f"{_PROG} {command}", *rest]
    module.main()
    return 0


def _change(module: Any, command: str, args: argparse.Namespace) -> None:
    """Let the command compress what the models that it loads keep."""
    from libturboquant.mlx import install

    def installing(load: Any) -> Any:
        def load_and_install(*given: Any, **options: Any) -> Any:
            with faults_of(str(given[0]), _MODELS):
                model, *others = load(*given, **options)
            try:
                return install(model, **args.options), *others
            except UnsupportedError as error:
                raise CommandError(f"{error}; here run `mlx_lm.{command}`") from error

        return load_and_install

    for name in ("load", "sharded_load"):
        if hasattr(module, name):
            setattr(module, name, installing(getattr(module, name)))
    if command == "generate":
        _change_generate(module, args)
    elif command == "perplexity":
        _change_perplexity(module)
    elif command == "server" and args.kv_cache_folder is not None:
        _change_server(module, args)


def _change_generate(module: Any, args: argparse.Namespace) -> None:
    """Compress a file of MLX-LM's own cache; refuse options that are not those of a file of a compressed one."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache
    from libturboquant._mlx_batch import BatchCache
    from libturboquant.mlx import from_kvcache
    generate = module.generate

    def generate_on(model: Any, *given: Any, prompt_cache: Any = None, **options: Any) -> Any:
        held = prompt_cache or []
        if any(isinstance(cache, QuantizedKVCache) for cache in held):
            raise UnsupportedError("--prompt-cache-file holds keys and values that MLX-LM has quantized, which are not read: "
                                   f"make it again, without --kv-bits, or by `{_PROG} cache_prompt`")
        if any(type(cache) is KVCache for cache in held):
            prompt_cache = from_kvcache(model, held, **args.options)
        of_file = [cache._options for cache in held if isinstance(cache, BatchCache)]
        wanted = [cache._options for cache in model.make_cache() if isinstance(cache, BatchCache)] if of_file else []
        if of_file != wanted:
            raise UnsupportedError(f"--prompt-cache-file was made with {_told(of_file)}, and this is {_told(wanted)}: give the "
                                   f"same options as `{_PROG} cache_prompt` was given")
        return generate(model, *given, prompt_cache=prompt_cache, **options)

    module.generate = generate_on


def _told(of_layers: list[dict[str, Any]]) -> str:
    """Options of the first layer, and how many layers there are."""
    first = {name: value for name, value in of_layers[0].items() if name != "layer"} if of_layers else {}
    return f"{', '.join(f'{name}={value}' for name, value in first.items())} in {len(of_layers)} layers"


def _change_perplexity(module: Any) -> None:
    """It calls the model without a cache, so nothing would be compressed."""
    from mlx_lm.models.cache import make_prompt_cache
    eval_ppl = module.eval_ppl

    def eval_ppl_of(model: Any, *given: Any, **options: Any) -> Any:
        return eval_ppl(lambda tokens: model(tokens, cache=make_prompt_cache(model)), *given, **options)

    module.eval_ppl = eval_ppl_of


def _change_server(module: Any, args: argparse.Namespace) -> None:
    """Also keep its prompts in a folder."""
    import mlx.core as mx
    from libturboquant._mlx_folder import Folder, FolderPromptCache, check, key_of
    if mx.distributed.init().size() > 1:
        raise UnsupportedError("--kv-cache-folder: a model on several machines needs the same prompts on all of them, which "
                               "folders do not promise: leave it out")
    known: dict[Any, Any] = {}

    class ModelProvider(module.ModelProvider):
        def _load(self, *given: Any, **options: Any) -> None:
            super()._load(*given, **options)
            models = [model for model in (self.model, self.draft_model) if model is not None]
            known.clear()  # the server has one model at a time
            known[self.model_key] = key_of(models, args.options), partial(check, models)

    folder = Folder(args.kv_cache_folder, args.kv_cache_folder_bytes)
    module.ModelProvider = ModelProvider
    module.LRUPromptCache = partial(FolderPromptCache, folder=folder, known=known)
