#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tq eval: llama-perplexity's words, presets on the command line, results that wait, and whole runs of stock llama.cpp."""
import csv
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import common
from eval import chat
from eval.__main__ import Progress
from eval.__main__ import main as evaluate
from eval.arguments import parse_arguments, split_presets
from eval.llama import Cache, Finished, LlamaError, kv_memory, path_option
from eval.needle import hide, make_case, shares
from eval.quality import base_tokens, parse_statistics
from eval.references import Reference, References
from eval.work import Work

TQ = common.PLUGIN.parent / "tq"
TEXT = common.path_from_env("TQ_TEXT")
PRINTED = (pathlib.Path(__file__).parent / "data/perplexity.txt").read_text()


class Parsing(unittest.TestCase):
    def test_statistics(self):
        figures = parse_statistics(PRINTED)
        self.assertEqual((figures["kld_mean"], figures["kld_mean_error"]), (0.005397, 0.0002))
        self.assertEqual((figures["kld_median"], figures["kld_99"], figures["kld_99_9"]), (0.004387, 0.020365, 0.028384))
        self.assertEqual((figures["same_top_1"], figures["same_top_1_error"]), (95.686, 0.901))
        self.assertEqual((figures["dp_rms"], figures["ppl_ratio"], figures["ppl"]), (1.629, 0.99162, 17.938247))

    def test_plot_of_make_run(self):
        """The last thing that `make run` writes: every row but the reference's is named in it."""
        sys.path.insert(0, str(common.ROOT / "scripts"))
        import report
        rows = [{"case": name, "bits_per_value": bits, "kld_mean": kld} for name, bits, kld in (
            ("f16", 16, 0), ("TQ4", 4.65, .0045), ("TQ2", 3.15, .0118), ("q4_0", 4.5, .0609))]
        with tempfile.TemporaryDirectory() as folder, mock.patch("builtins.print") as said:
            path = pathlib.Path(folder, "plot.svg")
            args = mock.Mock(text=pathlib.Path("novel.txt"), plot=str(path))
            report.write_plot(rows, args)
            svg = path.read_text()
            report.write_plot(rows, args)
            self.assertEqual(path.read_text(), svg)  # no date, no names by chance: a page changes where its figures do
        self.assertIn(str(path), said.call_args.args[0])
        for word in ("TQ4", "TQ2", "q4_0", "novel.txt, 4096 tokens"):
            self.assertIn(word, svg)
        self.assertNotIn("f16", svg)

    def test_statistics_that_lack_a_line(self):
        for label in ("Mean    KLD", "99.9%   KLD", "RMS Δp"):
            self.assertIsNone(parse_statistics(PRINTED.replace(label, "Other")))

    def test_memory(self):
        log = ("constructing llama_context\nCPU KV buffer size = 99.00 MiB\nconstructing llama_context\n"
               "TQ4_KV KV buffer size =    25.00 MiB\n"
               "turboquant: TQ4 holds the KV cache: keys tt4; 26.00 MiB, 4.500 bits per value")
        self.assertEqual(kv_memory(Finished(log, "", 0, 0, 0, "")), (26.0, 4.5))
        self.assertEqual(kv_memory(Finished("constructing llama_context\nCPU KV buffer size = 9.5 MiB", "", 0, 0, 0, "")),
                         (9.5, None))
        with self.assertRaises(LlamaError):
            kv_memory(Finished("nothing", "", 0, 0, 0, ""))

    def test_presets(self):
        self.assertEqual(split_presets(["TQ4,TQ3", "TQ4:k=tt4,v=tt3", "TQ2"]), ["TQ4", "TQ3", "TQ4:k=tt4,v=tt3", "TQ2"])

    def test_caches(self):
        self.assertTrue(Cache("q8_0").is_stock and Cache("q8_0/q4_0").is_stock and Cache("f16 -fa off").is_stock)
        self.assertFalse(Cache("TQ4").is_stock)
        self.assertEqual(Cache("q8_0/q4_0").types, ("q8_0", "q4_0"))
        self.assertEqual((Cache("TQ4:v=tt3").device, Cache("TQ4:v=tt3").plugin_options), ("TQ4", "v=tt3"))


    def test_the_work_folder_does_not_depend_on_outputs(self):
        words = ["model.gguf", "--text", "text"]
        for more in ([], ["--html", "out.html"], ["--json", "out.json"]):
            self.assertEqual(parse_arguments([*words, *more]).work, pathlib.Path("tq-eval.work"))

    def test_chats(self):
        one = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "chat.json"
            for content, wanted in ((json.dumps(one), [one]), (json.dumps([one, one]), [one, one]),
                                    (json.dumps({"messages": one}), [one]), (json.dumps([{"messages": one}]), [one]),
                                    (f"{json.dumps(one)}\n\n{json.dumps({'messages': one})}\n", [one, one])):
                path.write_text(content)
                self.assertEqual(chat.read(path), wanted)
            for content in ("", "{}", "[]", "[[]]", "no JSON", "1", '[{"role": "user"}]', '[{"role": "user", "content": [1]}]',
                            json.dumps([one, 1]), "[" * 100000):
                path.write_text(content)
                with self.assertRaisesRegex(LlamaError, "chat.json has .*conversations; give JSON: a list of messages"):
                    chat.read(path)


