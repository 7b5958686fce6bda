# SPDX-License-Identifier: MIT
"""The families of docs/models.md in stock llama.cpp: small random models of the real shapes, with the device and without."""
import re
import sys

from common import NOT_SERVED, PLUGIN, ROOT, THREADS, TestCase, build_host, main, run
from families import FAMILIES, write_hyperparameters

sys.path.insert(0, str(ROOT / "tests"))
import models_page  # noqa: E402

# Divergences, as fractions of what two swapped pages cost. Found: .00054 at most with 8 bits, .059 with TQ4.
SQ8, SQ8_MAX, TQ4_MAX = "k=sq8,v=sq8", .0015, .1
# Swapped pages, as a fraction of unrelated tokens: .043 at least.
SWAPPED_MIN = .01
QUICK = ("Llama 3", "Gemma 4", "gpt-oss", "DeepSeek V3", "MiniMax M3", "Qwen3.5", "Nemotron 3")


class ModelCase(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.host = build_host("models_host.c", cls.directory)

    def run_host(self, family, *arguments, **variables):
        path = self.directory / f"{family}.gguf"
        write_hyperparameters(family, path)
        return run([self.host, PLUGIN, path, "TQ4", *arguments, "--threads", THREADS], **variables)

    def divergence(self, result):
        self.assert_ok(result)
        found = re.fullmatch(r"divergence (\S+), swapped (\S+)", result.log.splitlines()[-1])
        self.assertGreater(float(found[2]), SWAPPED_MIN, "swapped pages are hardly seen, so nothing would be")
        return float(found[1])

    def answer(self, family):
        """What the page says of a family, when the model has kept the bounds."""
        name = FAMILIES[family][0]
        result = self.run_host(family)
        refused = re.search(r"^turboquant: TQ4 refuses \S+ \(.*?\): (.+)$", result.log, re.MULTILINE)
        if result.status == 1 and refused:
            self.assertNotIn("divergence", result.log)
            return f"refused: {refused[1]} (`{name}`)"
        self.assertLess(self.divergence(result), TQ4_MAX)
        self.assertLess(self.divergence(self.run_host(family, TQ_GGML=SQ8)), SQ8_MAX)
        self.assertIn("TQ4_KV KV buffer size", result.log)
        ours = result.log[result.log.index("TQ4_KV KV buffer size"):]  # the host's last model
        self.assertNotIn("CPU KV buffer size", ours)
        keys = ", keys at 8 bits" if result.lines("turboquant: ", "its keys have 8 bits") else ""
        return f"compressed{keys} (`{name}`)"

    def check_families(self, families):
        for family in families:
            with self.subTest(family):
                answer = self.answer(family)
                if any(reason in answer for reason in NOT_SERVED.values()):
                    continue
                models_page.check("llama.cpp", {family: answer})


class Models(ModelCase):
    """One of each kind."""

    def test_families(self):
        self.check_families(QUICK)

    def test_wrong_positions_are_found(self):
        for family in ("Llama 3", "DeepSeek V3", "Qwen3.5"):
            if FAMILIES[family][0] in NOT_SERVED:
                continue
            with self.subTest(family):
                divergence = self.divergence(self.run_host(family, "--wrong-positions", TQ_GGML=SQ8))
                self.assertGreater(divergence, 5 * SQ8_MAX)

    def test_the_page_has_all_families(self):
        self.assertEqual(tuple(FAMILIES), models_page.FAMILIES)


class AllModels(ModelCase):
    def test_families(self):
        self.check_families(family for family in FAMILIES if family not in QUICK)


if __name__ == "__main__":
    main()
