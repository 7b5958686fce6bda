#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Two builds' attention on a CUDA device in turns: pairs of formats with kernels of their own, and the kernels for any pair.

Each build has a process of its own on the device. For every case all variants are captured as CUDA graphs, whose calls rotate
over page tables as in cuda_attention.py; then they are replayed in turns, and medians are printed as CSV.

    cuda_pairs.py --old OLD/libturboquant.so --old-source OLD --new NEW/libturboquant.so --csv out.csv [--only decode,prefill]
                  [--rounds 9]

Variants: old; new; new with the kernels for any pair (general); and of prefill the portable kernels of both. Of presets also
new with a ring of 64 tokens (ring), and that with references of keys and factors of channels (referring).
"""
import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

N_HEAD, N_HEAD_KV = 40, 8
PRESETS = ("sq8/tt4", "tt4", "tt3", "tt3/tt2")
# The first are in pairs.h.
OWN = {64: ["sq8/tt4", "tt4", "tt3", "tt3/tt2", "sq4"], 128: ["sq8/tt4", "tt4", "tt3", "tt3/tt2", "sq4", "sq4/sq3", "sq3"],
       256: ["sq8/tt4", "tt4", "tt3", "tt3/tt2", "sq4"]}
OTHER = {64: ["sq8", "sq8/sq4", "sq3", "sq2", "tt2"], 96: ["sq4", "sq3"],
         128: ["sq8", "sq8/sq4", "sq4/sq2", "sq2", "tt2", "tt4/sq3"], 192: ["sq4", "sq3"], 256: ["sq8", "sq3", "sq2"]}
DECODE = {128: [(1, 4096), (1, 32768), (16, 32768), (64, 8192)]}
DECODE_ELSE = [(1, 32768), (16, 16384)]
PREFILL = (2048, 32768)  # queries at the end of tokens
# Whose, environment variables, options of the cache.
VARIANTS = {"old": ("old", {}, {}), "new": ("new", {}, {}), "new general": ("new", {"TQ_CUDA_GENERAL": "1"}, {})}
RING = {"new ring": ("new", {}, {"n_recent": 64}),
        "new referring": ("new", {}, {"n_recent": 64, "references": True, "factors": True})}
PORTABLE = {"old portable": ("old", {"TQ_CUDA_PORTABLE": "1"}, {}),
            "new portable": ("new", {"TQ_CUDA_PORTABLE": "1"}, {})}
SWITCHES = ("TQ_CUDA_GENERAL", "TQ_CUDA_PORTABLE")


def worker(path):
    """Reads a case a line, and replays of its variants; writes microseconds."""
    import torch

    from cuda_attention import PAGE, calls_for, decode_calls
    from cuda_device import Cache, Library
    library, graphs, kept, filled = Library(path), {}, [], {}  # filled: the last cache, by what it is

    def capture(cache, case, switches):
        for name in SWITCHES:
            os.environ.pop(name, None)
        os.environ.update(switches)
        if case["what"] == "decode":
            n_seq, length = case["size"]
            calls, n_bytes = decode_calls(cache, n_seq, [length] * n_seq, N_HEAD, False)
            n_calls = calls_for(len(calls), n_bytes)
        else:
            n_query, length = case["size"]
            table = torch.randperm(length // PAGE, device="cuda", dtype=torch.int32).view(1, -1)
            queries = torch.randn(n_query, N_HEAD, case["head_dim"], dtype=torch.bfloat16, device="cuda")
            lens = torch.tensor([length], dtype=torch.int32, device="cuda")
            params = cache.attend_params(queries, torch.empty_like(queries), table, lens, length, n_query)
            calls, n_calls = [lambda: cache.attend(params)], 2
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(n_calls):
                calls[i % len(calls)]()
        kept.append(calls)
        return graph, n_calls

    for line in sys.stdin:
        case = json.loads(line)
        if "replay" in case:
            graph, n_calls = graphs[case["replay"]]
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            answer = begin.elapsed_time(end) * 1000 / n_calls
        else:
            graphs.clear(), kept.clear()
            tokens = 524288 if case["what"] == "decode" else case["size"][1]
            shape = (*case["formats"], case["head_dim"], N_HEAD_KV, PAGE, tokens // PAGE)
            if not any(kind[0] == shape for kind in filled):
                filled.clear()
                torch.cuda.empty_cache()
            for name, (switches, options) in case["variants"].items():
                kind = shape, tuple(sorted(options.items()))
                if kind not in filled:
                    filled[kind] = Cache(library, *shape, n_seq=64 if options else 0, **options)
                    filled[kind].fill()
                graphs[name] = capture(filled[kind], case, switches)
            answer = torch.cuda.get_device_name()
        print(json.dumps(answer), flush=True)


class Build:
    def __init__(self, path, source):
        environment = {**os.environ, "TQ_CUDA_LIBRARY": str(Path(path).resolve().parent / "libturboquant-cuda.so"),
                       "TQ_PYTHON_SOURCE": str(source / "python")}
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", path], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def cases(only, portable):
    for what in ("decode", "prefill"):
        for head_dim in (64, 96, 128, 192, 256):
            for pair in OWN.get(head_dim, []) + OTHER[head_dim] if what in only else []:
                sizes = DECODE.get(head_dim, DECODE_ELSE) if what == "decode" else [PREFILL]
                for size in sizes:
                    variants = VARIANTS if pair in OWN.get(head_dim, []) else {k: VARIANTS[k] for k in ("old", "new")}
                    ring = RING if pair in PRESETS and (what == "prefill" or size[0] in (1, 16)) else {}
                    more = PORTABLE if what == "prefill" and portable else {}
                    yield what, head_dim, pair, size, {**variants, **more, **ring}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", metavar="LIBRARY", help=argparse.SUPPRESS)
    parser.add_argument("--old")
    parser.add_argument("--old-source", type=Path, help="the sources of the old library, with its package")
    parser.add_argument("--new")
    parser.add_argument("--csv")
    parser.add_argument("--only", default="decode,prefill")
    parser.add_argument("--no-portable", dest="portable", action="store_false", help="without the portable prefill")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker)
    root = Path(__file__).resolve().parent.parent
    builds = {"old": Build(arguments.old, arguments.old_source), "new": Build(arguments.new, root)}
    names = [*VARIANTS, *PORTABLE, *RING]
    table = [["what", "head_dim", "pair", "kernel", "size", *(f"us_{name.replace(' ', '_')}" for name in names),
              "new_to_old", "general_to_new", "referring_to_ring"]]
    print(*table[0], sep=",", flush=True)
    for what, head_dim, pair, size, variants in cases(arguments.only, arguments.portable):
        for name, build in builds.items():
            its = {variant: rest for variant, (of, *rest) in variants.items() if of == name}
            build.ask(what=what, head_dim=head_dim, formats=(pair.split("/") * 2)[:2], size=size, variants=its)
        times = {variant: [] for variant in variants}
        for i in range(arguments.rounds + 1):
            for variant, (of, *_) in variants.items():
                us = builds[of].ask(replay=variant)
                if i > 0:  # the first warms up
                    times[variant].append(us)
        us = {variant: statistics.median(found) for variant, found in times.items()}
        kernel = "own" if pair in OWN.get(head_dim, []) else "general"
        row = [what, head_dim, pair, kernel, "x".join(map(str, size)), *(f"{us[n]:.2f}" if n in us else "" for n in names),
               f"{us['new'] / us['old']:.3f}", f"{us['new general'] / us['new']:.3f}" if "new general" in us else "",
               f"{us['new referring'] / us['new ring']:.3f}" if "new ring" in us else ""]
        table.append(row)
        print(*row, sep=",", flush=True)
        if arguments.csv:
            with open(arguments.csv, "w", newline="") as file:
                csv.writer(file).writerows(table)


if __name__ == "__main__":
    sys.exit(main())
