# SPDX-License-Identifier: MIT
"""What the device can't serve is refused with the reason, before any token."""
import shutil

import gguf
import numpy as np

from common import LLAMA_BIN, TestCase, complete, main, run, tiny_model

PROMPT = "refused before this is answered"


class Refusals(TestCase):
    def assert_refused(self, result, *words):
        """No context is made, and the process ends by itself, with our message last."""
        self.assertEqual(result.status, 1, result.log[-2000:])
        self.assert_line(result, "turboquant: ", "refuses", *words)
        self.assertNotIn("eval time", result.log)
        last = result.log.splitlines()[-1]
        self.assertTrue(last.startswith("turboquant: TQ4 refuses"), result.log[-2000:])
        self.assertTrue(all(word in last for word in words), last)

    def test_flash_attention_off(self):
        for fit in ("on", "off"):
            result = complete(tiny_model("llama"), "-fa", "off", "-fit", fit, prompt=PROMPT)
            self.assert_refused(result, "layer 0 values", "flash attention is off")

    def test_cache_types_other_than_f16(self):
        for arguments, shown in ((("-ctk", "q8_0", "-ctv", "q8_0"), "q8_0"), (("-ctk", "q4_0"), "cache_k_l"),
                                 (("-ctv", "q8_0"), "cache_v_l"), (("-ctk", "bf16"), "bf16"), (("-ctk", "f32"), "f32")):
            with self.subTest(shown):
                result = complete(tiny_model("llama"), "-fa", "on", *arguments, prompt=PROMPT)
                self.assert_refused(result, shown, "leave --cache-type-k and --cache-type-v at f16")

    def test_head_dim_without_a_rotation(self):
        # Rows of 2 * 56 = 112 might be one head of 112: only the attention tells.
        model = tiny_model("llama_56", "--arch", "llama", "--head-dim", "56")
        for fa in ("on", "auto"):
            self.assert_refused(complete(model, "-fa", fa, prompt=PROMPT), "its head_dim is 56; supported are 32, 40, 48")

    def test_other_tools_end_by_themselves_too(self):
        model = tiny_model("llama_56", "--arch", "llama", "--head-dim", "56")
        for tool, arguments in (("server", ("--port", "0")), ("bench", ("-p", "8", "-n", "0", "-r", "1", "-fa", "1"))):
            with self.subTest(tool):
                result = run([LLAMA_BIN / f"llama-{tool}", "-m", model, "-dev", "TQ4", "-ngl", "99", "-t", "1", *arguments])
                self.assert_refused(result, "its head_dim is 56")

    def test_rows_that_no_head_dim_divides(self):
        model = tiny_model("llama_56_1", "--arch", "llama", "--head-dim", "56", "--n-head-kv", "1")
        self.assert_refused(complete(model, prompt=PROMPT), "no supported head_dim divides its rows")

    def test_a_device_that_gets_no_cache_says_so(self):
        for arguments in (("-ngl", "0"), ("-nkvo",)):
            result = complete(tiny_model("llama"), *arguments)
            self.assert_ok(result)
            self.assert_line(result, "turboquant: TQ4 was chosen, but no KV cache was put on it")

    def test_nan_in_keys_and_values_is_refused_with_its_place(self):
        for tensor, place in (("blk.1.attn_k.bias", "layer 1 keys: head 1 of slot 0"),
                              ("blk.2.attn_v.bias", "layer 2 values: head 1 of slot 0")):
            with self.subTest(tensor):
                path = self.directory / "nan.gguf"
                shutil.copy(tiny_model("qwen2"), path)
                reader = gguf.GGUFReader(path, "r+")
                data = next(t for t in reader.tensors if t.name == tensor).data
                data[64 + 5] = np.nan  # head 1's sixth value
                reader.data.flush()
                del data, reader
                result = complete(path, "-fit", "off", "--no-warmup", prompt=PROMPT)
                self.assertNotEqual(result.status, 0)
                self.assert_line(result, "turboquant: ", place, "NaN")


if __name__ == "__main__":
    main()
