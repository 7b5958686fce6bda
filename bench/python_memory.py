#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
Peak memory of a process that runs SmolLM2-135M by Transformers over a text, with the stock cache and with ours, and the time of
each decoded token after it. One process for each; CSV.

    build/deps/python-venv/bin/python bench/python_memory.py --csv build/python-memory.csv [--context 4096] [--dtype float32]

The package must be installed there, or be on PYTHONPATH.
"""
import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEPS = Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build" / "deps"))
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
N_DECODE = 16


def measure(kind, n_tok, dtype):
    """One row: what this process held at most, and what the cache says that it holds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from turboquant.transformers import TurboQuantCache
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(DEPS / "models", gguf_file=MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEPS / "models", gguf_file=MODEL, dtype=dtype).eval()
    text = (DEPS / "text/austen.txt").read_text()[: 8 * n_tok]
    tokens = torch.tensor([tokenizer.encode(text)[: n_tok + N_DECODE]])
    # What loading needed at most would hide the cache: the peak is that since now, on Linux.
    Path("/proc/self/clear_refs").write_text("5")
    if kind == "stock":
        cache = DynamicCache(config=model.config)
    else:
        model.set_attn_implementation("turboquant")
        cache = TurboQuantCache(preset=kind, config=model.config)
    for part in tokens[:, :n_tok].split(256, dim=1):
        model(part, cache=cache, logits_to_keep=1)
    seconds = []
    for i in range(n_tok, n_tok + N_DECODE):
        begin = time.perf_counter()
        model(tokens[:, i : i + 1], cache=cache)
        seconds.append(time.perf_counter() - begin)
    held = cache.nbytes if kind != "stock" else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    assert peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 + 1
    return {"cache": kind, "n_tok": n_tok, "dtype": dtype, "cache_mib": round(held / 2**20, 1), "peak_rss_mib": round(peak, 1),
            "ms_per_token": round(1000 * statistics.median(seconds), 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--caches", default="stock,TQ6,TQ4,TQ2")
    parser.add_argument("--commit", default="", help="what to write as the commit")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        writer = csv.DictWriter(sys.stdout, list(row := measure(args.one, args.context, args.dtype)))
        writer.writeheader()
        writer.writerow(row)
        return
    if not args.csv:
        parser.error("give --csv")
    rows = []
    for kind in args.caches.split(","):
        command = [sys.executable, __file__, "--one", kind, "--context", str(args.context), "--dtype", args.dtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += list(csv.DictReader(done.stdout.splitlines()))
        print(rows[-1], file=sys.stderr)
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "cpu", "threads", "commit"])
        writer.writeheader()
        writer.writerows(row | {"cpu": cpu, "threads": os.cpu_count(), "commit": args.commit} for row in rows)


if __name__ == "__main__":
    main()
