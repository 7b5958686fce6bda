# SPDX-License-Identifier: MIT
"""Collect the messages of the library, the plug-in, `tq` and the Python package from their sources.

A message is a text of three words or more that the sources hold as a string: those of calls that log, and those that are
handed on to one. A value in it, `%d` or `{name}`, becomes an ellipsis. Texts of help are no messages.
"""
import ast
import re
from dataclasses import dataclass
from pathlib import Path

VALUE = "…"
MIN_WORDS = 3  # a text of fewer words is a part of a message, or none
C_FOLDERS = {"library": ("src", "*.[ch]"), "CUDA": ("src", "*.cu*"), "plug-in": ("plugins/ggml", "*.[ch]"),
             "tq": ("tools", "*.[ch]")}
PYTHON_FOLDERS = {"Python": "python/libturboquant", "tq eval, tq calibrate, tq fold": "tools"}
# Whose strings are no messages: assembler, assertions, and what a command prints as its result.
C_SILENT = {"asm", "static_assert", "_Static_assert", "printf", "puts", "pragma", "_Pragma"}
PYTHON_SILENT = {"print", "add_argument", "add_parser", "ArgumentParser", "Parser", "add_argument_group", "getLogger", "join"}


@dataclass(frozen=True)
class Message:
    text: str
    place: str  # file:line
    part: str


TOKEN = re.compile(r"""
    //[^\n]* | /\*.*?\*/                        # comments
  | ^[ ]*\#[ ]*(?:include|pragma)[^\n]*
  | (?P<string>"(?:\\.|[^"\\\n])*")
  | (?P<char>'(?:\\.|[^'\\\n])+')
  | (?P<word>[A-Za-z_]\w*)
  | (?P<other>[^\s])
""", re.VERBOSE | re.DOTALL | re.MULTILINE)
CONVERSION = re.compile(r"%[-+ #0]*(?:\*|\d+)?(?:\.(?:\*|\d+))?(?:hh|h|ll|l|z|j|t)?[diouxXeEfgGcsp]|%(?=…)")


def is_message(text):
    words = [word for word in re.split(r"[\s…]+", text) if re.fullmatch(r"[(]?[A-Za-z][a-z']*[.,:;)]*", word)]
    return len(words) >= MIN_WORDS and "usage: " not in text


def plain(text):
    """One line; values that touch are one, and the name of the caller in front is left out."""
    text = " ".join(text.split())
    text = re.sub(rf"{VALUE}(?:{VALUE})+", VALUE, text)
    return re.sub(rf"^{VALUE}?: ", "", text)


def plain_c(text):
    text = CONVERSION.sub(VALUE, text.replace("%%", "\0")).replace("\0", "%")
    return plain(text.replace('\\"', '"').replace("\\n", " ").replace("\\\\", "\\"))


def c_strings(source):
    """(line, text) of each string, with those that it is joined to."""
    pieces, line, words = [], 0, set()
    for token in TOKEN.finditer(source):
        kind, text = token.lastgroup, token.group()
        if kind == "string":
            line = line or source.count("\n", 0, token.start()) + 1
            pieces.append(text[1:-1])
        elif kind == "word" and re.fullmatch(r"PRI[a-zA-Z0-9]+|[A-Z][A-Z0-9_]+", text) and pieces:
            pieces.append(VALUE)  # a macro that is a string, as PRId64
        elif kind:
            if pieces and not words & C_SILENT:
                yield line, "".join(pieces)
            pieces, line = [], 0
            words = set() if text in (";", "{", "}") else words | {text}


def remarks(tree):
    """Strings that stand for themselves: documentation."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def text_of(node):
    """The text of an expression that makes a string, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]|\{\w+\}", VALUE, node.value)  # as loggers take it, and str.format
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        left, right = text_of(node.left), text_of(node.right)
        if isinstance(node.op, ast.Mod):
            return CONVERSION.sub(VALUE, left) if left else None
        return (left or VALUE) + (right or VALUE) if left or right else None
    return None


def python_strings(source):
    tree = ast.parse(source)
    silent = set(remarks(tree))
    for node in ast.walk(tree):  # breadth first: what holds a string comes before it
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in PYTHON_SILENT:
                silent |= set(ast.walk(node))
    for node in ast.walk(tree):
        text = text_of(node) if node not in silent else None
        if text is not None:
            silent |= set(ast.walk(node)) - {node}
            yield node.lineno, text


def collect(root):
    """All messages, each text once."""
    found = {}

    def add(path, part, strings):
        for line, text in strings:
            if is_message(text):
                found.setdefault(text, Message(text, f"{path.relative_to(root)}:{line}", part))

    for part, (folder, pattern) in C_FOLDERS.items():
        for path in sorted((Path(root) / folder).rglob(pattern)):
            add(path, part, ((line, plain_c(text)) for line, text in c_strings(path.read_text())))
    for part, folder in PYTHON_FOLDERS.items():
        for path in sorted((Path(root) / folder).rglob("*.py")):
            add(path, part, ((line, plain(text)) for line, text in python_strings(path.read_text())))
    return list(found.values())
