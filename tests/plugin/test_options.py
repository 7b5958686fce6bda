# SPDX-License-Identifier: MIT
"""The devices as stock tools list them, and the environment variable TQ_GGML."""
import re

from common import LLAMA_BIN, PLUGIN, TestCase, complete, main, run, tiny_model
from eval.llama import path_option

PRESETS = {"TQ6": ("sq8", "tt4", 6.25), "TQ4": ("tt4", "tt4", 4.25), "TQ3": ("tt3", "tt3", 3.25), "TQ2": ("tt3", "tt2", 2.75)}


class Devices(TestCase):
    def list_devices(self, **variables):
        return run([LLAMA_BIN / "llama-completion", "--list-devices"], **variables)

    def test_each_preset_is_a_device_with_its_bits_per_value(self):
        result = self.list_devices()
        for name, (keys, values, nominal) in PRESETS.items():
            line = result.lines(f"{name}: KV cache")[0]
            self.assertIn(f"keys {keys}, values {values}", line)
            bits = float(re.search(r"([\d.]+) bits per value", line)[1])
            self.assertAlmostEqual(bits, nominal, delta=0.3)

    def test_options_show_in_the_description(self):
        result = self.list_devices(TQ_GGML="k=sq8,sinks=7,recent=33")
        for name in ("TQ4", "TQ2"):
            self.assert_line(result, f"{name}: ", f"keys sq8, values {PRESETS[name][1]}", "first 7 and last 33 tokens exact")

    def test_without_a_choice_one_device_gets_all_layers(self):
        # llama-bench loads plug-ins without being told a device.
        result = run([LLAMA_BIN / "llama-bench", "-m", tiny_model("llama"), "-p", 8, "-n", 0, "-r", 1, "-t", 1, "-v"])
        self.assert_ok(result)
        self.assertEqual(len(result.lines("using device")), 1, result.lines("using device"))
        self.assert_line(result, "using device TQ6")


