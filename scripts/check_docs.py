#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Check that what the pages name exists: links and their anchors, files, targets of make, options of CMake, variables of the
environment, functions of the library, commands of `tq` and of the Python package.

    check_docs.py      the last line is 'N passed, M failed'
"""
import itertools
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from faults import report

ROOT = Path(__file__).resolve().parent.parent
SKIP = {".git", "build", "__pycache__", ".pytest_cache", "node_modules"}
SOURCES = {".c", ".h", ".cu", ".cuh", ".metal", ".py", ".sh", ".cmake", ".in", ".json", ".toml", ".map", ".yml"}
# What is a name of a file of ours when it stands in backticks without its folder. Others, as `report.html`, are the reader's.
OWN_SUFFIXES = {".c", ".h", ".cu", ".cuh", ".metal", ".sh", ".cmake", ".md"}
FOREIGN = {"ggml-backend-impl.h"}  # files of others that pages name
MADE_BY_MACROS = {"tq_score_sq4_avx512"}
HISTORY = {"CHANGELOG.md"}  # may name what is gone


@dataclass
class Tree:
    """The files of a checkout, and what the pages may name."""
    root: Path
    paths: set = field(default_factory=set)  # of files and folders, from the root
    words: set = field(default_factory=set)  # TQ_..., TURBOQUANT_... and tq_... in files that are not pages
    targets: set = field(default_factory=set)  # of make
    tq_commands: set = field(default_factory=set)
    tq_options: set = field(default_factory=set)
    python_commands: set = field(default_factory=set)
    mlx_commands: set = field(default_factory=set)  # of `python -m libturboquant mlx`
    suites: set = field(default_factory=set)  # of tests, whose names look like folders, up to their first blank

    @property
    def folders(self):
        return {path for path in self.paths if "/" not in path and (self.root / path).is_dir()}


def read(path):
    return path.read_text(errors="replace")


def found(pattern, path):
    return set(re.findall(pattern, read(path), re.MULTILINE)) if path.exists() else set()


def read_tree(root=ROOT):
    tree = Tree(root)
    for folder, names, file_names in os.walk(root):
        names[:] = [name for name in names if name not in SKIP]
        for name in names + file_names:
            path = Path(folder) / name
            tree.paths.add(path.relative_to(root).as_posix())
            if name in file_names and (path.suffix in SOURCES or name in ("Makefile", "CMakeLists.txt")):
                tree.words |= set(re.findall(r"\b(?:TQ|TURBOQUANT|tq)_\w+", read(path)))
                if path.is_relative_to(root / "tools"):
                    tree.tq_options |= set(re.findall(r"--[a-z][a-z0-9-]+", read(path)))
                    # A table of getopt_long's has the names without their dashes.
                    tree.tq_options |= {f"--{name}" for name in re.findall(r'\{"([a-z][a-z0-9-]+)", ', read(path))}
    tree.targets = found(r"^([a-z][a-z-]*):", root / "Makefile")
    tree.tq_commands = found(r'^ *\{"(\w+)", .*cmd_\w+\},$', root / "tools/main.c")
    # Those of a table, and those with parsers of their own.
    tree.python_commands = found(r'^    "(\w+)": \(', root / "python/libturboquant/__main__.py")
    tree.python_commands |= found(r'\.add_parser\("(\w+)"', root / "python/libturboquant/__main__.py")
    tree.mlx_commands = found(r'^    "(\w+)": "', root / "python/libturboquant/commands/mlx.py")
    tree.suites = found(r'"([a-z-]+/[\w-]+)', root / "tests/suites.py")
    tree.suites |= {f"python/{name}" for name in found(r'"(\w+)"', root / "tests/suites.py")}
    return tree


def pages(root=ROOT):
    """All pages, and what else names files and commands for people and for CI."""
    return sorted([*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / ".github").rglob("*.md"),
                   *(root / ".github").rglob("*.yml")])


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def without_blocks(text):
    """A page without its fenced code blocks: their lines are empty, so that the numbers of lines stay."""
    def blank(match):
        return "\n" * match.group(0).count("\n")
    return re.sub(r"^( *)```.*?^\1```", blank, text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    names = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    seen = {}
    for heading in re.findall(r"^#+ +(.*?) *#*$", without_blocks(text), re.MULTILINE):
        name = slug(heading)
        n = seen.get(name, 0)
        seen[name] = n + 1
        names.add(f"{name}-{n}" if n else name)
    return names


def lines_of(text, pattern):
    """(line, match) of each match in the text."""
    for match in re.finditer(pattern, text, re.MULTILINE):
        yield text.count("\n", 0, match.start()) + 1, match


def code_of(text):
    """(line, code) of each piece between backticks, and of each line of a code block."""
    for line, match in lines_of(without_blocks(text), r"(?<!`)`([^`]+)`(?!`)"):
        yield line, match.group(1).replace("\n", " ")
    is_fenced = False
    for line, content in enumerate(text.split("\n"), 1):
        if content.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or content.startswith("    "):
            yield line, re.sub(r"^(?:- )?run: ", "", content.strip())  # as a step of CI


def fault_links(tree, page, text):
    plain = re.sub(r"`[^`\n]*`", "``", without_blocks(text))
    for line, match in lines_of(plain, r"\]\(<?([^)\s>]+)>?\)|(?:src|href)=\"([^\"]+)\""):
        target = match.group(1) or match.group(2)
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            yield line, f"the link {target} leads nowhere"
        elif anchor and path.suffix == ".md" and anchor not in anchors(read(path)):
            yield line, f"{path.name} has no heading for the link {target}"


def expand(name):
    """The names that a pattern with braces stands for."""
    match = re.search(r"\{([^{}]*)\}", name)
    if not match:
        return [name]
    return list(itertools.chain(*(expand(name[:match.start()] + part + name[match.end():]) for part in match[1].split(","))))


def exists(tree, page, name):
    name = name.rstrip("/")
    if "*" in name:
        return any(tree.root.glob(name))
    return name in tree.paths or name in tree.suites or (page.parent / name).exists()


def fault_files(tree, page, text):
    folders = "|".join(re.escape(folder) for folder in sorted(tree.folders))
    text = re.sub(r"https?://\S+", "", text)
    if folders:
        for line, match in lines_of(text, rf"(?<![\w/.$}}~*-])(?:{folders})/[\w.*/{{}},+-]*"):
            name = match.group(0).rstrip(".,-+")
            if text[match.end():match.end() + 1] == "<":  # tests/golden/codec_<name>.txt
                name += "*"
            for each in expand(name):
                if "DATE" not in each and not exists(tree, page, each):
                    yield line, f"{each} does not exist"
    names = {path.rpartition("/")[2] for path in tree.paths}
    for line, code in code_of(text):
        if re.fullmatch(r"[\w./-]+", code) and Path(code).suffix in OWN_SUFFIXES and code.split("/")[0] not in tree.folders:
            is_known = code in names | FOREIGN or any(path.endswith("/" + code) for path in tree.paths)
            if not is_known and not exists(tree, page, code):
                yield line, f"{code} does not exist"


def fault_index(tree, page, text):
    """docs/README.md leads to every page."""
    if page != tree.root / "docs/README.md":
        return
    for other in sorted((tree.root / "docs").glob("*.md")):
        if other != page and f"]({other.name}" not in text:
            yield 1, f"no link leads to {other.name}"


def fault_actions(tree, page, text):
    """Steps of CI that others wrote are pinned: by a commit, or by a major version of a well-known one."""
    for line, match in lines_of(text, r"^\s*- uses: (\S+)"):
        if page.suffix == ".yml" and not re.search(r"@(?:v\d+|[0-9a-f]{40}|release/v\d+)$", match.group(1)):
            yield line, f"{match.group(1)} is not pinned"


def fault_make_targets(tree, page, text):
    for line, code in code_of(text):
        for target in re.findall(r"(?:^(?:\$ )?|&& )make ((?:[a-z][a-z-]*\b ?)+)", code):
            for name in target.split():
                if name not in tree.targets:
                    yield line, f"make {name}: the Makefile has no such target"


def fault_words(tree, page, text):
    """Names that only the sources can give a meaning."""
    if page.name in HISTORY:
        return
    for line, match in lines_of(text, r"(?<![\w/])(-D)?((?:TQ|TURBOQUANT|tq)_\w+)(\*)?"):
        word, is_prefix = match.group(2), match.group(3) or match.group(2).endswith("_")
        is_known = any(known.startswith(word) for known in tree.words) if is_prefix else word in tree.words | MADE_BY_MACROS
        if not is_known:
            yield line, f"{word} does not occur in the sources"


def fault_commands(tree, page, text):
    if page.name in HISTORY:
        return
    for line, code in code_of(text):
        match = re.match(r"(?:\$ )?(?:build/release/)?tq ([a-z]+)(.*)", code)
        if match and match.group(1) not in tree.tq_commands:
            yield line, f"tq {match.group(1)}: tq has no such command"
        elif match and match.group(1) != "run":  # which passes options on to a tool
            for option in re.findall(r"(?<=[ \[|])--[a-z][a-z0-9-]+", match.group(2)):
                if option not in tree.tq_options:
                    yield line, f"tq {match.group(1)} {option}: tools/ has no such option"
        match = re.search(r"python3? -m libturboquant ([a-z]+)", code)
        if match and match.group(1) not in tree.python_commands:
            yield line, f"python -m libturboquant {match.group(1)}: it has no such command"
        match = re.search(r"python3? -m libturboquant mlx ([a-z_]+)", code)
        if match and match.group(1) not in tree.mlx_commands:
            yield line, f"python -m libturboquant mlx {match.group(1)}: it has no such command"


def fault_package(tree, page, text):
    """The Python package has one name, and the modules that are imported from it."""
    if page.name in HISTORY:
        return
    for line, code in code_of(text):
        for match in re.finditer(r"(?:\bpython3? -m |\bfrom |\bimport )((?:lib)?turboquant)\b((?:\.\w+)*)", code):
            path = "python/" + "/".join([match[1], *match[2].split(".")[1:]])
            if match[1] != "libturboquant":
                yield line, f"{match[0]}: the package is called libturboquant"
            elif not {path, path + ".py"} & tree.paths:
                yield line, f"{match[0]}: the package has no such module"


RULES = [fault_links, fault_files, fault_index, fault_actions, fault_make_targets, fault_words, fault_commands, fault_package]


def check(root=ROOT):
    """The faults of each rule, as text."""
    tree = read_tree(root)
    faults = {rule.__name__.removeprefix("fault_"): [] for rule in RULES}
    for page in pages(root):
        text = read(page)
        for rule in RULES:
            for line, message in rule(tree, page, text):
                faults[rule.__name__.removeprefix("fault_")].append(f"{page.relative_to(root)}:{line}: {message}")
    return faults


if __name__ == "__main__":
    sys.exit(report(check()))
