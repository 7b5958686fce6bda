#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""`make evidence`: presets and llama.cpp's own types on real models and texts, by `tq eval`: CSV, tables and a plot.

    evidence.py [--quick] [--csv OUT.csv] [--models NAME[,NAME...]] [--caches NAME[,NAME...]] [--threads N]

Two models, three kinds of text, windows of 4096 and 8192 tokens, one of 32768, and needles. --quick takes minutes: one text,
one short window, few types. Rows are written as soon as their window is measured, and those that OUT.csv has are not measured
again: the same command goes on where it was stopped. Rows do not know which code is new: name another file after a change.

OUT.csv is bench/results/DATE-evidence.csv (DATE-evidence-quick.csv), and the plot lies next to it as .svg. Results of a window
that is not complete wait in build/OUT.csv.work. It needs what `make all deps` makes, and scripts/get_qwen.py.
"""
import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "scripts")]
from cache import deps_folder, sha256_of  # noqa: E402
from eval import needle, report  # noqa: E402

from rows import append_rows, read_rows  # noqa: E402

MODELS = {"smollm2-135m": ("SmolLM2-135M-Instruct.Q4_1.gguf", 8192),
          "qwen2.5-0.5b": ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", 32768)}  # with the context that each was made for
TEXTS = "austen", "pydoc", "csource"
PRESETS = "TQ6,TQ4,TQ3,TQ2"
# Attention over stock types is up to ten times slower than over f16 and presets, so long windows have fewer.
STOCK = {4096: "q8_0,q5_1,q5_0,q4_0,q8_0/q4_0", 8192: "q8_0,q4_0,q8_0/q4_0", 32768: "q8_0"}
NEEDLES = "needles"  # in the place of a text
FIGURES = ["bits_per_value", "kld_mean", "kld_mean_error", "kld_median", "kld_99", "kld_99_9", "same_top_1", "same_top_1_error",
           "ppl_ratio", "kv_mib"]
COLUMNS = ["model", "text", "n_ctx", "n_chunks", "name", "kind", *FIGURES, "needles_found", "needles_found_of_f16", "seconds",
           "command", "machine", "commit", "llama_cpp", "model_sha256"]
TABLE = ["bits_per_value", "kld_mean", "kld_99_9", "same_top_1"]


@dataclass(frozen=True)
class Step:
    """One `tq eval`: a window of a text with some caches, or needles."""
    model: str
    text: str
    n_ctx: int
    stock: str
    n_depth: int = 5

    @property
    def names(self):
        return ["f16", "f16 -fa off", *self.stock.split(","), *PRESETS.split(",")]

    @property
    def work(self):
        """In proportion to the time that it takes, roughly: attention counts as the rest of a model does at 4096 tokens."""
        n_tok = self.n_ctx * (self.n_depth + 1 if self.text == NEEDLES else 1)
        return n_tok * (1 + self.n_ctx / 4096) * len(self.names)

    def words(self, models, texts, names):
        """Of tq eval."""
        stock = ",".join(name for name in names if name in self.stock.split(",")) or "f16"
        presets = ",".join(name for name in names if name in PRESETS.split(",")) or PRESETS
        text = texts / f"{TEXTS[0] if self.text == NEEDLES else self.text}.txt"
        more = ["--context", self.n_ctx]
        if self.text == NEEDLES:
            more = ["--context", "", "--needle", self.n_ctx, "--needle-depths", self.n_depth]
        return [models / MODELS[self.model][0], "--text", text, *more, "--baselines", stock, "--presets", presets]


def steps(quick, models):
    if quick:
        found = [Step(model, TEXTS[0], 1024, "q8_0,q4_0") for model in models]
        return [*found, *(Step(model, NEEDLES, 1024, "q4_0", 2) for model in models[:1])]
    found = [Step(model, text, n_ctx, STOCK[n_ctx]) for n_ctx in (4096, 8192) for model in models for text in TEXTS]
    found += [Step(model, NEEDLES, 4096, "q4_0") for model in models]
    return found + [Step(model, TEXTS[0], 32768, STOCK[32768]) for model in models if MODELS[model][1] >= 32768]


def missing(step, rows):
    known = {row["name"] for row in rows if (row["model"], row["text"], int(row["n_ctx"])) == (
        step.model, step.text, step.n_ctx)}
    return [name for name in step.names if name not in known]


def relative(path):
    """As a command is shown: below the checkout where it is."""
    path = Path(os.path.abspath(path))
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def measure(step, names, args):
    """The rows of one step, as tq eval says them."""
    deps, out = relative(deps_folder()), args.work / "step.json"
    out.unlink(missing_ok=True)
    words = [*step.words(deps / "models", deps / "text", names), *(["--threads", args.threads] if args.threads else [])]
    environment = {"TQ_PYTHON": sys.executable, "TQ_LLAMA_BIN": str(deps_folder() / "llama-bin"), **os.environ}
    done = subprocess.run([ROOT / "build/release/tq", "eval", *map(str, words), "--json", str(out), "--work",
                           str(args.work / "results")], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if not out.exists():
        raise RuntimeError(f"tq eval ended with {done.returncode}, as it says above")
    result = json.loads(out.read_text(encoding="utf-8"))
    common = {"model": step.model, "text": step.text, "n_ctx": step.n_ctx, "n_chunks": 1, "machine": result["machine"],
              "commit": result["commit"], "llama_cpp": result["llama_cpp"], "model_sha256": args.hashes[step.model],
              "command": f"tq eval {shlex.join(map(str, words))}"}
    if step.text == NEEDLES:
        found = [{"name": row["name"], "kind": NEEDLES, **shares_of(row, result["needle"][0])} for row in result["needle"]]
    else:
        found = result["rows"]
    return [{**row, **common} for row in found if row["name"] in names]


def shares_of(row, reference):
    found, known = needle.shares(row["cells"], reference["cells"])
    return {"needles_found": found, "needles_found_of_f16": known}


def time_left(done, left):
    """done: (work, seconds) of each step so far."""
    if not done:
        return "how long it takes is not known yet"
    rate = sum(seconds for _, seconds in done) / sum(work for work, _ in done)
    return f"some {left * rate / 60:.0f} minutes left"


def tables(rows):
    """One table for each model, text and window."""
    for panel in dict.fromkeys((row["model"], row["text"], row["n_ctx"]) for row in rows):
        own = [row for row in rows if (row["model"], row["text"], row["n_ctx"]) == panel]
        if panel[1] == NEEDLES:
            lines = [["cache", "needles found", "of those that FP16 finds"]]
            lines += [[row["name"], *(f"{float(row[key]):.0%}" if row[key] else "-" for key in (
                "needles_found", "needles_found_of_f16"))] for row in own]
        else:
            columns = [column for column in report.COLUMNS if column[1] in TABLE]
            lines = [["cache", *(title for title, _, _ in columns)]]
            lines += [[row["name"], *(report.cell(row, key, form) for _, key, form in columns)] for row in map(numbers, own)]
        yield f"### {panel[0]}, {panel[1]}, {panel[2]} tokens\n\n{report.markdown_table(lines)}"


def numbers(row):
    """A row of the CSV with its figures as numbers."""
    return {**row, **{key: float(row[key]) if row[key] else None for key in FIGURES}}


def plot(rows):
    from eval import plots
    shown = [numbers(row) for row in rows if row["text"] != NEEDLES]
    return plots.curves([{**row, "text": f"{row['model']}, {row['text']}", "n_ctx": int(row["n_ctx"])} for row in shown])


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a run of minutes")
    parser.add_argument("--csv", type=Path, metavar="OUT.csv", help="(bench/results/DATE-evidence.csv)")
    parser.add_argument("--models", default=",".join(MODELS), help="(%(default)s)")
    parser.add_argument("--caches", metavar="NAME[,NAME...]", help="only these, as q8_0,TQ4; without it later, the rest (all)")
    parser.add_argument("--threads", type=int, metavar="N", help="(all)")
    args = parser.parse_args()
    args.models = args.models.split(",")
    args.caches = args.caches and args.caches.split(",")
    for name in args.models:
        if name not in MODELS:
            parser.error(f"there is no model '{name}'; there are {', '.join(MODELS)}")
    if args.csv is None:
        date = datetime.date.today().isoformat()
        args.csv = ROOT / "bench/results" / f"{date}-evidence{'-quick' if args.quick else ''}.csv"
    args.csv = args.csv.absolute()
    args.work = ROOT / "build" / f"{args.csv.name}.work"
    args.work.mkdir(parents=True, exist_ok=True)
    needed = {ROOT / "build/release/tq": "make all", **{deps_folder() / "text" / f"{text}.txt": "make deps" for text in TEXTS},
              **{deps_folder() / "models" / MODELS[name][0]: "make deps, then scripts/get_qwen.py" for name in args.models}}
    for path, remedy in needed.items():
        if not path.exists():
            parser.error(f"{path} does not exist: run {remedy}, or `make evidence`")
    args.hashes = {name: sha256_of(deps_folder() / "models" / MODELS[name][0])[:12] for name in args.models}
    return args


def main():
    args = parse()
    todo, done, failed = [], [], False
    every = steps(args.quick, args.models)
    for step in every:
        names = [name for name in missing(step, read_rows(args.csv)) if args.caches is None or name in args.caches]
        if names:
            todo.append((step, names))
    print(f"evidence.py: {len(todo)} of {len(every)} windows to measure, to {relative(args.csv)}", file=sys.stderr)
    for i, (step, names) in enumerate(todo):
        left = time_left(done, sum(other.work for other, _ in todo[i:]))
        print(f"evidence.py: {i + 1} of {len(todo)}: {step.model}, {step.text}, {step.n_ctx} tokens, {len(names)} caches; "
              f"{left}", file=sys.stderr)
        begin = time.monotonic()
        try:
            rows = measure(step, names, args)
        except KeyboardInterrupt:
            print("evidence.py: stopped; the same command goes on from there", file=sys.stderr)
            return 130
        except RuntimeError as error:
            print(f"evidence.py: {step.model}, {step.text}, {step.n_ctx} tokens: {error}", file=sys.stderr)
            failed = True
            continue
        append_rows(args.csv, COLUMNS, [{name: row[name] for name in COLUMNS if name in row} for row in rows])
        done.append((step.work, time.monotonic() - begin))
        failed |= len(rows) < len(names)
    rows = read_rows(args.csv)
    print("\n".join(tables(rows)))
    if any(row["text"] != NEEDLES for row in rows):
        args.csv.with_suffix(".svg").write_text(plot(rows), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
