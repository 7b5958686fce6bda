#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Write docs/reference-c.md from turboquant.h and docs/reference-python.md from the package's docstrings.

    gen_reference.py [--check]      --check writes nothing, and ends with 1 if a page is not what it would write
"""
import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "include/turboquant.h"
PACKAGE = ROOT / "python/libturboquant"
SECTION = re.compile(r"/\* -{4} (.+?) -+ \*/\n")
COMMENT = re.compile(r"^/\*(.*?)\*/\n", re.M | re.S)
# Of a declaration: a function, or what a typedef or an enum names.
NAME = re.compile(r"\b(tq_\w+)\(|^typedef .*?\(\*?(tq_\w+)\)|^(?:typedef )?(?:struct|enum) (tq_\w+)|^#define (TQ_\w+)", re.M)
MODULES = {"": "The cache itself", "transformers": "Transformers", "mlx": "MLX-LM", "llama_cpp": "llama-cpp-python"}


def text_of(comment):
    """A comment's words, without its frame. Lists and empty lines stay."""
    lines = [re.sub(r"^ \*(?: |$)", "", line).rstrip() for line in comment.strip("\n").splitlines()]
    return "\n".join(lines).strip()


def names_of(code):
    plain = re.sub(r"/\*.*?\*/", "", code, flags=re.S)
    found = [next(filter(None, match.groups())) for match in NAME.finditer(plain)]
    return list(dict.fromkeys(found))


def c_blocks(section):
    """(comment, code) of a section's declarations, in order."""
    ends = [match.start() for match in COMMENT.finditer(section)] + [len(section)]
    before = section[:ends[0]].strip("\n")
    if before:
        yield "", before
    for begin, end in zip(ends, ends[1:]):
        match = COMMENT.match(section, begin)
        yield text_of(match[1]), section[match.end():end].strip("\n")


def c_page():
    text = HEADER.read_text()
    head, *parts = SECTION.split(text)
    lines = ["# C reference", "", "Made from `include/turboquant.h` by `scripts/gen_reference.py`.", "",
             text_of(re.search(r"/\*\n \* turboquant\.h(.*?)\*/", head, re.S)[0].removeprefix("/*").removesuffix("*/")), ""]
    for title, section in zip(parts[::2], parts[1::2]):
        section = section.partition("\n#ifdef __cplusplus\n")[0]
        lines += [f"## {title}", ""]
        for comment, code in c_blocks(section):
            names = names_of(code)
            if names:
                lines += ["### " + ", ".join(f"`{name}`" for name in names), ""]
            if comment:
                lines += [comment, ""]
            if code:
                lines += ["```c", code, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def signature(function):
    arguments = ast.unparse(function.args)
    result = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{arguments.removeprefix('self, ').removeprefix('cls, ') if arguments not in ('self', 'cls') else ''}", result


def described(node, prefix, level):
    """A function, or a class with its public methods and attributes that have docstrings."""
    doc = ast.get_docstring(node)
    if doc is None:
        return
    if isinstance(node, ast.ClassDef):
        own = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
        arguments = f"({signature(own)[0]})" if own else ""
        yield from (f"{level} `{prefix}{node.name}`", "", "```python", *wrapped(f"{prefix}{node.name}{arguments}"), "```", "",
                    doc, "")
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                yield from described(part, f"{node.name}.", level + "#")
        return
    arguments, result = signature(node)
    is_value = any(getattr(decorator, "id", "") == "property" for decorator in node.decorator_list)
    call = f"{prefix}{node.name}" + ("" if is_value else f"({arguments})") + result
    yield from (f"{level} `{prefix}{node.name}`", "", "```python", *wrapped(call), "```", "", doc, "")


def wrapped(call):
    return textwrap.wrap(call, 120, subsequent_indent="    ", break_long_words=False)


def public_names(module):
    tree = ast.parse((PACKAGE / (f"{module}.py" if module else "__init__.py")).read_text())
    if module:
        return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = {name.name for name in node.names}
            source = ast.parse((PACKAGE / f"{node.module}.py").read_text())
            found |= {part.name: part for part in source.body if getattr(part, "name", None) in names}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def python_page():
    package = PACKAGE.name
    lines = ["# Python reference", "", "Made from the docstrings by `scripts/gen_reference.py`. [python.md](python.md) tells "
             "how to use it all.", ""]
    for module, title in MODULES.items():
        path = f"{package}.{module}" if module else package
        lines += [f"## {title}: `{path}`", ""]
        for node in public_names(module).values():
            lines += described(node, "", "###")
    return "\n".join(lines).rstrip() + "\n"


def main():
    pages = {ROOT / "docs/reference-c.md": c_page(), ROOT / "docs/reference-python.md": python_page()}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if sys.argv[1:] == ["--check"]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what its source says: run scripts/gen_reference.py")
        print(f"{len(pages) - len(stale)} passed, {len(stale)} failed")
        return bool(stale)
    for path in stale:
        path.write_text(pages[path])
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
