#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Put three long real texts into build/deps/text: a novel, reference documentation and C sources, 300 to 800 KB each.

    austen.txt   "Pride and Prejudice" (public domain) from the Debian package r-cran-janeaustenr (MIT)
    pydoc.txt    the reference topics of Python's help() from the standard library's pydoc_data (PSF licence)
    csource.txt  C files of ggml (MIT), from the sources that scripts/get_llama.sh unpacked

A second run takes no time. TQ_DEPS_DIR puts build/deps elsewhere.
"""
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from cache import choose_folder

ROOT = Path(__file__).resolve().parent.parent
DEPS = Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build" / "deps"))
TEXT = DEPS / "text"
MIN_BYTES = 200_000
NOVEL = "prideprejudice"
DEB = "r-cran-janeaustenr"

LICENSES = f"""\
austen.txt   Jane Austen, "Pride and Prejudice" (1813): public domain. Taken from the Debian package {DEB},
             whose compilation is under the MIT licence, copyright 2016-2017 Julia Silge.
pydoc.txt    Python's reference documentation: Python Software Foundation License Version 2.
csource.txt  ggml: MIT licence, copyright 2023-2026 The ggml authors.
"""


class RReader:
    """R's serialization in XDR, as much of it as an index of lazily loaded data and a character vector need."""
    SYMBOL, PAIRLIST, CHAR, LOGICAL, INTEGER, STRINGS, LIST = 1, 2, 9, 10, 13, 16, 19
    NULL, REFERENCE = 254, 255

    def __init__(self, data):
        if data[:2] != b"X\n":
            raise ValueError("not R's XDR serialization")
        self.data, self.at, self.symbols = data, 2, []
        version = self.ints(3)[0]
        if version == 3:
            n_name = self.ints(1)[0]  # of the encoding
            self.at += n_name

    def ints(self, n):
        self.at += 4 * n
        return struct.unpack_from(f">{n}i", self.data, self.at - 4 * n)

    def value(self):
        """One value: None, str, list of values or tuple of ints. An attribute "names" turns a list into a dict."""
        flags = self.ints(1)[0]
        kind = flags & 255
        if kind == self.NULL:
            return None
        if kind == self.REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == self.SYMBOL:
            self.symbols.append(self.value())
            return self.symbols[-1]
        if kind == self.PAIRLIST:
            name = self.value() if flags & 1024 else None
            return {name: self.value(), **(self.value() or {})}
        n = self.ints(1)[0]
        if kind == self.CHAR:
            self.at += max(n, 0)
            return self.data[self.at - n:self.at].decode() if n >= 0 else None
        if kind in (self.LOGICAL, self.INTEGER):
            x = self.ints(n)
        elif kind in (self.STRINGS, self.LIST):
            x = [self.value() for _ in range(n)]
        else:
            raise ValueError(f"R object of type {kind}")
        attributes = self.value() if flags & 512 else {}
        return dict(zip(attributes["names"], x)) if "names" in attributes else x


def read_r_strings(folder, name):
    """The lines of the character vector `name` in a package's data folder."""
    index = RReader(zlib.decompress((folder / "Rdata.rdx").read_bytes(), wbits=47)).value()
    offset, n_bytes = index["variables"][name]
    with open(folder / "Rdata.rdb", "rb") as file:
        file.seek(offset)
        data = file.read(n_bytes)
    return RReader(zlib.decompress(data[4:])).value()  # 4 bytes of length come first


def get_deb(folder):
    """apt-get download works without root; fetching package lists, where there are none, does not."""
    folder.mkdir(parents=True, exist_ok=True)
    for kept in folder.glob(f"{DEB}_*.deb"):
        return kept
    command = ["apt-get", "download", "-q", DEB]
    with tempfile.TemporaryDirectory(dir=folder, prefix="new-") as new:
        done = subprocess.run(command, cwd=new, capture_output=True, text=True)
        if done.returncode and os.geteuid() == 0:
            subprocess.run(["apt-get", "update", "-q"], capture_output=True)
            done = subprocess.run(command, cwd=new, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"get_text.py: cannot download the Debian package {DEB}:\n{done.stderr}"
                     f"Run apt-get update as root and try again, or put any English novel into {TEXT}/austen.txt.")
        deb = next(Path(new).glob("*.deb"))
        return deb.replace(folder / deb.name)


def austen():
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        sys.exit(f"get_text.py: the novel comes from the Debian package {DEB}, and this is not a Debian system.\n"
                 f"Put any English novel of at least {MIN_BYTES} bytes into {TEXT}/austen.txt and try again.")
    with tempfile.TemporaryDirectory() as folder:
        deb = get_deb(choose_folder(os.environ, DEPS)[0] / "downloads")
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        lines = read_r_strings(Path(folder) / "usr/lib/R/site-library/janeaustenr/data", NOVEL)
    return "\n".join(lines) + "\n"


def pydoc():
    from pydoc_data import topics
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def csource():
    folder = DEPS / "llama.cpp" / "ggml" / "src"
    try:
        return "".join((folder / name).read_text() for name in ("ggml-alloc.c", "ggml.c"))
    except FileNotFoundError as error:
        sys.exit(f"get_text.py: {error}; run scripts/get_llama.sh first")


def main():
    TEXT.mkdir(parents=True, exist_ok=True)
    for make in (austen, pydoc, csource):
        path = TEXT / f"{make.__name__}.txt"
        if path.exists() and path.stat().st_size >= MIN_BYTES:
            continue
        text = make()
        if len(text) < MIN_BYTES:
            sys.exit(f"get_text.py: {path.name} has only {len(text)} characters, not {MIN_BYTES}")
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").rename(path)
        print(f"{path.name}: {len(text) // 1000} KB")
    (TEXT / "LICENSES").write_text(LICENSES)


if __name__ == "__main__":
    main()
