# SPDX-License-Identifier: MIT
"""A host that loads libllama with local symbols, as Python's ctypes does: nothing of ggml is in the global scope."""
import subprocess
import sys

from common import MODEL, PLUGIN, TestCase, build_host, device, environment, main

# libllama's parameter structs differ from version to version, so a small library fills them; Python only loads.
SCRIPT = """
import ctypes, sys
library, plugin, model, device = sys.argv[1:]
assert not hasattr(ctypes.CDLL(None), "ggml_version"), "ggml is in the global scope: this test shows nothing"
host = ctypes.CDLL(library, mode=ctypes.RTLD_LOCAL)
assert not hasattr(ctypes.CDLL(None), "ggml_version"), "ggml is in the global scope: this test shows nothing"
sys.exit(host.answer(plugin.encode(), model.encode(), device.encode()))
"""


class Ctypes(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.host = build_host("local_host.c", cls.directory, "-shared", "-fPIC")

    def test_local_symbols(self):
        for name in ("TQ6", "TQ4"):
            process = subprocess.run([sys.executable, "-c", SCRIPT, str(self.host), str(PLUGIN), str(MODEL), device(name)],
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, env=environment())
            text = process.stdout.decode(errors="replace")
            self.assertEqual(process.returncode, 0, text)
            self.assertIn(f"turboquant: {device(name)} holds the KV cache", text)
            self.assertIn("answer: Paris", text)


if __name__ == "__main__":
    main()
