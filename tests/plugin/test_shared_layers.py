# SPDX-License-Identifier: MIT
"""Layers that attend to the keys and values of earlier ones (Gemma 3n, Gemma 4): the device attends for them as well."""
import re

from common import PLUGIN, THREADS, TestCase, build_host, complete, main, run, tiny_model

ARCHS = {"gemma4": 8, "gemma3n": 25}  # with their layers
N_OWN = 4  # layers of gemma4 with keys and values of their own; those after them share the last two's in turn


def mebibytes(result, pattern):
    return sum(float(size) for size in re.findall(pattern, result.log))


class SharedLayers(TestCase):
    def plan(self, model, *arguments, **options):
        """A run, and the devices of one graph's attention operations in the order of the layers."""
        result = complete(model, *arguments, "-lv", "5", GGML_SCHED_DEBUG="2", **options)
        self.assert_ok(result)
        graph = result.log.split("## SPLIT #0:")[-1]
        # What is copied from one device to another is named behind the number of a split's inputs.
        self.assertEqual([line for line in result.log.splitlines() if "## SPLIT" in line and "cache_" in line], [])
        return result, re.findall(r"\(FLASH_ATTN\): +\S+ \([^)]*\) \[ *(\w+)", graph)

    def test_the_device_attends_for_all_layers(self):
        for arch, n_layer in ARCHS.items():
            for fa in ("auto", "on"):
                with self.subTest(arch, fa=fa):
                    result, devices = self.plan(tiny_model(arch), "-fa", fa)
                    self.assertEqual(devices, ["TQ4"] * n_layer)
                    self.assertEqual(result.lines("Flash Attention not supported"), [])

    def test_no_more_memory_than_without_the_device(self):
        for arch in ARCHS:
            with self.subTest(arch):
                model = tiny_model(arch)
                ours, stock = (complete(model, "-c", "4096", "-fit", "off", device=device) for device in ("TQ4", "none"))
                kv = mebibytes(ours, r"holds the KV cache.* ([\d.]+) MiB")
                kv_stock = mebibytes(stock, r"KV buffer size = +([\d.]+)")
                self.assertGreater(kv, 0.2 * kv_stock)  # both count the layers that own keys and values
                self.assertLess(kv, 0.5 * kv_stock)
                compute, compute_stock = (mebibytes(result, r"compute buffer size = +([\d.]+)") for result in (ours, stock))
                self.assertLess(compute, 1.1 * compute_stock)

    def test_layers_on_several_devices(self):
        model = tiny_model("gemma4")
        for split, own in (("1,8", ["TQ6", "TQ4", "TQ4", "TQ4"]), ("4,5", ["TQ6"] * 4)):
            with self.subTest(split):
                arguments = ("-ts", split)
                # The scheduler looks at the first device only.
                _, devices = self.plan(model, *arguments, "-fa", "on", device="TQ6,TQ4")
                self.assertEqual(devices, own + ["TQ6"] * (ARCHS["gemma4"] - N_OWN))
                self.assert_refused(complete(model, *arguments, device="TQ6,TQ4"))

    def test_a_part_of_the_layers_on_the_device(self):
        # Layer 3 is on the device, and layer 2, whose keys every second shared layer uses, is not.
        _, devices = self.plan(tiny_model("gemma4"), "-ngl", "6", "-fa", "on")
        self.assertEqual(devices, ["CPU", "CPU", "CPU", "TQ4"] + ["CPU", "TQ4"] * 2)
        self.assert_refused(complete(tiny_model("gemma4"), "-ngl", "6"))

    def assert_refused(self, result):
        """With -fa auto llama.cpp turns flash attention off for all layers, and would attend to copies."""
        self.assertEqual(result.status, 1, result.log[-2000:])
        self.assert_line(result, "turboquant: ", "refuses", "flash attention is off", "Give -fa on")
        self.assertNotIn("eval time", result.log)

    def test_only_shared_layers_on_the_device(self):
        result = complete(tiny_model("gemma4"), "-ngl", "4")
        self.assert_ok(result)
        self.assert_line(result, "turboquant: TQ4 was chosen, but no KV cache was put on it")

    def test_all_layers_see_a_batch_as_its_tokens_one_by_one(self):
        # With this ring the first tokens are exact for most of a batch, but coded at its end.
        host = build_host("host_test.c", self.directory)
        result = run([host, PLUGIN, tiny_model("gemma4"), "TQ4", "--max-batches", "1e-4", "--threads", THREADS],
                     TQ_GGML="recent=192")
        print(result.log)
        self.assert_ok(result)


if __name__ == "__main__":
    main()
