# SPDX-License-Identifier: MIT
"""Count the words that CONTRIBUTING.md asks to avoid. scripts/words.txt has how often each still occurs, which may only fall:
so new lines do without them, and old ones need no rewriting at once."""
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

LIST = "scripts/words.txt"
QUOTING = {"CONTRIBUTING.md", "tests/api/test_docs.py",  # the words themselves
           "docs/reference-c.md", "docs/reference-python.md"}  # words of files that are looked at


@dataclass
class Word:
    n_allowed: int
    pattern: str
    better: str


def read_list(root):
    lines = [line for line in (root / LIST).read_text().splitlines() if line and not line.startswith("#")]
    return [Word(int(n), pattern, better) for n, pattern, better in (line.split("\t") for line in lines)]


def occurrences(root, paths, word):
    """(path, line number, line) of each."""
    pattern = re.compile(word.pattern, re.IGNORECASE)
    for path in paths:
        name = path.relative_to(root).as_posix()
        if name in QUOTING or path.suffix in (".json", ".txt"):
            continue
        for i, line in enumerate(path.read_text().split("\n"), 1):
            for _ in pattern.findall(line):
                yield name, i, line.strip()


def added_lines(root):
    """Lines that git says are new since the last commit or in it; none without git or its history."""
    lines = set()
    for since in ("HEAD", "HEAD~1") if shutil.which("git") else ():
        done = subprocess.run(["git", "diff", "--unified=0", since], cwd=root, capture_output=True, text=True)
        lines |= {line[1:].strip() for line in done.stdout.splitlines() if line.startswith("+")}
    return lines


def faults(root, paths):
    """A text for each word that occurs more often than it may: its new places, as far as git knows them."""
    paths, found = list(paths), []
    for word in read_list(root):
        places = list(occurrences(root, paths, word))
        if len(places) > word.n_allowed:
            new = added_lines(root)
            shown = [f"{name}:{i}" for name, i, line in places if line in new] or [f"{name}:{i}" for name, i, _ in places]
            found.append(f"{', '.join(shown[:10])}: write '{word.better}' for {word.pattern} "
                         f"({len(places)} times, {word.n_allowed} allowed; CONTRIBUTING.md has the list)")
    return found


def lower(root, paths):
    """Write the numbers of today where they are smaller."""
    paths, text = list(paths), (root / LIST).read_text()
    for word in read_list(root):
        n = min(word.n_allowed, sum(1 for _ in occurrences(root, paths, word)))
        text = text.replace(f"{word.n_allowed}\t{word.pattern}\t", f"{n}\t{word.pattern}\t")
    (root / LIST).write_text(text)
