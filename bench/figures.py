#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The pages' plots, from results that lie in bench/results.

    figures.py      writes docs/divergence.svg and docs/speed.svg; and docs/llama-cuda.svg where its results exist

Divergence against bits is of a novel, the longest window that bench/evidence.py has measured of each model. Speed is that of
llama-bench on two cores (bench/speed.py) and of whole models on a GPU (bench/headline.py), and of the plug-in's CUDA devices in
llama-bench (bench/llama_cuda.py), by the newest DATE-llama-cuda.csv.
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
ON_CUDA = sorted(RESULTS.glob("*-llama-cuda.csv"))
COLOURS = {"f16": "#888888", "bf16 cudnn": "#888888", "TQ4": plots.OURS, "TQ3": "#5aa02c", "sq4/sq3": plots.OURS}
STOCK_COLOURS = {"q8_0": "#d9a441", "q4_0": plots.FLOOR}


def divergence():
    rows = [row for row in read_rows(EVIDENCE) if row["text"] == "austen"]
    longest = {model: max(int(row["n_ctx"]) for row in rows if row["model"] == model) for model in dict.fromkeys(
        row["model"] for row in rows)}
    shown = [{**row, "text": f"{row['model']}, a novel", "n_ctx": int(row["n_ctx"]), **{
        key: float(row[key]) for key in ("bits_per_value", "kld_mean", "kld_mean_error")}}
        for row in rows if int(row["n_ctx"]) == longest[row["model"]] and row["bits_per_value"]]
    return plots.curves(shown)


def draw(axes, title, x_name, lines, colours=COLOURS, y_name="tokens per second of each sequence"):
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=name, color=colours[name])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_name, fontsize=8)
    axes.set_ylabel(y_name, fontsize=8)
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


def llama_cuda(path):
    """A panel for each model: decoding after so many tokens, by the devices' presets and llama.cpp's own types."""
    rows = [row for row in read_rows(path) if (row["part"], row["figure"]) == ("decode", "tokens_per_s")]
    colours = {**COLOURS, **STOCK_COLOURS}
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(6 * len(models), 4.2), squeeze=False)
    for axes, model in zip(panels[0], models):
        lines = {}
        for row in rows:
            name = row["cache"].partition("-CUDA")[0]
            # A device with options of its own keeps them in its name, which has no colour.
            if row["model"] == model and name in colours and ":" not in row["cache"]:
                lines.setdefault(name, []).append((int(row["size"]), float(row["value"])))
        machine = next(row["machine"] for row in rows if row["model"] == model).partition(", driver")[0]
        draw(axes, f"{model} in llama.cpp, {machine}", "tokens in the cache", lines, colours, "tokens per second")
    figure.tight_layout()
    return to_svg(figure)


def main():
    drawn = [("divergence", divergence), ("speed", speed)]
    if ON_CUDA:
        drawn.append(("llama-cuda", lambda: llama_cuda(ON_CUDA[-1])))
    for name, draw_it in drawn:
        path = ROOT / "docs" / f"{name}.svg"
        path.write_text(draw_it(), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
