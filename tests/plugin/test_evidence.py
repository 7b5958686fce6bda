#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""bench/evidence.py on a small random model: rows, tables and plot, and that a second run measures what is missing, only."""
import contextlib
import io
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import common
from eval.arguments import parse_arguments

sys.path.insert(0, str(common.ROOT / "bench"))
import evidence  # noqa: E402

STEPS = [evidence.Step("tiny", text, 256, "q8_0") for text in ("austen", "csource")]


class Runs(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        model = common.tiny_model("llama")
        for kind, source, names in (("models", model, [model.name]), ("text", common.path_from_env("TQ_TEXT"), [
                f"{text}.txt" for text in evidence.TEXTS])):
            (self.folder / kind).mkdir()
            for name in names:
                (self.folder / kind / name).symlink_to(source)
        self.csv = self.folder / f"{self.folder.name}.csv"
        self.addCleanup(shutil.rmtree, common.ROOT / "build" / f"{self.csv.name}.work", True)
        self.enterContext(mock.patch.dict(os.environ, TQ_DEPS_DIR=str(self.folder)))
        self.enterContext(mock.patch.multiple(evidence, MODELS={"tiny": (model.name, 2048)}, steps=lambda *_: STEPS))

    def run_evidence(self):
        """(status, standard output, the words of each tq eval)"""
        out, calls, run = io.StringIO(), [], evidence.subprocess.run

        def counted(words, **more):
            calls.append(words)
            return run(words, **more, stderr=evidence.subprocess.DEVNULL)

        with mock.patch.object(sys, "argv", ["evidence.py", "--csv", str(self.csv), "--models", "tiny", "--threads", "1"]), \
                mock.patch.object(evidence.subprocess, "run", counted), contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(io.StringIO()):
            return evidence.main(), out.getvalue(), [words for words in calls if "eval" in map(str, words)]

    def test_rows_tables_and_what_is_there_already(self):
        status, out, calls = self.run_evidence()
        self.assertEqual((status, len(calls)), (0, 2))
        rows = evidence.read_rows(self.csv)
        names = ["f16", "f16 -fa off", "q8_0", "TQ6", "TQ4", "TQ3", "TQ2"]
        self.assertEqual([(row["text"], row["name"]) for row in rows],
                         [(step.text, name) for step in STEPS for name in names])
        for row in rows:
            self.assertTrue(row["commit"] and row["machine"] and len(row["model_sha256"]) == 12)
            self.assertEqual(float(row["kld_mean"]) == 0, row["name"] == "f16")
            self.assertNotIn(str(common.ROOT), row["command"])
        self.assertIn("### tiny, csource, 256 tokens", out)
        self.assertEqual(out.count("| TQ4 |"), 2)
        svg = self.csv.with_suffix(".svg").read_text()
        self.assertTrue(svg.startswith("<svg") and "tiny, austen" in svg)

        self.assertEqual(self.run_evidence(), (0, out, []))
        self.csv.unlink()
        others = [row for row in rows if (row["text"], row["name"]) != ("austen", "TQ3")]
        evidence.append_rows(self.csv, evidence.COLUMNS, others)
        status, _, (words,) = self.run_evidence()
        self.assertEqual((status, words[words.index("--presets") + 1]), (0, "TQ3"))
        self.assertEqual(len(evidence.read_rows(self.csv)), len(rows))

    def test_failures(self):
        with mock.patch.object(evidence, "steps", lambda *_: [evidence.Step("tiny", "austen", 1 << 20, "q8_0"), *STEPS[:1]]):
            status, out, calls = self.run_evidence()
        self.assertEqual((status, len(calls)), (1, 2))  # the model was made for fewer tokens; the next window is measured
        self.assertIn("### tiny, austen, 256 tokens", out)


class Arithmetic(unittest.TestCase):
    def test_steps(self):
        quick, full = (evidence.steps(quick, list(evidence.MODELS)) for quick in (True, False))
        self.assertLess(sum(step.work for step in quick), sum(step.work for step in full) / 50)
        for step in quick + full:
            self.assertLessEqual(step.n_ctx, evidence.MODELS[step.model][1])
        self.assertEqual({(step.text, step.n_ctx) for step in full if step.model == "qwen2.5-0.5b"},
                         {(text, n_ctx) for text in evidence.TEXTS for n_ctx in (4096, 8192)} |
                         {("austen", 32768), (evidence.NEEDLES, 4096)})

    def test_needles_measure_no_window(self):
        step = evidence.Step("smollm2-135m", evidence.NEEDLES, 1024, "q4_0")
        words = step.words(Path("models"), Path("text"), ["TQ4", "q4_0"])
        args = parse_arguments(list(map(str, words)))
        self.assertEqual((args.context, args.needle, args.presets, args.baselines), ([], [1024], ["TQ4"], ["q4_0"]))

    def test_time_left(self):
        self.assertIn("not known", evidence.time_left([], 5))
        self.assertEqual(evidence.time_left([(100, 60), (100, 180)], 300), "some 6 minutes left")


if __name__ == "__main__":
    common.main()
