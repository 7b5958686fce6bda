# SPDX-License-Identifier: MIT
"""The scripts of `make run` without a network: the cache, checked downloads, llama.cpp's build with stand-ins of its tools, the
report's lines; and which parts CMake chooses to build."""
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import DEPS, ROOT, main  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
import cache  # noqa: E402
import report  # noqa: E402

VERSION = re.search(r"^version=(.*)$", (ROOT / "scripts/get_llama.sh").read_text(), re.MULTILINE).group(1)
PROGRAMS = ["llama-completion", "llama-bench"]

# Stand-ins. The build of the first ninja stops half-way; the second one finds what the first has left.
FAKES = {
    "cc": """
case "$*" in *-dM*) echo "#define __AVX2__ $FAKE_AVX2" ;; *) echo "cc $FAKE_CC" ;; esac""",
    "c++": 'echo "c++ $FAKE_CXX"',
    "pkg-config": "exit 1",
    "cmake": """
while [ "$1" != -B ]; do shift; done
echo configured >>"$2.calls"
if [ -n "$FAKE_CMAKE_DIES" ]; then mkdir -p "$2"; exit 1; fi
mkdir -p "$2/bin" && touch "$2/build.ninja" """,
    "ninja": """
folder=$2
shift 2
if [ "$1" = -n ]; then
    shift
    for program; do [ -x "$folder/bin/$program" ] || { echo "[1/2] $program"; exit 0; }; done
    echo "ninja: no work to do."
    exit 0
fi
mkdir "$folder/running" || exit 1
shift 2
echo "built $*" >>"$folder.calls"
echo "[1/2 20.0] half"
if [ -n "$FAKE_NINJA_DIES" ]; then touch "$folder/half"; rmdir "$folder/running"; exit 1; fi
sleep 0.2
for program; do touch "$folder/bin/$program"; chmod +x "$folder/bin/$program"; done
rmdir "$folder/running" """,
}


class Folder(unittest.TestCase):
    """A test with a temporary folder."""
    def setUp(self):
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        self.folder = Path(place.name)


class CacheFolder(Folder):
    def test_xdg_comes_before_home(self):
        deps = self.folder / "deps"
        self.assertEqual(cache.choose_folder({"XDG_CACHE_HOME": str(self.folder / "x"), "HOME": str(self.folder)}, deps),
                         (self.folder / "x/turboquant", None))
        self.assertEqual(cache.choose_folder({"HOME": str(self.folder)}, deps), (self.folder / ".cache/turboquant", None))
        # As the specification says.
        self.assertEqual(cache.choose_folder({"XDG_CACHE_HOME": "relative", "HOME": str(self.folder)}, deps)[0],
                         self.folder / ".cache/turboquant")

    def print_folder(self, *arguments, **environment):
        kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
        return subprocess.run([sys.executable, ROOT / "scripts/cache.py", "folder", *arguments], capture_output=True, text=True,
                              check=True, env={**kept, "TQ_DEPS_DIR": str(self.folder / "deps"), **environment})

    def test_without_home(self):
        done = self.print_folder("--explain")
        self.assertEqual(done.stdout.strip(), str(self.folder / "deps"))
        self.assertEqual(done.stderr.count("\n"), 1)
        self.assertIn("neither XDG_CACHE_HOME nor HOME", done.stderr)
        self.assertEqual(self.print_folder().stderr, "")

    def test_where_nothing_can_be_written(self):
        (self.folder / "file").touch()
        done = self.print_folder("--explain", XDG_CACHE_HOME=str(self.folder / "file"))
        self.assertEqual(done.stdout.strip(), str(self.folder / "deps"))
        self.assertRegex(done.stderr, r"^.*/file/turboquant cannot be written .*\n$")


