# SPDX-License-Identifier: MIT
"""A host whose ggml is not laid out as the plug-in was compiled must be refused at load, with the reason."""
from common import PLUGIN, TestCase, build_host, main, run


class Abi(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.host = build_host("abi_host.c", cls.directory, "-rdynamic", libraries=("ggml", "ggml-base"))
        (cls.directory / "bare").mkdir()
        (cls.directory / "old").mkdir()
        cls.bare = build_host("abi_host.c", cls.directory / "bare", "-DBARE", libraries=())
        cls.old = build_host("abi_host.c", cls.directory / "old", "-DBARE", "-DOLD", "-rdynamic", libraries=())

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
                         "the host's ggml is 1.0.0")
        self.assert_line(self.load("version=banana", expected="refused"), "turboquant: not loaded", "no version")
        for version in ("0.24.9", "0.99.0"):
            self.assert_line(self.load(f"version={version}"), f"the host's ggml is {version}", "was tested with")
        self.assertEqual(self.load("version=0.25.99").lines("turboquant:"), [])

    def test_numbers_and_layouts(self):
        for lie, reason in (("op", "numbers its operations"), ("type", "numbers its types"), ("tensor", "lays out its tensors"),
                            ("view", "lays out its tensors"), ("buffer", "lays out its buffers")):
            with self.subTest(lie):
                self.assert_line(self.load(lie, expected="refused"), "turboquant: not loaded", reason)

    def test_hosts_with_missing_functions(self):
        self.assert_line(self.load("none", self.bare, "refused"), "turboquant: not loaded", "does not export ggml_version")
        self.assert_line(self.load("none", self.old, "refused"), "turboquant: not loaded", "before April 2026")


if __name__ == "__main__":
    main()
