#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What `make run` shows: a real model answers a question about a long real text with an FP16 KV cache and with ours, then a
table of memory, speed and quality for stock caches and our presets. All figures come from stock, unpatched llama.cpp tools.

    report.py [--only answers|table] [--cases f16,TQ4,q4_0] [--preset TQ4] [--full] [--json FILE] [--csv FILE]
              [--plot FILE]

Environment: TQ_DEPS_DIR (build/deps), TQ_PLUGIN (build/release/libggml-turboquant.so).
"""
import argparse
import csv
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from measure import (ROOT, Cache, Setup, commit, machine, measure_answer, measure_quality, measure_speed, shown,
                     write_reference)

DEPS = Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build" / "deps"))
N_CTX = 4096
TEXT_CHARACTERS = 12000  # some 3100 tokens
QUESTION = "What is the name of the place that Mr. Bingley has taken?"
PRESETS = "TQ6", "TQ4", "TQ3", "TQ2"
START = time.monotonic()


@dataclass(frozen=True)
class Effort:
    """How speed is measured."""
    depth: int  # tokens in the cache before the second measurement
    n_prompt: int
    n_gen: int
    repetitions: int

    @property
    def depths(self):
        return 0, self.depth


# llama-bench fills the cache to the depth, and stock caches of quantized values take most of the table's time for that: after
# 4096 tokens q4_0 reads 37 tokens per second on 2 cores. Half the depth takes less than a third of it.
SHORT, FULL = Effort(2048, 256, 32, 1), Effort(4096, 512, 32, 2)
WEIGHTS = {"q8_0": 2.0, "q4_0": 3.5}  # what a row costs, compared with f16's or ours


def say(text):
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


def make_prompt(text):
    first = text.index("It is a truth universally acknowledged")
    passage = text[first:first + TEXT_CHARACTERS]
    return f"<|im_start|>user\n{passage}\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def time_left(seconds, weights):
    """Seconds, judged by those of the steps done so far and by the weights of all steps; None before there is one."""
    n = len(seconds)
    if n == 0:
        return None
    return sum(seconds) / sum(weights[:n]) * sum(weights[n:])


def show_time_left(seconds):
    if seconds is None or seconds <= 0:
        return ""
    if seconds < 45:
        return "less than a minute left"
    minutes = int(seconds / 60 + 0.5)
    return "about a minute left" if minutes == 1 else f"about {minutes} minutes left"


def show_answers(setup, cases, args, folder):
    prompt = folder / "prompt.txt"
    prompt.write_text(make_prompt(args.text.read_text()))
    print(f"{QUESTION} (after some 3100 tokens of {args.text.name})\n")
    for case in cases:
        say(f"{case.name}: reads the text and answers")
        print(f"\n{case.name}: {measure_answer(setup, case, prompt, N_CTX, 48)}\n", flush=True)


def measure_table(setup, cases, args, folder):
    """One row of figures per case, in the order of cases; the first is the reference. Each is printed when it is there."""
    base, effort = folder / "base.kld", args.effort
    weights = [0.5, *(WEIGHTS.get(case.name, 1.0) for case in cases)]
    seconds, rows, where = [], [], {"commit": commit(), "machine": machine()}
    say(f"{cases[0].name}: next-token distributions of {args.chunks} x {N_CTX} tokens, to compare with\n")
    print(format_table([], effort.depths), flush=True)
    for step, case in enumerate([None, *cases]):
        begin = time.monotonic()
        if case is None:
            write_reference(setup, args.text, N_CTX, args.chunks, base)
        else:
            rows.append({"case": case.name,
                         **measure_speed(setup, case, effort.depths, effort.n_prompt, effort.n_gen, effort.repetitions),
                         **measure_quality(setup, case, args.text, N_CTX, args.chunks, base)})
            add_comparisons(rows[-1], rows[0])
            rows[-1].update(where)
        seconds.append(time.monotonic() - begin)
        if case:
            line = format_table(rows[-1:], effort.depths).splitlines()[-1]
            print(f"{line}  {show_time_left(time_left(seconds, weights))}".rstrip(), flush=True)
    return rows


def add_comparisons(row, reference):
    """What follows from a row and the reference's."""
    row["bits_per_value"] = 16 * row["kv_mib"] / reference["kv_mib"]
    row["kv_saved_mib"] = reference["kv_mib"] - row["kv_mib"]
    row["rss_saved_mib"] = reference["peak_rss_mib"] - row["peak_rss_mib"]


def columns(depths):
    """(title, key, format) of each. Titles are at least as wide as usual figures, so that rows can be printed one by one."""
    return [
        ("KV cache", "case", "{}"), ("KV MiB", "kv_mib", "{:.1f}"), ("bits/value", "bits_per_value", "{:.2f}"),
        ("peak RSS MiB", "peak_rss_mib", "{:.1f}"), ("KV saved", "kv_saved_mib", "{:.1f}"),
        ("RSS saved", "rss_saved_mib", "{:.1f}"),
        *((f"{kind} t/s @{depth}", f"{kind}_d{depth}", "{:.1f}") for depth in depths for kind in ("prefill", "decode")),
        ("mean KLD", "kld_mean", "{:.6f}"), ("99.9% KLD", "kld_99_9", "{:.4f}"), ("same top-1 %", "same_top_1", "{:.2f}"),
    ]


