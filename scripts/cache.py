#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Where downloads and llama.cpp's build are kept for all checkouts of this machine, and how files of packages get there.

    cache.py folder                                print the folder
    cache.py folder --explain                      the same, and say on stderr why it is not the usual one
    cache.py fetch NAME==VERSION SHA256 FILE       print the path of a package's file, downloaded if it is not there

The folder is $XDG_CACHE_HOME/turboquant, or ~/.cache/turboquant; build/deps (or TQ_DEPS_DIR) where that cannot be written.
"""
import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def deps_folder():
    return Path(os.environ.get("TQ_DEPS_DIR") or ROOT / "build" / "deps").absolute()


def cache_folder(environment):
    """The folder for all checkouts by the XDG specification, or None."""
    base = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the specification says to ignore such a value
        home = environment.get("HOME", "")
        base = os.path.join(home, ".cache") if os.path.isabs(home) else ""
    return Path(base) / "turboquant" if base else None


def choose_folder(environment, deps):
    """(the folder, None), or (deps, why it is not the usual one)."""
    folder = cache_folder(environment)
    if not folder:
        return deps, "neither XDG_CACHE_HOME nor HOME names a folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, None
    except OSError as error:
        return deps, f"{folder} cannot be written ({error.strerror})"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(pip, requirement, sha256, file_name, folder):
    """
    The path of a file of a package in the folder. pip compares the hash before it unpacks anything. For a source distribution
    it then asks the package for its name, so the backend has to be in pip's environment: --no-build-isolation keeps pip from
    installing one whose hash nobody has checked.
    """
    path = folder / file_name
    if path.exists():
        if sha256_of(path) == sha256:
            return path
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="new-") as new:
        requirements = Path(new) / "requirements.txt"
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        kind = ["--only-binary", ":all:"] if file_name.endswith(".whl") else ["--no-binary", ":all:", "--no-build-isolation"]
        done = subprocess.run([pip, "download", "-q", "--disable-pip-version-check", "--no-deps", *kind, "--require-hashes",
                               "-d", new, "-r", requirements])
        if done.returncode:
            sys.exit(f"cache.py: pip could not get {file_name} of {requirement}; see its message above.\n"
                     "Check the network (and PIP_INDEX_URL if you use a mirror), and run this again.")
        (Path(new) / file_name).replace(path)  # whole or not at all, also if two do this at once
    return path


def main():
    parser = argparse.ArgumentParser(description="The folder for downloads and builds, and files of packages in it.")
    commands = parser.add_subparsers(dest="command", required=True)
    where = commands.add_parser("folder")
    where.add_argument("--explain", action="store_true")
    get = commands.add_parser("fetch")
    for name in ("requirement", "sha256", "file"):
        get.add_argument(name)
    args = parser.parse_args()

    folder, reason = choose_folder(os.environ, deps_folder())
    if args.command == "fetch":
        print(fetch(deps_folder() / "venv/bin/pip", args.requirement, args.sha256, args.file, folder / "downloads"))
        return
    if reason and args.explain:
        print(f"{reason}: downloads and builds are kept in {folder}, for this checkout only", file=sys.stderr)
    print(folder)


if __name__ == "__main__":
    main()
