# SPDX-License-Identifier: MIT
"""The whole log of llama.cpp's programs: tools/flush_log.c, and what is done where it cannot help."""
import os
import subprocess
import unittest

from common import PLUGIN, Result, TestCase, build_host, main, preload, with_last_words
from eval.llama import LOG_TRIES, LlamaError

LAST_LINE = b"line 400: "


class Flush(TestCase):
    """A host whose log does not fit into the pipe that it goes to, so that its thread is still writing when main returns."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.host = build_host("log_host.c", cls.directory, libraries=("llama-common",))

    def test_all_is_written(self):
        """The pipe is not read before main is done. Without the library this process mostly ends there and then, or hangs."""
        process = subprocess.Popen([self.host], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=preload(os.environ, PLUGIN))
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), b"main is done\n")
        lines = process.stderr.read().splitlines()
        self.assertEqual(process.wait(60), 0)
        self.assertEqual(len(lines), 400)
        self.assertTrue(lines[-1].startswith(LAST_LINE))

    def test_other_programs_do_not_notice(self):
        done = subprocess.run(["sh", "-c", "echo hello; exit 3"], capture_output=True, text=True,
                              env=preload({"PATH": os.environ["PATH"]}, PLUGIN))
        self.assertEqual((done.returncode, done.stdout, done.stderr), (3, "hello\n", ""))


class Environment(unittest.TestCase):
    def test_what_is_preloaded_already_stays(self):
        library = PLUGIN.parent / "libtq-flush-log.so"
        self.assertEqual(preload({}, PLUGIN)["LD_PRELOAD"], str(library))
        self.assertEqual(preload({"LD_PRELOAD": "libother.so"}, PLUGIN)["LD_PRELOAD"], f"libother.so {library}")

    def test_without_the_library_nothing_is_preloaded(self):
        self.assertEqual(preload({"A": "b"}, PLUGIN.parent / "nowhere/plugin.so"), {"A": "b"})


class Repetition(unittest.TestCase):
    def run_with(self, *logs, status=0):
        """with_last_words on runs with these logs; returns its result and the number of runs."""
        results = [Result(log, "", status, 0, 0, "the command") for log in logs]
        runs = iter(results)
        done = with_last_words("the end", lambda: next(runs))
        return done, results.index(done) + 1

    def test_a_cut_log_is_had_again(self):
        done, n_runs = self.run_with("begin", "begin, mid", "begin, middle, the end")
        self.assertEqual((done.log, n_runs), ("begin, middle, the end", 3))

    def test_a_failure_is_no_cut_log(self):
        self.assertEqual(self.run_with("error", "the end", status=1)[1], 1)

    def test_the_end_never_comes(self):
        with self.assertRaisesRegex(LlamaError, f"no 'the end', in {LOG_TRIES} runs: the command"):
            self.run_with(*LOG_TRIES * ["begin"])


if __name__ == "__main__":
    main()
