#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The README's two plots, from results that lie in bench/results.

    figures.py      writes docs/divergence.svg and docs/speed.svg

Divergence against bits is of a novel, the longest window that bench/evidence.py has measured of each model. Speed is that of
llama-bench on two cores (bench/speed.py) and of whole models on a GPU (bench/headline.py).
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from eval import plots  # noqa: E402
from eval.plots import plt, to_svg  # noqa: E402

from rows import read_rows  # noqa: E402

RESULTS = ROOT / "bench/results"
EVIDENCE = RESULTS / "2026-12-01-evidence.csv"
ON_CPU = RESULTS / "2026-11-24-llama-bench-depths.csv"
ON_GPU = RESULTS / "2026-11-30-headline-one-cache-h200.csv"
COLOURS = {"f16": "#888888", "bf16 cudnn": "#888888", "TQ4": plots.OURS, "TQ3": "#5aa02c", "sq4/sq3": plots.OURS}


def divergence():
    rows = [row for row in read_rows(EVIDENCE) if row["text"] == "austen"]
    longest = {model: max(int(row["n_ctx"]) for row in rows if row["model"] == model) for model in dict.fromkeys(
        row["model"] for row in rows)}
    shown = [{**row, "text": f"{row['model']}, a novel", "n_ctx": int(row["n_ctx"]), **{
        key: float(row[key]) for key in ("bits_per_value", "kld_mean", "kld_mean_error")}}
        for row in rows if int(row["n_ctx"]) == longest[row["model"]] and row["bits_per_value"]]
    return plots.curves(shown)


def draw(axes, title, x_name, lines):
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=name, color=COLOURS[name])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_name, fontsize=8)
    axes.set_ylabel("tokens per second of each sequence", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def speed():
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    on_cpu = [row for row in read_rows(ON_CPU) if row["test"] == "decode" and row["config"] in COLOURS]
    draw(left, "SmolLM2-135M in llama.cpp, 2 cores with AVX-512", "tokens in the cache", {
        name: [(int(row["depth"]), float(row["tokens_per_s"])) for row in on_cpu if row["config"] == name]
        for name in dict.fromkeys(row["config"] for row in on_cpu)})
    on_gpu = [row for row in read_rows(ON_GPU) if row["model"] == "Qwen2.5-7B" and row["what"] == "decode"
              and row["cache"] in COLOURS]
    draw(right, "Qwen2.5-7B's shape, an H200: 1, 8, 16 sequences of 32768",
         "tokens in the cache, all sequences", {
             name: [(int(row["batch"]) * int(row["context"]), float(row["tokens_per_s"]) / int(row["batch"]))
                    for row in on_gpu if row["cache"] == name] for name in dict.fromkeys(row["cache"] for row in on_gpu)})
    figure.tight_layout()
    return to_svg(figure)


def main():
    for name, draw_it in (("divergence", divergence), ("speed", speed)):
        path = ROOT / "docs" / f"{name}.svg"
        path.write_text(draw_it(), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
