#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What scripts/release.py has made, as those who get it use it: symbols, wheels in clean environments, AArch64 under qemu, the
tarball in a root without anything of this machine. TQ_DIST names the folder of the artefacts (dist).

TQ_RELEASE_ROOT names a folder with an old system, such as `debootstrap --variant=minbase bullseye FOLDER` makes; without it the
tarball runs in a folder with this machine's C library and nothing else. TQ_AARCH64_SYSROOT names another folder of AArch64's
libraries than the cross compiler's.
"""
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import DEPS, ROOT, main  # noqa: E402
from suites import MODEL, PYTHON_VENV, absent, bindings  # noqa: E402

DIST = Path(os.environ.get("TQ_DIST") or ROOT / "dist").absolute()
WORK = ROOT / "build/release-artefacts"  # compilers and checkkern
GLIBC = 2, 28
VERSION = ".".join(re.findall(r"#define TQ_VERSION_[A-Z]+ (\d+)", (ROOT / "include/turboquant.h").read_text()))
NAMES = {"x86_64": "x86-64", "aarch64": "AArch64"}
SYSROOT = Path(os.environ.get("TQ_AARCH64_SYSROOT") or "/usr/aarch64-linux-gnu")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))} gave {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def artefact(pattern):
    found = sorted(DIST.glob(pattern))
    if len(found) != 1:
        raise AssertionError(f"{len(found)} files {pattern} in {DIST}: run `make release`")
    return found[0]


def clean(**more):
    """An environment in which no library, package or plug-in of this checkout is named."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("TQ_", "TURBOQUANT_", "GGML_", "PYTHON", "LD_"))}
    return kept | more


def newest_glibc(path):
    """The newest version of the C library whose symbols an ELF file needs."""
    versions = re.findall(r"\bGLIBC_(\d+)\.(\d+)", run("objdump", "-p", path).partition("Version References:")[2])
    return max((int(major), int(minor)) for major, minor in versions)


def is_elf(path):
    return path.is_file() and path.read_bytes()[:4] == b"\x7fELF"


