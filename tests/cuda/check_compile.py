#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Compile the kernels for each architecture, to nothing. The last line is 'N passed, M failed'."""
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHITECTURES = ["75", "80", "86", "89", "90", "90a", "100", "120"]
WHOLE = "append", "plain_append", "plain_attend", "pages", "entry"
SOURCES = ["tests/cuda/compile_check.cu"] + [f"src/kernels/cuda/{name}.cu" for name in WHOLE]
NVCC = os.environ.get("TQ_NVCC", "nvcc")


def compile_one(task):
    architecture, source = task
    with tempfile.TemporaryDirectory() as folder:
        command = [NVCC, "-std=c++17", "-O1", f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
                   f"-I{ROOT}/src", f"-I{ROOT}/include", "-c", ROOT / source, "-o", Path(folder) / "object.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"sm_{architecture}: {source}\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main():
    tasks = [(architecture, source) for architecture in ARCHITECTURES for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        good = sum(pool.map(compile_one, tasks))
    print(f"{good} passed, {len(tasks) - good} failed")
    return good < len(tasks)


if __name__ == "__main__":
    sys.exit(main())
