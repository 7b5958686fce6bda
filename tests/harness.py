# SPDX-License-Identifier: MIT
"""Run unittest cases of a Python test file so that the last line is 'N passed, M failed', as all test programs here print."""
import os
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("TQ_BUILD_DIR", ROOT / "build" / "release"))
DEPS = Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build" / "deps"))


def main():
    program = unittest.main(module="__main__", exit=False, verbosity=2)
    result = program.result
    n_failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    print(f"{result.testsRun - n_failed - len(result.skipped)} passed, {n_failed} failed")
    sys.exit(n_failed > 0)
