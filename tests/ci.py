#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What CI runs: `make test`, then as many shards of `make test-full` as fit into TQ_CI_MINUTES (50), those first that test what
has changed. It names the shards that it ran and those that it left out, and ends with one line 'N passed, M failed' of all.

Which files have changed: since the commit TQ_CI_BASE, by default since the newest commit a day older than HEAD. What a shard
takes is looked up in the durations of earlier runs; one that may not end in time is not begun.
"""
import os
import re
import subprocess
import sys
import time

from run_all import Durations, changed_paths, deal_shards, part_seconds, touched_first
from suites import PARTS, ROOT, all_suites

MARGIN = 1.3  # machines differ
COUNTS = re.compile(r"^(\d+) passed, (\d+) failed$")
START = time.monotonic()


def minutes():
    return (time.monotonic() - START) / 60


def run(name, command):
    """(passed, failed) of a command that ends with its counts. They are shown in other words: only the last line counts."""
    print(f"== {name}", flush=True)
    counts = None
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace") as process:
        for line in process.stdout:
            found = COUNTS.match(line)
            if found:
                counts = tuple(map(int, found.groups()))
            else:
                print(line, end="", flush=True)
    n_passed, n_failed = counts or (0, 1)
    if process.returncode and not n_failed:
        n_failed = 1
    print(f"== {name}: passed {n_passed}, failed {n_failed}, {minutes():.0f} minutes since the start", flush=True)
    return n_passed, n_failed


def main():
    budget = float(os.environ.get("TQ_CI_MINUTES", 50))
    results = [run("make test", ["make", "test"])]
    durations, suites = Durations(), all_suites()
    shards = deal_shards(suites, len(PARTS))  # one part each
    places = {names[0]: i + 1 for i, names in enumerate(shards)}
    left_out = []
    for name in touched_first(PARTS, changed_paths(), turn=int(time.time() // 86400)):
        expected = MARGIN * part_seconds([suite for suite in suites if suite.part == name], durations) / 60
        if minutes() + expected > budget:
            left_out.append(f"{name} ({expected:.0f} minutes)")
            continue
        place = f"{places[name]}/{len(shards)}"
        results.append(run(f"make test-full SHARD={place}: {name}", ["make", "test-full", f"SHARD={place}"]))
    if left_out:
        print(f"left out, for want of time: {', '.join(left_out)}; `make test-full` runs everything")
    n_passed, n_failed = (sum(counts) for counts in zip(*results))
    print(f"{n_passed} passed, {n_failed} failed")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
