#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""bench/llama_cuda.py without a GPU: what it reads and adds up, its commands, and all parts with the devices of the CPU."""
import contextlib
import io
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import common
from eval.llama import LlamaError

sys.path.insert(0, str(common.ROOT / "bench"))
import figures  # noqa: E402
import llama_clients  # noqa: E402
import llama_cuda  # noqa: E402
from rows import read_rows  # noqa: E402

# Of a run that ended while it wrote its third line. check_style.py wants files to end in a newline.
PRINTED = (Path(__file__).parent / "data/llama_bench.jsonl").read_text().rstrip("\n")
SMALL = {"--rounds": 2, "--depths": "0,64", "--n-gen": 2, "--prompts": "32,64", "--kl-context": 256, "--kl-chunks": 1,
         "--kl-single": 256, "--memory-contexts": 256, "--server-context": 2048, "--slots": 2, "--clients": 3, "--requests": 4,
         "--n-predict": 4, "--soak-requests": 6, "--threads": common.THREADS}


def run_bench(*more, **options):
    """(status, standard output) of a call with small sizes on the CPU."""
    given = {"--llama": common.LLAMA_BIN, "--plugin": common.PLUGIN, "--model": common.tiny_model("llama"),
             "--text": common.path_from_env("TQ_TEXT"), "--devices": "none,TQ4", "--stock": "f16,q4_0", **SMALL,
             **{f"--{name}": value for name, value in options.items()}}
    words = [str(word) for pair in given.items() for word in pair]
    out = io.StringIO()
    with mock.patch.object(sys, "argv", ["llama_cuda.py", *words, *more]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(io.StringIO()):
        return llama_cuda.main(), out.getvalue()


class Parsing(unittest.TestCase):
    def test_lines_of_llama_bench(self):
        found = llama_cuda.parse_bench(PRINTED, "n_depth")
        self.assertEqual(list(found), [0, 256])
        self.assertTrue(all(value > 1 for value in found.values()))
        self.assertEqual(llama_cuda.parse_bench("", "n_depth"), {})

    def test_ratios_are_of_the_same_round(self):
        # The second round was twice as fast for both; f16 has no third one.
        samples = {"f16": {0: {0: 100.0, 1: 200.0}}, "TQ4": {0: {0: 90.0, 1: 220.0, 2: 500.0}}}
        (_, _, stock), (name, size, ours) = llama_cuda.speed_rows(samples)
        self.assertEqual((name, size, ours["value"], ours["rounds"]), ("TQ4", 0, 220.0, 3))
        self.assertEqual((ours["ratio_to_f16"], ours["ratio_min"], ours["ratio_max"]), ("1.000", "0.900", "1.100"))
        self.assertEqual(stock["ratio_to_f16"], "1.000")

    def test_reasons(self):
        log = "CUDA error: no memory\n0.01 I failed: 0\n#1 0x7f in raise"
        for text, told in (("took longer than 3 s", "took longer than 3 s"), ("", "LlamaError('')"),
                           (f"ended with -6: llama-bench -m x: y\n{log}", "ended with -6: CUDA error: no memory"),
                           ("ended with 1: x\none\ntwo", "ended with 1: two")):
            self.assertEqual(llama_cuda.reason(LlamaError(text)), told)

    def test_a_passwords_way_into_another_answer(self):
        prompts = llama_clients.make_prompts("x" * 5000, 3, 1000, seed=1)
        self.assertEqual(len({prompt.canary for prompt in prompts}), 3)
        replies = [{"content": text, "tokens_predicted": 5} for text in (prompts[0].canary, f"of {prompts[0].canary}.")]
        figures = llama_clients.traffic(prompts, [*replies, LlamaError("refused")], 2.0)
        self.assertEqual(figures, {"requests": 3, "failed_requests": 1, "tokens_per_s": 5.0, "passwords_of_others": 1,
                                   "own_passwords": 1})

    def test_failed_requests(self):
        prompts = llama_clients.make_prompts("x" * 500, 3, 300, seed=1)
        reply, refused, died = {"content": ""}, LlamaError("refused"), LlamaError("llama-server died at /completion")
        for replies, is_fatal in (([reply, refused, reply], False), ([refused] * 3, True), ([reply, reply, died], True)):
            server = mock.Mock(post=mock.Mock(side_effect=replies))
            if is_fatal:
                self.assertRaises(LlamaError, llama_clients.ask_all, server, prompts, 1, 4)
            else:
                self.assertEqual(llama_clients.ask_all(server, prompts, 1, 4)[0], replies)

    def test_agreement(self):
        self.assertEqual(llama_clients.agreement(["abcd", "abxy", None], ["abcd", "abcd", "abcd"]),
                         {"compared": 2, "same_answers": 1, "same_part": 0.75})

    def test_a_dry_run_shows_all_commands(self):
        status, out = run_bench("--dry-run", devices="CUDA0,TQ4-CUDA0", depths="0,32768")
        self.assertEqual(status, 0)
        lines = out.splitlines()
        self.assertIn("llama-bench -m llama.gguf -p 0 -n 2 -d 0,32768 -r 1 -o jsonl -ctk q4_0 -ctv q4_0 -dev CUDA0 -ngl 999 "
                      f"-fa on -t {common.THREADS}", lines)
        ours = [line for line in lines if "-dev TQ4-CUDA0" in line]
        self.assertTrue(all(line.startswith("GGML_BACKEND_PATH=libggml-turboquant.so ") for line in ours))
        self.assertEqual(sum("TQ_GGML=k=sq4,v=sq4" in line for line in ours), len(ours) / 2)
        for tool in ("bench", "perplexity", "server"):
            self.assertTrue(any(f"llama-{tool}" in line for line in ours), tool)
        self.assertNotIn(str(common.ROOT), out)
        self.assertEqual(out.count("-np 2 -kvu "), run_bench("--dry-run", "--own-cells")[1].count("-np 2 --no-kv-unified "))


class Runs(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.csv = self.folder / "out.csv"

    def figures(self, **wanted):
        """{(cache, size, figure): row} of the rows that are so."""
        return {(row["cache"], row["size"], row["figure"]): row for row in read_rows(self.csv)
                if all(row[name] == value for name, value in wanted.items())}

    def test_all_parts(self):
        status, out = run_bench(csv=self.csv)
        self.assertEqual(status, 0, out)
        caches = ["f16", "q4_0", "TQ4", "TQ4:k=sq4,v=sq4"]
        for part, sizes in (("decode", ("0", "64")), ("prefill", ("32", "64"))):
            rows = self.figures(part=part)
            self.assertEqual(set(rows), {(cache, size, "tokens_per_s") for cache in caches for size in sizes})
            for row in rows.values():
                self.assertTrue(row["rounds"] == "2" and row["commit"] and row["machine"] and float(row["ratio_to_f16"]) > 0)
        kl = self.figures(part="kl")
        for size in ("256", "256 one by one"):
            self.assertLess(float(kl["f16", size, "kld_mean"]["value"]), 1e-4)
            self.assertLess(float(kl["TQ4", size, "kld_mean"]["value"]), float(kl["q4_0", size, "kld_mean"]["value"]))
        memory = self.figures(part="memory")
        self.assertGreater(float(memory["f16", "256", "kv_mib"]["value"]), float(memory["TQ4", "256", "kv_mib"]["value"]))
        for part in ("server", "soak"):
            for (cache, _, figure), row in self.figures(part=part).items():
                if figure in ("failed_requests", "passwords_of_others", "errors_logged"):
                    self.assertEqual(row["value"], "0", (cache, figure))
        self.assertEqual(self.figures(part="server")["TQ4", "3 clients", "compared"]["value"], "4")
        self.assertIn(("TQ4", "3 clients", "host_mib_last"), self.figures(part="soak"))

        svg = figures.llama_cuda(self.csv)
        self.assertTrue(svg.startswith("<svg") and "llama in llama.cpp" in svg)
        for name in ("f16", "q4_0", "TQ4"):
            self.assertIn(f"<!-- {name} -->", svg)

    def test_memory_of_the_gpu_is_what_is_used_more_than_before(self):
        # Each call of this one finds 10 MiB more.
        smi, calls = self.folder / "nvidia-smi", self.folder / "calls"
        smi.write_text(f'#!/bin/sh\ncase "$*" in *name*) echo "NVIDIA X, 1.0" ;; '
                       f'*) echo >>{calls}; echo "$(($(wc -l <{calls}) * 10))" ;; esac\n')
        smi.chmod(0o755)
        with mock.patch.dict(os.environ, PATH=f"{self.folder}:{os.environ['PATH']}"):
            self.assertEqual(run_bench(csv=self.csv, only="memory", devices="none", stock="f16")[0], 0)
        row = self.figures(part="memory")["f16", "256", "used_mib"]
        self.assertEqual(float(row["value"]) % 10, 0)
        self.assertGreater(float(row["value"]), 0)
        self.assertTrue(row["machine"].startswith("NVIDIA X, driver 1.0; "))

    def test_what_fails_does_not_keep_the_rest(self):
        model = common.tiny_model("large", "--arch", "llama", "--large", "--n-layer", "2", "--n-embd", "256", "--n-head", "4",
                                  "--n-head-kv", "2", "--head-dim", "64", "--n-ff", "512", "--n-vocab", "1000")
        status, _ = run_bench(csv=self.csv, devices="none,TQ9,TQ4", only="decode,server", model=model)
        self.assertEqual(status, 1)
        for part in ("decode", "server"):
            rows = self.figures(part=part)
            failed = [row for (cache, _, figure), row in rows.items() if figure == "failed"]
            self.assertEqual([row["cache"] for row in failed], ["TQ9"])
            self.assertRegex(failed[0]["error"], "ended with 1|does not start")
            self.assertRegex(failed[0]["error"], "invalid")
            self.assertTrue(any(cache == "TQ4" for cache, _, _ in rows))
        # The same file goes on: what was found stays, and nothing begins when the time is over.
        n_rows = len(read_rows(self.csv))
        self.assertEqual(run_bench(csv=self.csv, only="prefill,kl", budget=0), (0, ""))
        small = {"stock": "f16", "devices": "none", "timeout": 0}
        self.assertEqual(run_bench("--own-cells", csv=self.csv, only="prefill,server", **small)[0], 1)
        self.assertEqual(len(read_rows(self.csv)), n_rows + 3)
        for part, size in (("prefill", ""), ("server", "1 client, own cells"), ("server", "3 clients, own cells")):
            self.assertIn("took longer", self.figures(part=part)["f16", size, "failed"]["error"])


if __name__ == "__main__":
    common.main()
