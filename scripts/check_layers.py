#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Prove the order of rooms: read every #include and refuse one that points against it.

A room under src/ includes itself, the rooms before it in ROOMS, and the public header. plugins/ggml sees the public header,
cache/cells.h, cache/host_pages.h and ggml; tools see the public header and cache/cells.h; examples see only the public header.
Nothing else includes ggml. src/CMakeLists.txt must list every file.
The last line is 'N passed, M failed'.
"""
import re
import sys
from pathlib import Path

from faults import report

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["base", "codec", "kernels", "attention", "device", "cache", "api"]
PUBLIC = "turboquant.h"
CELLS, HOLDS_CELLS = "cache/cells.h", ["plugins/ggml", "tools"]
PAGES, HOLDS_PAGES = "cache/host_pages.h", ["plugins/ggml"]
OUTSIDE = ["plugins/ggml", "tools", "examples"]
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.MULTILINE)
SUFFIXES = {".c", ".h", ".cu", ".cuh", ".m", ".metal"}


def is_ggml(name):
    return name.startswith(("ggml", "gguf", "llama"))


def fault_in_room(room, name, is_local):
    """What is wrong with including `name` from src/<room>, or None. is_local: the file stands in the includer's folder."""
    if is_ggml(name):
        return "only plugins/ggml includes ggml"
    if name == PUBLIC or is_local:
        return None
    target = name.split("/")[0]
    if target not in ROOMS or "/" not in name:
        return f'"{name}" is neither {PUBLIC} nor room/file.h'
    if ROOMS.index(target) > ROOMS.index(room):
        return f"{room} stands below {target} in {' < '.join(ROOMS)}"
    return None


def fault_outside(folder, name, is_local):
    if is_ggml(name):
        return None if folder == "plugins/ggml" else "only plugins/ggml includes ggml"
    if name == PUBLIC or is_local or (name == CELLS and folder in HOLDS_CELLS) or (name == PAGES and folder in HOLDS_PAGES):
        return None
    return f'{folder} may use only {PUBLIC}, not "{name}"'


def includes(path):
    """(line, name, quoted) of every #include."""
    text = path.read_text()
    for match in INCLUDE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match.group(2), match.group(1) == '"'


def check_folder(folder, fault):
    """Messages for all includes of the files below a folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        for line, name, quoted in includes(path):
            if not quoted and not is_ggml(name):
                continue  # the system's headers
            message = fault(name, (path.parent / name).exists())
            if message:
                yield f"{path.relative_to(ROOT)}:{line}: {message}"


def check_listed():
    listed = set(re.findall(r"[\w/]+\.c\b", (ROOT / "src/CMakeLists.txt").read_text()))
    present = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.c")}
    for name in sorted(present - listed):
        yield f"src/CMakeLists.txt: {name} is not listed"
    for name in sorted(listed - present):
        yield f"src/CMakeLists.txt: {name} does not exist"


def check_rooms_known():
    for path in sorted((ROOT / "src").iterdir()):
        if path.is_dir() and path.name not in ROOMS:
            yield f"src/{path.name}: not a room; the rooms are {' < '.join(ROOMS)}"


def self_test():
    """The rules on examples, so that a broken rule cannot pass everything."""
    cases = [
        (fault_in_room("kernels", "codec/codec.h", False), False),
        (fault_in_room("codec", "kernels/kernels.h", False), True),
        (fault_in_room("codec", "tables.h", True), False),
        (fault_in_room("codec", "tables.h", False), True),
        (fault_in_room("api", "ggml.h", False), True),
        (fault_outside("plugins/ggml", "ggml-backend-impl.h", False), False),
        (fault_outside("plugins/ggml", "codec/codec.h", False), True),
        (fault_outside("tools", "ggml.h", False), True),
        (fault_outside("tools", PUBLIC, False), False),
        (fault_outside("tools", CELLS, False), False),
        (fault_outside("examples", CELLS, False), True),
        (fault_outside("plugins/ggml", PAGES, False), False),
        (fault_outside("tools", PAGES, False), True),
    ]
    for i, (fault, wanted) in enumerate(cases):
        if bool(fault) != wanted:
            yield f"self-test {i}: {fault}"


def main():
    checks = {"self-test": list(self_test()), "rooms": list(check_rooms_known()), "CMake list": list(check_listed())}
    for room in ROOMS:
        checks["src/" + room] = list(check_folder(ROOT / "src" / room, lambda *a, r=room: fault_in_room(r, *a)))
    for folder in OUTSIDE:
        checks[folder] = list(check_folder(ROOT / folder, lambda *a, f=folder: fault_outside(f, *a)))
    return report(checks)


if __name__ == "__main__":
    sys.exit(main())