class Fetch(Folder):
    """A source distribution whose code leaves a file when it runs."""
    def setUp(self):
        super().setUp()
        self.pip = DEPS / "venv/bin/pip"
        if not self.pip.exists():
            made = subprocess.run([sys.executable, "-I", "-m", "venv", self.folder / "venv"], capture_output=True)
            if made.returncode:
                self.skipTest("no pip, and python3 -m venv cannot make one (Debian: python3-venv)")
            self.pip = self.folder / "venv/bin/pip"
        self.trace = self.folder / "it-ran"
        source = self.folder / "tqfake-1.0"
        source.mkdir()
        (source / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
        (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tqfake\nVersion: 1.0\n")
        (source / "backend.py").write_text(
            f"import pathlib\npathlib.Path({str(self.trace)!r}).touch()\n"
            "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
            "    info = pathlib.Path(folder) / 'tqfake-1.0.dist-info'\n    info.mkdir()\n"
            "    (info / 'METADATA').write_text('Metadata-Version: 2.1\\nName: tqfake\\nVersion: 1.0\\n')\n"
            "    return info.name\n")
        self.archive = self.folder / "links/tqfake-1.0.tar.gz"
        self.archive.parent.mkdir()
        with tarfile.open(self.archive, "w:gz") as tar:
            tar.add(source, source.name)
        self.sha256 = hashlib.sha256(self.archive.read_bytes()).hexdigest()
        self.kept = self.folder / "downloads"

    def fetch(self, sha256):
        """In a process of its own, whose pip sees only the folder of links."""
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import cache, pathlib;"
                "print(cache.fetch(*sys.argv[2:6], pathlib.Path(sys.argv[6])))")
        return subprocess.run([sys.executable, "-c", code, ROOT / "scripts", self.pip, "tqfake==1.0", sha256,
                               self.archive.name, self.kept], capture_output=True, text=True,
                              env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.archive.parent)})

    def test_wrong_hash_is_refused_before_the_package_runs(self):
        done = self.fetch("0" * 64)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("DO NOT MATCH THE HASHES", done.stderr)
        self.assertIn("run this again", done.stderr)
        self.assertFalse(self.trace.exists())
        self.assertEqual(list(self.kept.iterdir()), [])

    def test_right_hash(self):
        done = self.fetch(self.sha256)
        self.assertEqual(done.stdout.strip(), str(self.kept / self.archive.name), done.stderr)
        self.assertEqual(cache.sha256_of(self.kept / self.archive.name), self.sha256)
        self.assertTrue(self.trace.exists())  # or the other test would prove nothing
        # A second time neither pip nor the link is needed; a file that was damaged is fetched again.
        self.archive.rename(self.folder / "elsewhere")
        self.assertEqual(self.fetch(self.sha256).returncode, 0)
        (self.folder / "elsewhere").rename(self.archive)
        (self.kept / self.archive.name).write_text("damaged")
        self.assertEqual(self.fetch(self.sha256).returncode, 0)
        self.assertEqual(cache.sha256_of(self.kept / self.archive.name), self.sha256)


