#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Get the headers of earlier ggml versions, which tests/plugin/test_versions.py compares with those of scripts/get_llama.sh: a
folder for each version in the cache (see scripts/cache.py).

    get_ggml_headers.py             get those that are not there
    get_ggml_headers.py --folder    print the folder, and do nothing

Each comes from a source distribution of llama-cpp-python, 70 MB, which is deleted when its few headers are out.
"""
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from cache import choose_folder, deps_folder, fetch

# By ggml's version: the release of llama-cpp-python that holds it, and the SHA-256 of its source distribution.
RELEASES = {
    "0.10.2": ("0.3.22", "93c54af95d917fe6d6d70039efe16ca9240634d11010f5aaf795261b9f43042f"),
    "0.13.1": ("0.3.26", "71b004d52a274273ae03ec954d62771d26c86f32193fd30be57601508bec0064"),
    "0.15.1": ("0.3.30", "798c9b42652d2e0bff5fe81e7e762089f425a99e67f66ffe5ae156957876e0d1"),
    "0.16.0": ("0.3.34", "d849d286d808284f1d3ec1bd6875572430d29d1f9574a010232caa4e9cef0e35"),
    "0.20.0": ("0.3.35", "1139dbb54509074b70893fab8554e3b079aa9f4d312058ce4018ef0019e3de12"),
}


def headers_folder():
    return choose_folder(os.environ, deps_folder())[0] / "ggml-headers"


def is_wanted(path):
    """The headers, and the file that tells ggml's version; not those of single backends in folders of their own."""
    return path.as_posix() == "CMakeLists.txt" or path.suffix == ".h" and path.parent.as_posix() in ("include", "src")


def unpack(archive, release, folder):
    """The folder is there whole or not at all, also if two do this at once."""
    top = Path(f"llama_cpp_python-{release}/vendor/llama.cpp/ggml")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="new-") as new, tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if not member.isfile() or not path.is_relative_to(top) or not is_wanted(path.relative_to(top)):
                continue
            target = Path(new) / folder.name / path.relative_to(top)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(member).read())
        if not folder.exists():
            (Path(new) / folder.name).rename(folder)


def main():
    folder = headers_folder()
    if sys.argv[1:] == ["--folder"]:
        print(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for version, (release, sha256) in RELEASES.items():
        if (folder / version).exists():
            continue
        print(f"Getting the headers of ggml {version} (llama-cpp-python {release}, 70 MB)", flush=True)
        archive = fetch(deps_folder() / "venv/bin/pip", f"llama-cpp-python=={release}", sha256,
                        f"llama_cpp_python-{release}.tar.gz", folder.parent / "downloads")
        unpack(archive, release, folder / version)
        archive.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
