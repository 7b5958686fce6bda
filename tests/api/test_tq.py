#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The command tq: its figures in JSON, its errors, what `tq run` would execute, its manual page and its completion."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import BUILD, DEPS, ROOT, main  # noqa: E402

TQ = BUILD / "tq"
TOOLS = Path(__file__).resolve().parent / "consumer"  # has an executable llama-bench
MODEL = __file__  # tq run only asks whether the model can be read
THEORY = {"sq2": 0.1175, "sq3": 0.03454, "sq4": 0.009497}


def tq(*arguments, **environment):
    return subprocess.run([TQ, *arguments], capture_output=True, text=True, env={**os.environ, **environment})


def tq_json(*arguments):
    done = tq(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Figures(unittest.TestCase):
    def test_formats(self):
        formats = tq_json("formats")
        keys = {"name", "bits", "head_dim", "bytes_per_vector", "bits_per_value", "ratio_to_f16", "description"}
        self.assertTrue(all(set(f) == keys for f in formats))
        head_dims = {32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320, 512, 576}
        self.assertEqual({f["head_dim"] for f in formats}, head_dims)
        sq4 = next(f for f in formats if f["name"] == "sq4" and f["head_dim"] == 128)
        self.assertEqual((sq4["bits"], sq4["bytes_per_vector"], sq4["bits_per_value"]), (4, 66, 4.125))
        self.assertAlmostEqual(sq4["ratio_to_f16"], 16 / 4.125)

    def test_formats_of_one_head_dim(self):
        self.assertEqual({f["head_dim"] for f in tq_json("formats", "--head-dim", "80")}, {80})

    def test_formats_table(self):
        table = tq("formats").stdout
        self.assertIn("sq4", table)
        self.assertIn("4.125", table)

    def test_distortion_within_one_percent_of_theory(self):
        for name, theory in THEORY.items():
            d = tq_json("distortion", "--format", name, "--head-dim", "128")
            self.assertLess(abs(d["mse"] / theory - 1), 0.01, name)
            self.assertLess(abs(d["lloyd_max"] / theory - 1), 0.01, name)
            self.assertEqual(d["shannon"], 4.0 ** -int(name[2]))
            self.assertLess(abs(d["mse_vector"] / theory - 1), 0.1, name)

    def test_distortion_without_codebook(self):
        d = tq_json("distortion", "--format", "sq8", "--head-dim", "64", "--n", "100", "--seed", "7")
        self.assertEqual((d["lloyd_max"], d["n"], d["seed"]), (None, 100, 7))
        self.assertEqual(d["mse"], d["mse_vector"])

    def test_distortion_repeats(self):
        arguments = ("distortion", "--format", "sq3", "--head-dim", "96", "--n", "50")
        self.assertEqual(tq_json(*arguments), tq_json(*arguments))
        self.assertNotEqual(tq_json(*arguments)["mse"], tq_json(*arguments, "--seed", "2")["mse"])

    def test_presets(self):
        presets = {p["name"]: p for p in tq_json("presets", "--head-dim", "64", "--n-head-kv", "3", "--context", "4096")}
        self.assertLessEqual({"TQ6", "TQ4", "TQ3", "TQ2"}, set(presets))
        # Exact tokens and bookkeeping cost something beyond the format's own bits, and not much.
        self.assertTrue(4.25 < presets["TQ4"]["bits_per_value"] < 5)


class Bench(unittest.TestCase):
    """What tq bench reports, on shapes that take no time. How fast it is, is no test."""
    SMALL = ("--n-head", "4", "--n-head-kv", "2", "--head-dim", "64", "--threads", "2", "--repeats", "2")
    KEYS = {"name", "us_median", "us_min", "us_max", "bytes", "gb_per_s", "bandwidth_share", "ratio_vs_f16", "error"}

    def test_attention(self):
        result = tq_json("bench", "attention", *self.SMALL, "--context", "300", "--formats", "sq4,tt4/tt3,TQ4", "--baselines",
                         "none")
        self.assertEqual([row["name"] for row in result["rows"]], ["sq4", "tt4/tt3", "TQ4"])
        for row in result["rows"]:
            self.assertEqual(set(row), self.KEYS)
            self.assertTrue(0 < row["us_min"] <= row["us_median"] <= row["us_max"])
            self.assertAlmostEqual(row["gb_per_s"], row["bytes"] / row["us_median"] / 1000)
            self.assertAlmostEqual(row["bandwidth_share"], row["gb_per_s"] / result["read_gb_per_s"])
            self.assertIsNone(row["ratio_vs_f16"])
        self.assertEqual((result["context"], result["n_query"], result["threads"]), (300, 1, 2))
        # Codes and scales of 300 tokens, 2 heads, keys and values, and a page of bookkeeping at most.
        self.assertTrue(0 <= result["rows"][0]["bytes"] - 300 * 2 * 2 * 34 < 4096)

    @unittest.skipUnless((BUILD / "libtq-ggml-reference.so").exists() and (DEPS / "llama-bin").exists(), "no ggml here")
    def test_same_result_as_ggml(self):
        for what in ("attention", "prefill"):
            n_query = ("--n-query", "70") if what == "prefill" else ()
            result = tq_json("bench", what, *self.SMALL, "--context", "300", *n_query, "--formats", "sq8,tt4",
                             "--baselines", "f16,q8_0", "--llama-bin", str(DEPS / "llama-bin"))
            rows = {row["name"]: row for row in result["rows"]}
            self.assertEqual((rows["f16"]["error"], rows["f16"]["ratio_vs_f16"]), (0, 1), what)
            self.assertEqual(rows["f16"]["bytes"], 300 * 2 * 2 * 64 * 2)
            # The errors of the codes: another mask, head or scale would give 1.
            self.assertTrue(0 < rows["sq8"]["error"] < 0.03, rows["sq8"])
            self.assertTrue(0.01 < rows["tt4"]["error"] < 0.2, rows["tt4"])

    def test_encode(self):
        result = tq_json("bench", "encode", "--repeats", "1", "--formats", "sq4,tt2", "--baselines", "none")
        self.assertEqual([row["name"] for row in result["rows"]], ["sq4", "tt2"])

    def test_table(self):
        done = tq("bench", "attention", *self.SMALL, "--context", "64", "--formats", "sq4", "--baselines", "none")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("us median", done.stdout)


class Cache(unittest.TestCase):
    SNAPSHOT = Path(__file__).resolve().parent.parent / "golden/snapshot_1.tqs"

    def test_inspect(self):
        info = tq_json("cache", "inspect", self.SNAPSHOT)
        self.assertEqual((info["n_layer"], info["page_size"], info["n_sequences"], info["n_prefixes"]), (2, 16, 2, 2))
        self.assertEqual((info["k_formats"], info["v_formats"]), (["tt4"] * 2, ["sq3"] * 2))
        self.assertEqual(info["file_bytes"], self.SNAPSHOT.stat().st_size)
        self.assertIn("layers     0 to 1: keys tt4, values sq3", tq("cache", "inspect", self.SNAPSHOT).stdout)

    def test_inspect_values_in_keys(self):
        done = tq("cache", "inspect", ROOT / "tests/golden/snapshot_values_in_keys.tqs")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("head_dim 32 and 32; values are read from the keys", done.stdout)
        self.assertIn("keys sq8, values sq8", done.stdout)
        info = tq_json("cache", "inspect", ROOT / "tests/golden/snapshot_values_in_keys.tqs")
        self.assertEqual((info["head_dim_v"], info["v_formats"]), (0, ["sq8"]))

    def test_verify(self):
        self.assertIn("whole", tq("cache", "verify", self.SNAPSHOT).stdout)
        with tempfile.NamedTemporaryFile() as damaged:
            content = bytearray(self.SNAPSHOT.read_bytes())
            content[-100] ^= 1
            damaged.write(content)
            damaged.flush()
            done = tq("cache", "verify", self.SNAPSHOT, damaged.name)
            self.assertEqual(done.returncode, 1)
            self.assertIn("a page's hash is wrong", done.stderr)
        self.assertEqual(tq("cache", "verify", "/nowhere").returncode, 1)
        self.assertEqual(tq("cache", "inspect").returncode, 2)

    def test_bench(self):
        done = tq("cache", "bench", "--context", "512", "--batch", "3", "--rounds", "2", "--page-size", "16")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual([line.split(",")[0] for line in done.stdout.splitlines()], ["name", "store", "paged", "ragged"])
        self.assertEqual(tq("cache", "bench", "--page-size", "20").returncode, 1)


class Errors(unittest.TestCase):
    def check(self, code, text, *arguments, **environment):
        done = tq(*arguments, **environment)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertIn(text, done.stderr)
        self.assertEqual(done.stdout, "")

    def test_usage(self):
        self.check(2, "usage: tq")
        self.check(2, "unknown command 'x'", "x")
        self.check(2, "unrecognized option", "formats", "--nope")
        self.check(2, "unexpected argument 'x'", "formats", "x")
        self.check(2, "--format and --head-dim are needed", "distortion")
        self.check(2, "whole number", "distortion", "--format", "sq4", "--head-dim", "64", "--n", "0")

    def test_unsupported(self):
        self.check(1, "64, 72, 80", "formats", "--head-dim", "65")
        self.check(1, "unknown format 'tq5'", "distortion", "--format", "tq5", "--head-dim", "64")
        self.check(1, "sq4 at head_dim 64", "distortion", "--format", "sq4", "--head-dim", "64", TQ_CPU="none")

    def test_run(self):
        self.check(2, "which model", "run")
        self.check(2, "unknown preset 'TQ9'", "run", "--preset", "TQ9", MODEL)
        self.check(2, "--tool is", "run", "--tool", "x", MODEL)
        self.check(1, "cannot read the model", "run", "no-such-model.gguf")
        self.check(1, "TQ_PLUGIN", "run", MODEL, TQ_PLUGIN="no-such-plugin.so")
        self.check(1, "llama-completion was not found in that folder", "run", "--llama-bin", str(TOOLS), MODEL, TQ_PLUGIN=MODEL)

    def test_bench(self):
        self.check(2, "attention, prefill or encode", "bench")
        self.check(2, "attention, prefill or encode", "bench", "x")
        self.check(2, "multiple of --n-head-kv", "bench", "attention", "--n-head", "5", "--n-head-kv", "2")
        self.check(2, "at most --context", "bench", "prefill", "--context", "10", "--n-query", "11")
        self.check(2, "whole number", "bench", "attention", "--threads", "0")
        self.check(2, "unexpected argument 'x'", "bench", "attention", "x")
        self.check(1, "unknown format or preset 'tq5'", "bench", "attention", "--context", "16", "--formats", "tq5",
                   "--baselines", "none")
        self.check(1, "TQ_CPU", "bench", "attention", TQ_CPU="none")

    def test_full_device(self):
        for arguments in (["formats", "--json"], ["formats"], ["presets"], ["--version"], ["--help"], ["run", "--help"]):
            with self.subTest(arguments), open("/dev/full", "w") as full:
                done = subprocess.run([TQ, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
                self.assertEqual(done.returncode, 1)
                self.assertIn("cannot write to standard output", done.stderr)


class Run(unittest.TestCase):
    def shown(self, *arguments):
        done = tq("run", "--dry-run", "--tool", "bench", "--llama-bin", str(TOOLS), *arguments, TQ_PLUGIN=MODEL)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.split()

    def test_adds_device_and_plugin(self):
        shown = self.shown("--preset", "TQ2", MODEL, "-p", "512")
        self.assertEqual(shown[0], "GGML_BACKEND_PATH=" + str(Path(MODEL).resolve()))
        self.assertEqual(shown[1:], [str(TOOLS / "llama-bench"), "-m", MODEL, "-dev", "TQ2", "-ngl", "999", "-p", "512"])

    def test_leaves_the_users_choice(self):
        shown = self.shown(MODEL, "--device", "TQ3", "-ngl", "4")
        self.assertEqual(shown[2:], ["-m", MODEL, "--device", "TQ3", "-ngl", "4"])

    def test_takes_the_gpus(self):
        devices = "Available devices:\n  CUDA0: a GPU\n  TQ4: the CPU\n  TQ4-CUDA0: one\n  TQ3-CUDA0: one\n  TQ4-CUDA1: two\n"
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "llama-bench"
            program.write_text(f"#!/bin/sh\ncat <<END\n{devices}END\n")
            program.chmod(0o755)
            done = tq("run", "--dry-run", "--tool", "bench", "--llama-bin", folder, MODEL, TQ_PLUGIN=MODEL)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("-dev TQ4-CUDA0,TQ4-CUDA1 -ngl 999", done.stdout)

    def test_becomes_the_tool(self):
        self.assertEqual(tq("run", "--tool", "bench", "--llama-bin", str(TOOLS), MODEL, TQ_PLUGIN=MODEL).returncode, 0)


class Doctor(unittest.TestCase):
    """What it says of programs, most of them scripts that do what a llama.cpp may do."""
    DEVICES = ("Available devices:", "  CUDA0: NVIDIA A (of 80 GB) (81920 MiB, 500 MiB free)",
               "  TQ4: KV cache with keys tt4, values tt4: 4.35 bits per value (100 MiB, 50 MiB free)")
    PLUGIN = BUILD / "libggml-turboquant.so"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()

    def program(self, listed, name="llama-server"):
        """A program whose --list-devices is these shell commands."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\ncase $1 in --version) echo 'version: 7 (abc)' >&2 ;; *) {listed} ;; esac\n")
        path.chmod(0o755)
        return path

    def lists(self, *lines):
        return "; ".join(f"echo '{line}'" for line in lines)

    def doctor(self, *arguments, **environment):
        """Its JSON, and that its exit code says the same."""
        done = tq("doctor", "--json", *arguments, **{"TQ_PLUGIN": __file__, **environment})
        self.assertEqual(done.stderr, "")
        found = json.loads(done.stdout)
        self.assertEqual(done.returncode, 0 if found["usable"] else 1)
        self.assertEqual(found["verdict"].split(":")[0], "run" if found["usable"] else "wrong")
        return found

    def assert_wrong(self, *words, why=True, given=(), **environment):
        found = self.doctor("--llama", self.folder, *given, **environment)
        for word in words:
            self.assertIn(word, found["verdict"])
        if why:  # it is the program's fault
            self.assertEqual(found["verdict"], "wrong: " + found["llama"][0]["why"])
        return found

    def test_one_that_fits(self):
        self.program(self.lists(*self.DEVICES))
        self.program(":", "llama-bench")
        found = self.doctor("--llama", self.folder)
        llama = found["llama"][0]
        self.assertEqual((llama["folder"], llama["programs"]), (str(self.folder), ["llama-server", "llama-bench"]))
        self.assertEqual((llama["version"], llama["ggml"], llama["why"]), ("7 (abc)", None, None))
        self.assertEqual([(d["name"], d["description"], d["is_ours"]) for d in llama["devices"]],
                         [("CUDA0", "NVIDIA A (of 80 GB)", False),
                          ("TQ4", "KV cache with keys tt4, values tt4: 4.35 bits per value", True)])
        self.assertEqual(found["verdict"], f"run: tq run --llama-bin {self.folder} --tool server MODEL.gguf")
        self.assertEqual(found["plugin"], str(Path(__file__).resolve()))
        text = tq("doctor", "--llama", self.folder, TQ_PLUGIN=__file__).stdout
        self.assertEqual(text.splitlines()[-1], found["verdict"])
        for word in ("version       7 (abc)", "CUDA0         NVIDIA A (of 80 GB)   (not ours)", "TQ4           KV cache"):
            self.assertIn(word, text)

    def test_it_gets_the_plug_in(self):
        self.program('echo "failed to load $GGML_BACKEND_PATH: no"')
        self.assert_wrong("llama.cpp could not load " + str(Path(__file__).resolve()))

    def test_a_program_or_a_folder_above(self):
        program = self.program(self.lists(*self.DEVICES), "main")
        found = self.doctor("--llama", program)
        self.assertEqual(found["verdict"], f"run: GGML_BACKEND_PATH={Path(__file__).resolve()} {program} -m MODEL.gguf "
                                           "--device TQ4")
        (self.folder / "build/bin").mkdir(parents=True)
        self.program(self.lists(*self.DEVICES), "build/bin/llama-cli")
        self.assertEqual(self.doctor("--llama", self.folder)["llama"][0]["folder"], str(self.folder / "build/bin"))

    def test_what_is_found_by_itself(self):
        self.program(self.lists(*self.DEVICES), "llama-completion")
        for variables in ({"TQ_LLAMA_BIN": str(self.folder)}, {"PATH": f"{self.folder}:{os.environ['PATH']}"}):
            found = self.doctor(**variables)
            self.assertIn(str(self.folder), [llama["folder"] for llama in found["llama"]], variables)
        self.assertEqual(self.doctor(TQ_LLAMA_BIN=str(self.folder))["verdict"], "run: tq run --tool completion MODEL.gguf")
        (self.folder / "empty").mkdir()
        nowhere = {"TQ_LLAMA_BIN": "/nowhere", "PATH": str(self.folder / "empty")}
        self.assertIn("no llama.cpp was found", self.doctor(**nowhere)["verdict"])

    def test_programs_that_do_not_fit(self):
        refusal = "turboquant: not loaded: the host has another layout. Take another llama.cpp"
        for listed, words in ((self.lists(refusal, *self.DEVICES[:2]), (refusal.removeprefix("turboquant: not loaded: "),)),
                              (self.lists(*self.DEVICES[:2]), ("has not looked at GGML_BACKEND_PATH",)),
                              ("echo unknown option; exit 3", ("does not list devices", "'unknown option'")),
                              ("kill -ILL $$", ("signal 4", "another processor")),
                              ("echo x: error while loading shared libraries: liba.so", ("does not start: liba.so",))):
            with self.subTest(listed):
                self.program(listed)
                self.assert_wrong(*words)

    def test_a_program_that_hangs(self):
        # One also leaves a process behind that keeps its output open, one never stops talking.
        for listed in ("sleep 1000 & sleep 1000", "while :; do echo and so on; done"):
            self.program(listed)
            self.assert_wrong("within 1 s and was stopped", given=("--timeout", "1"))

    def test_a_program_of_another_machine(self):
        path = self.folder / "llama-server"
        path.write_bytes(b"\x7fELF" + bytes(100))
        path.chmod(0o755)
        self.assert_wrong("Exec format error")

    def test_what_tq_lacks(self):
        self.program(self.lists(*self.DEVICES))
        self.assert_wrong("libggml-turboquant.so was not found where TQ_PLUGIN says", why=False, TQ_PLUGIN="/nowhere")
        found = self.assert_wrong("TQ_CPU is 'none'", why=False, TQ_CPU="none")
        self.assertIsNone(found["instruction_set"])
        cuda = self.doctor("--llama", self.folder, TQ_CUDA_LIBRARY="/nowhere.so")["cuda"]
        self.assertEqual((cuda["library"], cuda["device"]), (None, None))
        self.assertIn("is not next to the plug-in", cuda["why"])
        cuda = self.doctor("--llama", self.folder, TQ_CUDA_LIBRARY=__file__)["cuda"]
        self.assertEqual((cuda["library"], cuda["device"]), (__file__, None))
        self.assertIn("invalid ELF header", cuda["why"])

    def test_a_device(self):
        library = str(BUILD / "tests/cuda/libturboquant-cuda-emulated.so")
        cuda = self.doctor("--llama", self.program(self.lists(*self.DEVICES)), TQ_CUDA_LIBRARY=library)["cuda"]
        self.assertEqual((cuda["library"], cuda["device"], cuda["why"]), (library, "emulated", None))
        self.assertLessEqual({"compute", "memory_bytes", "driver", "runtime"}, set(cuda))

    def test_usage(self):
        for path, words in (("/nowhere", "does not exist"), (ROOT / "README.md", "is not a program"),
                            (self.folder, "has no llama-server")):
            done = tq("doctor", "--llama", path)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertIn(words, done.stderr)
        self.assertEqual(tq("doctor", "--timeout", "0").returncode, 2)
        self.assertEqual(tq("doctor", "x").returncode, 2)

    @unittest.skipUnless(PLUGIN.exists() and (DEPS / "llama-bin").exists(), "no plug-in or llama.cpp here")
    def test_the_real_one(self):
        found = self.doctor("--llama", DEPS / "llama-bin", TQ_PLUGIN=str(self.PLUGIN))
        llama = found["llama"][0]
        names = [device["name"] for device in llama["devices"] if device["is_ours"]]
        self.assertEqual(names, [preset["name"] for preset in tq_json("presets")])
        self.assertTrue(llama["ggml_library"].endswith(".so." + llama["ggml"]), llama)
        self.assertTrue(llama["version"])


class Python(unittest.TestCase):
    """Neither the current folder nor PYTHONPATH decides which of our modules, or of the standard library's, run."""
    OURS = ("eval", "calibrate", "fold", "simulate", "libturboquant", "json", "argparse", "re", "runpy", "sitecustomize",
            "usercustomize")
    INSTALLED = ("numpy", "tqdm", "gguf", "matplotlib", "jinja2", "xxhash")

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.python = DEPS / "venv/bin/python"

    def plant(self, *names):
        """A folder of modules that say so when they run."""
        planted = self.folder / "planted"
        planted.mkdir(exist_ok=True)
        for name in names:
            (planted / f"{name}.py").write_text("import os\nos.write(2, b'planted ran\\n')\n")
        return planted

    def check(self, folder, path):
        environment = {**os.environ, "TQ_PYTHON": str(self.python if self.python.exists() else sys.executable)}
        for arguments in (["eval", "--help"], ["calibrate", "--help"], ["fold", "--help"],
                          ["cache", "simulate", "--requests", "5", "--budgets", "1", "--html", self.folder / "page.html"]):
            with self.subTest(arguments, path=path):
                done = subprocess.run([TQ, *arguments], capture_output=True, text=True, cwd=folder,
                                      env={**environment, **({} if path is None else {"PYTHONPATH": path})})
                self.assertNotIn("planted ran", done.stderr)
                if self.python.exists():
                    self.assertEqual(done.returncode, 0, done.stderr)

    def test_current_folder(self):
        planted = self.plant(*self.OURS, *self.INSTALLED)
        for path in (None, "", ".", ":", "planted:."):
            self.check(planted, path)

    def test_python_path(self):
        planted = self.plant(*self.OURS, *(self.INSTALLED if self.python.exists() else ()))
        self.check(self.folder, str(planted))

    def test_python_path_may_have_what_is_not_installed(self):
        package, planted = self.folder / "package/probe", self.plant("tq_not_installed")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text("import sys, tq_not_installed\nprint(sys.argv[1:])\n")
        shutil.copy(ROOT / "tools/start_package.py", package.parent)
        done = subprocess.run([sys.executable, "-I", package.parent / "start_package.py", "probe", "a b"], capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(planted)})
        self.assertEqual((done.stdout, done.stderr), ("['a b']\n", "planted ran\n"))

    def test_help_without_libraries(self):
        for command in ("eval", "calibrate", "fold"):
            with self.subTest(command):
                words = [sys.executable, "-I", "-S", ROOT / "tools/start_package.py", command]
                environment = {**os.environ, "PYTHONNOUSERSITE": "1"}
                done = subprocess.run([*words, "--help"], capture_output=True, text=True, env=environment)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertIn(f"usage: tq {command}", done.stdout)
                done = subprocess.run([*words, "--nonsense"], capture_output=True, text=True, env=environment)
                self.assertEqual(done.returncode, 2, done.stderr)


class Help(unittest.TestCase):
    def test_help_everywhere(self):
        for command in ("formats", "distortion", "presets", "bench", "run", "doctor"):
            done = tq(command, "--help")
            self.assertEqual(done.returncode, 0)
            self.assertIn(f"usage: tq {command}", done.stdout)
            self.assertIn(command, tq("--help").stdout)


class ManualPage(unittest.TestCase):
    COMMANDS = ("formats", "distortion", "presets", "eval", "calibrate", "fold", "bench", "cache", "run", "doctor",
                "cache bench", "cache simulate")
    PAGE = (ROOT / "docs/tq.1").read_text().replace("\\-", "-")

    def sections(self):
        return {part.split("\n", 1)[0]: part for part in self.PAGE.split(".SS tq ")[1:]}

    def test_every_option_is_in_it(self):
        """Each in its command's own section. scripts/gen_man.py writes the page."""
        sections = self.sections()
        for command in self.COMMANDS:
            done = tq(*command.split(), "--help", TQ_PYTHON=sys.executable)
            self.assertEqual(done.returncode, 0, done.stderr)
            for option in set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout)):
                self.assertRegex(sections[command], rf"(?<![\w-]){option}(?![\w-])", f"tq {command} {option}")

    def test_every_command_is_in_it(self):
        commands = set(re.findall(r"^  ([a-z]+)  ", tq("--help").stdout, re.MULTILINE))
        self.assertEqual(commands, {name for name in self.sections() if " " not in name})
        self.assertEqual(set(self.COMMANDS), set(self.sections()))

    def test_its_version(self):
        self.assertIn(f'"turboquant {tq("--version").stdout.split()[1]}"', self.PAGE)


