#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Compile the kernels that run on an emulated device with the host's C++ compiler, and run them:

    check_emulated.py BUILD     the folder that has libturboquant.a

The last line is 'N passed, M failed'.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
# The threads of the emulated device jump between stacks, which _FORTIFY_SOURCE takes for a mistake.
FLAGS = ["-O2", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-w"]  # nvcc warns of the kernels
PROGRAMS = ("emulated_append", "emulated_attention", "emulated_prompt")
FOLDERS = [f"-I{ROOT / folder}" for folder in ("src", "include", "tests/unit")]


def copy_kernels(folder):
    """The kernels' headers with shared variables as static ones; by a macro those that are extern could not be told apart."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "src/kernels/cuda").glob("*.cuh"):
        if path.name not in ("mma.cuh", "hopper.cuh"):
            (folder / path.name).write_text(re.sub(r"(?<!extern )\b__shared__\b", "static", path.read_text()))


def main():
    build = Path(sys.argv[1])
    folder = build / "tests/cuda"
    copy_kernels(folder / "emulated/kernels/cuda")
    first = [f"-I{ROOT / 'tests/cuda/emulation'}", f"-I{folder / 'emulated'}", f"-I{ROOT / 'tests/cuda'}"]
    objects, counts = [], [0, 0]
    for source in ("tests/unit/vectors.c", "tests/cuda/emulated_calibration.c"):
        objects.append(folder / Path(source).with_suffix(".o").name)
        subprocess.run([os.environ.get("CC") or "cc", "-std=c11", "-O2", *FOLDERS, "-c", ROOT / source, "-o", objects[-1]],
                       check=True)
    libraries = [*objects, build / "libturboquant.a", build / "libturboquant_simd.a", "-lpthread", "-ldl", "-lm"]
    for name in PROGRAMS:
        subprocess.run([COMPILER, "-std=c++17", *FLAGS, *first, *FOLDERS, "-x", "c++", ROOT / f"tests/cuda/{name}.cu",
                        "-x", "none", *libraries, "-o", folder / name], check=True)
        done = subprocess.run([folder / name], stdout=subprocess.PIPE, text=True)
        found = re.search(r"^(\d+) passed, (\d+) failed$", done.stdout, re.MULTILINE)
        print(re.sub(r"^(\d+ passed, )", rf"{name}: \1", done.stdout, flags=re.MULTILINE), end="", flush=True)
        of_program = [int(n) for n in found.groups()] if found else [0, 0]
        if done.returncode and not of_program[1]:
            of_program[1] = 1  # it did not come to its end
        counts = [a + b for a, b in zip(counts, of_program)]
    print(f"{counts[0]} passed, {counts[1]} failed")
    return counts[1] > 0


if __name__ == "__main__":
    sys.exit(main())
