# SPDX-License-Identifier: MIT
"""host_test.c on the real model with each device, and on random models of all shapes; clients_host.c on the real model."""
import re

from common import (EXACT_VALUES, FEW_AND_MANY, MODEL, NOT_PLAIN, PLAIN, PLAIN_MAX_KL, PLUGIN, THREADS, TestCase, build_host,
                    main, path_from_env, run, served, tiny_model)

ARCHS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3n", "gemma4", "phi3", "gpt-oss", "mpt", "deepseek2"]


class HostCase(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.host = build_host("host_test.c", cls.directory)

    def check(self, model, *arguments, **variables):
        result = run([self.host, PLUGIN, model, *arguments, "--threads", THREADS], timeout=600, **variables)
        print(result.log)
        self.assert_ok(result)
        self.assertRegex(result.log.splitlines()[-1], r"^[1-9]\d* passed, 0 failed$")


class Hosts(HostCase):
    """Each kind of cache once: whole, with windows, shared by layers, of one latent; with key biases; without quantization."""

    def test_quantized(self):
        for arch in served("llama", "gemma3", "gemma4", "deepseek2"):
            with self.subTest(arch):
                self.check(tiny_model(arch), "TQ4")

    def test_outlier_keys(self):
        # Of qwen2's keys, which have large biases; also after a restored state or a context shift.
        self.check(tiny_model("qwen2"), "TQ4", TQ_GGML=EXACT_VALUES)

    def test_without_quantization(self):
        self.check(tiny_model("gemma2"), "TQ4", "--max-kl", PLAIN_MAX_KL, TQ_GGML=PLAIN)

    def test_states_are_exact_without_references(self):
        self.check(tiny_model("llama"), "TQ4", TQ_GGML="ref=0")

    def test_the_divergence_is_measured(self):
        # A bound that no 2-bit cache keeps: the host must be able to fail.
        result = run([self.host, PLUGIN, tiny_model("llama"), "TQ2", "--max-kl", "1e-6"])
        self.assertNotEqual(result.status, 0)
        self.assertIn("FAILED: decode", result.log)


class AllHosts(HostCase):
    """All devices, shapes and options."""

    def test_real_model(self):
        self.check(MODEL, "TQ6", "TQ4", "TQ3", "TQ2")

    def test_states_are_exact_without_references(self):
        self.check(tiny_model("llama"), "TQ6", "TQ2", TQ_GGML="ref=0")

    def test_every_shape_without_quantization(self):
        for arch in served(*ARCHS):
            if arch in NOT_PLAIN:
                continue
            with self.subTest(arch):
                self.check(tiny_model(arch), "TQ4", "--max-kl", PLAIN_MAX_KL, TQ_GGML=PLAIN)

    def test_every_shape_quantized(self):
        # qwen2's keys have large biases, which make random attention look at few tokens each: there the values' error shows in
        # full. gpt-oss chooses experts: where two are nearly as good, any error may take the other.
        options = {"qwen2": {"TQ_GGML": EXACT_VALUES}}
        bounds = {"gpt-oss": ("--max-kl", "0.3")}
        for arch in served(*ARCHS):
            with self.subTest(arch):
                self.check(tiny_model(arch), "TQ6", "TQ4", *bounds.get(arch, ()), **options.get(arch, {}))

    def test_every_head_dim(self):
        for head_dim in (32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 512):
            with self.subTest(head_dim):
                model = tiny_model(f"llama_{head_dim}", "--arch", "llama", "--head-dim", str(head_dim))
                self.check(model, "TQ6", "TQ4")

    def test_no_exact_tokens_and_many(self):
        for options in FEW_AND_MANY:
            with self.subTest(options):
                self.check(tiny_model("llama"), "TQ4", "--max-kl", "0.1", TQ_GGML=options)


class Clients(TestCase):
    """Sequences that share the cells (-kvu): whoever comes second, third or again is answered as the first one is."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.host = build_host("clients_host.c", cls.directory)

    def divergences(self, n_clients, n_tokens, **variables):
        result = run([self.host, PLUGIN, MODEL, "TQ4", path_from_env("TQ_TEXT"), n_clients, n_tokens, THREADS], timeout=900,
                     **variables)
        print(result.log)
        self.assert_ok(result)
        return [float(kl) for kl in re.findall(r"client \d+: (\S+)", result.log)]

    def test_each_client_is_answered_as_the_first(self):
        first, *others = self.divergences(3, 512)
        self.assertEqual(len(others), 5)
        self.assertLess(max(others), 1.1 * first)

    def test_without_places_the_second_is_not(self):
        first, second, *_ = self.divergences(2, 384, TQ_GGML="sequences=0")
        self.assertGreater(second, 1.3 * first)


if __name__ == "__main__":
    main()
