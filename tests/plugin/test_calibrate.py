#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A calibration, made by tq calibrate from a real model at work in stock llama.cpp, and used there."""
import re
import subprocess
import sys

import common
from common import LLAMA_BIN, MODEL, PLUGIN, SETUP, complete, run, tiny_model
from eval.llama import F16, Cache, run_tool
from eval.quality import parse_statistics

TEXT = common.path_from_env("TQ_TEXT")
N_CTX = 768


class Calibration(common.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.path = cls.directory / "model.tqcal"
        command = [PLUGIN.parent / "tq", "calibrate", MODEL, "--text", TEXT, "-o", cls.path, "--context", str(N_CTX),
                   "--chunks", "1", "--llama-bin", LLAMA_BIN, "--plugin", PLUGIN, "--threads", str(common.THREADS)]
        cls.printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300,
                                     env=common.environment(TQ_PYTHON=sys.executable)).stdout

    def test_what_was_learnt(self):
        self.assertIn("30 layers of 3 KV heads, head_dim 64, from 1 windows", self.printed)
        gain = float(re.search(r"by a factor of ([\d.]+) \(median", self.printed)[1])
        print(f"gain {gain}")
        self.assertGreater(gain, 1.5)
        self.assertLess(gain, 10)

    def perplexity(self, cache, *arguments):
        base = self.directory / "base"
        return run_tool(SETUP, cache, "perplexity", ["-f", TEXT, "-c", N_CTX, "-b", "512", "--chunks", "1",
                                                     "--kl-divergence-base", base, *arguments]).log

    def test_divergence_falls(self):
        """On the text that it was learnt from, the gain is far above what noise is."""
        self.perplexity(F16)
        plain, calibrated = (parse_statistics(self.perplexity(Cache(f"TQ2:k=tt2,v=sq8{more}"), "--kl-divergence"))
                             for more in (",factors=off", f",calibration={self.path}"))
        print(f"divergence {calibrated['kld_mean']} of {plain['kld_mean']} with a calibration")
        self.assertLess(calibrated["kld_mean"], 0.85 * plain["kld_mean"])

    def test_its_bytes_are_counted(self):
        def mib(**variables):
            result = complete(MODEL, "-c", "1024", n=2, **variables)
            self.assert_ok(result)
            return float(re.search(r"([\d.]+) MiB, [\d.]+ bits", result.lines("TQ4 holds the KV cache")[-1])[1])

        row = sum(16 * (i // 16 + 1) for i in range(64))  # values of one head's matrix in memory
        self.assertAlmostEqual(mib(TQ_GGML=f"calibration={self.path}") - mib(), 30 * 3 * row * 2 / 2**20, delta=0.02)

    def test_devices_say_so(self):
        result = run([LLAMA_BIN / "llama-completion", "--list-devices"], TQ_GGML=f"calibration={self.path}")
        self.assert_line(result, "TQ4: ", "keys tt4 (calibrated), values tt4")

    def test_another_model_is_refused(self):
        result = complete(tiny_model("qwen3"), TQ_GGML=f"calibration={self.path}")
        self.assertNotEqual(result.status, 0)
        self.assert_line(result, "layer 0 keys: the calibration (of ", "it is of another model")

    def test_bad_files_are_refused(self):
        cut = self.directory / "cut.tqcal"
        cut.write_bytes(self.path.read_bytes()[:-7])
        for path, words in ((cut, "damaged, cut off"), (self.directory / "missing", "cannot open")):
            result = complete(tiny_model("llama"), TQ_GGML=f"calibration={path}")
            self.assertNotEqual(result.status, 0)
            self.assert_line(result, words)
            self.assert_line(result, "not loaded: calibration=")

    def test_what_cannot_be_observed(self):
        result = complete(tiny_model("llama"), TQ_GGML="k=f16,v=f16,observe=/nonexistent/records")
        self.assertNotEqual(result.status, 0)
        self.assert_line(result, "observe=/nonexistent/records: it can't be written: No such file")


if __name__ == "__main__":
    common.main()
