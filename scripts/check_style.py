#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Check what all files have in common: licence line, no tabs, no trailing blanks, bounded lines and files, no paths of
somebody's machine, no more words that CONTRIBUTING.md asks to avoid than there were, and clang-format's opinion of the C files
(version 14; others differ in details and are not asked).

    check_style.py          the last line is 'N passed, M failed'
    check_style.py --fix    run clang-format on the C files, lower the counts of words
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import words
from faults import report

ROOT = Path(__file__).resolve().parent.parent
SKIP = {".git", "build", "__pycache__", ".venv", ".pytest_cache", "node_modules"}
CODE = {".c", ".h", ".cu", ".cuh", ".m", ".metal", ".py", ".sh", ".cmake"}
NAMED = {"Makefile", "CMakeLists.txt", "run"}
TEXT = CODE | {".md", ".json", ".map", ".in", ".txt", ".toml", ".yml", ".yaml", ".cff", ".bash"}
MAX_LINES, MAX_COLUMNS = 1000, 128
GENERATED = {"src/codec/tables.c"}
CLANG_FORMAT = "14"
# Spelled in pieces, so that this file passes.
PRIVATE_FOLDERS = ["ho" + "me", "ro" + "ot", "Us" + "ers", "wo" + "rk", "t" + "mp"]
PRIVATE_PATH = re.compile("(?<![\\w.$}\\])])/(" + "|".join(PRIVATE_FOLDERS) + ")/")


def files():
    for folder, names, file_names in os.walk(ROOT):
        names[:] = sorted(name for name in names if name not in SKIP)
        for name in sorted(file_names):
            path = Path(folder) / name
            if path.suffix in TEXT or path.name in NAMED or path.name.startswith(".clang") or path.name == ".gitignore":
                yield path


def is_code(path):
    return path.suffix in CODE or path.name in NAMED


def fault_license(path, lines):
    if is_code(path) and not any("SPDX-License-Identifier: MIT" in line for line in lines[:2]):
        return 1, "no SPDX-License-Identifier line at the top"


def fault_blanks(path, lines):
    for i, line in enumerate(lines, 1):
        if line != line.rstrip():
            return i, "trailing blanks"
        if "\t" in line and path.name != "Makefile" and path.suffix not in (".txt", ".md"):
            return i, "a tab"


def fault_end(path, lines):
    if lines and (lines[-1] != "" or (len(lines) > 1 and lines[-2] == "")):
        return len(lines), "the file must end in one newline"


def fault_length(path, lines):
    name = str(path.relative_to(ROOT))
    if is_code(path) and len(lines) > MAX_LINES and name not in GENERATED:
        return len(lines), f"more than {MAX_LINES} lines"
    for i, line in enumerate(lines, 1):
        if is_code(path) and len(line) > MAX_COLUMNS and name not in GENERATED:
            return i, f"more than {MAX_COLUMNS} columns"


def fault_private_path(path, lines):
    for i, line in enumerate(lines, 1):
        if PRIVATE_PATH.search(line):
            return i, f"a path of one machine: {line.strip()}"


RULES = [fault_license, fault_blanks, fault_end, fault_length, fault_private_path]


def c_files():
    names = [str(path.relative_to(ROOT)) for path in files() if path.suffix in (".c", ".h")]
    return [name for name in names if name not in GENERATED]


def clang_format(*options):
    return subprocess.run(["clang-format", *options, *c_files()], cwd=ROOT, capture_output=True, text=True)


def check_format():
    """Messages of clang-format, or None where its version does not fit."""
    if not shutil.which("clang-format"):
        return None
    version = subprocess.run(["clang-format", "--version"], capture_output=True, text=True).stdout
    if f"version {CLANG_FORMAT}." not in version:
        return None
    done = clang_format("--dry-run", "-Werror")
    return sorted({line.split(": error")[0] + ": not formatted" for line in done.stderr.splitlines() if ": error" in line})


def main():
    if sys.argv[1:] == ["--fix"]:
        words.lower(ROOT, files())
        return clang_format("-i").returncode
    faults = {rule.__name__.removeprefix("fault_"): [] for rule in RULES}
    for path in files():
        lines = path.read_text().split("\n")
        for rule in RULES:
            fault = rule(path, lines)
            if fault:
                faults[rule.__name__.removeprefix("fault_")].append(f"{path.relative_to(ROOT)}:{fault[0]}: {fault[1]}")
    faults["words"] = words.faults(ROOT, files())
    formatted = check_format()
    if formatted is None:
        print(f"clang-format {CLANG_FORMAT} is not here; the format was not checked")
    else:
        faults["format"] = formatted
    return report(faults, 20)


if __name__ == "__main__":
    sys.exit(main())
