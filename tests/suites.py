# SPDX-License-Identifier: MIT
"""The list of test suites: what each runs, its tier and part, what it needs built, which rooms it tests."""
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
DEPS = Path(os.environ.get("TQ_DEPS_DIR", BUILD / "deps")).absolute()
JOBS = str(os.cpu_count() or 1)
PYTHON_VENV = DEPS / "python-venv"  # MLX-LM
TORCH_VENV = DEPS / "torch-venv"  # and Transformers
VLLM_VENV = DEPS / "vllm-venv"
TINY = BUILD / "tiny"
MODEL = DEPS / "models/SmolLM2-135M-Instruct.Q4_1.gguf"

# The parts of `make test-full`, which its shards are dealt: what each proves, and the files that it tests first of all.
PARTS = {
    "sanitizers": "thread sanitizer; the kernels of instruction sets and long runs of the fuzz targets under address sanitizer",
    "fuzzing": "Clang's sanitizers and libFuzzer",
    "emulated": "AArch64 and x86-64 without AVX-512 under qemu, CUDA's prefill on an emulated device",
    "package": "installed library, wheels and a tarball as released, beyond 4 GiB, CUDA compiled for all architectures",
    "metal": "the Metal kernels on an emulation, and in MLX-LM",
    "plug-in": "all shapes and options in stock llama.cpp, also with its AVX2 and AVX-512 code",
    "quality": "4096 tokens of the real model against FP16, whole runs of `tq eval` and `tq calibrate`",
    "transformers": "Transformers on the CPU and on an emulated CUDA device, real models in Transformers and MLX-LM",
    "vllm": "the plug-in in stock vLLM on a CPU",
}
PART_FILES = {
    "sanitizers": ("src/base", "src/cache", "src/kernels", "src/attention", "src/api", "fuzz", "tests/unit", "tests/kernels"),
    "fuzzing": ("src/cache", "src/api", "src/codec", "plugins", "fuzz", "tests/unit"),
    "emulated": ("src/kernels", "src/codec", "src/attention", "src/base", "tests/kernels", "tests/cross", "tests/cuda"),
    "package": ("include", "cmake", "CMake", "pyproject", "src/kernels/cuda", "tests/api", "tests/cuda", "tests/release",
                "scripts/setup", "scripts/release"),
    "metal": ("src/kernels/metal", "python", "tests/metal"),
    "plug-in": ("plugins", "src/cache", "src/attention", "tests/plugin", "scripts/get_llama", "scripts/get_ggml",
                "scripts/make_"),
    "quality": ("src/codec", "src/cache", "tools", "tests/plugin", "scripts"),
    "transformers": ("python", "src/api", "src/cache", "tests/cuda", "bench/headline"),
    "vllm": ("python/libturboquant/vllm", "python/tests/vllm", "src/device", "src/api/paged"),
}
TIERS = ("check", "test", "full")  # `make check`, `make test`, `make test-full`