def pythons():
    """One interpreter of each version that the wheel is for, of those that this machine has."""
    folders = [Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"]
    paths = [Path(sys.executable), *(Path(found) for minor in range(10, 20) if (found := shutil.which(f"python3.{minor}")))]
    paths += [path for folder in folders for path in sorted(folder.glob("3.*/bin/python3"))]
    found = {}
    for path in paths:
        done = subprocess.run([path, "-c", "import sys, venv, ensurepip; print(*sys.version_info[:2])"],
                              capture_output=True, text=True)
        if done.returncode == 0 and (key := tuple(map(int, done.stdout.split()))) >= (3, 10):
            found.setdefault(key, path)
    return found


class Unpacked(unittest.TestCase):
    """Every artefact in a folder of its own."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        cls.wheels = {}
        for machine in NAMES:
            cls.wheels[machine] = cls.folder / machine
            with zipfile.ZipFile(artefact(f"libturboquant-*-manylinux_2_28_{machine}.whl")) as wheel:
                wheel.extractall(cls.wheels[machine])
        with tarfile.open(artefact("turboquant-*-linux-x86_64.tar.gz")) as archive:
            archive.extractall(cls.folder / "tarball")
        (cls.tarball,) = (cls.folder / "tarball").iterdir()


class Contents(Unpacked):
    def test_symbols_are_of_the_promised_c_library(self):
        folders = [*self.wheels.values(), self.tarball]
        for cuda in DIST.glob("libturboquant_cuda-*.whl"):
            folders.append(self.folder / "cuda")
            with zipfile.ZipFile(cuda) as wheel:
                wheel.extractall(folders[-1])
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if not path.is_symlink() and is_elf(path)]
        self.assertGreaterEqual(len(files), 10)
        for path in files:
            with self.subTest(path.relative_to(self.folder)):
                newest = newest_glibc(path)
                print(f"{path.relative_to(self.folder)}: GLIBC_{newest[0]}.{newest[1]}, {path.stat().st_size} bytes")
                self.assertLessEqual(newest, GLIBC)

    def test_no_file_names_this_checkout(self):
        for folder in (*self.wheels.values(), self.tarball):
            for path in folder.rglob("*"):
                if path.is_file():
                    self.assertNotIn(os.fsencode(ROOT) + b"/", path.read_bytes(), path.relative_to(self.folder))

    def test_each_library_is_of_its_machine(self):
        for machine, folder in self.wheels.items():
            for name in ("libturboquant.so", "libggml-turboquant.so"):
                header = run("readelf", "-h", folder / "libturboquant" / name)
                self.assertIn(NAMES[machine], header.replace("X86-64", "x86-64"), name)

    def test_auditwheel_has_no_complaint(self):
        interpreter = DEPS / "release-venv/bin/python"
        environment = clean(PATH=os.pathsep.join([str(interpreter.parent), os.environ["PATH"]]))
        wheels = sorted(DIST.glob("*.whl"))
        self.assertGreaterEqual(len(wheels), len(NAMES))
        for wheel in wheels:
            shown = " ".join(run(interpreter, "-m", "auditwheel", "show", wheel, env=environment).split())
            tag = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_(\w+)"', shown)
            self.assertIsNotNone(tag, shown)
            print(f"auditwheel: {wheel.name}: {tag[0]}")
            self.assertTrue(wheel.stem.endswith(tag[3]), wheel.name)
            self.assertLessEqual((int(tag[1]), int(tag[2])), GLIBC)

    def test_wheels_name_vllms_entry_point_and_the_licences(self):
        for folder in self.wheels.values():
            (info,) = folder.glob("*.dist-info")
            self.assertIn("turboquant = libturboquant.vllm:register", (info / "entry_points.txt").read_text())
            metadata = email.message_from_string((info / "METADATA").read_text())
            self.assertEqual(metadata.get_all("License-File"), ["LICENSE", "LICENSE-third-party"])
            for name in metadata.get_all("License-File"):
                self.assertEqual((info / "licenses" / name).read_text(), (ROOT / name).read_text())

    def test_the_tarball_is_whole(self):
        for name in ("bin/tq", "lib/libturboquant.so", "lib/turboquant/libggml-turboquant.so",
                     "lib/turboquant/libtq-flush-log.so", "include/turboquant.h", "share/man/man1/tq.1",
                     "share/bash-completion/completions/tq", "LICENSE", "LICENSE-third-party", "README.md"):
            self.assertTrue((self.tarball / name).is_file(), name)

    def test_the_source_distribution_has_what_a_reader_looks_for(self):
        with tarfile.open(artefact(f"libturboquant-{VERSION}.tar.gz")) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        for name in ("LICENSE", "LICENSE-third-party", "CHANGELOG.md", "README.md", "CMakeLists.txt", "include/turboquant.h",
                     "src/CMakeLists.txt", "plugins/ggml/entry.c", "tools/flush_log.c", "docs/python.md", "docs/tq.1",
                     "examples/cache.py", "examples/attend.c", "python/libturboquant/__init__.py"):
            self.assertIn(name, names)
        self.assertFalse([name for name in names if name.startswith(("build", "dist", ".git/"))])

    def test_sums_are_of_the_files(self):
        listed = {line.split()[1] for line in (DIST / "SHA256SUMS").read_text().splitlines()}
        self.assertEqual(listed, {path.name for path in DIST.glob("*turboquant*")})
        run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=DIST)


class Python(Unpacked):
    def install(self, interpreter, name, source):
        folder = self.folder / name
        run(interpreter, "-I", "-m", "venv", folder, env=clean())
        run(folder / "bin/pip", "install", "-q", "--disable-pip-version-check", source, env=clean())
        return folder / "bin/python"

    def test_the_wheel_in_each_python(self):
        found = pythons()
        print("Python", ", ".join(f"{major}.{minor}" for major, minor in sorted(found)))
        for key, interpreter in sorted(found.items()):
            with self.subTest(key):
                python = self.install(interpreter, f"python{key[0]}.{key[1]}", artefact("libturboquant-*_x86_64.whl"))
                self.assertIn("after a fork", run(python, ROOT / "examples/cache.py", cwd=self.folder, env=clean()))
                shown = run(python, "-c", "import libturboquant; print(libturboquant.__file__)", cwd=self.folder, env=clean())
                package = Path(shown.strip()).parent
                self.assertTrue(package.is_relative_to(self.folder), package)
                self.assertTrue((package / "libggml-turboquant.so").is_file())

    def test_the_source_distribution(self):
        python = self.install(sys.executable, "from-source", artefact(f"libturboquant-{VERSION}.tar.gz"))
        self.assertIn("after a fork", run(python, ROOT / "examples/cache.py", cwd=self.folder, env=clean()))

    @unittest.skipIf(reason := absent(MODEL, PYTHON_VENV, DEPS / "llama-cpp-python", DEPS / "llama-bin"), reason)
    def test_the_wheels_plugin_in_llama_cpp_python(self):
        environment = clean(**bindings(self.wheels["x86_64"]), PYTHONDONTWRITEBYTECODE="1")
        shown = run(PYTHON_VENV / "bin/python", ROOT / "examples/llama_cpp_generate.py", MODEL, "The capital of France is",
                    "--n-tok", "16", cwd=self.folder, env=environment)
        self.assertIn("Paris", shown)

    @unittest.skipIf(not list(DIST.glob("libturboquant_cuda-*.whl")), "no wheel of CUDA's library: release.py --cuda makes it")
    def test_cudas_wheel_is_found_by_the_library(self):
        python = self.install(sys.executable, "cuda", artefact("libturboquant-*_x86_64.whl"))
        doctor = [python, "-m", "libturboquant", "doctor"]
        before = subprocess.run(doctor, capture_output=True, text=True, cwd=self.folder, env=clean()).stdout
        run(python.parent / "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
            artefact("libturboquant_cuda-*.whl"), env=clean())
        after = subprocess.run(doctor, capture_output=True, text=True, cwd=self.folder, env=clean()).stdout
        missing = "libturboquant-cuda.so: cannot open"
        self.assertIn(missing, before)
        self.assertNotIn(missing, after)


class Kernels(unittest.TestCase):
    def test_those_of_this_compiler_against_the_specification(self):
        self.assertRegex(run(WORK / "x86_64/tests/checkkern", "--quick"), r"(?m)^\d+ passed, 0 failed$")


@unittest.skipIf(not QEMU or not (SYSROOT / "lib/ld-linux-aarch64.so.1").exists(),
                 "no qemu-aarch64, or no libraries for it: scripts/setup.sh cross, or set TQ_AARCH64_SYSROOT")
class AArch64(Unpacked):
    def emulate(self, *command):
        return run(QEMU, "-L", SYSROOT, "-cpu", "max", *command)

    def compile(self, name, source, *more):
        run(WORK / "cc-aarch64", "-O2", source, f"-I{ROOT / 'include'}", *more, "-o", self.folder / name,
            env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig-cache"), "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig-cache")})
        return self.folder / name

    def test_a_program_with_the_wheels_library(self):
        library = self.wheels["aarch64"] / "libturboquant"
        program = self.compile("attend", ROOT / "examples/attend.c", library / "libturboquant.so", f"-Wl,-rpath,{library}",
                               "-lm", "-pthread")
        (library / "libturboquant.so.0").symlink_to("libturboquant.so")  # the name that programs ask for
        native = run(self.native_attend())
        self.assertEqual(numbers(self.emulate(program)), numbers(native))

    def native_attend(self):
        program = self.folder / "attend-native"
        library = self.tarball / "lib"
        run("cc", "-O2", ROOT / "examples/attend.c", f"-I{ROOT / 'include'}", library / "libturboquant.so",
            f"-Wl,-rpath,{library}", "-lm", "-pthread", "-o", program)
        return program

    def test_libraries_load(self):
        library = self.wheels["aarch64"] / "libturboquant"
        program = self.compile("load", ROOT / "tests/release/load.c", "-ldl")
        shown = self.emulate(program, library / "libturboquant.so", library / "libggml-turboquant.so")
        self.assertEqual(shown.count("loaded "), 2)

    def test_kernels_against_the_specification(self):
        self.assertRegex(self.emulate(WORK / "aarch64/tests/checkkern", "--quick"), r"(?m)^\d+ passed, 0 failed$")


def numbers(text):
    return re.findall(r"\d+", text)


class Root(Unpacked):
    """The tarball where nothing of this machine is visible, neither its folder of libraries nor its checkout."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        given = os.environ.get("TQ_RELEASE_ROOT")
        cls.root = Path(given).absolute() if given else cls.bare_root()
        # Anywhere: no path is compiled in.
        place = tempfile.mkdtemp(prefix="turboquant-", dir=cls.root)
        cls.addClassCleanup(shutil.rmtree, place)
        cls.place = Path(place)
        shutil.copytree(cls.tarball, cls.place / "unpacked here", symlinks=True)
        os.chmod(cls.place, 0o755)

    @classmethod
    def bare_root(cls):
        """The C library, and what starts programs."""
        root = cls.folder / "root"
        listed = run("ldd", cls.tarball / "lib/libturboquant.so", env=clean())
        for path in map(Path, re.findall(r"(/\S+) \(0x", listed)):
            target = root / str(path).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        (root / "proc").mkdir()
        return root

    def inside(self, *command):
        # With /proc, as everywhere: $ORIGIN is read there.
        start = ["unshare", "--mount", "--pid", "--fork", f"--root={self.root}", "--wd=/", "--mount-proc"]
        if os.geteuid():
            start.insert(1, "--map-root-user")
        return run(*start, *command, env={"PATH": "/usr/bin:/bin"})

    def name(self, path):
        return f"/{self.place.name}/unpacked here/{path}"

    def test_tq(self):
        self.assertIn(VERSION, self.inside(self.name("bin/tq"), "--version"))
        self.assertIn("sq4", self.inside(self.name("bin/tq"), "formats"))
        shown = self.inside(self.name("bin/tq"), "distortion", "--format", "sq4", "--head-dim", "128")
        self.assertTrue(numbers(shown), shown)

    @unittest.skipIf(reason := absent(MODEL, DEPS / "llama-bin"), reason)
    def test_its_plugin_in_llama_cpp(self):
        command = [self.tarball / "bin/tq", "run", "--llama-bin", DEPS / "llama-bin"]
        arguments = [MODEL, "-no-cnv", "-p", "The capital of France is", "-n", "8", "--temp", "0"]
        shown = run(*command, "--dry-run", *arguments, env=clean())
        (plugin,) = re.findall(r"GGML_BACKEND_PATH='?([^'\s]+)", shown)
        self.assertEqual(Path(plugin).resolve(), (self.tarball / "lib/turboquant/libggml-turboquant.so").resolve())
        self.assertIn("Paris", run(*command, *arguments, env=clean()))

    def test_libraries_load(self):
        program = self.place / "load"
        run(WORK / "cc-x86_64", "-O2", ROOT / "tests/release/load.c", "-ldl", "-o", program,
            env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig-cache"), "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig-cache")})
        names = "lib/libturboquant.so", "lib/turboquant/libggml-turboquant.so", "lib/turboquant/libtq-flush-log.so"
        shown = self.inside(f"/{self.place.name}/load", *map(self.name, names))
        self.assertEqual(shown.count("loaded "), 3)


if __name__ == "__main__":
    main()
