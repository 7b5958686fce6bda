#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Write docs/tq.1, the manual page of `tq`, from its help texts: scripts/gen_man.py [TQ], after a build.

tests/api/test_tq.py fails where the page lacks an option."""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = "88"
HEAD = r""".\" SPDX-License-Identifier: MIT
.\" Written by scripts/gen_man.py from the help texts.
.TH TQ 1 "" "turboquant {version}" "User Commands"
.SH NAME
tq \- a language model's KV cache in 2 to 8 bits a value
.SH SYNOPSIS
.B tq
.I COMMAND
[\fIOPTIONS\fR]
.br
.B tq
.I COMMAND
.B \-\-help
.br
.B tq \-\-version
.SH DESCRIPTION
.B tq
lists formats and presets, measures what a compressed KV cache changes in a model's output, times attention, looks at saved
caches, says which llama.cpp fits, and runs stock llama.cpp tools with the compressed cache.
"""
TAIL = r""".SH ENVIRONMENT
.TP
.B TQ_CPU
Caps the instruction set: scalar, avx2, avx512, amx, neon, dotprod or i8mm.
.TP
.B TQ_CUDA_LIBRARY
The library libturboquant\-cuda.so.
.TP
.B TQ_LLAMA_BIN
The folder with llama.cpp's programs.
.TP
.B TQ_PLUGIN
The plug-in, libggml\-turboquant.so.
.TP
.B TQ_PYTHON
The Python that runs eval, calibrate, fold and the plots of cache simulate.
.TP
.B TQ_GGML
Options of the plug-in.
.SH EXIT STATUS
0, 1 if the command failed, 2 for wrong usage. Errors are one line on standard error.
.SH SEE ALSO
docs/tq.md, docs/llama\-cpp.md and docs/troubleshooting.md in the sources.
"""


def help_of(tq, *command):
    environment = {**os.environ, "COLUMNS": WIDTH}
    return subprocess.run([tq, *command, "--help"], capture_output=True, text=True, check=True, env=environment).stdout


def escape(line):
    line = line.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + line if line.startswith((".", "'")) else line


def section(name, text):
    lines = "\n".join(escape(line) for line in text.rstrip().split("\n"))
    return f".SS tq {escape(name)}\n.nf\n{lines}\n.fi\n"


def page(tq):
    text = help_of(tq)
    version = subprocess.run([tq, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    commands = re.findall(r"^  ([a-z]+)  ", text, re.MULTILINE)
    sections = [section(name, help_of(tq, name)) for name in commands]
    sections += [section(f"cache {name}", help_of(tq, "cache", name)) for name in ("bench", "simulate")]
    return HEAD.replace("{version}", version) + ".SH COMMANDS\n" + "".join(sections) + TAIL


def main():
    tq = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/release/tq"
    (ROOT / "docs/tq.1").write_text(page(tq))


if __name__ == "__main__":
    main()
