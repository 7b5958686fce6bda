# SPDX-License-Identifier: MIT
"""
Factors of key channels from the weights, in stock llama.cpp: found in every kind of graph, and what they bring. The model with
outliers is a random Qwen2, whose keys have large biases; values are FP16, since attention on few tokens shows their error.
"""
import re
import shutil

from gguf import GGUFReader

from common import EXACT_VALUES, LLAMA_BIN, TestCase, complete, main, path_from_env, run, served, tiny_model, with_last_words

TEXT = path_from_env("TQ_TEXT")
ARCHS = ("llama", "qwen2", "qwen2vl", "qwen3", "gemma2", "gemma3", "gemma3n", "gemma4", "phi3", "gpt-oss", "mpt", "deepseek2")
NOT_UNDERSTOOD = "projects its queries and keys is not understood"


class Factors(TestCase):
    def divergence(self, options):
        command = [LLAMA_BIN / "llama-perplexity", "-m", tiny_model("qwen2"), "-f", TEXT, "-c", 512, "-b", 512, "--chunks", 1,
                   "-t", 1, "-fa", "on", "--kl-divergence-base", self.directory / "logits"]
        base = self.directory / "logits"
        if not base.exists():
            self.assert_ok(run([*command, "-dev", "none"]))
        result = with_last_words("Mean    KLD", lambda: run([*command, "--kl-divergence", "-dev", "TQ4", "-ngl", 99],
                                                            TQ_GGML=options))
        self.assert_ok(result)
        return float(re.search(r"Mean\s+KLD:\s+(\S+)", result.log)[1])

    def test_every_graph_is_understood(self):
        for arch in served(*ARCHS):
            with self.subTest(arch):
                result = complete(tiny_model(arch), TQ_GGML=EXACT_VALUES)
                self.assert_ok(result)
                self.assertEqual(bool(result.lines(NOT_UNDERSTOOD)), arch == "deepseek2", result.log[-2000:])

    def test_what_is_not_understood_has_8_bits(self):
        result = complete(tiny_model("deepseek2"))
        self.assert_ok(result)
        self.assert_line(result, NOT_UNDERSTOOD, "its keys have 8 bits", "factors=off")
        chosen = complete(tiny_model("deepseek2"), TQ_GGML="k=tt4")
        self.assert_line(chosen, NOT_UNDERSTOOD, "the format that k= gives")
        self.assertEqual(complete(tiny_model("deepseek2"), TQ_GGML="factors=off").lines(NOT_UNDERSTOOD), [])

        def bits(found):
            return float(re.search(r"([\d.]+) bits per value", found.lines("holds the KV cache")[0])[1])

        self.assertGreater(bits(result), bits(chosen) + 1)

    def test_parts_of_a_fused_projection_are_told_apart(self):
        """phi3 has queries, keys and values in one weight. Only the first two decide how far logits are spread."""
        for name, first, end, is_raised in (("queries", 0, 384, True), ("keys", 384, 576, True), ("values", 576, 768, False)):
            with self.subTest(name):
                path = self.directory / f"{name}.gguf"
                shutil.copy(tiny_model("phi3"), path)
                weights = [tensor.data for tensor in GGUFReader(path, "r+").tensors if tensor.name == "blk.0.attn_qkv.weight"]
                self.assertEqual(weights[0].shape, (768, 384))
                weights[0][first:end] *= 40
                result = complete(path)
                self.assert_ok(result)
                self.assertEqual(bool(result.lines("guard: layer 0: by the model's weights")), is_raised)

    def test_they_lower_the_divergence(self):
        with_factors = self.divergence(f"k=sq8,{EXACT_VALUES}")
        without = self.divergence(f"k=sq8,{EXACT_VALUES},factors=off")
        print(f"divergence {with_factors} of {without} without factors")
        self.assertLess(with_factors, 0.8 * without)

    def test_the_guard_raises_what_factors_do_not_cure(self):
        guarded = self.divergence(EXACT_VALUES)
        not_guarded = self.divergence(f"{EXACT_VALUES},guard=off")
        print(f"divergence {guarded} of {not_guarded} without the guard")
        self.assertLess(guarded, 0.2 * not_guarded)


if __name__ == "__main__":
    main()
