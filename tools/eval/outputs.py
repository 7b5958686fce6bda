# SPDX-License-Identifier: MIT
"""Files that a command writes at its end: what would keep it from that is told before the work, not after it."""
import os
import tempfile
from pathlib import Path

from .llama import LlamaError


def check_outputs(outputs, inputs):
    """outputs: the options' names with the paths that they give, None where one is not given. inputs: paths that are read."""
    taken = {}
    for option, path in outputs.items():
        if path is None:
            continue
        path = Path(path)
        check_place(option, path)
        same = next((other for other in taken if is_same(taken[other], path)), None)
        if same:
            raise LlamaError(f"{same} and {option} both name {path}; give each a file of its own")
        if any(is_same(given, path) for given in inputs):
            raise LlamaError(f"{option} would write over {path}, which is read; name another file")
        taken[option] = path


def is_same(a, b):
    return os.path.realpath(a) == os.path.realpath(b) and not Path(a).is_char_device()


def check_place(option, path):
    try:
        if path.is_dir():
            raise LlamaError(f"{option}: {path} is a folder; name a file")
        if path.exists():
            if not os.access(path, os.W_OK):
                raise LlamaError(f"{option}: {path} cannot be written: it is read-only; name another file")
        elif not path.parent.is_dir():
            raise LlamaError(f"{option}: {path} cannot be written: there is no folder {path.parent}; make it, or name another "
                             "file")
        else:
            # Where the disk is full or read-only, whoever asks, this fails as writing would.
            with tempfile.TemporaryFile(dir=path.parent) as probe:
                probe.write(b"x")
    except OSError as error:
        raise LlamaError(f"{option}: {path} cannot be written: {error.strerror}; name another file") from error


def write_text(path, text):
    """As UTF-8, whatever the locale; what a file's name has that is none is escaped."""
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
    except OSError as error:
        raise LlamaError(f"cannot write {path}: {error.strerror}") from error