class Options(TestCase):
    def assert_refused(self, text, *words):
        result = complete(tiny_model("llama"), TQ_GGML=text)
        self.assertNotEqual(result.status, 0, text)
        self.assert_line(result, "turboquant: not loaded: TQ_GGML: ", *words)
        self.assert_line(result, "invalid device: TQ4")
        # llama.cpp prints a page after it.
        self.assertTrue(result.log.splitlines()[-1].startswith("turboquant: not loaded: TQ_GGML: "), result.log[-500:])

    def test_unknown_options_are_refused_and_the_known_ones_named(self):
        for text, shown in (("foo=1", "'foo=1'"), ("k", "'k'"), ("k=sq4,", "''"), (",", "''"), ("kk=sq4", "'kk=sq4'"),
                            (" k=sq4", "' k=sq4'"), ("K=sq4", "'K=sq4'"), ("v=sq4;k=sq4", "v=sq4;k=sq4")):
            with self.subTest(text):
                known = ("sinks=N", "sequences=N", "recent=N", "exact=LAYER", "ref=N", "guard=raise", "head_dim=N", "log=LEVEL")
                self.assert_refused(text, shown, *(() if ";" in text else known))

    def test_bad_values_are_refused_and_the_valid_ones_named(self):
        for text, expected in (("k=tq5", "f16, bf16, sq8, sq4, sq3, sq2"), ("v=", "f16, bf16, sq8"), ("sinks=-1", "from 0 to"),
                               ("sinks=4x", "from 0 to"), ("recent=99999999999999999999", "from 0 to"),
                               ("sinks=1000,recent=1000", "together"), ("sequences=x", "from 0 to 256"),
                               ("sequences=257", "from 0 to 256"), ("sequences=256", "at most 1024"),
                               ("sinks=100,sequences=16", "at most 1024"), ("exact=-1", "layers counted from 0"),
                               ("exact=3-1", "layers counted from 0"), ("exact=0+", "layers counted from 0"),
                               ("exact=5000", "layers counted from 0"), ("head_dim=56", "64, 72, 80"),
                               ("log=loud", "error, warning, info"), ("ref=8", "16 to 1024"), ("ref=x", "16 to 1024"),
                               ("factors=on", "weights or off"), ("guard=on", "raise, warn, refuse, off"),
                               ("calibration=", "a file's path"),
                               ("k=sq4,k=sq8", "given twice")):
            with self.subTest(text):
                self.assert_refused(text, expected)

    def test_options_that_have_no_effect_together_are_refused(self):
        for option in ("guard=raise", "guard=warn", "guard=refuse"):
            for other in ("factors=off", "k=f16", "k=bf16"):
                with self.subTest(option, other=other):
                    self.assert_refused(f"{other},{option}", "guard= has no effect", other.partition("=")[0] + "=")
        for option, other in (("ref=64", "recent=0"), ("ref=64", "k=f16"), ("ref=64", "k=sq3_prod"),
                              ("factors=weights", "k=bf16"), ("factors=weights", "calibration=x"), ("calibration=x", "k=f16"),
                              ("sinks=4", "k=f16,v=bf16"), ("sequences=4", "v=f16,k=f16"), ("sequences=2", "sinks=0"),
                              ("recent=4", "k=f16,v=f16"), ("exact=0", "k=f16,v=f16")):
            with self.subTest(option, other=other):
                for text in (f"{option},{other}", f"{other},{option}"):
                    self.assert_refused(text, f"{option.partition('=')[0]}= has no effect", "Leave one of the two out")

    def test_options_that_switch_off_what_is_off_are_taken(self):
        for text in ("guard=off,factors=off", "ref=0,recent=0,factors=off,guard=off",
                     "k=f16,v=f16,sinks=0,recent=0,ref=0,factors=off,sequences=0", "sinks=900,recent=100",
                     "k=f16,sinks=2,recent=8,exact=1",
                     "k=bf16,v=bf16,exact=1", "factors=weights,k=sq4_prod,v=sq4_prod", "balance=off,bias=off"):
            with self.subTest(text):
                self.assert_ok(complete(tiny_model("llama"), TQ_GGML=text))

    def test_paths_with_commas_and_long_ones(self):
        folder = self.directory / "a,b" / ("long" * 50) / ("long" * 20)
        folder.mkdir(parents=True)
        for name in ("c,d.json", "e\\,.json"):
            path = folder / name
            option = path_option("observe", path)
            self.assert_ok(complete(tiny_model("llama"), "-f", self.long_prompt(), TQ_GGML=f"{option},sinks=4"))
            self.assertTrue(path.exists(), option)

    def test_what_the_model_leaves_without_effect_is_announced(self):
        self.assertEqual(complete(tiny_model("llama"), TQ_GGML="v=tt3,exact=0").lines("has no effect"), [])
        for more in ("k=sq8", "guard=refuse", "ref=32"):
            result = complete(tiny_model("llama"), TQ_GGML=f"exact=0-2,{more}")
            self.assert_line(result, "exact= names every layer", "no effect")
        self.assertEqual(complete(tiny_model("llama"), TQ_GGML="exact=0-2").lines("no effect"), [])
        result = complete(tiny_model("deepseek2"), TQ_GGML="v=tt3")
        self.assert_ok(result)
        self.assert_line(result, "v= has no effect")

    def test_sinks_and_the_presets_own_ring_may_be_too_many(self):
        result = complete(tiny_model("llama"), TQ_GGML="sinks=1024")
        self.assertNotEqual(result.status, 0)
        self.assert_line(result, "turboquant: not loaded: device TQ6")

    def test_formats_and_exact_layers_are_used(self):
        def bytes_of(**variables):
            result = complete(tiny_model("llama"), "-c", "4096", **variables)
            self.assert_ok(result)
            line = result.lines("turboquant: TQ4 holds the KV cache")[0]
            return float(re.search(r"([\d.]+) bits per value", line)[1]), line

        plain, _ = bytes_of()
        bits, line = bytes_of(TQ_GGML="exact=0-1+2")
        self.assertIn("3 layers exact", line)
        self.assertGreater(bits, 15.9)
        self.assertLess(bits, 16.1)
        bits, line = bytes_of(TQ_GGML="k=sq8,sinks=0,recent=0")
        self.assertIn("keys sq8, values tt4, first 0 and last 0 tokens exact", line)
        self.assertAlmostEqual(bits, (8.25 + 4.25) / 2, delta=0.02)
        self.assertLess(plain, bits)

    def test_the_guard(self):
        # By their weights 2 bits move the logits of qwen2's keys, with their biases, too far.
        def answer(guard):
            return complete(tiny_model("qwen2"), TQ_GGML=f"k=sq2,guard={guard}")

        self.assertEqual(answer("off").lines("guard:"), [])
        warned = answer("warn")
        self.assert_ok(warned)
        self.assert_line(warned, "turboquant: guard: layer 0: by the model's weights", "sq2 would move by more than 1")
        raised = answer("raise")
        self.assert_ok(raised)
        self.assert_line(raised, "guard: layer 0: by the model's weights", "its keys are kept as sq8")
        refused = answer("refuse")
        self.assertNotEqual(refused.status, 0)
        self.assert_line(refused, "refuses", "guard: by the model's weights", "Take another preset, k=sq8, or guard=raise")
        self.assertEqual(complete(tiny_model("llama"), TQ_GGML="guard=refuse").lines("guard:"), [])

    def long_prompt(self):
        path = self.directory / "prompt"
        path.write_text("a b c d " * 25)
        return path

    def test_a_layer_that_the_model_lacks_is_refused(self):
        result = complete(tiny_model("llama"), TQ_GGML="exact=0+7")
        self.assertEqual(result.status, 1)
        self.assert_line(result, "TQ_GGML: exact=7: the last layer with a KV cache on the device is 2")
        self.assert_line(result, "failed to create context")

    def test_head_dim_must_be_the_models(self):
        # 80 does not even divide the rows.
        for wrong in (80, 96, 128, 256):
            result = complete(tiny_model("llama"), TQ_GGML=f"head_dim={wrong}")
            self.assertEqual(result.status, 1)
            self.assert_line(result, f"the model's head_dim is 64, but TQ_GGML says head_dim={wrong}")
        self.assert_ok(complete(tiny_model("llama"), TQ_GGML="head_dim=64"))

    def test_log_level(self):
        quiet = complete(tiny_model("llama"), TQ_GGML="log=warning")
        self.assert_ok(quiet)
        self.assertEqual(quiet.lines("turboquant:"), [])

    def test_cpu_cap_with_an_unknown_name_is_refused(self):
        result = complete(tiny_model("llama"), TQ_CPU="mmx")
        self.assertNotEqual(result.status, 0)
        self.assert_line(result, "turboquant: not loaded")
        self.assert_ok(complete(tiny_model("llama"), TQ_CPU="scalar"))

    def test_the_plug_in_exports_one_function_and_needs_no_ggml(self):
        symbols = run(["nm", "-D", PLUGIN]).log.splitlines()
        defined = [line.split()[-1] for line in symbols if " T " in line or " D " in line or " B " in line]
        self.assertEqual(defined, ["ggml_backend_init"])
        undefined = [line for line in symbols if " U " in line]
        self.assertFalse([line for line in undefined if "ggml" in line or "omp" in line.lower()], undefined)


if __name__ == "__main__":
    main()