class Llama(Folder):
    """scripts/get_llama.sh with stand-ins of the compiler, CMake and Ninja, and sources that are there."""
    def setUp(self):
        super().setUp()
        tools = self.folder / "tools"
        tools.mkdir()
        for name, text in FAKES.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        sources = self.folder / f"cache/turboquant/llama.cpp-{VERSION}"
        sources.mkdir(parents=True)
        (sources / "CMakeLists.txt").touch()
        self.script = ROOT / "scripts/get_llama.sh"
        hidden = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")
        self.environment = {**{name: value for name, value in os.environ.items() if name not in hidden},
                            "PATH": f"{tools}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(self.folder / "cache"),
                            "TQ_DEPS_DIR": str(self.folder / "deps")}

    def start(self, *arguments, **environment):
        return subprocess.Popen([self.script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**self.environment, **environment})

    def run_script(self, *arguments, **environment):
        process = self.start(*arguments, **environment)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def build_folder(self, **environment):
        status, output, errors = self.run_script("--folder", **environment)
        self.assertEqual(status, 0, errors)
        return Path(output.strip())

    def calls(self):
        return Path(f"{self.build_folder()}.calls").read_text().splitlines()

    def test_key(self):
        folders = [self.build_folder(**environment) for environment in (
            {}, {"FAKE_CC": "13"}, {"FAKE_CXX": "13"}, {"FAKE_AVX2": "1"}, {"CFLAGS": "-O1"}, {"CXXFLAGS": "-O1"})]
        self.assertEqual(len(set(folders)), len(folders))
        self.assertEqual(self.build_folder(), folders[0])
        # Another version, or other options of the build.
        for old, new in ((f"version={VERSION}", "version=9.9.9"), ("-DLLAMA_CURL=OFF", "-DLLAMA_CURL=ON")):
            copy = self.folder / new
            shutil.copytree(ROOT / "scripts", copy / "scripts")
            self.script = copy / "scripts/get_llama.sh"
            self.script.write_text(self.script.read_text().replace(old, new))
            folders.append(self.build_folder())
        self.assertEqual(len({folder.name.rpartition("-")[2] for folder in folders}), len(folders))

    def test_interrupted_build_goes_on(self):
        status, _, errors = self.run_script(*PROGRAMS, FAKE_NINJA_DIES="1")
        self.assertEqual(status, 1)
        self.assertIn(f"the log is {self.build_folder()}.log", errors)
        self.assertFalse((self.folder / "deps/llama-bin").exists())
        status, output, errors = self.run_script(*PROGRAMS)
        self.assertEqual((status, errors), (0, ""))
        self.assertIn("1 of 2 files, about a minute left", output)
        self.assertTrue((self.build_folder() / "half").exists())
        self.assertEqual(self.calls(), ["configured", *["built " + " ".join(PROGRAMS)] * 2])
        self.assertEqual((self.folder / "deps/llama-bin").resolve(), (self.build_folder() / "bin").resolve())
        self.assertTrue((self.folder / "deps/llama.cpp/CMakeLists.txt").exists())
        # Once more, and for a second checkout: nothing is built.
        for deps in ("deps", "deps2"):
            self.assertEqual(self.run_script(*PROGRAMS, TQ_DEPS_DIR=str(self.folder / deps)), (0, "", ""))
        self.assertEqual(len(self.calls()), 3)
        # Another program is added to the same build.
        self.assertEqual(self.run_script("llama-server")[0], 0)
        self.assertEqual(self.calls()[3:], ["built llama-server"])

    def test_interrupted_configuration_starts_again(self):
        status, _, errors = self.run_script(*PROGRAMS, FAKE_CMAKE_DIES="1")
        self.assertEqual(status, 1)
        self.assertIn("could not be configured", errors)
        self.assertEqual(self.run_script(*PROGRAMS)[0], 0)
        self.assertEqual(self.calls()[:2], ["configured"] * 2)

    def test_two_builds_at_the_same_time(self):
        processes = [self.start(*PROGRAMS, TQ_DEPS_DIR=str(self.folder / name)) for name in ("one", "two")]
        ends = [(process.communicate(), process.returncode) for process in processes]
        self.assertEqual([status for _, status in ends], [0, 0], ends)
        self.assertEqual(self.calls(), ["configured", "built " + " ".join(PROGRAMS)])

    def test_folders_of_earlier_versions_become_links(self):
        (self.folder / "deps/llama.cpp/old").mkdir(parents=True)
        self.assertEqual(self.run_script("--sources")[0], 0)
        self.assertTrue((self.folder / "deps/llama.cpp").is_symlink())


