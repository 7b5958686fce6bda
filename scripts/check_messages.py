#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Compare docs/troubleshooting.md, docs/tq.md and docs/errors.md with the messages in the sources.

    check_messages.py            the last line is 'N passed, M failed'
    check_messages.py --write    renew the lists of messages in the pages

An entry of a page ends in a comment with patterns, one a line: a regular expression, a file or a folder/, or both as
`file: regular expression`. A message belongs to the first entry that has a pattern for it. What follows the comment, up to
`<!-- end -->`, is the list of those messages, which --write makes. An entry with `<!-- messages, not listed` has no list, and
what is no message stands in `<!-- no messages`.
"""
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import messages
from faults import report

ROOT = Path(__file__).resolve().parent.parent
PAGES = "docs/troubleshooting.md", "docs/tq.md", "docs/errors.md"
BLOCK = re.compile(r"<!-- (?P<kind>messages|messages, not listed|no messages)\n(?P<patterns>.*?)-->\n"
                   r"(?:(?:(?!<!--).)*?<!-- end -->\n)?", re.DOTALL)
SHORT = 3  # so many messages are shown at once, more when they are asked for


@dataclass
class Block:
    kind: str
    patterns: list
    messages: list = field(default_factory=list)
    used: set = field(default_factory=set)


def fits(pattern, message):
    match = re.fullmatch(r"([\w/.-]+(?:/|\.(?:c|h|cu|cuh|py)))(?:: (.*))?", pattern)
    path, expression = match.groups() if match else ("", pattern)
    place = message.place.rpartition(":")[0]
    is_there = not path or f"/{place}".endswith(f"/{path}") or path.endswith("/") and place.startswith(path)
    return is_there and re.search(expression or "", message.text) is not None


def code(text):
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def list_of(block):
    if block.kind != "messages":
        return ""
    lines = "\n".join(f"- {code(message.text)}" for message in block.messages)
    if len(block.messages) > SHORT:
        lines = f"<details><summary>{len(block.messages)} messages</summary>\n\n{lines}\n\n</details>"
    return f"\n{lines}\n<!-- end -->\n"


def blocks_of(text):
    return [Block(match["kind"], match["patterns"].strip().split("\n")) for match in BLOCK.finditer(text)]


def sort(blocks, found):
    """Give the blocks their messages; those that no pattern fits."""
    left = []
    for message in found:
        for block in blocks:
            pattern = next((pattern for pattern in block.patterns if fits(pattern, message)), None)
            if pattern is not None:
                block.messages.append(message)
                block.used.add(pattern)
                break
        else:
            left.append(message)
    return left


def rewrite(text, blocks):
    one_by_one = iter(blocks)

    def renew(match):
        head = f"<!-- {match['kind']}\n{match['patterns']}-->\n"
        return head + list_of(next(one_by_one))
    return BLOCK.sub(renew, text)


def check(root=ROOT, is_written=False):
    """The faults of each kind; writes the lists first, if that is asked for."""
    texts = {page: (root / page).read_text() for page in PAGES if (root / page).exists()}
    blocks = {page: blocks_of(text) for page, text in texts.items()}
    faults = {"entries": [], "patterns": [], "lists": []}
    for message in sort([block for page in texts for block in blocks[page]], messages.collect(root)):
        faults["entries"].append(f"{message.place}: no entry of {' and '.join(PAGES)} has this message: {message.text}")
    for page, text in texts.items():
        faults["patterns"] += [f"{page}: no message fits the pattern: {pattern}"
                               for block in blocks[page] for pattern in block.patterns if pattern not in block.used]
        renewed = rewrite(text, blocks[page])
        if is_written:
            (root / page).write_text(renewed)
        elif renewed != text:
            faults["lists"].append(f"{page}: its lists are not those of the sources: scripts/check_messages.py --write")
    return faults


def main():
    return report(check(is_written=sys.argv[1:] == ["--write"]))


if __name__ == "__main__":
    sys.exit(main())
