# SPDX-License-Identifier: MIT
"""A host whose ggml is not laid out as the plug-in was compiled must be refused at load, with the reason."""
from common import LLAMA_SRC, PLUGIN, TestCase, build_host, main, run


class Abi(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        headers = "-isystem", LLAMA_SRC / "ggml/src"  # a backend's tables
        for name in ("bare", "old"):
            (cls.directory / name).mkdir()
        cls.host = build_host("abi_host.c", cls.directory, "-rdynamic", *headers, libraries=("ggml", "ggml-base"))
        cls.bare = build_host("abi_host.c", cls.directory / "bare", "-DBARE", *headers, libraries=())
        cls.old = build_host("abi_host.c", cls.directory / "old", "-DBARE", "-DOLD", "-rdynamic", *headers, libraries=())

    def load(self, lie, host=None, expected="accepted", **variables):
        result = run([host or self.host, PLUGIN, lie], **variables)
        self.assert_ok(result)
        self.assertEqual(result.log.splitlines()[-1], expected, result.log)
        return result

    def test_the_true_host_is_accepted_in_silence(self):
        result = self.load("none")
        self.assertEqual(result.lines("turboquant:"), [])
        self.load("loader")

    def test_versions(self):
        self.assert_line(self.load("version=1.0.0", expected="refused"), "turboquant: not loaded", "another major version",
                         "The host's ggml is 1.0.0", "is made for 0.10 to 0.25: take an unchanged llama.cpp")
        self.assert_line(self.load("version=banana", expected="refused"), "turboquant: not loaded", "no version")
        for version in ("0.9.9", "0.26.0", "0.99.0"):
            self.assert_line(self.load(f"version={version}"), f"the host's ggml is {version}", "was made for 0.10 to 0.25")
        for version in ("0.10.0", "0.16.1", "0.25.99"):
            self.assertEqual(self.load(f"version={version}").lines("turboquant:"), [])

    def test_numbers_and_layouts(self):
        reasons = {"gone": "does not have the operation SET_ROWS", "type": "numbers its types",
                   "tensor": "lays out its tensors", "view": "lays out its tensors", "buffer": "lays out its buffers"}
        for lie, reason in reasons.items():
            with self.subTest(lie):
                self.assert_line(self.load(lie, expected="refused"), "turboquant: not loaded", reason)

    def test_operations_go_by_name(self):
        """The device takes PERMUTE and TRANSPOSE for views, whatever their numbers are."""
        self.assert_line(self.load("none"), "views: 0 1")
        self.assert_line(self.load("moved"), "views: 0 2")

    def test_hosts_with_missing_functions(self):
        self.assert_line(self.load("none", self.bare, "refused"), "turboquant: not loaded", "does not export ggml_version")
        self.assert_line(self.load("none", self.old, "refused"), "turboquant: not loaded", "before April 2026")


if __name__ == "__main__":
    main()
