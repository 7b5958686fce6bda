#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
Prove that no file needs another that needs it: object files by their symbols, headers by what they include, Python modules by
what they import. Argument: a build folder with object files. The last line is 'N passed, M failed'.
"""
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("src", "plugins/ggml")
TARGETS = ("turboquant_objects", "turboquant_simd", "ggml-turboquant")
HEADERS = ("include", "src", "plugins/ggml")
PACKAGES = ("python/libturboquant", "tools/eval", "tools/calibrate")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def circles(graph):
    """Sets of nodes that reach each other, by Tarjan's strongly connected components (1972)."""
    number, low, stack, found = {}, {}, [], []

    def visit(node):
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(stack[at:])
            del stack[at:]

    for node in graph:
        if node not in number:
            visit(node)
    return found


def object_graph(objects):
    """A file needs those that define what it leaves undefined."""
    defined, undefined = {}, {}
    for path in objects:
        table = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        lines = [line.split() for line in table.splitlines()]
        defined |= {words[2]: path for words in lines if len(words) == 3 and words[1] in "TDBRVW"}
        undefined[path] = [words[1] for words in lines if len(words) == 2 and words[0] == "U"]
    return {path: {defined[name] for name in names if defined.get(name, path) != path} for path, names in undefined.items()}


def header_graph(folder):
    paths = {path for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".cuh")}

    def included(path):
        for name in INCLUDE.findall(path.read_text()):
            for base in (path.parent, ROOT / "src", ROOT / "include"):
                if (base / name).resolve() in paths:
                    yield (base / name).resolve()
                    break

    return {path: set(included(path)) for path in paths}


def module_graph(folder):
    """What modules import as they are loaded: imports in functions come later."""
    paths = {path.stem: path for path in (ROOT / folder).glob("*.py")}

    def imported(path):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
                yield from (paths[name] for name in names if name in paths)

    return {path: set(imported(path)) for name, path in paths.items() if not name.startswith("__")}


def main():
    build = Path(sys.argv[1])
    graphs = {}
    for folder in PROGRAMS:
        objects = [path for target in TARGETS for path in build.glob(f"**/{target}.dir/**/*.o")
                   if f"/{folder}/" in f"/{path.relative_to(build)}"]
        graphs[f"{folder}, objects"] = object_graph(objects)
    graphs |= {f"{folder}, headers": header_graph(folder) for folder in HEADERS}
    graphs |= {folder: module_graph(folder) for folder in PACKAGES}
    n_failed = circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) != [["b", "c"]]
    for name, graph in graphs.items():
        found = circles(graph) if graph else [["nothing was found to look at"]]
        n_failed += bool(found)
        for circle in found:
            print(f"{name}: {', '.join(str(path) for path in circle)}")
    print(f"{len(graphs) + 1 - n_failed} passed, {n_failed} failed")
    return n_failed > 0


if __name__ == "__main__":
    sys.exit(main())
