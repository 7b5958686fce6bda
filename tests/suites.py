# SPDX-License-Identifier: MIT
"""The list of test suites: what is built, and which commands each suite runs."""
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
DEPS = Path(os.environ.get("TQ_DEPS_DIR", BUILD / "deps"))
JOBS = str(os.cpu_count() or 1)
PYTHON_VENV = DEPS / "python-venv"
PYTHON_SITE = BUILD / "python-site"  # the package as it is tested; PYTHON_VENV may be shared by several checkouts
WHEEL_BUILD = f"build-dir={BUILD / 'wheel'}"

SANITIZERS = {
    # abort: a report must also end a test that expects failures of its own. The leak checker needs ptrace, which qemu has not.
    "ASAN_OPTIONS": "abort_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
SLOW = {"TQ_TEST_SLOW": "1"}  # fewer random runs, where each takes ten times as long
FUZZ_RUNS = 200  # of the stand-alone driver: some 7 s of the slowest target
# Of libFuzzer: some 5 s each. Inputs, not seconds, so that a failure can be had again on another machine.
FUZZ_INPUTS = {"fuzz_options": 200_000, "fuzz_page_ops": 2500, "fuzz_snapshot": 5000, "fuzz_state": 250, "fuzz_store_ops": 800}


@dataclass
class Suite:
    name: str
    commands: list  # of (command, environment)
    missing: str = ""  # why it cannot run here
    optional: bool = False  # needs what a machine for tests may lack: skipped there, even in CI
    timeout: int = 900
    alone: bool = False  # the stock tools lose the end of their log on a busy machine


def needs(*programs):
    absent = [program for program in programs if not shutil.which(program)]
    return f"{' and '.join(absent)} not installed" if absent else ""


def build_steps(quick):
    """(name, why it cannot be built here, commands) of each kind of build."""
    kinds = {"release": ""}
    if not quick:
        kinds |= {"asan": "", "tsan": "", "fuzz": needs("clang"), "aarch64": needs("aarch64-linux-gnu-gcc")}
    # Only CI has one known compiler, whose warnings can be errors.
    options = ["-DTQ_WERROR=ON"] if os.environ.get("CI") == "true" else []
    for name, missing in kinds.items():
        yield name, missing, [["cmake", "--preset", name, *options], ["cmake", "--build", "--preset", name, "-j", JOBS]]
    if not quick:
        install = [PYTHON_VENV / "bin/pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
        yield "python", python_missing(), [[*install, "--upgrade", "--target", PYTHON_SITE, "-C", WHEEL_BUILD, ROOT]]


def programs(kind, folder, pattern="*"):
    """Executables of one build."""
    found = sorted((BUILD / kind / folder).glob(pattern))
    return [path for path in found if path.is_file() and os.access(path, os.X_OK)]


def units(kind, environment=None, emulator=()):
    return [([*emulator, path], {**SANITIZERS, **(environment or {})}) for path in programs(kind, "tests/unit", "test_*")]


def python(script, *arguments, **environment):
    return [sys.executable, ROOT / script, *arguments], environment


def static_suites():
    yield Suite("style", [python("scripts/check_style.py")])
    yield Suite("layers", [python("scripts/check_layers.py")])
    yield Suite("tables", [python("scripts/gen_tables.py", "--check"), (["echo", "1 passed, 0 failed"], {})])


def replay_suite(kind):
    """Every fuzz target on its corpus, and on a few inputs of its own making."""
    commands = []
    for path in programs(kind, "tests/fuzz", "fuzz_*"):
        corpus = sorted((ROOT / "fuzz" / "corpus" / path.name.removeprefix("fuzz_")).glob("*"))
        commands.append(([path, "--runs", "100", *corpus], SANITIZERS))
    return Suite(f"fuzz corpus/{kind}", counted(commands))


def counted(commands):
    """Commands without a count of their own: each is one test."""
    wrapper = ["sh", "-c", '"$@" && echo "1 passed, 0 failed"', "sh"]
    return [([*wrapper, *command], environment) for command, environment in commands]


def quick_suites():
    return [
        *static_suites(),
        Suite("units/release", units("release")),
        Suite("checkkern/release", [([BUILD / "release/tests/checkkern"], {})]),
        Suite("library", [python("tests/api/test_library.py", "Header", "Symbols")]),
        Suite("tq", [python("tests/api/test_tq.py"), python("tests/api/test_simulate.py")]),
        replay_suite("release"),
    ]


def cpu_flags():
    return Path("/proc/cpuinfo").read_text()


def cpu_levels():
    """The levels below this machine's best that it has; the best runs anyway."""
    flags = cpu_flags()
    return ["scalar", *(["avx2"] if " avx512_vnni" in flags else []), *(["avx512"] if " amx_int8" in flags else [])]


def native_suites():
    yield Suite("checkkern/release", [([BUILD / "release/tests/checkkern"], {})])
    yield Suite("checkkern/asan", [([BUILD / "asan/tests/checkkern", "--quick"], SANITIZERS)])
    yield Suite("units/release", units("release"))
    for level in cpu_levels():
        yield Suite(f"units/TQ_CPU={level}", units("release", {"TQ_CPU": level}))
    # Clang's sanitizers, which know what GCC's do not; GCC's run the kernels and the fuzz targets.
    yield Suite("units/asan", units("fuzz" if not needs("clang") else "asan"))
    yield Suite("units/tsan", units("tsan", SLOW))
    yield Suite("library", [python("tests/api/test_library.py")])
    yield Suite("tq", [python("tests/api/test_tq.py"), python("tests/api/test_simulate.py")])
    yield Suite("calibrate", [python("tests/api/test_calibrate.py")])
    examples = programs("release", "examples", "example_*")
    if examples:
        yield Suite("examples", counted([([path], {}) for path in examples]))


def emulated_suites():
    """Other machines: AArch64 of three classes, and an x86-64 without AVX-512, where an instruction too many is a crash."""
    missing = needs("qemu-aarch64", "aarch64-linux-gnu-gcc")
    # i8mm and all below it; dotprod at most; NEON alone.
    for cpu in ("max", "cortex-a76", "cortex-a53"):
        emulator = ("qemu-aarch64", "-cpu", cpu)
        yield Suite(f"checkkern/{cpu}", [([*emulator, BUILD / "aarch64/tests/checkkern", "--quick"], {})], missing)
    yield Suite("units/max", units("aarch64", SLOW, emulator=("qemu-aarch64", "-cpu", "max")), missing)
    if "avx512f" in cpu_flags():  # else this machine is such a one itself
        haswell = ["qemu-x86_64", "-cpu", "Haswell"]
        yield Suite("checkkern/haswell", [([*haswell, BUILD / "release/tests/checkkern", "--quick"], {})],
                    needs("qemu-x86_64"))


def fuzz_suites():
    yield replay_suite("asan")
    for path in programs("asan", "tests/fuzz", "fuzz_*"):
        yield Suite(f"{path.name}/asan", counted([([path, "--runs", str(FUZZ_RUNS), "--seed", "1"], SANITIZERS)]))
    for path in programs("fuzz", "tests/fuzz", "fuzz_*"):
        found = BUILD / "fuzz-corpus" / path.name
        found.mkdir(parents=True, exist_ok=True)
        corpus = [folder for folder in [ROOT / "fuzz/corpus" / path.name.removeprefix("fuzz_")] if folder.is_dir()]
        command = [path, f"-runs={FUZZ_INPUTS[path.name]}", "-seed=1", "-print_final_stats=1",
                   f"-artifact_prefix={found}-", found, *corpus]
        yield Suite(f"{path.name}/libFuzzer", counted([(command, SANITIZERS)]), needs("clang"))


def plugin_suites():
    """The plug-in in stock llama.cpp. tests/plugin/common.py explains the environment."""
    tiny = BUILD / "tiny"
    tiny.mkdir(parents=True, exist_ok=True)
    environment = {
        "TQ_LLAMA_BIN": DEPS / "llama-bin",
        "TQ_LLAMA_SRC": DEPS / "llama.cpp",
        "TQ_PLUGIN": BUILD / "release/libggml-turboquant.so",
        "TQ_MODEL": DEPS / "models/SmolLM2-135M-Instruct.Q4_1.gguf",
        "TQ_TEXT": DEPS / "text/austen.txt",
        "TQ_TINY_DIR": tiny,
    }
    absent = [f"{name} ({path})" for name, path in environment.items() if not path.exists()]
    missing = f"{', '.join(absent)} not there: run `make deps` first" if absent else ""
    strings = {name: str(path) for name, path in environment.items()}
    for path in sorted((ROOT / "tests/plugin").glob("test_*.py")):
        yield Suite(f"plugin/{path.stem.removeprefix('test_')}", [python(path.relative_to(ROOT), **strings)], missing,
                    alone=True)


def python_missing():
    """Why the package cannot be tested here."""
    return "" if (PYTHON_VENV / ".installed").exists() else f"{PYTHON_VENV} is not there: run scripts/setup.sh test first"


def python_suites():
    """The package: in an environment with nothing else, and in Transformers and MLX-LM, whose real model is `make deps`'."""
    clean = BUILD / "python-clean"
    pip = [clean / "bin/pip", "install", "-q", "--disable-pip-version-check"]
    install = [([sys.executable, "-m", "venv", "--clear", clean], {}), ([*pip, "-C", WHEEL_BUILD, ROOT], {})]
    example = ([clean / "bin/python", ROOT / "examples/cache.py"], {})
    yield Suite("python/install", counted([*install, example]), timeout=1800)
    # Threads that wait actively for each other take hours where other suites run at the same time.
    environment = {"PYTHONPATH": str(PYTHON_SITE), "TQ_DEPS_DIR": str(DEPS), "HF_HUB_OFFLINE": "1",
                   "OMP_WAIT_POLICY": "passive"}
    pytest = [PYTHON_VENV / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    parts = {"core": ["buffers", "cache", "codec", "header"], "transformers": ["transformers", "transformers_refusals"],
             "real model": ["real_model"], "mlx": ["mlx"], "mlx real model": ["mlx_real_model"], "examples": ["examples"],
             "metal kernels": ["metal_kernels"], "mlx metal": ["mlx_metal"]}
    model = DEPS / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    for name, files in parts.items():
        needs_model = name not in ("core", "transformers", "mlx") and "metal" not in name
        absent = f"{model} is not there: run `make deps` first" if needs_model and not model.exists() else ""
        if "metal" in name:
            absent = needs(os.environ.get("CXX", "g++"))  # which compiles the Metal kernels for the CPU
        command = [*pytest, *(ROOT / f"python/tests/test_{file}.py" for file in files)]
        yield Suite(f"python/{name}", [(command, environment)], python_missing() or absent, timeout=1800)
    # TurboQuantCache as on a GPU, on a device in host memory, and the benchmark that drives whole models.
    emulated = {"TQ_TEST_BACKEND": "emulated", "TURBOQUANT_LIBRARY": str(BUILD / "release/libturboquant.so"),
                "TQ_CUDA_LIBRARY": str(BUILD / "release/tests/cuda/libturboquant-cuda-emulated.so")}
    names = ("cuda", "cuda_snapshot", "transformers", "transformers_refusals")
    files = (ROOT / f"python/tests/test_{name}.py" for name in names)
    headline = [PYTHON_VENV / "bin/python", ROOT / "bench/headline.py", "--tiny"]
    yield Suite("python/cuda emulated", [([*pytest, *files], environment | emulated),
                                         *counted([(headline, environment | emulated)])], python_missing(), timeout=1800)


def nvcc():
    """CUDA's compiler, or None."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def device_missing():
    """Why device tests cannot run here: they need a build with nvcc, and a device."""
    if not (BUILD / "release/tests/cuda/test_device").exists():
        return "libturboquant-cuda.so was not built: nvcc not installed"
    return "" if Path("/dev/nvidiactl").exists() else "no CUDA device"


def cuda_suites():
    """Kernels against the specification, also under CUDA's checkers; and that they compile for all architectures."""
    program = BUILD / "release/tests/cuda/test_device"
    environment = {"TQ_CUDA_LIBRARY": str(BUILD / "release/libturboquant-cuda.so")}
    yield Suite("cuda/device", [([program], environment)], device_missing(), optional=True)
    checker = device_missing() or needs("compute-sanitizer")
    # racecheck does not follow barriers in shared memory, by which the warp groups of prefill_hopper.cuh wait for each other.
    for tool, options in (("memcheck", []), ("racecheck", ["--kernel-name-exclude", "kernel_substring=prefill_hopper"])):
        command = ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "1", "--print-limit", "5", program,
                   "--quick"]
        yield Suite(f"cuda/{tool}", counted([(command, environment)]), checker, optional=True)
    yield Suite("cuda/compile", [python("tests/cuda/check_compile.py", TQ_NVCC=str(nvcc()))],
                "" if nvcc() else "nvcc not installed", optional=True)


def full_suites():
    # The longest first, so that none is left alone at the end.
    return [*plugin_suites(), *python_suites(), *emulated_suites(), *native_suites(), *cuda_suites(), *fuzz_suites(),
            *static_suites()]
