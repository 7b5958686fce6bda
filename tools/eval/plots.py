# SPDX-License-Identifier: MIT
"""Pictures of an evaluation, as SVG text that stands in the page itself."""
import io
import math

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "tq"  # with no date, the same figures give the same bytes
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first

STOCK, OURS, FLOOR = "#888888", "#1f6fb4", "#c0392b"


def to_svg(figure):
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg"):]  # without the XML prologue, which names addresses


def draw_curve(axes, rows, label, colour, marker):
    rows = sorted(rows, key=lambda row: row["bits_per_value"])
    if not rows:
        return
    bits, kld = [row["bits_per_value"] for row in rows], [max(row["kld_mean"], 1e-5) for row in rows]
    errors = [row.get("kld_mean_error", 0) for row in rows]
    axes.errorbar(bits, kld, yerr=errors, color=colour, marker=marker, linestyle="--", linewidth=0.8, label=label)
    for row, x, y in zip(rows, bits, kld):
        axes.annotate(row["name"], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7, color=colour)


def draw_slope(axes, anchor):
    """What each bit is worth at best: squared error falls by 4^-bits, and so does the divergence that it causes."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    x0, y0 = anchor["bits_per_value"], max(anchor["kld_mean"], 1e-5)
    axes.plot([low, high], [y0 * 4 ** (x0 - low), y0 * 4 ** (x0 - high)], color="#bbbbbb", linestyle=":", linewidth=1,
              label="4^-bits")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, top)


def curve_panel(axes, rows, title):
    quantized = [row for row in rows if row["kind"] in ("stock", "ours")]
    draw_curve(axes, [row for row in quantized if row["kind"] == "stock"], "llama.cpp", STOCK, "s")
    draw_curve(axes, [row for row in quantized if row["kind"] == "ours"], "turboquant", OURS, "o")
    axes.set_yscale("log")
    for row in rows:
        if row["kind"] == "floor" and row["kld_mean"] > 1e-5:
            axes.axhline(row["kld_mean"], color=FLOOR, linewidth=0.8, label=row["name"])
    if quantized:
        draw_slope(axes, max(quantized, key=lambda row: row["kld_mean"]))
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("bits per value, all included", fontsize=8)
    axes.set_ylabel("mean KL divergence from FP16", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6)


def curves(rows):
    """A panel for each text and context."""
    panels = list(dict.fromkeys((row["text"], row["n_ctx"]) for row in rows))
    n_columns = min(2, len(panels))
    n_lines = math.ceil(len(panels) / n_columns)
    figure, axes = plt.subplots(n_lines, n_columns, figsize=(6 * n_columns, 4.2 * n_lines), squeeze=False)
    for place, panel in zip(axes.flat, panels):
        curve_panel(place, [row for row in rows if (row["text"], row["n_ctx"]) == panel], f"{panel[0]}, {panel[1]} tokens")
    for place in list(axes.flat)[len(panels):]:
        place.set_axis_off()
    figure.tight_layout()
    return to_svg(figure)


def heat_map(values, x_labels, y_labels, title, x_name, y_name, colours, low, high):
    figure, axes = plt.subplots(figsize=(1.6 + 0.42 * len(x_labels), 1.4 + 0.26 * len(y_labels)))
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(x_labels)), x_labels, fontsize=7)
    axes.set_yticks(range(len(y_labels)), y_labels, fontsize=7)
    axes.set_xlabel(x_name, fontsize=8)
    axes.set_ylabel(y_name, fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes)
    return to_svg(figure)


def needle_map(name, cells):
    single = [cell for cell in cells if cell["n_needles"] == 1]
    lengths, depths = sorted({cell["length"] for cell in single}), sorted({cell["depth"] for cell in single})
    scores = {(cell["depth"], cell["length"]): cell["score"] for cell in single}
    values = [[scores[depth, length] for length in lengths] for depth in depths]
    return heat_map(values, lengths, [f"{depth:.0%}" for depth in depths], name, "tokens", "depth", "RdYlGn", 0, 1)
