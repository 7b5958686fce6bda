#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What a user of the library sees: header, symbols, package files, installation, and a build without a build system."""
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import BUILD, DEPS, ROOT, main  # noqa: E402

HEADER = ROOT / "include" / "turboquant.h"
CONSUMER = Path(__file__).resolve().parent / "consumer"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise AssertionError(f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def header_version():
    numbers = dict(re.findall(r"#define TQ_VERSION_(\w+) (\d+)", HEADER.read_text()))
    return ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH"))


def declared_functions():
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return set(re.findall(r"^TQ_API\b[^;(]*?(\w+)\(", text, flags=re.MULTILINE))


def defined_symbols(path, *options):
    names = [line.split()[-1] for line in run("nm", "--defined-only", *options, path).splitlines() if len(line.split()) == 3]
    return {name for name in names if name != "VERS_1.0"}


class Header(unittest.TestCase):
    def compile(self, compiler, standard, suffix):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / ("only" + suffix)
            source.write_text('#include "turboquant.h"\n')
            run(compiler, f"-std={standard}", *STRICT, f"-I{HEADER.parent}", "-c", source, "-o", Path(folder) / "only.o")

    def test_alone_as_c11(self):
        self.compile("cc", "c11", ".c")

    def test_alone_as_cpp17(self):
        self.compile("c++", "c++17", ".cpp")


class Symbols(unittest.TestCase):
    def test_shared_library_exports_the_header(self):
        self.assertEqual(defined_symbols(BUILD / "libturboquant.so", "-D"), declared_functions())

    def test_static_library_defines_only_tq(self):
        names = defined_symbols(BUILD / "libturboquant.a", "--extern-only")
        self.assertGreater(len(names), len(declared_functions()))
        self.assertEqual([name for name in names if not name.startswith("tq_")], [])

    def test_soname(self):
        dynamic = run("readelf", "-d", BUILD / "libturboquant.so")
        self.assertIn("Library soname: [libturboquant.so.0]", dynamic)

    def test_plugin(self):
        plugin = BUILD / "libggml-turboquant.so"
        if not plugin.exists():
            self.skipTest("the plug-in was not built")
        self.assertEqual(defined_symbols(plugin, "-D"), {"ggml_backend_init"})
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", plugin))
        # The C library alone: no libturboquant (it is inside), no ggml (the host has it), no OpenMP (found at run time).
        self.assertEqual([name for name in needed if not re.match(r"(libc|libm|libpthread|libdl|ld-linux.*)\.so", name)], [])


class Install(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.prefix = Path(cls.folder.name) / "prefix"
        run("cmake", "--install", BUILD, "--prefix", cls.prefix)
        cls.lib = next(cls.prefix.rglob("libturboquant.a")).parent
        cls.pkg_config = ["pkg-config", f"--define-variable=prefix={cls.prefix}", f"--define-variable=libdir={cls.lib}",
                          f"--define-variable=includedir={cls.prefix}/include", cls.lib / "pkgconfig" / "turboquant.pc"]

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def test_one_header(self):
        self.assertEqual([path.name for path in (self.prefix / "include").rglob("*")], ["turboquant.h"])

    def test_version(self):
        self.assertEqual(run(*self.pkg_config, "--modversion").strip(), header_version())

    def check_program(self, program):
        self.assertEqual(run(program, env={"LD_LIBRARY_PATH": str(self.lib)}).split()[0], header_version())

    def test_pkg_config_shared(self):
        program = self.prefix / "shared"
        flags = run(*self.pkg_config, "--cflags", "--libs").split()
        run("cc", CONSUMER / "main.c", *flags, "-o", program)
        self.assertIn("libturboquant.so.0", run("readelf", "-d", program))
        self.check_program(program)

    def test_pkg_config_static(self):
        program = self.prefix / "static"
        flags = run(*self.pkg_config, "--static", "--cflags", "--libs").split()
        run("cc", "-static", CONSUMER / "main.c", *flags, "-o", program)
        self.check_program(program)

    def test_cmake(self):
        build = self.prefix / "consumer-build"
        run("cmake", "-S", CONSUMER, "-B", build, f"-DCMAKE_PREFIX_PATH={self.prefix}")
        run("cmake", "--build", build)
        self.check_program(build / "with_shared")
        self.check_program(build / "with_static")

    def test_installed_tq(self):
        tq = self.prefix / "bin" / "tq"
        if not tq.exists():
            self.skipTest("tq was not built")
        self.assertEqual(run(tq, "--version").strip(), "tq " + header_version())
        for path in ("share/man/man1/tq.1", "share/bash-completion/completions/tq"):
            self.assertTrue((self.prefix / path).exists(), path)
        if (BUILD / "libggml-turboquant.so").exists():
            shown = run(tq, "run", "--dry-run", "--llama-bin", CONSUMER, "--tool", "bench", HEADER)
            plugin = next(self.prefix.rglob("libggml-turboquant.so"))
            self.assertIn(str(plugin), str(Path(shown.split()[0].split("=")[1]).resolve()))

    def test_installed_tq_fold_finds_the_library(self):
        tq, python = self.prefix / "bin" / "tq", DEPS / "venv/bin/python"
        if not tq.exists() or not python.exists():
            self.skipTest("tq was not built, or its Python is not there")
        environment = {**os.environ, "TQ_PYTHON": str(python)}
        environment.pop("TURBOQUANT_LIBRARY", None)
        done = subprocess.run([tq, "fold", "absent.gguf", "-o", "out.gguf"], capture_output=True, text=True, env=environment)
        self.assertEqual((done.returncode, done.stderr), (1, "tq fold: absent.gguf is not a file; name a GGUF model\n"))


class WithoutBuildSystem(unittest.TestCase):
    def test_plain_cc(self):
        """One command, no flags but include paths and -O2: it builds, and still encodes bit by bit as the golden files say."""
        tests = ROOT / "tests"
        includes = [f"-I{folder}" for folder in (ROOT / "include", ROOT / "src", tests / "cross", tests, tests / "unit")]
        golden = [tests / "unit" / "test_golden.c", tests / "unit" / "vectors.c"]
        with tempfile.TemporaryDirectory() as folder:
            sources = sorted((ROOT / "src").rglob("*.c"))
            run("cc", "-O2", *includes, "-c", *sources, cwd=folder)
            objects = sorted(Path(folder).glob("*.o"))
            self.assertEqual(len(objects), len(sources), "two files under src/ have the same name")
            run("cc", *includes, CONSUMER / "main.c", *objects, "-pthread", "-lm", "-o", "consumer", cwd=folder)
            self.assertEqual(run(Path(folder) / "consumer").split()[0], header_version())
            run("cc", *includes, *golden, *objects, "-pthread", "-lm", "-o", "golden", cwd=folder)
            run(Path(folder) / "golden", cwd=ROOT)


if __name__ == "__main__":
    main()
