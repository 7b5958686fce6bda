#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Build what test suites need and run them. The last line is 'N passed, M failed'; the exit code is 1 if anything failed, died
or counted nothing.

    run_all.py check                 no model, no network, no sanitizer: `make check`
    run_all.py check --room ROOM     of these, and of the others that are quick, what tests one room: `make check ROOM=cache`
    run_all.py test                  the same and more, on small models and a short run of the real one: `make test`
    run_all.py full [--shard I/N]    what `make test` leaves out, or the Ith of N shards of it: `make test-full SHARD=1/8`
    run_all.py NAME...               suites of any tier whose names contain one of NAME
    run_all.py --list                the suites, with their tiers and parts

Each suite is a command whose output says how many tests passed and failed, as cmocka does or as 'N passed, M failed'. Its
output is kept in build/test-logs and shown if it failed. How long builds and suites took is kept there too (durations.json):
the longest suites start first. A suite that cannot run here is skipped with the reason; with CI=true that counts as a failure,
because there everything must run but what needs a GPU or its compiler.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from suites import PART_FILES, PARTS, ROOT, TIERS, all_suites, builds

LOGS = ROOT / "build" / "test-logs"
DURATIONS = LOGS / "durations.json"
REFERENCE = Path(__file__).resolve().parent / "durations.json"  # of the machine that docs/testing.md tells of
PASSED = re.compile(r"^\[  PASSED  \] (\d+) test|^(\d+) passed, \d+ failed$", re.MULTILINE)
FAILED = re.compile(r"^\[  FAILED  \] (\d+) test|^\d+ passed, (\d+) failed$", re.MULTILINE)
ROOM_SECONDS = 40  # the longest suite that `make check ROOM=` takes from another tier
START = time.monotonic()
print_lock = threading.Lock()


def say(text):
    with print_lock:
        print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def count(pattern, text):
    return sum(int(next(filter(None, groups), 0)) for groups in pattern.findall(text))


class Durations:
    """Wall seconds of builds and suites: what the last run here took, else what is committed (paths: the later ones win)."""

    def __init__(self, *paths):
        self.seconds, self.new = {}, {}
        for path in paths or (REFERENCE, DURATIONS):
            try:
                self.seconds.update(json.loads(path.read_text()))
            except (OSError, ValueError):
                pass  # nothing is kept yet, or only a part was written

    def of(self, name, default=30.0):
        return self.seconds.get(name, default)

    def keep(self, name, seconds):
        with print_lock:
            self.new[name] = round(seconds, 1)

    def save(self):
        try:
            kept = json.loads(DURATIONS.read_text())
        except (OSError, ValueError):
            kept = {}
        LOGS.mkdir(parents=True, exist_ok=True)
        DURATIONS.write_text(json.dumps(dict(sorted((kept | self.new).items())), indent=1) + "\n")