def format_table(rows, depths):
    cells = [[title for title, _, _ in columns(depths)]]
    cells += [[form.format(row[key]) if key in row else "-" for _, key, form in columns(depths)] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        pairs = enumerate(zip(line, widths))
        lines.append("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in pairs))
    return "\n".join(lines)


def print_notes(rows, args):
    effort = args.effort
    print(f"""
KV MiB and bits/value: the cache of {N_CTX} tokens as llama.cpp reports it, norms, sinks, ring and its bookkeeping included.
Peak RSS: of the whole process that filled it; saved: against {rows[0]['case']}.
t/s @N: tokens per second of llama-bench after N tokens: {effort.n_prompt} of prefill, {effort.n_gen} of decode.
KLD and same top-1: of the next-token distribution against {rows[0]['case']}, by llama-perplexity, {args.chunks} x {N_CTX}
tokens of {args.text.name}.""")
    if not args.full:
        print(f"`scripts/report.py --only table --full` measures speed after {FULL.depth} tokens, {FULL.repetitions} times.")
    print("Commands:")
    for name in ("command_speed", "command_quality"):
        print("  " + rows[-1][name])


def print_next(setup):
    """What to type with a model of one's own; tq finds build/deps by itself, and no other place."""
    elsewhere = {} if DEPS.resolve() == (ROOT / "build/deps").resolve() else {"TQ_LLAMA_BIN": str(setup.llama_bin)}
    tq = ROOT / "build/release/tq"
    server = setup.llama_bin / "llama-server"
    print("\nWith a model of your own:")
    print("  " + shown([tq, "run", "--preset", "TQ4", "model.gguf"], elsewhere))
    print("  " + shown([tq, "eval", "model.gguf", "--text", "file.txt"], elsewhere))
    if not server.exists():
        print("  scripts/get_llama.sh    # builds llama-server too, a few minutes; then")
    print("  " + shown([server, "-m", "model.gguf", "--device", "TQ4", "-ngl", "99"], {"GGML_BACKEND_PATH": str(setup.plugin)}))


def write_files(rows, args):
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in reversed(rows) for key in row)))
            writer.writeheader()
            writer.writerows(rows)


def write_plot(rows, args):
    """Divergence against bits of all rows but the reference's."""
    sys.path.insert(0, str(ROOT / "tools"))
    from eval import plots
    shown_rows = [{**row, "name": row["case"], "kind": "ours" if row["case"] in PRESETS else "stock", "text": args.text.name,
                   "n_ctx": N_CTX} for row in rows[1:]]
    Path(args.plot).write_text(plots.curves(shown_rows))
    print(f"\nPlot of divergence against bits: {args.plot}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Memory, speed and quality of KV caches on a real model.")
    parser.add_argument("--only", choices=("answers", "table"), help="one of the two parts")
    parser.add_argument("--cases", default="f16,TQ6,TQ4,TQ3,TQ2,q8_0,q4_0",
                        help="the rows, in this order; the first is what others are compared with (%(default)s)")
    parser.add_argument("--preset", default="TQ4", help="whose answer to show after the first case's (%(default)s)")
    parser.add_argument("--model", type=Path, default=DEPS / "models/SmolLM2-135M-Instruct.Q4_1.gguf", help="a GGUF file")
    parser.add_argument("--text", type=Path, default=DEPS / "text/austen.txt", help="for the quality, and for the answers")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp (all)")
    parser.add_argument("--chunks", type=int, default=1, help=f"of {N_CTX} tokens, for the quality (%(default)s)")
    parser.add_argument("--full", action="store_true",
                        help=f"measure speed after {FULL.depth} tokens and {FULL.repetitions} times, not after {SHORT.depth} "
                             "and once; on 2 cores this takes minutes more")
    parser.add_argument("--repetitions", type=int, help=f"of each measurement of speed ({SHORT.repetitions}, --full "
                                                        f"{FULL.repetitions})")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--csv", help="also write the figures to this file")
    parser.add_argument("--plot", help="also draw divergence against bits to this file, SVG")
    args = parser.parse_args()
    args.effort = FULL if args.full else SHORT
    if args.repetitions:
        args.effort = replace(args.effort, repetitions=args.repetitions)
    return args


def run(args, setup, cases, folder):
    if args.only != "table":
        show_answers(setup, [cases[0], Cache(args.preset)], args, folder)
    if args.only != "answers":
        rows = measure_table(setup, cases, args, folder)
        print()
        say("done\n")
        print(format_table(rows, args.effort.depths))
        print_notes(rows, args)
        write_files(rows, args)
        if args.plot:
            write_plot(rows, args)
        print_next(setup)


def main():
    args = parse_arguments()
    plugin = Path(os.environ.get("TQ_PLUGIN", ROOT / "build/release/libggml-turboquant.so"))
    setup = Setup(DEPS / "llama-bin", plugin.absolute(), args.model, args.threads)
    needed = {"answers": ["llama-completion"], "table": ["llama-bench", "llama-perplexity"]}
    programs = needed[args.only] if args.only else sum(needed.values(), [])
    for path in (*(setup.llama_bin / name for name in programs), setup.plugin, args.model, args.text):
        if not path.exists():
            sys.exit(f"report.py: {path} is missing; `make run` makes it")
    cases = [Cache(name) for name in args.cases.split(",")]
    # The logits are large: beside the build, not in a temporary folder that may be memory.
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="report-") as folder:
        try:
            run(args, setup, cases, Path(folder))
        except RuntimeError as error:
            sys.exit(f"report.py: {error}")
        except KeyboardInterrupt:
            print("\nreport.py: interrupted", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