class Report(unittest.TestCase):
    def test_time_left(self):
        self.assertIsNone(report.time_left([], [1, 1]))
        self.assertEqual(report.time_left([10], [0.5, 1, 2]), 60)
        self.assertEqual(report.time_left([10, 30], [0.5, 1.5, 2]), 40)
        self.assertEqual(report.time_left([10], [1]), 0)

    def test_time_left_in_words(self):
        words = {None: "", 0: "", 20: "less than a minute left", 50: "about a minute left", 200: "about 3 minutes left"}
        self.assertEqual({seconds: report.show_time_left(seconds) for seconds in words}, words)

    def test_rows_fit_under_the_header(self):
        row = {"case": "q4_0", "kv_mib": 25.31, "bits_per_value": 4.5, "peak_rss_mib": 1234.5, "kv_saved_mib": 64.69,
               "rss_saved_mib": 63.2, "prefill_d0": 296.04, "decode_d0": 182.0, "kld_mean": 0.0609, "kld_99_9": 1.5,
               "same_top_1": 100.0}
        header = report.format_table([], (0, 2048))
        alone = report.format_table([row], (0, 2048)).splitlines()
        self.assertEqual(alone[0], header)
        self.assertEqual(len(alone[1]), len(header))
        self.assertEqual(alone[1].split(), ["q4_0", "25.3", "4.50", "1234.5", "64.7", "63.2", "296.0", "182.0", "-", "-",
                                            "0.060900", "1.5000", "100.00"])

    def test_interrupted(self):
        """Ctrl-C ends with a line and no traceback."""
        code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import report, pathlib\n"
                "def interrupt(*_): raise KeyboardInterrupt\n"
                "report.show_answers, report.Path.exists = interrupt, lambda _: True\nreport.main()")
        done = subprocess.run([sys.executable, "-c", code, ROOT / "scripts"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (130, "\nreport.py: interrupted\n"))


@unittest.skipUnless(shutil.which("cmake") and shutil.which("ninja"), "no CMake")
class Cuda(Folder):
    def configure(self, *options, nvcc=True):
        """(exit status, output without line breaks, whether libturboquant-cuda.so would be built)"""
        fake = self.folder / "bin/nvcc"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text("#!/bin/sh\n")
        fake.chmod(0o755)
        done = subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", self.folder / "build", "-DTQ_BUILD_TESTS=OFF",
                               "-DTQ_BUILD_TOOLS=OFF", "-DTQ_BUILD_PLUGIN=OFF", *options, *([] if nvcc else ["-DTQ_NVCC=OFF"])],
                              capture_output=True, text=True, env={**os.environ, "CUDA_HOME": str(self.folder)})
        plan = self.folder / "build/build.ninja"
        return done.returncode, " ".join(done.stderr.split()), plan.exists() and "libturboquant-cuda.so" in plan.read_text()

    @unittest.skipIf(Path("/dev/nvidiactl").exists(), "this machine has a GPU")
    def test_auto_without_a_gpu(self):
        self.assertEqual(self.configure(), (0, "", False))

    def test_on(self):
        self.assertEqual(self.configure("-DTQ_BUILD_CUDA=ON"), (0, "", True))

    def compiled_for(self, architectures):
        """{name of an object: what nvcc makes it for}"""
        self.assertEqual(self.configure("-DTQ_BUILD_CUDA=ON", f"-DTQ_CUDA_ARCHITECTURES={architectures}")[:2], (0, ""))
        plan = (self.folder / "build/build.ninja").read_text()
        return {name: re.findall(r",code=(\w+)", command)
                for command, name in re.findall(r"COMMAND = (.*bin/nvcc .* -c .*/cuda/(\w+)\.o)\b", plan)}

    def test_release_architectures(self):
        found = self.compiled_for("release")
        self.assertEqual(found["decode_128"], ["sm_80", "sm_86", "sm_89", "sm_90a", "compute_90", "sm_120"])
        self.assertEqual(found["prefill"], found["decode_128"])
        self.assertEqual(found["prefill_hopper_128"], ["sm_90a"])

    def test_named_architectures(self):
        found = self.compiled_for("80-real;89")
        self.assertEqual(found["decode_64_256"], ["sm_80", "sm_89", "compute_89"])
        self.assertNotIn("prefill_hopper_128", found)

    def test_unknown_architecture(self):
        status, errors, _ = self.configure("-DTQ_BUILD_CUDA=ON", "-DTQ_CUDA_ARCHITECTURES=hopper")
        self.assertEqual(status, 1)
        self.assertIn("'hopper' is not native, release, or a number", errors)

    def test_native(self):
        """The GPUs that nvidia-smi shows, or all of a release."""
        smi = self.folder / "smi/nvidia-smi"
        smi.parent.mkdir()
        for shown, wanted in (("9.0\n9.0\n8.9\n", ["sm_90a", "sm_89"]),
                              ("No devices were found\n", ["sm_80", "sm_86", "sm_89", "sm_90a", "compute_90", "sm_120"])):
            smi.write_text(f"#!/bin/sh\nprintf '{shown}'\n")
            smi.chmod(0o755)
            with unittest.mock.patch.dict(os.environ, {"PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}"}):
                self.assertEqual(self.compiled_for("native")["entry"], wanted)

    def test_pairs_in_docs(self):
        """docs/cuda.md lists the pairs of pairs.h."""
        source = '#include "kernels/cuda/pairs.h"\n#define PAIR(D, K, V) D K/V;\nTQ_PAIRS(PAIR)\n'
        listed = subprocess.run(["cc", "-E", "-P", "-I", ROOT / "src", "-"], input=source, capture_output=True, text=True,
                                check=True).stdout
        of_header = sorted(re.findall(r"(\d+) (\w+/\w+);", listed))
        section = (ROOT / "docs/cuda.md").read_text().split("## What there is")[1].split("##")[0]
        rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", section, re.MULTILINE)
        self.assertEqual(sorted((d, pair) for d, pairs in rows for pair in pairs.strip().split(", ")), of_header)

    def test_on_without_nvcc(self):
        status, errors, _ = self.configure("-DTQ_BUILD_CUDA=ON", nvcc=False)
        self.assertEqual(status, 1)
        self.assertIn("needs nvcc, which was not found", errors)
        self.assertIn("Install NVIDIA's CUDA toolkit", errors)


if __name__ == "__main__":
    main()
