#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The runner of the tests: that no test file is left out, that shards are all there is, and that failures count."""
import contextlib
import io
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_all  # noqa: E402
from harness import ROOT, main  # noqa: E402
from suites import PART_FILES, PARTS, TIERS, UNIT_ROOMS, Suite, all_suites, builds  # noqa: E402

SUITES = all_suites()


def words():
    return {str(word) for suite in SUITES for command, _ in suite.commands for word in command}


class Lists(unittest.TestCase):
    def test_no_test_file_is_left_out(self):
        named = {Path(word).name for word in words()}
        for folder, pattern in (("tests/plugin", "test_*.py"), ("tests/api", "test_*.py"), ("python/tests", "test_*.py")):
            for path in (ROOT / folder).glob(pattern):
                self.assertIn(path.name, named, f"no suite runs {path.relative_to(ROOT)}")
        for folder, pattern in (("tests/unit", "test_*.c"), ("fuzz", "fuzz_*.c")):
            for path in (ROOT / folder).glob(pattern):
                self.assertIn(path.stem, named, f"no suite runs {path.relative_to(ROOT)}")

    def test_unit_tests_have_rooms(self):
        found = {path.name for path in (ROOT / "tests/unit").glob("test_*.c")}
        self.assertEqual({f"test_{name}.c" for name in UNIT_ROOMS}, found | {"test_hostile.c"})

    def test_all_are_documented(self):
        text = (ROOT / "docs/testing.md").read_text()
        for suite in SUITES:
            self.assertIn(f"`{suite.name}`", text)

    def test_names_are_unique(self):
        names = [suite.name for suite in SUITES]
        self.assertEqual(len(names), len(set(names)))

    def test_tiers_parts_and_builds_exist(self):
        for suite in SUITES:
            self.assertIn(suite.tier, TIERS, suite.name)
            self.assertEqual(suite.part in PARTS, suite.tier == "full", suite.name)
            self.assertLessEqual(set(suite.builds), set(builds()), suite.name)
        self.assertEqual(set(PART_FILES), set(PARTS))
        self.assertEqual({suite.part for suite in SUITES} - {""}, set(PARTS))

    def test_what_make_check_needs(self):
        for suite in SUITES:
            if suite.tier == "check":
                self.assertLessEqual(set(suite.builds), {"release"}, suite.name)

    def test_files_of_parts_exist(self):
        for name, prefixes in PART_FILES.items():
            for prefix in prefixes:
                folder, _, start = prefix.rpartition("/")
                self.assertTrue(list((ROOT / folder).glob(start + "*")), f"{name}: {prefix}")


class Shards(unittest.TestCase):
    def test_together_they_are_all(self):
        for n in range(1, len(PARTS) + 1):
            shards = run_all.deal_shards(SUITES, n)
            self.assertEqual(len(shards), n)
            self.assertEqual(sorted(name for shard in shards for name in shard), sorted(PARTS))
            self.assertTrue(all(shards))

    def test_what_is_changed_comes_first(self):
        for turn in range(10):
            order = run_all.touched_first(PARTS, ["src/kernels/metal/attend.metal", "tests/metal/shim.h"], turn)
            self.assertEqual((order[0], sorted(order)), ("metal", sorted(PARTS)))
        self.assertEqual({run_all.touched_first(PARTS, [], turn)[0] for turn in range(len(PARTS))}, set(PARTS))

    def test_builds_come_before_those_that_need_them(self):
        suites = [Suite("a", [], builds=("asan",)), Suite("b", [], builds=("asan", "release"))]
        self.assertEqual([build.name for build in run_all.chosen_builds(suites)], ["release", "asan"])

    def test_shards_that_do_not_exist(self):
        for text in ("0/2", "3/2", "1/99", "1", "a/b", "1/0"):
            with self.assertRaises(run_all.argparse.ArgumentTypeError):
                run_all.shard(text)


class Counts(unittest.TestCase):
    def run_suite(self, output, missing="", optional=False, status=0):
        with tempfile.TemporaryDirectory() as folder:
            run_all.LOGS, kept = Path(folder), run_all.LOGS
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    command = ["sh", "-c", f"printf '{output}'; exit {status}"]
                    suite = Suite("a", [(command, {})], missing=missing, optional=optional)
                    return run_all.run_suite(suite, run_all.Durations(Path(folder) / "none"))
            finally:
                run_all.LOGS = kept

    def test_counts(self):
        self.assertEqual(self.run_suite("3 passed, 0 failed\\n2 passed, 0 failed\\n"), (5, 0))
        self.assertEqual(self.run_suite("[  PASSED  ] 7 test(s).\\n"), (7, 0))
        self.assertEqual(self.run_suite("[  PASSED  ] 7 test(s).\\n[  FAILED  ] 2 test(s)\\n", status=1), (7, 2))

    def test_what_counts_nothing_or_dies_has_failed(self):
        self.assertEqual(self.run_suite("well done"), (0, 1))
        self.assertEqual(self.run_suite("0 passed, 0 failed\\n"), (0, 1))
        self.assertEqual(self.run_suite("3 passed, 0 failed\\n", status=3), (3, 1))

    def test_skipped_in_ci_is_failed(self):
        with unittest.mock.patch.dict(run_all.os.environ, {"CI": "true"}):
            self.assertEqual(self.run_suite("", missing="no compiler"), (0, 1))
            self.assertEqual(self.run_suite("", missing="no GPU", optional=True), (0, 0))
        with unittest.mock.patch.dict(run_all.os.environ, {"CI": ""}):
            self.assertEqual(self.run_suite("", missing="no compiler"), (0, 0))


if __name__ == "__main__":
    main()
