# SPDX-License-Identifier: MIT
"""Stock command-line tools with the plug-in: placement, memory, loading modes, context shift, states."""
import os
import re
import subprocess

from common import LLAMA_BIN, MODEL, THREADS, TestCase, complete, environment, main, run, tiny_model, with_last_words


def kv_mib(result, buffer="TQ4_KV"):
    return float(re.search(rf"{buffer} KV buffer size = +([\d.]+) MiB", result.lines(f"{buffer} KV buffer size")[-1])[1])


def bound_mib(result):
    return float(re.search(r"([\d.]+) MiB,", result.lines("turboquant: TQ4 holds the KV cache")[-1])[1])


class Tools(TestCase):
    def test_the_real_model_answers(self):
        for device in ("TQ6", "TQ4"):
            result = complete(MODEL, device=device, n=6)
            self.assert_ok(result)
            self.assertIn("The capital of France is Paris", result.log)

    def test_outputs_larger_than_a_layers_cache(self):
        # After a measuring run the host asks for the memory of its outputs; 49152 logits are more than 256 cells.
        result = complete(MODEL, "-c", "256", "-fit", "on", n=4)
        self.assert_ok(result)
        self.assertIn("The capital of France is Paris", result.log)

    def test_the_reported_size_is_the_compressed_one(self):
        plain = complete(MODEL, "-c", "4096", device="none")
        fitted = complete(MODEL, "-c", "4096", "-fit", "on")
        unfitted = complete(MODEL, "-c", "4096", "-fit", "off")
        for result in (plain, fitted, unfitted):
            self.assert_ok(result)
        f16 = kv_mib(plain, "CPU")
        # With --fit a measuring run tells the head_dim beforehand; without, the first figure is an upper bound.
        self.assertAlmostEqual(kv_mib(fitted), bound_mib(fitted), delta=0.02)
        self.assertAlmostEqual(bound_mib(fitted), bound_mib(unfitted), delta=0.001)
        self.assertGreaterEqual(kv_mib(unfitted) + 0.01, bound_mib(unfitted))
        self.assertLess(bound_mib(fitted), 0.3 * f16)
        self.assertGreater(bound_mib(fitted), 0.25 * f16)

    def test_a_cache_that_is_not_written_takes_no_memory(self):
        def peak_mib(n_ctx):
            command = [LLAMA_BIN / "llama-completion", "-m", MODEL, "-dev", "TQ6", "-t", "1", "-p", "hi", "-n", "2", "-no-cnv",
                       "-fit", "off", "-ub", "32", "-c", str(n_ctx)]
            process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL, env=environment())
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
            self.assertEqual(status, 0)
            return usage.ru_maxrss / 1024

        small, large = peak_mib(512), peak_mib(32768)
        # 32768 cells are 371 MiB; llama.cpp's own tables of cells grow with them too.
        self.assertLess(large - small, 60)

    def test_loading_modes(self):
        for mode in ("none", "mmap"):
            result = complete(tiny_model("llama"), "-lm", mode)
            self.assert_ok(result)
            self.assert_line(result, "turboquant: TQ4 holds the KV cache")

    def test_some_layers_on_the_device(self):
        # The output layer counts as one.
        result = complete(tiny_model("qwen3"), "-ngl", "2")
        self.assert_ok(result)
        self.assert_line(result, "CPU KV buffer size")
        self.assert_line(result, "TQ4_KV KV buffer size")

    def test_two_presets_share_the_layers(self):
        result = complete(tiny_model("gemma3"), device="TQ4,TQ2")
        self.assert_ok(result)
        for name in ("TQ4", "TQ2"):
            self.assert_line(result, f"turboquant: {name} holds the KV cache")

    def test_all_splits_are_without_copies(self):
        result = complete(tiny_model("llama"), "-lv", "5", n=1, GGML_SCHED_DEBUG="2")
        self.assert_ok(result)
        splits = result.lines("## SPLIT", "TQ4")
        self.assertTrue(splits)
        for line in splits:
            self.assertRegex(line, r"# 0 inputs")

    def test_context_shift(self):
        for name in ("llama", "deepseek2"):
            result = complete(tiny_model(name), "-c", "256", "--context-shift", "--ignore-eos", "-lv", "5", n=400)
            self.assert_ok(result)
            self.assert_line(result, "applying K-shift")
            self.assertNotIn("turboquant: TQ4 refuses", result.log)

    def test_prompt_cache_file(self):
        path = self.directory / "prompt.bin"
        prompt = "In the beginning God created the heaven and the earth. And the earth was without form, and void; " * 8
        texts = []
        for _ in range(2):
            result = complete(MODEL, "--prompt-cache", path, "--prompt-cache-all", prompt=prompt, n=0)
            self.assert_ok(result)
            texts.append(result.log)
        self.assertTrue(path.exists())
        self.assertIn("loaded a session", texts[1])

    def test_bench_and_perplexity(self):
        result = run([LLAMA_BIN / "llama-bench", "-m", tiny_model("llama"), "-dev", "TQ3", "-p", "64", "-n", "8", "-r", "1",
                      "-t", THREADS, "-d", "0,256"])
        self.assert_ok(result)
        text = self.directory / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
        command = [LLAMA_BIN / "llama-perplexity", "-m", tiny_model("llama"), "-dev", "TQ4", "-ngl", "99", "-f", text, "-c",
                   "512", "--chunks", "2", "-t", THREADS]
        self.assert_ok(with_last_words("Final estimate: PPL", lambda: run(command)))


if __name__ == "__main__":
    main()
