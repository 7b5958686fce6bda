# SPDX-License-Identifier: MIT
"""Key biases of a random Qwen2, and of a Qwen2-VL, whose RoPE has several axes, over many batches, by stock llama-perplexity:
what its keys cost with and without them. Values are FP16, since attention on few tokens shows theirs."""
import re

from common import LLAMA_BIN, TestCase, main, path_from_env, run, tiny_model, with_last_words

TEXT = path_from_env("TQ_TEXT")


class KeyBiases(TestCase):
    def perplexity(self, model, batch, last_words, *arguments, **variables):
        command = [LLAMA_BIN / "llama-perplexity", "-m", tiny_model(model), "-f", TEXT, "-c", 512, "-b", batch, "-ub", batch,
                   "--chunks", 1, "-t", 1, "-fa", "on", "--kl-divergence-base", self.directory / "logits", *arguments]
        result = with_last_words(last_words, lambda: run(command, **variables))
        self.assert_ok(result)
        return result

    def divergence(self, model, batch, options):
        result = self.perplexity(model, batch, "Mean    KLD", "--kl-divergence", "-dev", "TQ4", "-ngl", 99, TQ_GGML=options)
        return float(re.search(r"Mean\s+KLD:\s+(\S+)", result.log)[1])

    def check_positions(self, model):
        self.perplexity(model, 512, "", "-dev", "none")
        for batch in (32, 512):
            with self.subTest(batch):
                kept = self.divergence(model, batch, "k=tq8,v=f16,guard=off")
                coded = self.divergence(model, batch, "k=tq8,v=f16,guard=off,bias=off")
                print(f"divergence {kept} of {coded} without biases in the keys")
                self.assertLess(kept, 0.005)
                self.assertGreater(coded, 10 * kept)

    def test_positions_follow_the_text(self):
        self.check_positions("qwen2")

    def test_positions_on_several_axes(self):
        self.check_positions("qwen2vl")


if __name__ == "__main__":
    main()
