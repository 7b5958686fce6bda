# SPDX-License-Identifier: MIT
"""The commands of `python -m libturboquant`. docs/python.md."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

import libturboquant
from libturboquant.errors import ArgumentError


class CommandError(Exception):
    """What ends a command with one line: what is wrong, and its cure."""


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, with a cure."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"turboquant: {message}; `{self.prog} --help` has all options\n")


def first_line(error: BaseException) -> str:
    """Of other packages' messages, which may be long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def table(rows: list[list[str]]) -> str:
    """Rows as Markdown, the first one as the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def kept_bytes(stats: libturboquant.Stats) -> int:
    """What a cache keeps of its tokens, as `tq eval` counts it: pages and exact tokens, and no tables that do not grow."""
    return stats.n_pages_used * stats.page_bytes + stats.exact_bytes


def add_presets(parser: argparse.ArgumentParser) -> None:
    names = ",".join(libturboquant.presets())
    parser.add_argument("--presets", type=presets, default=names, metavar="P[,P...]", help="(%(default)s)")


def presets(text: str) -> list[str]:
    """The type of --presets: names as the library has them."""
    try:
        return [libturboquant.preset(name).name for name in text.split(",")]
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def at_least(least: int) -> Callable[[str], int]:
    """The type of whole numbers."""
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 1 << 31:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return int(text)

    return number