@unittest.skipUnless(shutil.which("bash"), "no bash")
class Completion(unittest.TestCase):
    def complete(self, *words):
        script = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tq; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-eu", "-c", script, "bash", ROOT / "tools/tq.bash", TQ, *words], capture_output=True,
                              text=True, env={**os.environ, "TQ_PYTHON": sys.executable})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout.split()

    def test_commands(self):
        self.assertEqual(self.complete("fo"), ["formats", "fold"])
        self.assertLessEqual({"run", "eval", "cache", "--version"}, set(self.complete("")))
        self.assertEqual(self.complete("cache", "s"), ["simulate"])
        self.assertEqual(self.complete("bench", "p"), ["prefill"])

    def test_options(self):
        self.assertEqual(self.complete("distortion", "--h"), ["--head-dim"])
        self.assertEqual(self.complete("doctor", "--l"), ["--llama"])
        self.assertEqual(self.complete("cache", "simulate", "--bud"), ["--budgets"])
        self.assertEqual(self.complete("eval", "--need"), ["--needle", "--needle-depths"])
        self.assertEqual(self.complete("nonsense", "--x"), [])

    def test_values(self):
        self.assertEqual(self.complete("run", "--preset", "TQ"), ["TQ6", "TQ4", "TQ3", "TQ2"])
        self.assertEqual(self.complete("run", "--tool", "s"), ["server"])
        self.assertEqual(self.complete("distortion", "--format", "tt"), ["tt4", "tt3", "tt2"])
        self.assertEqual(self.complete("eval", "model.g"), [])  # bash completes files itself


if __name__ == "__main__":
    main()
