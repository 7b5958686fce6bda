# SPDX-License-Identifier: MIT
"""What tq eval, tq calibrate and tq fold alike take from the command line: threads, llama.cpp's programs and the plug-in."""
import os
import shutil
import signal
import sys
from pathlib import Path

from .llama import ROOT, LlamaError, Setup


def begin(parse_arguments, argv):
    """The parsed arguments, with the words that they came from. From now on a signal ends the command as Ctrl-C does."""
    words = sys.argv[1:] if argv is None else argv
    args = parse_arguments(words)
    args.words = words
    # A letter that the locale lacks is no reason to end without the figures.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    stop_by_signal()
    return args


def run_command(name, parse_arguments, run, left, argv=None):
    """All of a command; returns its exit status. left(args): what there is when Ctrl-C or a signal has stopped it."""
    args = begin(parse_arguments, argv)
    try:
        return run(args) or 0
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; {left(args)}", file=sys.stderr)
        return 130
    except (LlamaError, OSError) as error:
        end_with(name, error)


def end_with(name, error):
    """The end of a command with a LlamaError or an OSError."""
    drop_output()
    is_named = isinstance(error, OSError) and error.filename
    sys.exit(f"{name}: {error.filename}: {error.strerror}" if is_named else f"{name}: {error}")


def drop_output():
    """What standard output did not take would fail a second time when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_host_options(parser):
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="(all)")
    parser.add_argument("--llama-bin", type=Path, metavar="DIR", help="llama.cpp's programs (TQ_LLAMA_BIN, build/deps, PATH)")


def add_options(parser):
    add_host_options(parser)
    parser.add_argument("--plugin", type=Path, metavar="FILE", help="libggml-turboquant.so (TQ_PLUGIN, build/release)")


def find_llama_bin(given):
    places = [given] if given else [os.environ.get("TQ_LLAMA_BIN"), ROOT / "build/deps/llama-bin"]
    for place in filter(None, places):
        if (Path(place) / "llama-perplexity").exists():
            return Path(place)
    found = shutil.which("llama-perplexity")
    if given or not found:
        raise LlamaError("llama-perplexity was not found; `make deps` builds it, or give llama.cpp's folder of programs by "
                         "--llama-bin")
    return Path(found).parent


def find_plugin(given):
    for place in filter(None, [given, os.environ.get("TQ_PLUGIN"), ROOT / "build/release/libggml-turboquant.so"]):
        if Path(place).exists():
            return Path(place).resolve()
        if place in (given, os.environ.get("TQ_PLUGIN")):
            raise LlamaError(f"the plug-in {place} does not exist")
    raise LlamaError("libggml-turboquant.so was not found; `make all` builds it, or name it by --plugin")


def make_setup(args, *files):
    """The Setup of arguments that name a model and texts, which must be there, as other files must."""
    for path in (args.model, *args.text, *files):
        if not path.is_file():
            raise LlamaError(f"the file {path} does not exist")
    return Setup(find_llama_bin(args.llama_bin), find_plugin(args.plugin), args.model, args.threads)


def stop_by_signal():
    """Let SIGTERM end the program as Ctrl-C does."""
    def stop(_signal, _frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
