# SPDX-License-Identifier: MIT
"""tq calibrate: learn from texts how to code a model's keys, for less error at the same bits."""
import json
import os
import shlex
import statistics
import sys

from .arguments import parse_arguments

# One thread: llama.cpp computes the next layer meanwhile, and BLAS's threads, which wait actively, would slow both.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
try:
    import numpy as np
    from tqdm import tqdm

    from . import file
except ImportError as error:
    parse_arguments(sys.argv[1:])  # --help, and mistakes in the words, do without
    sys.exit(f"tq calibrate: {error}. `make deps` installs what it needs; or: pip install numpy tqdm xxhash, and name that "
             "Python in TQ_PYTHON")
from eval.llama import LlamaError, commit, describe_model, list_devices, machine, path_option, shown, version
from eval.options import make_setup, run_command
from eval.outputs import check_outputs

from .observe import EXACT, observe
from .transform import center_blocks, coded_columns, solve, to_halves, weighted_moments


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
    check_outputs({"-o": args.output, "--json": args.json}, [args.model, *args.text])
    for path in filter(None, (args.output, args.json)):
        if path.exists() and not path.is_file():  # in whose place the new file would come
            raise LlamaError(f"{path} is not a regular file; name another one")
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
    use = (f"TQ_GGML={shlex.quote(path_option('calibration', args.output))}" if args.order == "same" else
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
    print(summary(args, layers, n_windows, len(content)), flush=True)


def main(argv=None):
    return run_command("tq calibrate", parse_arguments, run, lambda args: f"{args.output} was not written", argv)


if __name__ == "__main__":
    sys.exit(main())
