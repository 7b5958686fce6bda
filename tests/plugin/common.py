# SPDX-License-Identifier: MIT
"""What the tests of the plug-in share: where things are, running stock tools, building the C hosts, the last line.

Environment (a missing one is an error): TQ_LLAMA_BIN, the folder of the stock llama-* programs (its libraries there or in
../lib); TQ_LLAMA_SRC, the sources of the same llama.cpp, for headers; TQ_PLUGIN, libggml-turboquant.so; TQ_MODEL, a real model;
TQ_TINY_DIR, a folder for small random models, which are made when missing (that needs the packages gguf and numpy).
Not needed: TQ_TEST_THREADS, the threads of each stock program (2); TQ_CPU, the instruction set that the plug-in is held to;
TQ_TEST_INNER, a device of llama.cpp, as CPU: then all tests run on the plug-in's devices that stand in front of it, TQ4-CPU for
TQ4. Tests name TQ4 all the same, and read it in logs.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from eval.llama import Finished, Setup, preload, shown, with_last_words  # noqa: E402

THREADS = os.environ.get("TQ_TEST_THREADS", "2")
os.environ["OMP_WAIT_POLICY"] = "passive"  # suites run side by side: threads that spin would hold each other up


def path_from_env(name):
    value = os.environ.get(name)
    if not value or not os.path.exists(value):
        sys.exit(f"{name} must name an existing file or folder, not {value!r}\n0 passed, 1 failed")
    return pathlib.Path(value).resolve()


LLAMA_BIN = path_from_env("TQ_LLAMA_BIN")
LLAMA_SRC = path_from_env("TQ_LLAMA_SRC")
PLUGIN = path_from_env("TQ_PLUGIN")
MODEL = path_from_env("TQ_MODEL")
TINY_DIR = path_from_env("TQ_TINY_DIR")
INNER = os.environ.get("TQ_TEST_INNER", "")
SETUP = Setup(LLAMA_BIN, PLUGIN, MODEL, THREADS, inner=INNER)
# What devices in front of others do not serve: architectures, and tests by their names.
_SHARED, _LATENT = "layers that share keys and values are not served", "which the GPU device does not serve yet"
NOT_SERVED = {"gemma3n": _SHARED, "gemma4": _SHARED, "deepseek2": _LATENT} if INNER else {}
NOT_TESTED = {
    "test_nan_in_keys_and_values_is_refused_with_its_place": "NaN is found some steps later, without its place",
    "test_what_is_not_understood_has_8_bits": _LATENT,
} if INNER else {}
# What is left without quantization is the plumbing, which may move a model by so much; next to it where that can't be had.
PLAIN, PLAIN_MAX_KL = ("k=sq8,v=sq8,ref=0", "1e-3") if INNER else ("k=f16,v=f16", "2e-5")
FEW_AND_MANY = ["sinks=0,recent=1", "sinks=64,recent=384"] if INNER else ["sinks=0,recent=0", "sinks=64,recent=960"]
FEW_AND_MANY += ["sinks=1,recent=1", "sinks=3,recent=33"]
EXACT_VALUES = "v=sq8" if INNER else "v=f16"
NOT_PLAIN = {"qwen2": "its keys are so large that 8 bits without references move it far"} if INNER else {}
LLAMA_LIB = next((d for d in (LLAMA_BIN, LLAMA_BIN.parent / "lib") if (d / "libllama.so").exists()), LLAMA_BIN)


def tiny_model(name, *arguments):
    """A random model; `name` is its file's, and its architecture's unless arguments tell."""
    path = TINY_DIR / f"{name}.gguf"
    if not path.exists():
        new = path.with_suffix(f".{os.getpid()}")  # another suite may be making it too
        command = [sys.executable, ROOT / "scripts/make_tiny_gguf.py", *(arguments or ("--arch", name)), new]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        new.rename(path)
    return path


def served(*archs):
    return [arch for arch in archs if arch not in NOT_SERVED]


def environment(**variables):
    """This process's environment with the plug-in in it and `variables` on top (None removes one)."""
    hidden = ("TQ_", "GGML_", "LLAMA_")
    env = {name: value for name, value in os.environ.items() if name == "TQ_CPU" or not name.startswith(hidden)}
    env["GGML_BACKEND_PATH"] = str(PLUGIN)
    for name, value in variables.items():
        env.pop(name, None)
        if value is not None:
            env[name] = str(value)
    if INNER:
        env["TQ_GGML"] = ",".join(filter(None, [f"inner={INNER}", env.get("TQ_GGML")]))
    return preload(env, PLUGIN)


def device(name):
    """The name in llama.cpp of the device under test that is called `name` here."""
    return f"{name}-{INNER}" if INNER and re.fullmatch(r"TQ\d", str(name)) else str(name)


def under_test(log):
    """A log with the names that devices have here."""
    return re.sub(rf"\b(TQ\d)-{re.escape(INNER)}(?=\b|_)", r"\1", log) if INNER else log


class Result(Finished):
    """The end of a process whose streams went into one."""

    def lines(self, *words):
        """The lines that hold all of these."""
        return [line for line in self.log.splitlines() if all(w in line for w in words)]


def run(command, timeout=300, **variables):
    command = [device(argument) for argument in command]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             stdin=subprocess.DEVNULL, timeout=timeout, env=environment(**variables))
    return Result(under_test(process.stdout.decode(errors="replace")), "", process.returncode, 0, 0, shown(command, variables))


def complete(model, *arguments, prompt="The capital of France is", n=8, device="TQ4", **variables):
    """Stock llama-completion, greedy. Without repacked weights: for AMX's, llama.cpp ends on deepseek2 by itself."""
    command = [LLAMA_BIN / "llama-completion", "-m", model, "-dev", device, "-ngl", "99", "-t", THREADS, "-p", prompt, "-n", n,
               "--temp", "0", "-no-cnv", "-lv", "4", "--no-repack", *arguments]
    return with_last_words("graphs reused", lambda: run(command, **variables))


def build_host(source, directory, *flags, libraries=("llama", "ggml", "ggml-base")):
    """Compile a C host of this folder against the stock libraries."""
    program = pathlib.Path(directory) / pathlib.Path(source).stem
    command = ["cc", "-std=c11", "-O1", "-Wall", "-Wextra", *flags, "-isystem", LLAMA_SRC / "include", "-isystem",
               LLAMA_SRC / "ggml/include", ROOT / "tests/plugin" / source, "-o", program, f"-L{LLAMA_LIB}",
               *(f"-l{name}" for name in libraries), f"-Wl,-rpath,{LLAMA_LIB}", "-lm", "-ldl"]
    subprocess.run([str(c) for c in command], check=True)
    return program


class TestCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.directory = pathlib.Path(cls.temporary.name)

    def setUp(self):
        if self._testMethodName in NOT_TESTED:
            self.skipTest(NOT_TESTED[self._testMethodName])

    def assert_line(self, result, *words):
        self.assertTrue(result.lines(*words), f"no line has {words}; status {result.status}:\n{result.log[-4000:]}")

    def assert_ok(self, result):
        self.assertEqual(result.status, 0, result.log[-4000:])


def main():
    """Run the calling script's tests; its last line is 'N passed, M failed'."""
    result = unittest.main(exit=False, verbosity=2).result
    # A subtest counts for its test; a class that could not be set up is a failure of its own.
    failed = {getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors}
    n_failed = len(failed)
    sys.stderr.flush()
    print(f"{max(result.testsRun - n_failed, 0)} passed, {n_failed} failed", flush=True)
    sys.exit(n_failed != 0)
