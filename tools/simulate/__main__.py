# SPDX-License-Identifier: MIT
"""Reads the report of tq cache simulate on standard input; draws it as SVG, or as a page that needs no other file."""
import argparse
import json
import sys
from pathlib import Path

try:
    import jinja2

    from eval.outputs import write_text
    from eval.plots import plt, to_svg
except ImportError as error:
    sys.exit(f"tq cache simulate: {error}. `make deps` installs what it needs; or: pip install matplotlib jinja2, and name "
             "that Python in TQ_PYTHON")

from eval.llama import LlamaError

F16 = "f16"
PANELS = [  # title, unit, key, factor, whether the scale is logarithmic from 1 on
    ("requests at once, mean", "requests", "running_mean", 1, False),
    ("output", "tokens/s", "output_tok_per_s", 1, False),
    ("wait for admission, 99 %", "seconds", "wait_p99_s", 1, True),
    ("prompt tokens found in the cache", "%", "hit_rate", 100, False),
]
COLUMNS = [  # title, key, format
    ("cache", "cache", "{}"), ("GiB", "budget_gib", "{:g}"), ("at once", "running_peak", "{:.0f}"),
    ("mean", "running_mean", "{:.1f}"), ("requests/s", "requests_per_s", "{:.2f}"), ("tokens/s", "output_tok_per_s", "{:.1f}"),
    ("wait s, median", "wait_median_s", "{:.2f}"), ("99 %", "wait_p99_s", "{:.2f}"),
    ("first token s, median", "first_token_median_s", "{:.2f}"), ("99 %", "first_token_p99_s", "{:.2f}"),
    ("hit rate", "hit_rate", "{:.1%}"), ("evicted pages", "n_evicted_pages", "{:.0f}"), ("pages used", "pages_peak", "{:.0f}"),
    ("of", "n_pages", "{:.0f}"), ("KiB/page", "page_kib", "{:.0f}"), ("exact KiB/request", "sequence_kib", "{:.0f}"),
    ("refused", "n_refused", "{:.0f}"),
]


def draw_panel(axes, rows, title, unit, key, factor, is_log):
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = sorted((row["budget_gib"], factor * row[key]) for row in rows if row["cache"] == cache)
        style = {"color": "#888888", "linestyle": "--"} if cache == F16 else {}
        axes.plot(*zip(*own), marker="o", markersize=4, linewidth=1.2, label=cache, **style)
    budgets = sorted({row["budget_gib"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets], fontsize=7)
    axes.minorticks_off()
    if is_log:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("GiB for the cache", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(linewidth=0.3)


def draw(rows):
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    for place, panel in zip(axes.flat, PANELS):
        draw_panel(place, rows, *panel)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    return to_svg(figure)


def table(rows):
    yield [title for title, _, _ in COLUMNS]
    for row in rows:
        row = {**row, "page_kib": row["page_bytes"] / 1024, "sequence_kib": row["sequence_bytes"] / 1024}
        yield [form.format(row[key]) for _, key, form in COLUMNS]


def html(report, plots):
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template("page.html")
    return page.render(report=report, table=list(table(report["rows"])), plots=plots)


def main():
    parser = argparse.ArgumentParser(prog="tq cache simulate", description=__doc__)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    report = json.load(sys.stdin)
    plots = draw(report["rows"])
    try:
        if args.plot:
            write_text(args.plot, plots)
        if args.html:
            write_text(args.html, html(report, plots))
    except LlamaError as error:
        sys.exit(f"tq: {error}")


if __name__ == "__main__":
    main()
