# SPDX-License-Identifier: MIT
"""tq calibrate: learn from texts how to code a model's keys, for less error at the same bits."""
import argparse
import json
import os
import statistics
import sys
from pathlib import Path

# One thread: llama.cpp computes the next layer meanwhile, and BLAS's threads, which wait actively, would slow both.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
try:
    import numpy as np
    from tqdm import tqdm

    from . import file
except ImportError as error:
    sys.exit(f"tq calibrate: {error}. `make deps` installs what it needs; or: pip install numpy tqdm xxhash, and name that "
             "Python in TQ_PYTHON")
from eval.llama import LlamaError, commit, describe_model, list_devices, machine, shown, version
from eval.options import add_options, begin, make_setup

from .observe import EXACT, observe
from .transform import center_blocks, coded_columns, solve, to_halves, weighted_moments

EPILOG = """
What was learnt holds for one model; a few thousand tokens of what it will read are enough. docs/calibrate.md tells more.

  tq calibrate model.gguf --text book.txt code.txt -o model.tqcal
  TQ_GGML=calibration=model.tqcal tq run --preset TQ3 model.gguf
"""


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="tq calibrate", description=__doc__.partition(": ")[2], epilog=EPILOG,
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


class Moments:
    """Second moments of the keys and queries of every layer and KV head, over all that was observed."""

    def __init__(self, args):
        self.args = args
        self.layers = {}  # (of keys, of queries), each [n_head_kv, head_dim, head_dim]

    def add(self, record):
        n_head_kv, head_dim = record.shape
        if record.layer not in self.layers:
            self.layers[record.layer] = tuple(np.zeros((n_head_kv, head_dim, head_dim)) for _ in range(2))
        of_keys, of_queries = self.layers[record.layer]
        if of_keys.shape != (n_head_kv, head_dim, head_dim):
            raise LlamaError(f"layer {record.layer} changes its shape: {of_keys.shape[:2]}, then {record.shape}")
        if not len(record.keys):
            return
        coded = coded_columns(record.visible, self.args.sinks, self.args.recent)
        grouped = record.queries.reshape(len(record.queries), n_head_kv, -1, head_dim).transpose(1, 2, 0, 3)
        for head in range(n_head_kv):
            keys = np.ascontiguousarray(record.keys[:, head])
            with np.errstate(all="ignore"):  # solve sees what is not finite
                k, q = weighted_moments(grouped[head], keys, center_blocks(keys, self.args.ref), record.visible, coded,
                                        record.softcap)
            of_keys[head] += k
            of_queries[head] += q

    def solve(self):
        """A list of Transforms for each layer, empty for one that was not seen."""
        reorder = to_halves if self.args.order == "halves" else np.asarray
        return [[solve(*map(reorder, pair)) for pair in zip(*self.layers.get(layer, ((), ())))]
                for layer in range(max(self.layers) + 1)]


def learn(args, setup):
    """(Moments, windows that were seen)"""
    moments, n_windows = Moments(args), 0
    with tqdm(unit=" layers") as bar:
        def take(record):
            # The first layer again: now their number is known.
            if bar.total is None and record.layer in moments.layers:
                bar.total = len(moments.layers) * args.chunks * len(args.text)
            moments.add(record)
            bar.update()

        for text in args.text:
            bar.set_description_str(text.stem)
            n_seen = observe(setup, text, args.context, args.chunks, take)
            if n_seen < args.chunks:
                bar.write(f"tq calibrate: {text} has {n_seen} of {args.chunks} windows of {args.context} tokens",
                          file=sys.stderr)
            n_windows += n_seen
    return moments, n_windows


def check(args, setup):
    """All that can be told before the first window; returns what describe_model tells."""
    for path in filter(None, (args.output, args.json)):
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise LlamaError(f"{path} cannot be written: there is no folder {path.parent}, or it is read-only")
        if path.is_dir():
            raise LlamaError(f"{path} is a folder; name a file")
    devices, why = list_devices(setup, EXACT)
    if EXACT.device not in devices:
        raise LlamaError(f"{setup.plugin} does not load into {setup.llama_bin}: {why}")
    model = describe_model(setup)
    if args.context > model["n_ctx_train"]:
        raise LlamaError(f"the model was made for {model['n_ctx_train']} tokens; {args.context} are too many")
    return model


def report(args, setup, model, layers, n_windows):
    """What --json gets."""
    return {"version": 1, "command": shown(["tq", "calibrate", *args.words]), "machine": machine(), "commit": commit(),
            "llama_cpp": version(setup), "model": {**model, "file": args.model.name}, "sinks": args.sinks,
            "recent": args.recent, "ref": args.ref, "context": args.context, "n_windows": n_windows,
            "layers": [{"layer": layer, "heads": [{"gain": transform.gain} for transform in heads]}
                       for layer, heads in enumerate(layers)]}


def summary(args, layers, n_windows, n_bytes):
    transforms = [transform for heads in layers for transform in heads]
    gains = [transform.gain for transform in transforms]
    n_head_kv, head_dim = ("/".join(map(str, sorted(values))) for values in
                           ({len(heads) for heads in layers if heads}, {len(transform.bits) for transform in transforms}))
    use = (f"TQ_GGML=calibration={args.output}" if args.order == "same" else
           f'TurboQuantCache(model.config, calibration="{args.output}")')
    return (f"{sum(map(bool, layers))} layers of {n_head_kv} KV heads, head_dim {head_dim}, from {n_windows} windows of "
            f"{args.context} tokens\n"
            f"expected error of the logits, in energy: less by a factor of {statistics.median(gains):.2f} (median of heads), "
            f"{max(gains):.2f} at most\n"
            f"{args.output}: {n_bytes} bytes; use it by {use}")


def run(args):
    setup = make_setup(args)
    model = check(args, setup)
    moments, n_windows = learn(args, setup)
    layers = moments.solve()
    content = file.pack(layers, model["name"], args.sinks, args.recent, args.ref)
    file.write_whole(args.output, content)
    if args.json:
        result = report(args, setup, model, layers, n_windows)
        file.write_whole(args.json, (json.dumps(result, indent=1) + "\n").encode())
    print(summary(args, layers, n_windows, len(content)))


def main(argv=None):
    args = begin(parse_arguments, argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print(f"\ntq calibrate: stopped; {args.output} was not written", file=sys.stderr)
        return 130
    except (LlamaError, OSError) as error:
        sys.exit(f"tq calibrate: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
