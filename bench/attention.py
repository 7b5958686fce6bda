#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""`tq bench` over contexts, shapes, and instruction sets: one CSV row for each measurement, and a plot.

    attention.py --csv build/attention.csv --plot build/attention.svg [--quick]

Each call of tq bench runs all of its configurations in turns, ggml's f16 among them, so ratios are of one run.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from measure import commit, machine  # noqa: E402

FORMATS = "sq8,sq4,sq3,sq2,tt4,tt3,tt2,TQ6,TQ4,TQ3,TQ2"
FEW = "sq8,sq4,tt4,tt2,TQ4"
# (label, instruction set or None for the best, arguments)
RUNS = [
    *((f"40/8 heads, {n} tokens", None, ["attention", "--context", n, "--formats", FORMATS if n == 32768 else FEW])
      for n in (4096, 8192, 32768, 131072)),
    ("40/8 heads, 32768 tokens, avx2", "avx2", ["attention", "--context", 32768, "--formats", FEW]),
    ("8/8 heads, 32768 tokens", None, ["attention", "--context", 32768, "--n-head", 8, "--formats", FEW]),
    ("8/8 heads, 32768 tokens, avx2", "avx2", ["attention", "--context", 32768, "--n-head", 8, "--formats", FEW]),
    ("prefill of 512 at the end of 4608", None, ["prefill", "--context", 4608, "--baselines", "f16", "--formats", FEW]),
    ("encode", None, ["encode"]),
]
QUICK = [("40/8 heads, 2048 tokens", None, ["attention", "--context", 2048, "--repeats", 3, "--formats", FEW])]
FIELDS = ["label", "name", "us_median", "us_min", "us_max", "bytes", "gb_per_s", "bandwidth_share", "ratio_vs_f16",
          "ratio_vs_q8_0", "error", "read_gb_per_s", "threads", "cpu", "command", "commit", "machine"]


def run(label, cpu, arguments):
    command = [str(ROOT / "build/release/tq"), "bench", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **({"TQ_CPU": cpu} if cpu else {})})
    if done.returncode:
        sys.exit(f"attention.py: {' '.join(command)} failed:\n{done.stderr}")
    result = json.loads(done.stdout)
    shown = (f"TQ_CPU={cpu} " if cpu else "") + "build/release/tq " + " ".join(command[1:-1])
    common = {"label": label, "command": shown, "commit": commit(), "machine": machine(),
              **{key: result[key] for key in ("read_gb_per_s", "threads", "cpu")}}
    return [{**common, **row} for row in result["rows"]]


def plot(rows, path):
    """How many times faster than f16, per configuration, a group of bars for each run."""
    labels = list(dict.fromkeys(row["label"] for row in rows if row.get("ratio_vs_f16") is not None))
    names = [name for name in FORMATS.split(",") if any(row["name"] == name for row in rows)]
    figure, axes = plt.subplots(figsize=(11, 4.5))
    for i, name in enumerate(names):
        values = {row["label"]: row["ratio_vs_f16"] for row in rows if row["name"] == name and row.get("ratio_vs_f16")}
        places = [j + (i + 0.5) / len(names) * 0.8 - 0.4 for j, label in enumerate(labels) if label in values]
        axes.bar(places, [values[label] for label in labels if label in values], width=0.8 / len(names), label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), [label.replace(", ", "\n") for label in labels], fontsize=7)
    axes.set_ylabel("times faster than ggml with f16")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--plot")
    parser.add_argument("--quick", action="store_true", help="one small run")
    args = parser.parse_args()
    rows, runs = [], QUICK if args.quick else RUNS
    for i, (label, cpu, arguments) in enumerate(runs):
        print(f"[{i + 1}/{len(runs)}] {label}", file=sys.stderr)
        rows += run(label, cpu, arguments)
    for row in rows:
        ratio = row.get("ratio_vs_f16") or row.get("ratio_vs_q8_0")
        print(f"{row['label']:36} {row['name']:6} {row['us_median']:12.3f} us" + (f"  x {ratio:.2f}" if ratio else ""))
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