SANITIZERS = {
    # abort: a report must also end a test that expects failures of its own. The leak checker needs ptrace, which qemu has not.
    "ASAN_OPTIONS": "abort_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
SLOW = {"TQ_TEST_SLOW": "1"}  # fewer random runs, where each takes ten times as long
# Of the driver in fuzz/standalone.h: some 7 s of the slowest target but fuzz_batch, whose inputs take a second each.
FUZZ_RUNS = 200
# Of libFuzzer: some 5 s each. Inputs, not seconds, so that a failure can be had again on another machine.
FUZZ_INPUTS = {"fuzz_batch": 30, "fuzz_options": 200_000, "fuzz_page_ops": 2500, "fuzz_snapshot": 5000, "fuzz_state": 250,
               "fuzz_store_ops": 800}
# Whose unit tests these are. The hostile ones are written by tests/hostile/generate.py, the others are tests/unit/test_*.c.
UNIT_ROOMS = {
    "attention": "attention", "batch": "cache", "cache": "cache", "calibration": "cache", "codec": "codec", "cuda": "cuda",
    "dry_run": "cache", "exact_pages": "cache", "factors": "codec", "file": "base", "fork": "cache", "golden": "codec",
    "gpu_cells": "plugins",
    "half": "base", "hostile": "api", "invariants": "cache", "keep": "cache", "offload": "cache", "packing": "codec",
    "paged": "cache", "params": "api", "presets": "api", "restore": "cache", "rotation": "codec", "snapshot": "cache",
    "store": "cache", "store_references": "cache", "threads": "base",
}


@dataclass
class Suite:
    name: str
    commands: list  # of (command, environment)
    tier: str = "full"
    part: str = ""  # of `make test-full`
    builds: tuple = ("release",)
    rooms: tuple = ()  # what `make check ROOM=` selects it by
    missing: str = ""  # why it cannot run here
    optional: bool = False  # needs what a machine for tests may lack: skipped there, even in CI
    timeout: int = 900


@dataclass
class Build:
    name: str
    commands: list
    setup: tuple = ()  # what scripts/setup.sh installs for it
    needs: tuple = ()  # builds before it
    programs: tuple = field(default=())  # without which it cannot be made

    @property
    def missing(self):
        return needs(*self.programs)


def needs(*programs):
    absent = [program for program in programs if not shutil.which(program)]
    return f"{' and '.join(absent)} not installed" if absent else ""


def python(script, *arguments, interpreter=None, **environment):
    return [interpreter or sys.executable, ROOT / script, *arguments], environment


def preset(name, *targets, options=(), **more):
    # Only CI has one known compiler, whose warnings can be errors.
    werror = ["-DTQ_WERROR=ON"] if os.environ.get("CI") == "true" else []
    chosen = ["--target", *targets] if targets else []
    return Build(name, [["cmake", "--preset", name, "--log-level=WARNING", *werror, *options],
                        ["cmake", "--build", "--preset", name, "-j", JOBS, *chosen]], **more)


def builds():
    """All that suites may need, in the order in which it is made."""
    clang = ("clang",)
    cross = ("aarch64-linux-gnu-gcc", "qemu-aarch64")
    variants = [python("scripts/get_llama_variant.sh", name, interpreter="sh")[0] for name in ("avx2", "avx512")]
    found = [
        preset("release", "tests"),
        Build("cuda", [["cmake", "--build", "--preset", "release", "-j", JOBS, "--target", "turboquant_cuda", "test_device"]],
              needs=("release",), programs=("nvcc",)),
        preset("asan", "tests", needs=("release",)),
        preset("asan-simd", "checkkern"),
        preset("tsan", "tests"),
        preset("fuzz", "tests", setup=clang, programs=clang),
        preset("aarch64", "tests", setup=("cross",), programs=cross),
        Build("qemu", [["true"]], setup=("cross",), programs=("qemu-x86_64",)),
        Build("torch", [["true"]], setup=("torch",)),
        Build("vllm", [["true"]], setup=("vllm",)),
        Build("artefacts", [[DEPS / "release-venv/bin/python", ROOT / "scripts/release.py", "--output", BUILD / "dist"]],
              setup=("run", "release", "cross")),
        Build("ggml headers", [[sys.executable, ROOT / "scripts/get_ggml_headers.py"]], setup=("run",)),
        Build("llama variants", variants if "avx512_vnni" in cpu_flags() else variants[:1] if "avx2" in cpu_flags() else []),
    ]
    return {build.name: build for build in found}


def sources(folder, pattern):
    """Names of test programs. They come from the sources, so that one that was not built is a failure."""
    return sorted(path.stem for path in (ROOT / folder).glob(pattern))


def device_of(kind):
    """The device that computes in host memory, next to the CPU: for batches, paged stores and fuzz_batch."""
    return {"TQ_CUDA_LIBRARY": str(BUILD / kind / "tests/cuda/libturboquant-cuda-emulated.so")}


def units(kind, environment=None, emulator=(), names=None):
    device = {} if emulator else device_of(kind)  # a static program, for an emulator, loads none
    on_device = "test_batch", "test_exact_pages", "test_paged"
    return [([*emulator, BUILD / kind / "tests/unit" / name],
             {**SANITIZERS, **(device if name in on_device else {}), **(environment or {})})
            for name in names or [f"test_{name}" for name in UNIT_ROOMS]]


def counted(commands):
    """Commands without a count of their own: each is one test."""
    wrapper = ["sh", "-c", '"$@" && echo "1 passed, 0 failed"', "sh"]
    return [([*wrapper, *command], environment) for command, environment in commands]


def static_suites():
    yield Suite("style", [python("scripts/check_style.py")], "check", builds=(), rooms=("",))
    yield Suite("layers", [python("scripts/check_layers.py")], "check", builds=(), rooms=("",))
    yield Suite("circles", [python("scripts/check_circles.py", BUILD / "release")], "check", rooms=("",))
    yield Suite("docs", [python(f"scripts/check_{name}.py") for name in ("docs", "facts", "messages")]
                + [python("scripts/gen_reference.py", "--check"), python("tests/api/test_docs.py")], "check", rooms=("",))
    yield Suite("tables", counted([python("scripts/gen_tables.py", "--check")]), "check", builds=(),
                rooms=("codec", "kernels", "scripts"))
    yield Suite("runner", [python("tests/api/test_runner.py")], "check", builds=(), rooms=("tests",))


def fuzz_targets():
    return sources("fuzz", "fuzz_*.c")


def fuzz_command(kind, name, runs, *more):
    runs = max(1, runs // 100) if name == "fuzz_batch" else runs
    command = [BUILD / kind / "tests/fuzz" / name, "--runs", str(runs), *more]
    return command, {**SANITIZERS, **(device_of(kind) if name == "fuzz_batch" else {})}


def replay_suite(kind, **options):
    """Every fuzz target on a few inputs of its own making."""
    commands = [fuzz_command(kind, name, 100) for name in fuzz_targets()]
    return Suite(f"fuzz targets/{kind}", counted(commands), builds=(kind,), rooms=("fuzz", "cache", "plugins"), **options)


def cpu_flags():
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def cpu_levels():
    """The levels below this machine's best that it has; the best runs anyway."""
    flags = cpu_flags()
    return ["scalar", *(["avx2"] if " avx512_vnni" in flags else []), *(["avx512"] if " amx_int8" in flags else [])]


def native_suites():
    for room in sorted(set(UNIT_ROOMS.values())):
        names = [f"test_{name}" for name, its_room in UNIT_ROOMS.items() if its_room == room]
        yield Suite(f"units/{room}", units("release", names=names), "check", rooms=(room,))
    yield Suite("checkkern/release", [([BUILD / "release/tests/checkkern"], {})], "check", rooms=("kernels", "codec"))
    yield Suite("header and symbols", [python("tests/api/test_library.py", "Header", "Symbols")], "check",
                rooms=("include", "api"))
    yield Suite("tq", [python("tests/api/test_tq.py"), python("tests/api/test_simulate.py")], "check", rooms=("tools",))
    yield replay_suite("release", tier="check")
    for level in cpu_levels():
        # The specification is slow: a quarter of the random runs.
        environment = {"TQ_CPU": level, **(SLOW if level == "scalar" else {})}
        yield Suite(f"units/TQ_CPU={level}", units("release", environment), "test")
    yield Suite("units/asan", units("asan"), "test", builds=("asan",))
    yield replay_suite("asan", tier="test")
    yield Suite("installed library", [python("tests/api/test_library.py")], "test", rooms=("cmake", "include"))
    yield Suite("scripts", [python("tests/api/test_scripts.py")], "test", builds=(), rooms=("scripts",))
    yield Suite("tq calibrate", [python("tests/api/test_calibrate.py")], "test", rooms=("tools",))
    examples = [([BUILD / "release/examples" / f"example_{name}"], {}) for name in sources("examples", "*.c")]
    yield Suite("examples", counted(examples), "test", rooms=("examples",))


def sanitizer_suites():
    yield Suite("units/tsan", units("tsan", SLOW), builds=("tsan",))
    yield Suite("checkkern/asan", [([BUILD / "asan-simd/tests/checkkern", "--quick"], SANITIZERS)], builds=("asan-simd",))
    for name in fuzz_targets():
        yield Suite(f"{name}/asan", counted([fuzz_command("asan", name, FUZZ_RUNS, "--seed", "1")]), builds=("asan",))


def fuzz_suites():
    """Clang's sanitizers know what GCC's do not."""
    yield Suite("units/clang", units("fuzz"), builds=("fuzz",))
    for name in fuzz_targets():
        found = BUILD / "fuzz-corpus" / name
        command = [BUILD / "fuzz/tests/fuzz" / name, f"-runs={FUZZ_INPUTS[name]}", "-seed=1", "-print_final_stats=1",
                   f"-artifact_prefix={found}-", found]
        commands = counted([(command, {**SANITIZERS, **(device_of("fuzz") if name == "fuzz_batch" else {})})])
        yield Suite(f"{name}/libFuzzer", [(["mkdir", "-p", found], {}), *commands], builds=("fuzz",))


def emulated_suites():
    """Other machines: AArch64 of three classes, and an x86-64 without AVX-512, where an instruction too many is a crash."""
    # i8mm and all below it; dotprod at most; NEON alone.
    for cpu in ("max", "cortex-a76", "cortex-a53"):
        emulator = ("qemu-aarch64", "-cpu", cpu)
        yield Suite(f"checkkern/{cpu}", [([*emulator, BUILD / "aarch64/tests/checkkern", "--quick"], {})], builds=("aarch64",))
    yield Suite("units/max", units("aarch64", SLOW, emulator=("qemu-aarch64", "-cpu", "max")), builds=("aarch64",))
    if "avx512f" in cpu_flags():  # else this machine is such a one itself
        haswell = ["qemu-x86_64", "-cpu", "Haswell"]
        yield Suite("checkkern/haswell", [([*haswell, BUILD / "release/tests/checkkern", "--quick"], {})],
                    builds=("release", "qemu"))
    yield Suite("cuda/emulated", [python("tests/cuda/check_emulated.py", BUILD / "release")], timeout=1800)


def plugin_environment(llama_bin):
    TINY.mkdir(parents=True, exist_ok=True)
    return {
        "TQ_LLAMA_BIN": llama_bin,
        "TQ_LLAMA_SRC": DEPS / "llama.cpp",
        "TQ_PLUGIN": BUILD / "release/libggml-turboquant.so",
        "TQ_MODEL": MODEL,
        "TQ_TEXT": DEPS / "text/austen.txt",
        "TQ_TINY_DIR": TINY,
        "TQ_TEST_THREADS": "1",  # two suites run side by side
    }


def plugin_suite(name, script, *classes, llama_bin=DEPS / "llama-bin", cpu=None, inner=None, **options):
    """cpu: the plug-in's instruction set, as the programs in llama_bin have ggml's. inner: what its devices are in front of."""
    more = {"TQ_CPU": cpu, "TQ_TEST_INNER": inner}
    environment = {key: str(value) for key, value in (plugin_environment(llama_bin) | more).items() if value}
    return Suite(name, [python(f"tests/plugin/{script}.py", *classes, interpreter=DEPS / "venv/bin/python", **environment)],
                 missing=absent(MODEL, DEPS / "text/austen.txt"), **options)


def absent(*paths):
    missing = [str(path) for path in paths if not path.exists()]
    return f"{', '.join(missing)} not there: run `make deps` first" if missing else ""


def plugin_suites():
    """The plug-in in stock llama.cpp. tests/plugin/common.py explains the environment."""
    quick = {"abi": (), "ctypes": (), "factors": (), "fold": (), "llama_cuda": (), "log": (), "options": (), "refusals": (),
             "shared_layers": (), "tools": (), "models": ("Models",), "hosts": ("Hosts",),
             "server": ("Server", "CodedServer", "DamagedServer"), "quality": ("ShortQuality",),
             "eval": ("Parsing", "Needles", "Waiting", "KeptReferences", "Runs")}
    for name, classes in quick.items():
        yield plugin_suite(f"plug-in/{name}", f"test_{name}", *classes, tier="test", rooms=("plugins",))
    yield plugin_suite("plug-in/all hosts", "test_hosts", "AllHosts", part="plug-in")
    yield plugin_suite("plug-in/unified server", "test_server", "UnifiedServer", "FirstTokens", "DamagedUnifiedServer",
                       "FirstRequest", "GoingOn", part="plug-in")
    yield plugin_suite("plug-in/all models", "test_models", "AllModels", part="plug-in")
    yield Suite("plug-in/versions", [python("tests/plugin/test_versions.py")], part="plug-in", builds=("ggml headers",),
                missing=absent(DEPS / "llama.cpp/ggml"))
    yield plugin_suite("plug-in/clients", "test_hosts", "Clients", part="plug-in")
    yield plugin_suite("plug-in/chaos", "test_chaos", part="plug-in")
    # Other processors' sums in llama.cpp, and their kernels here.
    variants = {"avx2": " avx2 ", "avx512": " avx512_vnni "}
    for variant in (name for name, flag in variants.items() if flag in cpu_flags()):
        for name in ("hosts", "factors", "server", "quality"):
            yield plugin_suite(f"plug-in/{name} {variant}", f"test_{name}", *quick[name], part="plug-in",
                               llama_bin=DEPS / f"llama-{variant}/bin", cpu=variant, builds=("release", "llama variants"))
    # What runs on a GPU, with the library's paged stores on the CPU.
    front = {"hosts": ("Hosts",), "server": ("Server", "CodedServer", "DamagedServer"), "ctypes": (), "factors": (),
             "refusals": (), "models": ("Models",), "quality": ("ShortQuality",)}
    for name, classes in front.items():
        name, script = f"plug-in/{name} in front", f"test_{name}"
        yield plugin_suite(name, script, *classes, inner="CPU", tier="test", rooms=("plugins",))
    front = {"all hosts": ("AllHosts", "Clients"), "all models": ("AllModels",), "chaos": (),
             "unified server": ("UnifiedServer", "FirstTokens", "DamagedUnifiedServer", "FirstRequest", "GoingOn")}
    for name, classes in front.items():
        script = f"test_{name.split()[-1]}"
        yield plugin_suite(f"plug-in/{name} in front", script, *classes, inner="CPU", part="plug-in")
    yield plugin_suite("plug-in/4096 tokens", "test_quality", "Quality", part="quality")
    yield plugin_suite("plug-in/evidence", "test_evidence", part="quality")
    yield plugin_suite("plug-in/tq eval", "test_eval", "RealRuns", part="quality")
    yield plugin_suite("plug-in/tq calibrate", "test_calibrate", part="quality")


def package_suites():
    clean = BUILD / "python-clean"
    pip = [clean / "bin/pip", "install", "-q", "--disable-pip-version-check"]
    make = [sys.executable, "-I", "-m", "venv", "--clear", clean]
    with_plugin = {"TQ_GGML_DIR": str(DEPS / "llama.cpp/ggml")}
    install = [(make, {}), ([*pip, "-C", f"build-dir={BUILD / 'wheel'}", ROOT], with_plugin)]
    example = ([clean / "bin/python", ROOT / "examples/cache.py"], {})
    # What llama-cpp-python needs is in the other environment; the wheel's files come first.
    site = clean / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    plugin = ([PYTHON_VENV / "bin/python", ROOT / "examples/llama_cpp_generate.py", MODEL, "The capital of France is"],
              bindings(site))
    yield Suite("wheel in a clean environment", counted([*install, example, plugin]), builds=(), timeout=1800)
    yield Suite("release artefacts", [python("tests/release/test_release.py", TQ_DIST=str(BUILD / "dist"))],
                builds=("artefacts",), missing=absent(DEPS / "llama.cpp/ggml", MODEL))
    large = {"TQ_TEST_LARGE": "1"}
    yield Suite("units/large", units("release", large, names=["test_cache"]))
    # Kernels against the specification, also under CUDA's checkers; and that they compile for all architectures.
    program = BUILD / "release/tests/cuda/test_device"
    environment = {"TQ_CUDA_LIBRARY": str(BUILD / "release/libturboquant-cuda.so")}
    yield Suite("cuda/device", [([program], environment)], builds=("cuda",), missing=device_missing(), optional=True)
    # racecheck does not follow barriers in shared memory, by which the warp groups of prefill_hopper.cuh wait for each other.
    for tool, options in (("memcheck", []), ("racecheck", ["--kernel-name-exclude", "kernel_substring=prefill_hopper"])):
        command = ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "1", "--print-limit", "5", program,
                   "--quick"]
        yield Suite(f"cuda/{tool}", counted([(command, environment)]), builds=("cuda",),
                    missing=device_missing() or needs("compute-sanitizer"), optional=True)
    yield Suite("cuda/compile", [python("tests/cuda/check_compile.py", TQ_NVCC=str(nvcc()))], builds=(),
                missing="" if nvcc() else "nvcc not installed", optional=True, timeout=1800)


def nvcc():
    """CUDA's compiler, or None."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def device_missing():
    """Why device tests cannot run here: they need a build with nvcc, and a device."""
    if not Path("/dev/nvidiactl").exists():
        return "no CUDA device"
    return "" if nvcc() else "nvcc not installed"


def pytest(name, venv, *files, more=(), folder="", **options):
    """Files of python/tests, or a folder in it, with the sources' package and the release build's library."""
    # Threads that wait actively for each other take hours where other suites run at the same time.
    environment = {"PYTHONPATH": str(ROOT / "python"), "TURBOQUANT_LIBRARY": str(BUILD / "release/libturboquant.so"),
                   "TQ_DEPS_DIR": str(DEPS), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= options.pop("environment", {})
    command = [venv / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider",
               *(ROOT / "python/tests" / folder / f"test_{file}.py" for file in files)]
    more = [(command, {**environment, **given}) for command, given in more]
    return Suite(name, [(command, environment), *counted(more)], timeout=1800, rooms=("python",), **options)


def bindings(*folders):
    """llama-cpp-python's modules next to others, over the llama.cpp of the plug-in's tests."""
    return {"PYTHONPATH": os.pathsep.join(str(folder) for folder in (*folders, DEPS / "llama-cpp-python")),
            "LLAMA_CPP_LIB_PATH": str(DEPS / "llama-bin")}


def python_suites():
    yield pytest("python/core", PYTHON_VENV, "buffers", "cache", "codec", "engines", "header", "weight_factors",
                 tier="test")
    yield pytest("python/mlx", PYTHON_VENV, "mlx", "mlx_factors", "mlx_prompt_cache", "mlx_folder", tier="test")
    yield pytest("python/mlx commands", PYTHON_VENV, "mlx_commands", tier="test")
    yield pytest("python/mlx models", PYTHON_VENV, "models_mlx", environment={"TQ_TEST_QUICK": "1"}, tier="test")
    plugin = {"GGML_BACKEND_PATH": str(BUILD / "release/libggml-turboquant.so")}
    yield pytest("python/llama-cpp", PYTHON_VENV, "llama_cpp", environment=bindings(ROOT / "python") | plugin, tier="test",
                 missing=absent(MODEL, DEPS / "llama-bin/libllama.so"))


def metal_suites():
    for name in ("metal_kernels", "mlx_metal"):
        yield pytest(f"python/{name}", PYTHON_VENV, name, missing=needs(os.environ.get("CXX", "g++")))


def transformers_suites():
    needed = {"builds": ("release", "torch")}
    names = "transformers", "transformers_factors", "transformers_fold", "transformers_install", "transformers_refusals"
    files = *names, "interrupted"
    yield pytest("python/transformers", TORCH_VENV, *files, "transformers_latent", **needed)
    yield pytest("python/models", TORCH_VENV, "models", **needed)
    yield pytest("python/commands", TORCH_VENV, "commands", **needed)
    yield pytest("python/all mlx models", PYTHON_VENV, "models_mlx")
    for name in ("real_model", "mlx_real_model", "lm_eval", "examples"):
        yield pytest(f"python/{name}", TORCH_VENV, name, missing=absent(MODEL), **needed)
    # TurboQuantCache as on a GPU, on a device in host memory, and the benchmark that drives whole models.
    emulated = {"TQ_TEST_BACKEND": "emulated",
                "TQ_CUDA_LIBRARY": str(BUILD / "release/tests/cuda/libturboquant-cuda-emulated.so")}
    headline = [TORCH_VENV / "bin/python", ROOT / "bench/headline.py", "--tiny"]
    yield pytest("python/cuda emulated", TORCH_VENV, "cuda", "cuda_snapshot", *files, environment=emulated,
                 more=[(headline, {})], **needed)
    on_device = {"TQ_TEST_BACKEND": "cuda", "TQ_CUDA_LIBRARY": str(BUILD / "release/libturboquant-cuda.so")}
    yield pytest("python/cuda", TORCH_VENV, "cuda", "cuda_graph", "cuda_snapshot", "transformers", "transformers_factors",
                 "interrupted",
                 environment=on_device, builds=("cuda", "torch"), missing=device_missing(), optional=True)


def vllm_suites():
    needed = {"builds": ("release", "vllm")}
    yield pytest("python/vllm", VLLM_VENV, "vllm", folder="vllm", **needed)
    yield pytest("python/vllm refusals", VLLM_VENV, "vllm_refusals", folder="vllm", **needed)
    yield pytest("python/vllm traffic", VLLM_VENV, "vllm_traffic", folder="vllm", **needed)
    yield pytest("python/vllm real model", VLLM_VENV, "vllm_real_model", folder="vllm", missing=absent(MODEL), **needed)


def part(name, found):
    for suite in found:
        suite.part = suite.part or name
        yield suite


def all_suites():
    return [
        *static_suites(), *native_suites(), *python_suites(), *plugin_suites(),
        *part("sanitizers", sanitizer_suites()), *part("fuzzing", fuzz_suites()), *part("emulated", emulated_suites()),
        *part("package", package_suites()), *part("metal", metal_suites()), *part("transformers", transformers_suites()),
        *part("vllm", vllm_suites()),
    ]
