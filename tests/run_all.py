#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Run all test suites. The last line is 'N passed, M failed'; the exit code is 1 if anything failed, died or counted nothing.

    run_all.py             everything: `make test`
    run_all.py --quick     what needs no model, no sanitizer and no other architecture: `make check`
    run_all.py NAME...     suites whose names contain one of NAME
    run_all.py --list

Each suite is a command whose output says how many tests passed and failed, as cmocka does or as 'N passed, M failed'. Its
output is kept in build/test-logs and shown if it failed. A suite that cannot run here is skipped with the reason; with CI=true
that counts as a failure, because there everything must run but what needs a GPU or its compiler.
"""
import argparse
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from suites import ROOT, build_steps, full_suites, quick_suites

LOGS = ROOT / "build" / "test-logs"
PASSED = re.compile(r"^\[  PASSED  \] (\d+) test|^(\d+) passed, \d+ failed$", re.MULTILINE)
FAILED = re.compile(r"^\[  FAILED  \] (\d+) test|^\d+ passed, (\d+) failed$", re.MULTILINE)
START = time.monotonic()
print_lock = threading.Lock()


def say(text):
    with print_lock:
        print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def count(pattern, text):
    return sum(int(next(filter(None, groups), 0)) for groups in pattern.findall(text))


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


def run_suite(suite):
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
    with print_lock:
        if n_failed:
            print("\n".join(output.splitlines()[-60:]))
            if trouble:
                print(f"{suite.name}: {trouble}")
    say(f"{suite.name}: {n_passed} passed, {n_failed} failed ({time.monotonic() - started:.1f} s)")
    return n_passed, n_failed


def run_builds(steps):
    """Build each kind, one after the other (each uses all cores). Returns the number of failures."""
    n_failed = 0
    for name, missing, commands in steps:
        if missing:
            say(f"build {name}: skipped, {missing}")
            continue
        started = time.monotonic()
        output, trouble = run_commands("build-" + name, [(command, {}) for command in commands], 1800)
        if trouble:
            n_failed += 1
            print("\n".join(output.splitlines()[-60:]))
        say(f"build {name}: {trouble or 'ok'} ({time.monotonic() - started:.1f} s)")
    return n_failed


def main():
    parser = argparse.ArgumentParser(description="Run all test suites.")
    parser.add_argument("--quick", action="store_true", help="what `make check` runs")
    parser.add_argument("--list", action="store_true", help="name the suites")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="suites at a time (2)")
    parser.add_argument("names", nargs="*", help="run only suites whose names contain one of these")
    args = parser.parse_args()

    n_failed = 0
    if not args.list:
        n_failed = run_builds(build_steps(args.quick))
    # After the builds, because these tell which programs there are.
    suites = quick_suites() if args.quick else full_suites()
    if args.names:
        suites = [suite for suite in suites if any(name in suite.name for name in args.names)]
    if args.list:
        print("\n".join(suite.name for suite in suites))
        return 0
    results = [run_suite(suite) for suite in suites if suite.alone]
    with ThreadPoolExecutor(args.jobs) as pool:
        results += pool.map(run_suite, [suite for suite in suites if not suite.alone])
    n_passed = sum(passed for passed, _ in results)
    n_failed += sum(failed for _, failed in results)
    if not suites:
        n_failed += 1
    skipped = [suite.name for suite in suites if suite.missing]
    if skipped:
        print(f"skipped suites ({len(skipped)}): {', '.join(skipped)}")
    print(f"{n_passed} passed, {n_failed} failed")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