class Needles(unittest.TestCase):
    def test_hide(self):
        text = "One. Two. Three. Four. "
        self.assertTrue(hide(text, ["N."], [0]).startswith("One. N. Two."))
        self.assertTrue(hide(text, ["N."], [1]).endswith("Four. N. "))
        both = hide(text, ["A.", "B."], [0.1, 0.6])
        self.assertLess(both.index("A."), both.index("B."))

    def test_cases_repeat_and_differ(self):
        self.assertEqual(make_case(1, 1024, 0.5, 3), make_case(1, 1024, 0.5, 3))
        self.assertNotEqual(make_case(1, 1024, 0.5, 1), make_case(1, 1024, 0.75, 1))

    def test_shares(self):
        reference = [{"n_needles": 1, "score": s} for s in (1, 1, 0, 1)] + [{"n_needles": 3, "score": 0.3}]
        found = [{"n_needles": 1, "score": s} for s in (1, 0, 0, 1)] + [{"n_needles": 3, "score": 1}]
        self.assertEqual(shares(found, reference), (0.5, 2 / 3))


class Waiting(unittest.TestCase):
    def test_results_belong_to_what_they_depend_on(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            text = folder / "text"
            text.write_text("a")
            work = Work(folder / "work", [text, "version"])
            work.save(Cache("TQ4"), {"kld": 1})
            self.assertEqual(Work(folder / "work", [text, "version"]).load(Cache("TQ4")), {"kld": 1})
            self.assertIsNone(work.load(Cache("TQ3")))
            self.assertIsNone(Work(folder / "work", [text, "other"]).load(Cache("TQ4")))
            text.write_text("b")
            self.assertIsNone(Work(folder / "work", [text, "version"]).load(Cache("TQ4")))

    def test_half_a_result_is_none(self):
        with tempfile.TemporaryDirectory() as folder:
            work = Work(folder, [])
            work.path(Cache("TQ4")).write_text('{"kld": ')
            self.assertIsNone(work.load(Cache("TQ4")))

    def test_foreign_results_are_none(self):
        with tempfile.TemporaryDirectory() as folder:
            work = Work(folder, [])
            path = work.path(Cache("TQ4"))
            work.save(Cache("TQ4"), {"kld": 1})
            changed = path.read_text().replace('"kld": 1', '"kld": 2')
            for content in (changed, "[]", "1", "null", '{"kld": 1}', '{"result": {}, "checksum": 1}', "[" * 100000, "\0", ""):
                path.write_text(content)
                self.assertIsNone(work.load(Cache("TQ4")), content[:40])
            path.write_bytes(b"\xff\xfe")
            self.assertIsNone(work.load(Cache("TQ4")))
            path.unlink()
            os.mkfifo(path)  # which would wait for a writer
            self.assertIsNone(work.load(Cache("TQ4")))

    def test_one_command_at_a_time(self):
        with tempfile.TemporaryDirectory() as folder:
            Work(folder, []).hold()
            with self.assertRaisesRegex(LlamaError, "another tq eval is at work .*--work"):
                Work(folder, []).hold()

    def test_what_the_system_refuses_is_told_in_a_line(self):
        for error, words in ((OSError(28, "No space left on device", "w/x.json"), "tq eval: w/x.json: No space left on device"),
                             (OSError(28, "No space left on device"), "No space left on device")):
            with mock.patch("eval.__main__.run", side_effect=error), mock.patch("eval.options.drop_output"), \
                    mock.patch("eval.options.stop_by_signal"), self.assertRaises(SystemExit) as raised:
                evaluate(["model.gguf", "--text", "text"])
            self.assertIn(words, str(raised.exception))

    def test_paths_with_commas(self):
        self.assertEqual(path_option("observe", "a,b\\c"), "observe=a\\,b\\\\c")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "a,b\\c.tqcal"
            path.write_bytes(b"one")
            self.assertEqual(Cache("TQ4:k=tt2," + path_option("calibration", path) + ",recent=8").files, [path])

    def test_another_calibration_of_the_same_name(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "model.tqcal"
            path.write_bytes(b"one")
            work, cache = Work(folder, []), Cache(f"TQ4:k=tt2,calibration={path}")
            work.save(cache, {"kld": 1})
            self.assertEqual(work.load(cache), {"kld": 1})
            path.write_bytes(b"two")
            self.assertIsNone(work.load(cache))


    def test_a_bar_ends_full_and_never_goes_back(self):
        bar = mock.Mock()
        with Progress(bar, 100) as part:
            for n in (0, 30, 20, 60):
                part.reach(n)
            part.add(15)
        self.assertEqual([call.args[0] for call in bar.update.call_args_list], [0, 30, 0, 30, 15, 25])


class KeptReferences(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.text = self.folder / "text"
        self.text.write_text("a")
        self.written = 0

    def write(self, path):
        self.written += 1
        path.write_bytes(bytes(1000))

    def references(self, limit=10000):
        return References(self.folder / "references", ["model"], limit)

    def reference(self, n_ctx=512, machine="CPU"):
        return Reference(self.text, n_ctx, 1, False, machine)

    def test_another_command_finds_it(self):
        path = self.references().get(self.reference(), self.write)
        self.assertEqual(self.references().get(self.reference(), self.write), path)
        self.assertEqual((self.written, path.stat().st_size), (1, 1000))
        self.references().get(self.reference(machine="another CPU"), self.write)
        self.text.write_text("b")
        self.references().get(self.reference(), self.write)
        self.assertEqual(self.written, 3)

    def test_what_is_damaged_or_was_not_finished_is_made_again(self):
        path = self.references().get(self.reference(), self.write)
        path.write_bytes(bytes(999))
        self.references().get(self.reference(), self.write)

        def fail(new):
            self.write(new)
            raise KeyboardInterrupt

        self.references().forget(self.reference())
        with self.assertRaises(KeyboardInterrupt):
            self.references().get(self.reference(), fail)
        self.assertFalse(self.references().has(self.reference()))
        self.assertEqual([file.suffix for file in path.parent.iterdir()], [".json"])
        self.assertEqual(self.written, 3)

    def test_the_least_lately_used_go_first(self):
        references = self.references(limit=2500)
        for i, n_ctx in enumerate((512, 1024, 2048)):
            os.utime(references.get(self.reference(n_ctx), self.write), (i, i))
        references.get(self.reference(512), self.write)  # now the latest
        stray = self.folder / "references/0123.77"  # of a command that was killed
        stray.write_text("")
        references.trim()
        self.assertFalse(stray.exists())
        self.assertEqual([references.has(self.reference(n_ctx)) for n_ctx in (512, 1024, 2048)], [True, False, True])
        self.assertEqual(self.written, 3)


class RunCase(unittest.TestCase):
    arch = "llama"  # of a random model

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=common.TINY_DIR, prefix="eval-"))
        self.addCleanup(shutil.rmtree, self.folder)

    def model(self):
        return common.tiny_model(self.arch)

    def command(self, *arguments):
        return [str(word) for word in [TQ, "eval", self.model(), "--text", TEXT, "--context", 512, "--llama-bin",
                                       common.LLAMA_BIN, "--plugin", common.PLUGIN, "--threads", common.THREADS, "--work",
                                       self.folder / "work", *arguments]]

    def run_eval(self, *arguments):
        return subprocess.run(self.command(*arguments), capture_output=True, text=True,
                              env={**os.environ, "TQ_PYTHON": sys.executable})

    def check_error(self, words, *arguments):
        done = self.run_eval(*arguments)
        self.assertIn(words, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertIn(done.returncode, (1, 2))

    def check_whole_run(self):
        out = {kind: self.folder / f"out.{kind}" for kind in ("json", "html", "csv", "markdown")}
        done = self.run_eval("--presets", "TQ4", "TQ4:v=tt2,recent=16", "--baselines", "f16,q4_0",
                             *(word for kind, path in out.items() for word in (f"--{kind}", path)))
        self.assertEqual(done.returncode, 0, done.stderr)
        result = json.loads(out["json"].read_text())
        rows = {row["name"]: row for row in result["rows"]}
        self.assertEqual(list(rows), ["f16", "f16 -fa off", "q4_0", "TQ4", "TQ4:v=tt2,recent=16"])
        self.assertEqual((rows["f16"]["kld_mean"], rows["f16"]["same_top_1"], rows["f16"]["bits_per_value"]), (0, 100, 16))
        self.assertTrue(0 < rows["TQ4"]["kld_mean"] < rows["TQ4:v=tt2,recent=16"]["kld_mean"] < 1)
        self.assertAlmostEqual(rows["q4_0"]["bits_per_value"], 4.5, delta=0.1)
        self.assertGreater(rows["TQ4"]["bits_per_value"], 4.25)  # at 512 tokens many of them are exact
        self.assertEqual(result["failed"], [])
        page = out["html"].read_text()
        self.assertGreaterEqual(page.count("<svg"), 1)
        self.assertIsNone(re.search(r'(?:src|href)="(?!#|data:)', page))
        self.assertIn("| TQ4 |", out["markdown"].read_text())
        with open(out["csv"]) as file:
            lines = list(csv.DictReader(file))
        self.assertEqual(len(lines), 5)
        self.assertTrue(all(line["command"] and line["commit"] and line["machine"] and line["run"] for line in lines))


class Runs(RunCase):
    """Whole runs on a random model."""

    def test_whole_run(self):
        self.check_whole_run()

    def test_goes_on_where_it_was_stopped(self):
        arguments = ("--presets", "TQ4,TQ3,TQ2,TQ6", "--baselines", "f16,q8_0,q4_0", "--chunks", "8")
        process = subprocess.Popen(self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "TQ_PYTHON": sys.executable})
        deadline = time.monotonic() + 60
        while not list(self.folder.glob("work/*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130, errors)
        self.assertIn("the same command goes on", errors)
        self.assertLessEqual({path.suffix for path in self.folder.glob("work/references/*")}, {".json", ".kld"})
        kept = {path.name: path.stat().st_mtime_ns for path in self.folder.glob("work/*.json")}
        self.assertTrue(1 <= len(kept) < 8)
        done = self.run_eval(*arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"{len(kept)} of 8 measurements", done.stderr)
        after = {path.name: path.stat().st_mtime_ns for path in self.folder.glob("work/*.json")}
        self.assertEqual(len(after), 8)
        self.assertEqual({name: after[name] for name in kept}, kept)

    def test_the_reference_is_kept(self):
        for preset, words in (("TQ4", "512: reference"), ("TQ3", "512: TQ3")):
            done = self.run_eval("--presets", preset, "--baselines", "f16")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(words, done.stderr)
        self.assertNotIn("reference", done.stderr)
        self.assertIn("2 of 3 measurements are in", done.stderr)
        self.assertEqual(len(list(self.folder.glob("work/references/*.kld"))), 1)
        done = self.run_eval("--presets", "TQ2", "--baselines", "f16", "--keep", "0")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(list(self.folder.glob("work/references/*")), [])

    def test_a_chat_has_special_tokens(self):
        path = self.folder / "chat.json"
        messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": 200 * "a</s>bcd"}]
        path.write_text(json.dumps([messages, messages]))
        done = self.run_eval("--chat", path, "--presets", "TQ4", "--baselines", "f16")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("### chat, 1 x 512 tokens", done.stdout)
        counts = [base_tokens(base).count(2) for base in self.folder.glob("work/references/*.kld")]  # </s>
        self.assertEqual(min(counts), 0)
        self.assertGreater(max(counts), 80)

    def test_outputs_are_tried_first(self):
        existing = self.folder / "out"
        existing.write_text("mine")
        for words, arguments in (("there is no folder", ("--json", self.folder / "absent/out")),
                                 ("is a folder", ("--html", self.folder)),
                                 ("cannot be written", ("--csv", existing / "out")),
                                 ("both name", ("--json", existing, "--csv", self.folder / "." / "out")),
                                 ("which is read", ("--markdown", self.model())), ("which is read", ("--json", TEXT)),
                                 ("is not a folder", ("--work", existing))):
            with self.subTest(words):
                self.check_error(words, *arguments)
        self.assertEqual(existing.read_text(), "mine")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["out"])

    def test_odd_names_a_poor_locale_and_a_full_disk(self):
        work = ("--work", self.folder / "wo,rk\\", "--presets", "TQ4", "--baselines", "f16")
        page, table, figures = (self.folder / f"\u00fc\udcff.{kind}" for kind in ("html", "csv", "json"))
        poor = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(self.command(*work, "--html", page, "--csv", table, "--json", figures), capture_output=True,
                              env={**os.environ, **poor, "TQ_PYTHON": sys.executable})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("\u00b1", page.read_text(encoding="utf-8"))
        self.assertEqual(len(json.loads(figures.read_text())["rows"]), 3)
        with open("/dev/full", "w") as full:
            for arguments, stdout in (((), full), (("--json", "/dev/full"), subprocess.DEVNULL)):
                done = subprocess.run(self.command(*work, *arguments), stdout=stdout, stderr=subprocess.PIPE, text=True,
                                      env={**os.environ, "TQ_PYTHON": sys.executable})
                self.assertEqual(done.returncode, 1, done.stderr)
                self.assertIn("No space left on device", done.stderr)
                self.assertIn("the same command writes it", done.stderr)
                self.assertNotIn("Traceback", done.stderr)
                self.assertNotIn("Exception", done.stderr)

    def test_one_that_fails_stops_no_other(self):
        self.arch = "qwen2"  # whose keys with their biases are beyond 2 bits
        done = self.run_eval("--presets", "TQ2:k=sq2,guard=refuse", "TQ4", "--baselines", "f16", "--json",
                             self.folder / "out.json")
        self.assertEqual(done.returncode, 1)
        result = json.loads((self.folder / "out.json").read_text())
        self.assertEqual([row["name"] for row in result["rows"]], ["f16", "f16 -fa off", "TQ4"])
        self.assertIn("guard", result["failed"][0]["error"])

    def test_errors(self):
        self.check_error("does not exist", "--text", "no-such-text")
        self.check_error("does not exist", "--chat", "no-such-chat")
        self.check_error("has no conversations; give JSON", "--chat", TEXT)
        self.check_error("unknown preset 'TQ9'; the presets are TQ6", "--presets", "TQ9")
        self.check_error("v=tq9", "--presets", "TQ4:v=tq9")
        self.check_error("unknown baseline 'q9'", "--baselines", "q9")
        self.check_error("not a list of whole numbers", "--context", "1k")
        self.check_error("8192 tokens; 9000 are too many", "--context", "9000")
        self.check_error("llama-perplexity was not found", "--llama-bin", self.folder)
        self.check_error("no-such.so does not exist", "--plugin", "no-such.so")
        short = self.folder / "short.txt"
        short.write_text("Too short.")
        self.check_error("too short for a window of 512 tokens", "--text", short, "--presets", "TQ4", "--baselines", "f16")

    def test_without_libraries(self):
        done = subprocess.run(self.command(), capture_output=True, text=True, env={**os.environ, "TQ_PYTHON": "/usr/bin/false"})
        self.assertEqual(done.returncode, 1)
        done = subprocess.run(self.command(), capture_output=True, text=True, env={**os.environ, "TQ_PYTHON": "/no/python"})
        self.assertIn("TQ_PYTHON", done.stderr)


class RealRuns(RunCase):
    """What only a trained model shows."""

    def model(self):
        return common.MODEL

    def test_whole_run(self):
        self.check_whole_run()

    def test_a_chat_in_the_models_template(self):
        text, path = TEXT.read_text()[:8000], self.folder / "chat.jsonl"
        chats = [[{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text[at:at + 400]}]
                 for at in range(0, len(text), 400)]
        path.write_text("\n".join(map(json.dumps, chats)))
        done = self.run_eval("--chat", path, "--presets", "TQ4", "--baselines", "f16", "--keep", "1")
        self.assertEqual(done.returncode, 0, done.stderr)
        begins = [base_tokens(base)[0] for base in self.folder.glob("work/references/*.kld")]
        self.assertIn(1, begins)  # <|im_start|>, of which there are three in each conversation
        rendered = next(self.folder.glob("work/chat-*/chat.txt")).read_text()
        self.assertEqual((rendered.count("<|im_start|>"), rendered.count("<|im_end|>")), (3 * len(chats), 3 * len(chats)))

    def test_needles(self):
        out = self.folder / "out.json"
        done = self.run_eval("--presets", "TQ4", "--baselines", "f16", "--needle", "512", "--needle-depths", "2", "--json", out,
                             "--html", self.folder / "out.html")
        self.assertEqual(done.returncode, 0, done.stderr)
        needle = json.loads(out.read_text())["needle"]
        self.assertEqual([row["name"] for row in needle], ["f16", "f16 -fa off", "TQ4"])
        self.assertEqual([(cell["depth"], cell["n_needles"]) for cell in needle[0]["cells"]], [(0, 1), (1, 1), (0.5, 3)])
        self.assertGreater(sum(cell["score"] for cell in needle[0]["cells"]), 0)


if __name__ == "__main__":
    common.main()
