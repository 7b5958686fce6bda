#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
Peak memory of a process that runs a Transformers model over a text, with the stock cache and with ours: does memory fall by
what the cache saves? The model is small and random, but its cache is that of a larger one (64 KiB a token in float32); memory
does not depend on the values. One process for each cache; CSV. Linux.

    build/deps/torch-venv/bin/python bench/python_memory.py --csv build/python-memory.csv [--context 4096]

The package must be installed there; or put python/ on PYTHONPATH and name build/release/libturboquant.so in TURBOQUANT_LIBRARY.
"""
import argparse
import csv
import subprocess
import sys
from pathlib import Path

N_LAYER, N_HEAD_KV, HEAD_DIM = 8, 8, 128


def peak_mib():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def measure(kind, n_tok, dtype):
    """One row: what this process came to hold on top of the model, and what the cache says that it holds."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

    from libturboquant.transformers import TurboQuantCache
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=256, num_hidden_layers=N_LAYER,
                         num_attention_heads=N_HEAD_KV, num_key_value_heads=N_HEAD_KV, head_dim=HEAD_DIM)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    model.set_attn_implementation("sdpa" if kind == "stock" else "turboquant")

    def make_cache():
        return DynamicCache(config=config) if kind == "stock" else TurboQuantCache(preset=kind, config=config)

    tokens = torch.randint(1000, (1, n_tok))
    model(tokens[:, :128], cache=make_cache(), logits_to_keep=1)  # what the first call loads and keeps
    # From here on the peak is counted anew.
    Path("/proc/self/clear_refs").write_text("5")
    before, cache = peak_mib(), make_cache()
    for part in tokens.split(128, dim=1):
        model(part, cache=cache, logits_to_keep=1)
    held = cache.nbytes if kind != "stock" else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"cache": kind, "n_tok": n_tok, "dtype": dtype, "cache_mib": round(held / 2**20, 1),
            "peak_rss_grown_mib": round(peak_mib() - before, 1)}


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
        row = measure(args.one, args.context, args.dtype)
        writer = csv.DictWriter(sys.stdout, list(row))
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
        writer = csv.DictWriter(file, [*rows[0], "cpu", "commit"])
        writer.writeheader()
        writer.writerows(row | {"cpu": cpu, "commit": args.commit} for row in rows)


if __name__ == "__main__":
    main()
