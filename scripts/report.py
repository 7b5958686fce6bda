#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What `make run` shows: a real model answers a question about a long real text with an FP16 KV cache and with ours, then a
table of memory, speed and quality for stock caches and our presets. All figures come from stock, unpatched llama.cpp tools.

    report.py [--cases f16,q8_0,q4_0,TQ6,TQ4,TQ3,TQ2] [--preset TQ4] [--json FILE] [--csv FILE]

Environment: TQ_DEPS_DIR (build/deps), TQ_PLUGIN (build/release/libggml-turboquant.so).
"""
import argparse
import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, Cache, Setup, commit, machine, measure_answer, measure_quality, measure_speed, write_reference

DEPS = Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build" / "deps"))
N_CTX = 4096
DEPTHS = (0, 4096)
TEXT_CHARACTERS = 12000  # some 3100 tokens
QUESTION = "What is the name of the place that Mr. Bingley has taken?"
START = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


def make_prompt(text):
    first = text.index("It is a truth universally acknowledged")
    passage = text[first:first + TEXT_CHARACTERS]
    return f"<|im_start|>user\n{passage}\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def measure(setup, cases, text, args, folder):
    """One row of figures per case, in the order of cases; the first is the reference."""
    prompt, base = folder / "prompt.txt", folder / "base.kld"
    prompt.write_text(make_prompt(text.read_text()))
    rows = {case.name: {"case": case.name} for case in cases}
    for case in (cases[0], Cache(args.preset)):
        say(f"{case.name}: reads the text and answers")
        print(f"\n{case.name}: {measure_answer(setup, case, prompt, N_CTX, 48)}\n", flush=True)
    for case in cases:
        say(f"{case.name}: speed")
        rows[case.name].update(measure_speed(setup, case, DEPTHS, 512, 32, args.repetitions))
    say(f"{cases[0].name}: next-token distributions of {args.chunks} x {N_CTX} tokens, to compare with")
    write_reference(setup, text, N_CTX, args.chunks, base)
    for case in cases:
        say(f"{case.name}: next-token distributions and memory")
        rows[case.name].update(measure_quality(setup, case, text, N_CTX, args.chunks, base))
    return list(rows.values())


def add_comparisons(rows):
    """What follows from a row and the reference's."""
    reference = rows[0]
    where = {"commit": commit(), "machine": machine()}
    for row in rows:
        row["bits_per_value"] = 16 * row["kv_mib"] / reference["kv_mib"]
        row["kv_saved_mib"] = reference["kv_mib"] - row["kv_mib"]
        row["rss_saved_mib"] = reference["peak_rss_mib"] - row["peak_rss_mib"]
        row.update(where)


COLUMNS = [
    ("KV cache", "case", "{}"), ("KV MiB", "kv_mib", "{:.1f}"), ("bits/value", "bits_per_value", "{:.2f}"),
    ("peak RSS MiB", "peak_rss_mib", "{:.1f}"), ("KV saved", "kv_saved_mib", "{:.1f}"),
    ("RSS saved", "rss_saved_mib", "{:.1f}"),
    *((f"{kind} t/s @{depth}", f"{kind}_d{depth}", "{:.1f}") for depth in DEPTHS for kind in ("prefill", "decode")),
    ("mean KLD", "kld_mean", "{:.6f}"), ("99.9% KLD", "kld_99_9", "{:.4f}"), ("same top-1 %", "same_top_1", "{:.2f}"),
]


def print_table(rows):
    cells = [[title for title, _, _ in COLUMNS]]
    cells += [[form.format(row[key]) if key in row else "-" for _, key, form in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    for line in cells:
        pairs = enumerate(zip(line, widths))
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in pairs))


def print_notes(rows, args):
    print(f"""
KV MiB and bits/value: the cache of {N_CTX} tokens as llama.cpp reports it, norms, sinks, ring and its bookkeeping included.
Peak RSS: of the whole process that filled it; saved: against {rows[0]['case']}. t/s @N: tokens per second of llama-bench after
N tokens. KLD and same top-1: of the next-token distribution against {rows[0]['case']}, by llama-perplexity, {args.chunks} x
{N_CTX} tokens.
Commands:""")
    for name in ("command_speed", "command_quality"):
        print("  " + rows[-1][name])


def write_files(rows, args):
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in reversed(rows) for key in row)))
            writer.writeheader()
            writer.writerows(rows)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Memory, speed and quality of KV caches on a real model.")
    parser.add_argument("--cases", default="f16,q8_0,q4_0,TQ6,TQ4,TQ3,TQ2",
                        help="the first is what others are compared with")
    parser.add_argument("--preset", default="TQ4", help="whose answer to show beside the first case's (TQ4)")
    parser.add_argument("--model", type=Path, default=DEPS / "models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--text", type=Path, default=DEPS / "text/austen.txt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--chunks", type=int, default=1, help=f"of {N_CTX} tokens, for the quality (1)")
    parser.add_argument("--repetitions", type=int, default=2, help="of each speed measurement (2)")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--csv", help="also write the figures to this file")
    return parser.parse_args()


def main():
    args = parse_arguments()
    plugin = Path(os.environ.get("TQ_PLUGIN", ROOT / "build/release/libggml-turboquant.so"))
    setup = Setup(DEPS / "llama-bin", plugin.absolute(), args.model, args.threads)
    for path in (setup.llama_bin / "llama-completion", setup.plugin, args.model, args.text):
        if not path.exists():
            sys.exit(f"report.py: {path} is missing; `make run` makes it")
    cases = [Cache(name) for name in args.cases.split(",")]
    # The logits are large: beside the build, not in a temporary folder that may be memory.
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="report-") as folder:
        try:
            rows = measure(setup, cases, args.text, args, Path(folder))
        except RuntimeError as error:
            sys.exit(f"report.py: {error}")
    add_comparisons(rows)
    say("done\n")
    print_table(rows)
    print_notes(rows, args)
    write_files(rows, args)


if __name__ == "__main__":
    main()
