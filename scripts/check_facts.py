#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Check facts that several pages tell against the one source of each, and tables that stand in two pages against each other.

    check_facts.py      the last line is 'N passed, M failed'

A rule takes a page's text and the facts, and gives (line, message). What only the built `tq` knows, the presets' bits, is
compared in tests/api/test_docs.py.
"""
import csv
import re
import sys
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import check_docs
from check_docs import HISTORY, lines_of, read
from faults import report

ROOT = Path(__file__).resolve().parent.parent
# Texts of the measurement that README.md and docs/quality.md quote.
TEXTS = {"novel": "austen", "manual": "pydoc", "C code": "csource"}
# Figures that several pages tell in a sentence: what stands in brackets is the same in all of them.
SAYINGS = {
    "what a calibration takes off": r"(\d+\s+to\s+\d+)\s+%\s+off\s+what",
    "decoding after 4096 tokens": r"(\d\.\d)\s+times\s+as\s+fast\s+as\s+(?:with\s+)?f16\s+after\s+4096",
    "families of models": r"\b(\d+)\s+families",
}
MEASURED = {"cache", "preset", "format", "engine", "model"}  # what rows are of in tables of figures
RESULTS = re.compile(r"bench/results/[\w.-]+\.csv")


@dataclass
class Facts:
    head_dims: list
    presets: dict  # of name: (keys, values, sinks, recent)
    version: str
    ggml: list  # what the plug-in is made for, from the first to the last, as "0.25"
    pins: dict  # of package: versions in the tests' environments
    tested: dict  # of what pages call a host: its tested versions, as "5.24"
    python: str
    n_models: int
    divergence: dict  # of a file of results: {(cache, text): ".0045"}
    tables: dict = field(default_factory=dict)  # of (header, first cell): (row, page)
    sayings: dict = field(default_factory=dict)  # of the name: (figure, page)


def short(value):
    """As pages write a fraction: .0045"""
    return str(Decimal(value).quantize(Decimal("1e-4"), ROUND_HALF_UP)).removeprefix("0")


def read_facts(root=ROOT):
    presets = re.findall(r'^    \{"(TQ\d)", "keys (\w+), values (\w+); first (\d+) and last (\d+) tokens exact"',
                         read(root / "src/api/presets.c"), re.MULTILINE)
    head_dims = re.search(r"head_dims\[\] = \{([\d, ]+)\}", read(root / "src/codec/rotation.c")).group(1)
    version = re.findall(r"^#define TQ_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", read(root / "include/turboquant.h"), re.MULTILINE)
    doctor = read(root / "python/libturboquant/commands/doctor.py")
    hosts = {name: re.findall(r'"([\d.]+)"', versions)
             for name, versions in re.findall(r'^    "(\w+)": \(\([^)]*\), \(([^)]*)\)\),', doctor, re.MULTILINE)}
    names = {"Transformers": "transformers", "PyTorch": "torch", "MLX": "mlx", "MLX-LM": "mlx_lm", "vLLM": "vllm"}
    llama = read(root / "scripts/get_llama.sh")
    pins = {"llama-cpp-python": {re.search(r"^version=(.*)$", llama, re.MULTILINE).group(1)}}
    for path in (root / "python/tests").glob("requirements*.in"):
        for name, version_of in re.findall(r"^([\w.-]+)==([\w.]+)", read(path), re.MULTILINE):
            pins.setdefault(name.replace("_", "-"), set()).add(version_of)
    models = read(root / "docs/models.md").split("<!-- begin: written by tests -->")[1].split("\n## ")[0]
    return Facts(
        head_dims=[int(n) for n in head_dims.split(",")],
        presets={name: (k, v, int(sinks), int(recent)) for name, k, v, sinks, recent in presets},
        version=".".join(version),
        ggml=ggml_of(read(root / "plugins/ggml/entry.c")),
        pins=pins,
        tested={name: hosts[module] for name, module in names.items()},
        python=re.search(r'^requires-python = ">=([\d.]+)"', read(root / "pyproject.toml"), re.MULTILINE).group(1),
        n_models=len(re.findall(r"^\| \w", models, re.MULTILINE)),
        divergence={path.relative_to(root).as_posix(): divergence_of(path) for path in root.glob("bench/results/*.csv")},
    )


def ggml_of(entry):
    major, first, last = (int(re.search(rf"^#define GGML_{name} (\d+)$", entry, re.MULTILINE).group(1))
                          for name in ("MAJOR", "MINOR_MIN", "MINOR_MAX"))
    return [f"{major}.{minor}" for minor in range(first, last + 1)]


def divergence_of(path):
    """{(cache, text): mean divergence} of a file of results, where it has these and one figure for each."""
    with open(path) as file:
        rows = [row for row in csv.DictReader(file) if {"name", "text", "kld_mean"} <= row.keys() and row["kld_mean"]]
    found = {}
    for row in rows:
        found.setdefault((row["name"], row["text"]), set()).add(short(row["kld_mean"]))
    return {key: figures.pop() for key, figures in found.items() if len(figures) == 1}


def cells_of(line):
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def tables_of(text):
    """(header, [(line, cells)]) of each table."""
    header, rows = None, []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.startswith("|"):
            if header:
                yield header, rows
            header, rows = None, []
        elif header is None:
            header = cells_of(line)
        elif not re.fullmatch(r"[| :-]+", line):
            rows.append((i, cells_of(line)))
    if header:
        yield header, rows


def fault_head_dims(facts, page, text):
    for line, match in lines_of(text, r"\b\d+(?:,\s\d+){7,}(?:\s(?:and|or)\s\d+)?"):
        numbers = [int(n) for n in re.findall(r"\d+", match.group(0))]
        if numbers[0] == facts.head_dims[0] and numbers != facts.head_dims:
            yield line, f"head_dims are {', '.join(map(str, facts.head_dims))} (src/codec/rotation.c)"


def fault_presets(facts, page, text):
    told = r"\b(TQ\d)\b[^.|\n]{0,60}?keys (\w+), values (\w+)(?:[,;] first (\d+) and last (\d+))?"
    for line, match in lines_of(text, told):
        preset = facts.presets.get(match.group(1))
        given = [*match.groups()[1:3], *(int(n) for n in match.groups()[3:] if n)]
        if preset and list(preset[:len(given)]) != given:
            yield line, f"{match.group(1)} is {preset} (src/api/presets.c)"
    for header, rows in tables_of(text):
        if "keys, values" not in header or "exact tokens" not in header:
            continue
        for line, cells in rows:
            k, v, sinks, recent = facts.presets.get(cells[0], (None,) * 4)
            told = cells[header.index("keys, values")], cells[header.index("exact tokens")]
            if told != (f"{k}, {v}", f"first {sinks}, last {recent}"):
                yield line, f"{cells[0]} is {facts.presets.get(cells[0])} (src/api/presets.c)"


def fault_hosts(facts, page, text):
    """Tested versions. Pages about speed and quality also name what was compared with; history names what was."""
    if page.name in HISTORY:
        return
    for line, match in lines_of(text, r"\bggml (\d+\.\d+)(?: to (\d+\.\d+))?"):
        first, last = match.groups()
        if first not in facts.ggml or last and [first, last] != [facts.ggml[0], facts.ggml[-1]]:
            yield line, f"the plug-in is made for ggml {facts.ggml[0]} to {facts.ggml[-1]} (plugins/ggml/entry.c)"
    for header, rows in tables_of(text):
        for line, cells in rows if "version" in header else ():
            for name, version in zip(cells[0].split(", "), cells[header.index("version")].split(", ")):
                pins = facts.pins.get(name)
                if pins and version[:1].isdigit() and version.split(" ")[0] not in pins:
                    yield line, f"{name} is pinned at {' and '.join(sorted(pins))} (python/tests, scripts/get_llama.sh)"
    if page.name in ("README.md", "python.md", "faq.md"):
        for line, match in lines_of(text, r"\b(Transformers|PyTorch|MLX-LM|MLX|vLLM) (\d+\.\d+)"):
            name, version = match.groups()
            if version not in facts.tested[name]:
                yield line, f"{name} {' and '.join(facts.tested[name])}: tested (python/libturboquant/commands/doctor.py)"


def fault_python(facts, page, text):
    for line, match in lines_of(text, r"Python (3\.\d+) or\s+newer"):
        if match.group(1) != facts.python:
            yield line, f"the package needs Python {facts.python} (pyproject.toml)"


def fault_models(facts, page, text):
    for line, match in lines_of(text, r"\b(\d+) families"):
        if int(match.group(1)) != facts.n_models:
            yield line, f"docs/models.md has {facts.n_models} families"


def fault_version(facts, page, text):
    if page.name == "CHANGELOG.md":
        first = re.search(r"^## (?:\[)?([\w.]+)", text, re.MULTILINE)
        if first and first.group(1) not in (facts.version, "Unreleased"):
            yield 1, f"the header's version is {facts.version}"


def fault_citation(facts, page, text):
    """CITATION.cff is not a page, but also has the version; it is looked at once."""
    if page.name != "CHANGELOG.md" or not (ROOT / "CITATION.cff").exists():
        return
    version = re.search(r"^version: (.*)$", read(ROOT / "CITATION.cff"), re.MULTILINE).group(1)
    if version != facts.version:
        yield 1, f"CITATION.cff has version {version}, the header {facts.version}"


def fault_divergence(facts, page, text):
    """A table of caches and texts has the figures of the results that are named last before it."""
    lines = text.split("\n")
    for header, rows in tables_of(text):
        names = [TEXTS.get(name, name) for name in header]
        if header[0] != "cache" or not set(TEXTS.values()) <= set(names) or not rows:
            continue
        named = RESULTS.findall("\n".join(lines[:rows[0][0]]))
        if not named or named[-1] not in facts.divergence:
            yield rows[0][0], "a table of caches and texts names no file of results before it"
            continue
        for line, cells in rows:
            for name, cell in zip(names[1:], cells[1:]):
                expected = facts.divergence[named[-1]].get((cells[0], name))
                if expected and cell != expected:
                    yield line, f"{cells[0]}, {name}: {cell} here, {expected} in {named[-1]}"


def fault_tables(facts, page, text):
    """A row in two tables with the same header is the same."""
    for header, rows in tables_of(text):
        if header[0] not in MEASURED:
            continue
        for line, cells in rows:
            key = (tuple(header), cells[0])
            other, where = facts.tables.setdefault(key, (cells, page.name))
            if other != cells and where != page.name:
                yield line, f"{where} tells the row {cells[0]!r} differently"


def fault_sayings(facts, page, text):
    """A figure in a sentence is the same in all pages."""
    for name, pattern in SAYINGS.items():
        for line, match in lines_of(text, pattern):
            figure = " ".join(match.group(1).split())
            other, where = facts.sayings.setdefault(name, (figure, page.name))
            if other != figure:
                yield line, f"{name}: {figure} here, {other} in {where}"


RULES = [fault_head_dims, fault_presets, fault_hosts, fault_python, fault_models, fault_version, fault_citation,
         fault_divergence, fault_tables, fault_sayings]


def check(root=ROOT):
    facts = read_facts(root)
    faults = {rule.__name__.removeprefix("fault_"): [] for rule in RULES}
    for page in check_docs.pages(root):
        text = read(page)
        for rule in RULES:
            for line, message in rule(facts, page, text):
                faults[rule.__name__.removeprefix("fault_")].append(f"{page.relative_to(root)}:{line}: {message}")
    return faults


if __name__ == "__main__":
    sys.exit(report(check()))
