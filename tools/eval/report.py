# SPDX-License-Identifier: MIT
"""An evaluation as JSON, CSV, Markdown and a page that needs no other file."""
import csv
import io
import json
from pathlib import Path

import jinja2

from . import plots
from .needle import shares
from .outputs import write_text

COLUMNS = [  # title, key, format, whether an error stands beside it
    ("bits/value", "bits_per_value", "{:.2f}"), ("mean KLD", "kld_mean", "{:.5f}"), ("median", "kld_median", "{:.5f}"),
    ("99 %", "kld_99", "{:.4f}"), ("99.9 %", "kld_99_9", "{:.4f}"), ("same top-1 %", "same_top_1", "{:.2f}"),
    ("RMS Δp %", "dp_rms", "{:.3f}"), ("PPL ratio", "ppl_ratio", "{:.4f}"),
]


def cell(row, key, form):
    if row.get(key) is None:
        return "-"
    text = form.format(row[key])
    error = row.get(f"{key}_error")
    return f"{text} ± {form.format(error)}" if error is not None else text


def tables(rows):
    """One table for each text and context: (title, lines of cells)."""
    for panel in dict.fromkeys((row["text"], row["n_ctx"]) for row in rows):
        own = [row for row in rows if (row["text"], row["n_ctx"]) == panel]
        lines = [[row["name"], *(cell(row, key, form) for _, key, form in COLUMNS)] for row in own]
        yield f"{panel[0]}, {own[0]['n_chunks']} x {panel[1]} tokens", [["cache", *(title for title, _, _ in COLUMNS)], *lines]


def needle_table(needles):
    """Lines of cells: what each cache found of all single needles, of those that FP16 finds, and of several at once."""
    reference = needles[0]["cells"]
    yield ["cache", "single needles found", "of those that FP16 finds", "several at once"]
    for row in needles:
        found, known = shares(row["cells"], reference)
        several = [cell["score"] for cell in row["cells"] if cell["n_needles"] > 1]
        yield [row["name"], f"{found:.0%}", "-" if known is None else f"{known:.0%}", f"{sum(several) / len(several):.0%}"]


def markdown_table(lines):
    head, *rest = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rest]) + "\n"


def markdown(result):
    parts = [f"### {title}\n\n{markdown_table(lines)}" for title, lines in tables(result["rows"])]
    if result["needle"]:
        parts.append("### Needles\n\n" + markdown_table(list(needle_table(result["needle"]))))
    return "\n".join([*parts, f"`{result['command']}`, {result['machine']}, {result['llama_cpp']}\n"])


def html(result):
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template("page.html")
    needles = result["needle"]
    return page.render(result=result, tables=list(tables(result["rows"])),
                       needle_table=list(needle_table(needles)) if needles else [],
                       curves=plots.curves(result["rows"]) if result["rows"] else "",
                       needle_maps=[plots.needle_map(row["name"], row["cells"]) for row in needles])


def csv_text(result):
    common = {**{key: result[key] for key in ("command", "commit", "llama_cpp")}, "model": result["model"]["file"]}
    rows = [{**{key: value for key, value in row.items() if key != "notes"}, "run": row["command"], **common}
            for row in result["rows"]]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_files(args, result):
    made = {"json": lambda: json.dumps(result, indent=1) + "\n", "csv": lambda: csv_text(result),
            "markdown": lambda: markdown(result), "html": lambda: html(result)}
    for kind, make in made.items():
        if getattr(args, kind):
            write_text(getattr(args, kind), make())
