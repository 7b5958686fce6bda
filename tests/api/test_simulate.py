#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tq cache simulate: small traces whose outcome is worked out by hand, what is refused, and its outputs."""
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import BUILD, DEPS, main  # noqa: E402

TQ = BUILD / "tq"
PYTHON = DEPS / "venv/bin/python"
SMALL = ("--n-layer", "1", "--n-head-kv", "1", "--head-dim", "64", "--page-size", "16", "--checkpoint-stride", "16")
RATES = ("--prefill-rate", "1000", "--decode-rate", "10")
MIB = 1 / 1024  # of a GiB


def tq(*arguments, **environment):
    words = [str(word) for word in (TQ, *arguments)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})


def simulate(*arguments):
    done = tq("cache", "simulate", *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Trace(unittest.TestCase):
    """With a folder for traces."""
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def write(self, *lines):
        path = self.folder / "trace.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    def replay(self, *requests, budget=64 * MIB, presets="TQ4", more=()):
        """The rows by cache, of a model of one head; prompts at 1000 tokens/s, outputs at 10."""
        report = simulate("--trace", self.write(*requests), *SMALL, *RATES, "--budgets", budget, "--presets", presets, *more)
        return {row["cache"]: row for row in report["rows"]}


class Prefixes(Trace):
    def test_shared_prefix(self):
        """The second prompt finds the pages of the first one's prefix: 10 in FP16; with a ring of 64 the last 4 of the 13 that
        210 tokens fill are not settled, so that 9 are found."""
        rows = self.replay({"arrival": 0, "prefix": "p", "prefix_tok": 160, "prompt_tok": 200, "output_tok": 10},
                           {"arrival": 100, "prefix": "p", "prefix_tok": 160, "prompt_tok": 200, "output_tok": 10})
        for cache, found, copied in (("f16", 160, 0), ("TQ4", 144, 4)):  # copied: what its ring covers, to be coded again
            row = rows[cache]
            self.assertEqual((row["n_prompt_tok"], row["n_matched_tok"]), (400, found))
            self.assertAlmostEqual(row["hit_rate"], found / 400)
            self.assertEqual((row["running_peak"], row["n_served"], row["n_refused"]), (1, 2, 0))
            self.assertEqual((row["n_evicted_pages"], row["n_copied_pages"]), (0, copied))
            self.assertEqual(row["pages_peak"], 14)  # of 210 tokens
            # Prefill skips what was found; then 10 tokens in a second.
            second = (200 - found) / 1000
            self.assertAlmostEqual(row["seconds"], 100 + second + 1)
            self.assertAlmostEqual(row["running_mean"], (0.2 + 1 + second + 1) / (100 + second + 1))
            self.assertAlmostEqual(row["first_token_median_s"], second)
            self.assertAlmostEqual(row["first_token_p99_s"], 0.2)
            self.assertAlmostEqual(row["output_tok_per_s"], 20 / row["seconds"])

    def test_another_prefix_is_not_found(self):
        rows = self.replay({"arrival": 0, "prefix": "p", "prefix_tok": 160, "prompt_tok": 200, "output_tok": 10},
                           {"arrival": 100, "prefix": "q", "prefix_tok": 160, "prompt_tok": 200, "output_tok": 10},
                           {"arrival": 200, "chat": "p", "prompt_tok": 200, "output_tok": 10})
        self.assertEqual(rows["f16"]["n_matched_tok"], 0)

    def test_shorter_prefix(self):
        """Of 100 tokens in common, 6 pages of 16."""
        rows = self.replay({"arrival": 0, "prefix": "p", "prefix_tok": 160, "prompt_tok": 200, "output_tok": 10},
                           {"arrival": 100, "prefix": "p", "prefix_tok": 100, "prompt_tok": 200, "output_tok": 10})
        self.assertEqual(rows["f16"]["n_matched_tok"], 96)

    def test_conversation(self):
        """The second turn finds the first one's prompt and answer, 160 tokens; without a name there is no second turn."""
        first = {"arrival": 0, "chat": "c", "prompt_tok": 100, "output_tok": 60}
        second = {"arrival": 100, "chat": "c", "prompt_tok": 200, "output_tok": 10}
        self.assertEqual(self.replay(first, second)["f16"]["n_matched_tok"], 160)
        self.assertEqual(self.replay(first, second)["TQ4"]["n_matched_tok"], 96)  # 160 - 64
        del first["chat"], second["chat"]
        self.assertEqual(self.replay(first, second)["f16"]["n_matched_tok"], 0)

    def test_the_last_token_is_always_computed(self):
        again = [{"arrival": 100 * i, "chat": "c", "prompt_tok": 160, "output_tok": 1} for i in range(2)]
        self.assertEqual(self.replay(*again)["f16"]["n_matched_tok"], 144)

    def test_at_the_same_time_nothing_is_found(self):
        """The second is admitted before the first is computed; its prefill comes behind the first one's."""
        row = self.replay(*[{"arrival": 0, "prefix": "p", "prefix_tok": 160, "prompt_tok": 200, "output_tok": 10}] * 2)["f16"]
        self.assertEqual((row["n_matched_tok"], row["running_peak"]), (0, 2))
        self.assertAlmostEqual(row["seconds"], 0.4 + 1)
        self.assertAlmostEqual(row["running_mean"], (1.2 + 1.4) / 1.4)


class Budgets(Trace):
    BUDGET = 0.5 * MIB

    def capacity(self, cache="f16", budget=BUDGET):
        return self.replay({"arrival": 0, "prompt_tok": 1, "output_tok": 1}, budget=budget)[cache]["n_pages"]

    def request(self, share, arrival=0.0):
        """Some share of the budget's pages, a second of output included."""
        n_tok = int(16 * share * self.capacity())
        return {"arrival": arrival, "prompt_tok": n_tok - 10, "output_tok": 10}

    def test_exactly_one(self):
        request = self.request(0.6)
        row = self.replay(request, request, request, budget=self.BUDGET)["f16"]
        took = request["prompt_tok"] / 1000 + 1
        self.assertEqual((row["running_peak"], row["n_served"], row["n_refused"]), (1, 3, 0))
        self.assertAlmostEqual(row["running_mean"], 1)
        self.assertAlmostEqual(row["seconds"], 3 * took)
        self.assertAlmostEqual(row["wait_median_s"], took)
        self.assertAlmostEqual(row["wait_p99_s"], 2 * took)

    def test_exactly_two(self):
        request = self.request(0.4)
        row = self.replay(request, request, request, budget=self.BUDGET)["f16"]
        self.assertEqual((row["running_peak"], row["wait_median_s"]), (2, 0))
        self.assertAlmostEqual(row["wait_p99_s"], request["prompt_tok"] / 1000 + 1)

    def test_max_running(self):
        request = {"arrival": 0, "prompt_tok": 100, "output_tok": 10}
        rows = self.replay(*[request] * 5, more=("--max-running", 3))
        self.assertEqual({cache: row["running_peak"] for cache, row in rows.items()}, {"f16": 3, "TQ4": 3})

    def test_first_come_first_served(self):
        """The third would fit beside the first, but the second is before it."""
        small = {"arrival": 0.5, "prompt_tok": 16, "output_tok": 10}
        row = self.replay(self.request(0.6), self.request(0.6, 0.25), small, budget=self.BUDGET)["f16"]
        self.assertGreater(row["wait_median_s"], 0.5)
        self.assertEqual(row["running_peak"], 2)  # the second and third

    def test_too_long_is_refused(self):
        small = {"arrival": 1, "prompt_tok": 16, "output_tok": 10}
        rows = self.replay(self.request(1.1), small, budget=self.BUDGET, more=("--checkpoint-stride", 0))
        self.assertEqual((rows["f16"]["n_served"], rows["f16"]["n_refused"], rows["f16"]["n_prompt_tok"]), (1, 1, 16))
        self.assertEqual((rows["TQ4"]["n_served"], rows["TQ4"]["n_refused"]), (2, 0))

    def test_evicted(self):
        """After the first request its full pages are kept. The second needs some of them; a third finds the rest."""
        first, second = {**self.request(0.6), "chat": "a"}, self.request(0.6, 100)
        n_tok = first["prompt_tok"] + first["output_tok"]
        lacking = 2 * -(-n_tok // 16) - self.capacity()
        row = self.replay(first, second, budget=self.BUDGET)["f16"]
        # The tokens of two times 76 published pages take up to 5 pages of 4 KiB.
        self.assertTrue(lacking <= row["n_evicted_pages"] <= lacking + 5, (lacking, row))
        # Evicted from its end: what is left is its beginning, but for a page that the third sequence's record may take.
        left = 16 * (n_tok // 16 - row["n_evicted_pages"])
        row = self.replay(first, second, {**first, "arrival": 200}, budget=self.BUDGET)["f16"]
        self.assertIn(row["n_matched_tok"], (left, left - 16))
        self.assertEqual(self.replay(first, second, budget=2 * self.BUDGET)["f16"]["n_evicted_pages"], 0)

    def test_bytes(self):
        """A page is what the formats say, exact tokens what the presets say, and nothing is beyond the budget."""
        row = self.replay(*[self.request(0.3)] * 9, budget=self.BUDGET, presets="TQ4,TQ2")
        formats = {f["name"]: f["bytes_per_vector"] for f in json.loads(tq("formats", "--head-dim", 64, "--json").stdout)}
        presets = {p["name"]: p for p in json.loads(tq("presets", "--json").stdout)}
        self.assertEqual((row["f16"]["page_bytes"], row["f16"]["sequence_bytes"]), (2 * 16 * 128, 0))
        for name in ("TQ4", "TQ2"):
            p = presets[name]
            # A page of 16 tokens has one reference for its keys.
            sides = (16 * formats[p["k_format"]] + formats["sq8"], 16 * formats[p["v_format"]])
            self.assertEqual(row[name]["page_bytes"], sum((side + 63) // 64 * 64 for side in sides))
            self.assertEqual(row[name]["sequence_bytes"], (p["n_sink"] + p["n_recent"]) * 2 * 128)
        for r in row.values():
            self.assertLess(r["n_pages"] * r["page_bytes"], self.BUDGET * 2 ** 30)
            self.assertGreater(r["n_pages"] * r["page_bytes"], 0.9 * self.BUDGET * 2 ** 30)
            self.assertLess(r["bytes_peak"], self.BUDGET * 2 ** 30 + 65536)  # and the codecs

    def test_ratio_is_that_of_the_bits(self):
        """Of one model at one budget, requests of 4096 tokens that all arrive at once."""
        path = self.write(*[{"arrival": 0, "prompt_tok": 4000, "output_tok": 96}] * 3000)
        for n_checkpoints, stride in ((4, 1024), (0, 0)):  # the latter as in the presets' figures
            report = simulate("--trace", path, "--shape", "llama3.1-8b", "--budgets", 64, "--presets", "TQ4,TQ3,TQ2,TQ6",
                              "--checkpoint-stride", stride)
            rows = {row["cache"]: row for row in report["rows"]}
            for row in rows.values():
                fit = 2 ** 36 / (64 * row["page_bytes"] + (1 + n_checkpoints) * row["sequence_bytes"])
                self.assertTrue(0.995 * fit - 1 < row["running_peak"] <= fit, (fit, row))
        # The presets' figures are those of the plug-in's stores, with references that the cache does not have yet.
        for preset in json.loads(tq("presets", "--context", 4096, "--json").stdout):
            ratio = rows[preset["name"]]["running_peak"] / rows["f16"]["running_peak"]
            self.assertLess(abs(ratio / preset["ratio_to_f16"] - 1), 0.05, (preset, ratio))


class Generated(Trace):
    WORDS = ("--requests", 300, "--budgets", "0.5,2")

    def test_same_seed_same_rows(self):
        self.assertEqual(simulate(*self.WORDS)["rows"], simulate(*self.WORDS)["rows"])
        self.assertNotEqual(simulate(*self.WORDS)["rows"], simulate(*self.WORDS, "--seed", 2)["rows"])

    def test_saved_trace_gives_the_same(self):
        path = self.folder / "saved.jsonl"
        rows = simulate(*self.WORDS, "--save-trace", path)["rows"]
        self.assertEqual(simulate("--trace", path, "--budgets", "0.5,2")["rows"], rows)

    def test_trace_is_as_asked_for(self):
        path = self.folder / "saved.jsonl"
        simulate("--requests", 4000, "--rate", 10, "--prefixes", 4, "--prefix-tok", 800, "--message-tok", 100,
                 "--output-tok", 50, "--turns", 4, "--zipf", 1, "--budgets", 64, "--save-trace", path)
        requests = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual(len(requests), 4000)
        prefixes = [r["prefix"] for r in requests]
        shares = sorted((prefixes.count(p) / 4000 for p in set(prefixes)), reverse=True)
        self.assertEqual(len(shares), 4)
        for share, rank in zip(shares, range(1, 5)):
            self.assertLess(abs(share - 1 / rank / (1 + 1 / 2 + 1 / 3 + 1 / 4)), 0.05)
        self.assertLess(abs(sum(r["output_tok"] for r in requests) / 4000 / 50 - 1), 0.1)
        late = [r for r in requests if r["arrival"] > requests[-1]["arrival"] / 2]
        self.assertLess(abs(len(late) / (requests[-1]["arrival"] / 2) / 10 - 1), 0.15)
        chats = {}
        for r in requests:
            self.assertGreaterEqual(r["prompt_tok"], chats.get(r["chat"], r["prefix_tok"]) + 1)
            chats[r["chat"]] = r["prompt_tok"] + r["output_tok"]

    def test_without_prefixes(self):
        self.assertEqual(simulate(*self.WORDS, "--prefixes", 0, "--turns", 1)["rows"][-1]["n_matched_tok"], 0)

    def test_ours_is_never_worse(self):
        rows = simulate(*self.WORDS)["rows"]
        for budget in (0.5, 2):
            f16, sq4, sq2 = (row for row in rows if row["budget_gib"] == budget)
            self.assertLess(sq4["wait_p99_s"], f16["wait_p99_s"])
            self.assertLessEqual(sq2["wait_p99_s"], sq4["wait_p99_s"])


class Errors(Trace):
    GOOD = {"arrival": 1, "prompt_tok": 10, "output_tok": 10}

    def check(self, code, text, *arguments, **environment):
        done = tq("cache", "simulate", *arguments, **environment)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertIn(text, done.stderr)

    def test_lines(self):
        cases = [
            ("nonsense", "not a JSON object"), ("[1]", "not a JSON object"), ("{} {}", "not a JSON object"),
            ({**self.GOOD, "out_tok": 1}, "unknown key out_tok"),
            ('{"arrival": 1, "arrival": 2}', "the line has twice arrival"),
            ({"arrival": 1, "prompt_tok": 10}, "the line lacks output_tok"), ({**self.GOOD, "arrival": -1}, "arrival must be"),
            ({**self.GOOD, "arrival": "now"}, "arrival must be"), ({**self.GOOD, "prompt_tok": 0}, "prompt_tok must be"),
            ({**self.GOOD, "output_tok": 1.5}, "output_tok must be a whole number"), ({**self.GOOD, "arrival": 0.5}, "before"),
            ({**self.GOOD, "prompt_tok": 1 << 25}, "prompt_tok must be"), ({**self.GOOD, "chat": 1}, "chat must be a text"),
            ({**self.GOOD, "prefix": "p"}, "belong together"), ({**self.GOOD, "prefix_tok": 5}, "belong together"),
            ({**self.GOOD, "prefix": "p", "prefix_tok": 11}, "more than prompt_tok"), ('{"a": "' + 5000 * "x", "too long"),
        ]
        for line, text in cases:
            path = self.write(self.GOOD, "", line, self.GOOD)
            self.check(1, f"{path}:3: ", "--trace", path)
            self.check(1, text, "--trace", path)

    def test_files(self):
        self.check(1, "cannot read the trace", "--trace", self.folder / "absent")
        self.check(1, "no requests", "--trace", self.write())
        # Before the work: a trace that is not there would be the other error.
        unread = ("--trace", self.folder / "absent")
        for option in ("--json", "--csv", "--html", "--plot"):
            self.check(1, "absent: No such file or directory; name another file", *unread, option, self.folder / "absent/file")
            self.check(1, "it is a folder", *unread, option, self.folder)
        self.check(1, "two outputs", *unread, "--csv", self.folder / "file", "--html", self.folder / "file")
        self.check(1, "cannot write", "--requests", 1, "--save-trace", self.folder / "absent/file")

    def test_options(self):
        self.check(2, "unknown preset 'TQ9'", "--presets", "TQ9")
        self.check(2, "unknown shape 'x'", "--shape", "x")
        self.check(2, "--budgets takes a number", "--budgets", "4,x")
        self.check(2, "--budgets takes", "--budgets", ",")
        self.check(2, "--decode-rate takes a number", "--decode-rate", "0")
        self.check(2, "whole number", "--requests", "0")
        self.check(2, "unexpected argument", "x")
        self.check(1, "64, 72, 80", "--head-dim", "65")
        self.check(1, "multiple of 16", "--page-size", "20")
        self.check(2, "a multiple of --page-size", "--checkpoint-stride", "100")
        self.check(1, "does not hold one page", "--budgets", "0.0001")
        self.check(1, "no trace of this kind", "--context", "3")


class Outputs(Trace):
    WORDS = ("--requests", 100, "--budgets", "0.5,1")

    def test_table(self):
        table = tq("cache", "simulate", *self.WORDS).stdout.splitlines()
        self.assertEqual(len(table), 2 + 2 * 3)
        self.assertEqual({line.count("|") for line in table}, {13})

    def test_csv(self):
        path = self.folder / "rows.csv"
        rows = simulate(*self.WORDS, "--csv", path)["rows"]
        comment, head, *lines = path.read_text().splitlines()
        self.assertTrue(comment.startswith("# tq cache simulate --requests 100"))
        self.assertEqual(head.split(","), list(rows[0]))
        self.assertEqual([line.split(",")[0] for line in lines], ["f16", "TQ4", "TQ2"] * 2)
        self.assertAlmostEqual(float(lines[0].split(",")[-1]), rows[0]["bytes_peak"])

    def test_json_file(self):
        path = self.folder / "report.json"
        self.assertIn("TQ2", tq("cache", "simulate", *self.WORDS, "--json", path).stdout)
        report = json.loads(path.read_text())
        self.assertEqual(set(report), {"command", "server", "trace", "rows"})
        self.assertEqual(report["trace"]["n_requests"], 100)

    @unittest.skipUnless(PYTHON.exists(), "no Python with matplotlib here")
    def test_page(self):
        page, plot = self.folder / "page.html", self.folder / "plot.svg"
        done = tq("cache", "simulate", *self.WORDS, "--html", page, "--plot", plot, TQ_PYTHON=str(PYTHON))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(plot.read_text().startswith("<svg"))
        text = page.read_text()
        self.assertEqual(text.count("<svg"), 1)
        for title in ("requests at once, mean", "wait for admission", "prompt tokens found in the cache"):
            self.assertIn(f"<!-- {title}", text)  # matplotlib names what it draws
        self.assertEqual(text.count("<tr>"), 1 + 2 * 3)
        self.assertNotIn("http-equiv", text)
        self.assertNotIn("<script", text)
        done = tq("cache", "simulate", *self.WORDS, "--html", self.folder / "absent/page.html", TQ_PYTHON=str(PYTHON))
        self.assertEqual(done.returncode, 1)
        self.assertIn("cannot write", done.stderr)

    def test_page_without_python(self):
        done = tq("cache", "simulate", *self.WORDS, "--html", self.folder / "page.html", TQ_PYTHON="no-such-python")
        self.assertEqual(done.returncode, 1)
        self.assertIn("TQ_PYTHON", done.stderr)

    def test_help(self):
        self.assertIn("usage: tq cache simulate", tq("cache", "simulate", "--help").stdout)
        self.assertIn("tq cache simulate", tq("cache", "--help").stdout)


if __name__ == "__main__":
    main()