def run_commands(name, commands, timeout):
    """Run one after the other into the suite's log. Returns (output, what went wrong or None)."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / (name.replace("/", "-").replace(" ", "-") + ".log")
    trouble = None
    with open(path, "wb") as log:
        for command, environment in commands:
            shown = " ".join([*(f"{k}={v}" for k, v in environment.items()), *map(str, command)])
            log.write(f"$ {shown}\n".encode())
            log.flush()
            try:
                done = subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment},
                                      stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, timeout=timeout)
                if done.returncode:
                    trouble = trouble or f"exit code {done.returncode}: {shown}"
            except (OSError, subprocess.TimeoutExpired) as error:
                trouble = trouble or str(error)
    return path.read_text(errors="replace"), trouble


def run_suite(suite, durations):
    """(passed, failed) of one suite."""
    started = time.monotonic()
    if suite.missing:
        failed = 1 if os.environ.get("CI") == "true" and not suite.optional else 0
        say(f"{suite.name}: skipped, {suite.missing}")
        return 0, failed
    output, trouble = run_commands(suite.name, suite.commands, suite.timeout)
    n_passed, n_failed = count(PASSED, output), count(FAILED, output)
    if n_failed == 0 and trouble is None and n_passed == 0:
        trouble = "it counted no tests"
    if trouble and n_failed == 0:
        n_failed = 1
    seconds = time.monotonic() - started
    durations.keep(suite.name, seconds)
    if n_failed:
        with print_lock:
            print("\n".join(output.splitlines()[-60:]))
            if trouble:
                print(f"{suite.name}: {trouble}")
    say(f"{suite.name}: {n_passed} passed, {n_failed} failed ({seconds:.1f} s)")
    return n_passed, n_failed


def chosen_builds(suites):
    """The builds that these suites need, in the order in which they are made."""
    known = builds()
    wanted = {name for suite in suites for name in suite.builds}
    for name in reversed(known):
        if name in wanted:
            wanted.update(known[name].needs)
    return [build for name, build in known.items() if name in wanted]


def run_builds(chosen, durations):
    """
    Make each kind of build, one after the other (each uses all cores). Returns {name: why it is not there}, and the number of
    those that failed: a build whose compiler is not installed is only left out.
    """
    absent, n_failed = {}, 0
    for build in chosen:
        started = time.monotonic()
        # A set-up that fails shows in what is missing then.
        setup = [([ROOT / "scripts/setup.sh", *build.setup], {})] if build.setup else []
        output, trouble = run_commands("setup-" + build.name, setup, 1800)
        if trouble:
            print(output)
        trouble = build.missing
        if not trouble:
            output, trouble = run_commands("build-" + build.name, [(command, {}) for command in build.commands], 1800)
            if trouble:
                n_failed += 1
                print("\n".join(output.splitlines()[-60:]))
        durations.keep("build " + build.name, time.monotonic() - started)
        say(f"build {build.name}: {trouble or 'ok'} ({time.monotonic() - started:.1f} s)")
        if trouble:
            absent[build.name] = trouble
    return absent, n_failed


def part_seconds(suites, durations, jobs=2):
    """What a part takes by the clock: its builds, then its suites side by side, the longest of them at least."""
    seconds = [durations.of(suite.name) for suite in suites]
    return sum(durations.of("build " + build.name) for build in chosen_builds(suites)) + max(sum(seconds) / jobs, *seconds, 0)


def deal_shards(suites, n_shards):
    """
    The names of the parts in n_shards lists of about the same length. Only the committed durations count: on several machines
    the shards must fit together.
    """
    durations = Durations(REFERENCE)
    seconds = {name: part_seconds([suite for suite in suites if suite.part == name], durations) for name in PARTS}
    shards = [[] for _ in range(n_shards)]
    for name in sorted(PARTS, key=lambda name: (-seconds[name], name)):
        min(shards, key=lambda shard: sum(seconds[other] for other in shard)).append(name)
    return shards


def touched_first(names, paths, turn=0):
    """The parts, those first that test most of the changed files; others in turn, so that each comes first on some day."""
    order = list(names)
    order = order[turn % len(order):] + order[:turn % len(order)]
    return sorted(order, key=lambda name: -sum(path.startswith(PART_FILES[name]) for path in paths))


def changed_paths():
    """Files that differ from the commit TQ_CI_BASE; without it, from the newest commit a day older than HEAD."""
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.split()

    base = os.environ.get("TQ_CI_BASE")
    if not base:
        seconds = int(next(iter(git("log", "-1", "--format=%ct", "HEAD")), 0))
        base = next(iter(git("rev-list", "-1", f"--before={seconds - 86400}", "HEAD")), "HEAD")
    return git("diff", "--name-only", base)


def choose_suites(args, durations):
    suites = all_suites()
    if args.names and args.names[0] not in TIERS:
        return [suite for suite in suites if any(name in suite.name for name in args.names)]
    tier = args.names[0] if args.names else "test"
    if args.room:
        rooms = sorted({room for suite in suites for room in suite.rooms if room})
        if args.room not in rooms:
            sys.exit(f"run_all.py: no room '{args.room}'; there are {', '.join(rooms)}")
        return [suite for suite in suites if (args.room in suite.rooms or "" in suite.rooms)
                and (suite.tier == "check" or durations.of(suite.name) <= ROOM_SECONDS and suite.builds == ("release",))]
    if tier == "full":
        suites = [suite for suite in suites if suite.tier == "full"]
        if args.shard:
            names = deal_shards(suites, args.shard[1])[args.shard[0] - 1]
            for name in names:
                say(f"this shard has the part {name}: {PARTS[name]}")
            suites = [suite for suite in suites if suite.part in names]
        return suites
    return [suite for suite in suites if TIERS.index(suite.tier) <= TIERS.index(tier)]


def shard(text):
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or not int(match[1]) <= int(match[2]) <= len(PARTS):
        raise argparse.ArgumentTypeError(f"a shard is I/N, with I from 1 to N and N at most {len(PARTS)}, as 1/{len(PARTS)}")
    return int(match[1]), int(match[2])


def run(suites, jobs, durations):
    """Builds, then suites, the longest first. Returns (passed, failed)."""
    absent, n_broken = run_builds(chosen_builds([suite for suite in suites if not suite.missing]), durations)
    for suite in suites:
        reasons = [f"build {name}: {absent[name]}" for name in suite.builds if name in absent]
        suite.missing = suite.missing or "; ".join(reasons)
    suites = sorted(suites, key=lambda suite: -durations.of(suite.name))
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda suite: run_suite(suite, durations), suites))
    skipped = [suite.name for suite in suites if suite.missing]
    if skipped:
        print(f"skipped suites ({len(skipped)}): {', '.join(skipped)}")
    slowest = sorted(durations.new.items(), key=lambda item: -item[1])[:10]
    print("the slowest: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in slowest))
    durations.save()
    return sum(passed for passed, _ in results), sum(failed for _, failed in results) + n_broken + (not suites)


def main():
    parser = argparse.ArgumentParser(description="Build what test suites need and run them.",
                                     epilog="CONTRIBUTING.md and docs/testing.md tell more.")
    parser.add_argument("names", nargs="*", metavar="check|test|full|NAME",
                        help="a tier, or parts of suites' names (test)")
    parser.add_argument("--room", help="with check: only what tests this room")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="with full: only the Ith of N about equal shards")
    parser.add_argument("--list", action="store_true", help="name the suites, with their tiers and parts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="suites at a time (the number of cores)")
    args = parser.parse_args()
    durations = Durations()
    suites = choose_suites(args, durations)
    if args.list:
        print("\n".join(f"{suite.tier:5}  {suite.part:12}  {suite.name}" for suite in suites))
        return 0
    n_passed, n_failed = run(suites, args.jobs, durations)
    print(f"{n_passed} passed, {n_failed} failed")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
