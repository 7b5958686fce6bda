#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The Metal kernels on an Apple GPU: first their tests, then their speed beside MLX's own attention in FP16.

    python bench/metal.py --csv metal.csv [--contexts 4096,32768] [--skip-tests]

Needs macOS on Apple silicon, a checkout, and in the environment `pip install ".[mlx]" pytest`. Decode is one token of one
sequence, prefill 512 tokens behind a context; 32 query heads share 8 KV heads of 128. All caches of a context are measured in
turns in each round; the CSV has medians, minima and maxima. Arrays rotate over several layers, so that no cache of the chip
holds them. Codes are random: their time does not depend on them.
"""
import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx

from libturboquant import SEED_DEFAULT, metal_kernels as kernels

ROOT = Path(__file__).resolve().parent.parent
N_HEAD, N_HEAD_KV, HEAD_DIM, N_PROMPT = 32, 8, 128, 512
N_SINK, N_RECENT = 4, 64
BYTES_WANTED = 256 << 20  # of all layers that a measurement rotates over
CACHES = {"TQ6": (kernels.SQ8, kernels.TT4, True), "TQ4": (kernels.TT4, kernels.TT4, True),
          "TQ2": (kernels.TT3, kernels.TT2, True), "sq4": (kernels.SQ4, kernels.SQ4, False),
          "sq3": (kernels.SQ3, kernels.SQ3, False)}


def run_tests():
    """The tests of the kernels and of the cache, with the GPU in place of the emulation."""
    environment = os.environ | {"TQ_METAL_DEVICE": "1"}
    tests = [ROOT / f"python/tests/test_{name}.py" for name in ("metal_kernels", "mlx_metal")]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    if subprocess.run(command, env=environment, cwd=ROOT).returncode:
        sys.exit("the kernels are wrong on this GPU: no speed is measured. Please report the output above.")


def random_arrays(k_format, v_format, n_tok, n_query):
    """A layer that holds n_tok tokens, all encoded but the exact ones."""
    capacity = -(-n_tok // kernels.BLOCK) * kernels.BLOCK
    lead, n_exact = (1, N_HEAD_KV), N_SINK + N_RECENT + kernels.BLOCK + n_query

    def words(n, width):
        return mx.random.randint(0, 2**31 - 1, (*lead, n, width)).astype(mx.uint32)

    def codes(fmt):
        return words(capacity, kernels.words(fmt, HEAD_DIM)), mx.full((*lead, capacity), .01, mx.float16)

    references = mx.zeros((*lead, capacity // kernels.BLOCK, kernels.reference_words(HEAD_DIM)), mx.uint32)
    exact = [mx.random.normal((*lead, n_exact, HEAD_DIM)).astype(mx.float16) for _ in range(2)]
    return kernels.Arrays(*codes(k_format), references, *codes(v_format), *exact)


def ours(name, n_context, n_query):
    """(calls, bytes of a layer): attention of the last n_query tokens, over different layers."""
    k_format, v_format, has_refs = CACHES[name]
    n_tok = n_context + n_query
    coded = max(n_context - N_RECENT, 0) // kernels.BLOCK * kernels.BLOCK
    first = max(coded, N_SINK)
    extent = kernels.Extent(n_tok, N_SINK, N_RECENT, kernels.BLOCK, coded, first, N_SINK + n_tok - first)
    first_layer = random_arrays(k_format, v_format, n_tok, n_query)
    size = sum(x.nbytes for x in first_layer)
    layers = [first_layer] + [random_arrays(k_format, v_format, n_tok, n_query) for _ in range(BYTES_WANTED // size)]
    q = mx.random.normal((1, N_HEAD, n_query, HEAD_DIM)).astype(mx.float16)
    mx.eval(layers, q)
    return [lambda arrays=arrays: kernels.attend(q, arrays, k_format, v_format, has_refs, extent, HEAD_DIM**-.5, SEED_DEFAULT)
            for arrays in layers], size


def fp16(n_context, n_query):
    """The same of mx.fast.scaled_dot_product_attention."""
    shape = (1, N_HEAD_KV, n_context + n_query, HEAD_DIM)
    size = 2 * 2 * N_HEAD_KV * shape[2] * HEAD_DIM
    layers = [[mx.random.normal(shape).astype(mx.float16) for _ in range(2)] for _ in range(1 + BYTES_WANTED // size)]
    q, mask = mx.random.normal((1, N_HEAD, n_query, HEAD_DIM)).astype(mx.float16), "causal" if n_query > 1 else None
    mx.eval(layers, q)
    return [lambda k=k, v=v: mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD_DIM**-.5, mask=mask)
            for k, v in layers], size


def encoding(name, n_tok):
    """Encoding n_tok tokens' keys and values."""
    rows = mx.random.normal((1, N_HEAD_KV, n_tok, HEAD_DIM)).astype(mx.float16)
    mx.eval(rows)

    def call():
        return [part for fmt in CACHES[name][:2] for part in kernels.encode(fmt, rows, 0, n_tok, SEED_DEFAULT)]

    return [call], 2 * rows.nbytes


def microseconds(calls, n_calls):
    begin = time.perf_counter()
    mx.eval([calls[i % len(calls)]() for i in range(n_calls)])
    return (time.perf_counter() - begin) * 1e6 / n_calls


def measure(work, context, candidates, n_calls, n_rounds):
    """Rows of the CSV: all candidates in turns."""
    times = {name: [] for name in candidates}
    for i in range(n_rounds + 1):
        for name, (calls, _) in candidates.items():
            found = microseconds(calls, n_calls)
            if i > 0:  # the first round compiles
                times[name].append(found)
    base = statistics.median(times.get("f16", [float("nan")]))
    for name, found in times.items():
        median = statistics.median(found)
        yield {"work": work, "context": context, "cache": name, "bytes": candidates[name][1], "median_us": round(median, 1),
               "min_us": round(min(found), 1), "max_us": round(max(found), 1), "f16_over_this": round(base / median, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--contexts", default="1024,4096,32768,131072")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()
    if not mx.metal.is_available():
        sys.exit("bench/metal.py needs an Apple GPU: MLX finds no Metal on this machine")
    if not args.skip_tests:
        run_tests()
    rows = []
    for context in map(int, args.contexts.split(",")):
        for work, n_query, n_calls in (("decode", 1, 32), ("prefill", N_PROMPT, 2)):
            candidates = {"f16": fp16(context, n_query)} | {name: ours(name, context, n_query) for name in CACHES}
            rows += measure(work, context, candidates, n_calls, args.rounds)
            for row in rows[-len(candidates):]:
                print(row, flush=True)
    rows += measure("encode", N_PROMPT, {name: encoding(name, N_PROMPT) for name in CACHES}, 4, args.rounds)
    machine = {"machine": platform.processor(), "system": platform.platform(), "mlx": mx.__version__}
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *machine])
        writer.writeheader()
        writer.writerows(row | machine for row in rows)


if __name__ == "__main__":
    main()
