#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Write the lists of Python packages that scripts/setup.sh installs, with the hashes of all files, from the .in files next to
them. It needs uv (pip install uv) and a network; pip then installs only what was tested. What an environment gets from one list
is not in its second one. Of a list LIST, LIST-overrides.in takes the place of what packages ask for;
what it wants on the platform "never" is left out.
"""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# All packages with the hashes of all their files. Made by scripts/pin_requirements.py.\n"
LISTS = [  # (the list, the least Python, the list that the environment has already)
    ("scripts/requirements-run", "3.10", None),
    ("scripts/requirements-release", "3.10", None),
    ("python/tests/requirements", "3.11", None),
    ("python/tests/requirements-torch", "3.11", "python/tests/requirements"),
    ("python/tests/requirements-vllm", "3.11", None),
]


def packages(text):
    """The text's entries: a requirement, and the lines with its hashes."""
    entries = []
    for line in text.splitlines(keepends=True):
        if line.startswith((" ", "\t")) and entries:
            entries[-1] += line
        elif line.strip() and not line.startswith("#"):
            entries.append(line)
    return entries


def main():
    for name, version, before in LISTS:
        path = ROOT / f"{name}.in"
        command = ["uv", "pip", "compile", "-q", "--universal", "--python-version", version, "--generate-hashes", "--no-header",
                   "--no-annotate", path.name]
        overrides = path.with_name(f"{path.stem}-overrides.in")
        command += ["--override", overrides.name] if overrides.exists() else []
        done = subprocess.run(command, cwd=path.parent, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"pin_requirements.py: {path} could not be resolved")
        known = packages((ROOT / f"{before}.txt").read_text()) if before else []
        wanted = [entry for entry in packages(done.stdout) if entry not in known and "sys_platform == 'never'" not in entry]
        path.with_suffix(".txt").write_text(HEADER + "".join(wanted))


if __name__ == "__main__":
    main()
