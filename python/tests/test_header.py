# SPDX-License-Identifier: MIT
"""The structs and prototypes that ctypes has are those of turboquant.h, as a C compiler sees them."""
import ctypes
import re
import subprocess

import pytest
from conftest import ROOT

from libturboquant import _library

HEADER = ROOT / "include" / "turboquant.h"


def without_comments():
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def layout_in_c(folder, structs):
    """{struct: {member: offset}} with the size as member '', from a compiled program."""
    lines = ["#include <stdio.h>", '#include "turboquant.h"', "int main(void) {"]
    for name, struct in structs.items():
        lines.append(f'printf("{name} - %zu\\n", sizeof({name}));')
        lines += [f'printf("{name} {field} %zu\\n", offsetof({name}, {field}));' for field, *_ in struct._fields_]
    source, program = folder / "layout.c", folder / "layout"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    subprocess.run(["cc", f"-I{HEADER.parent}", source, "-o", program], check=True)
    layout = {}
    for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines():
        name, field, number = line.split()
        layout.setdefault(name, {})[field] = int(number)
    return layout


def test_structs(tmp_path):
    layout = layout_in_c(tmp_path, _library.STRUCTS)
    for name, struct in _library.STRUCTS.items():
        fields = {field: getattr(struct, field).offset for field, *_ in struct._fields_}
        assert fields | {"-": ctypes.sizeof(struct)} == layout[name], name


def test_structs_name_all_members():
    text = without_comments()
    for name, struct in _library.STRUCTS.items():
        body = re.search(r"\{([^{}]*)\} " + name + ";", text).group(1)
        declared = re.findall(r"(\w+)(?=(?:\[\d+\])?\s*[,;\)])", re.sub(r"\(int?[^;]*?\)\(|\(\*(\w+)\)\([^)]*\)", r"\1", body))
        assert [field for field, *_ in struct._fields_] == declared, name


@pytest.mark.parametrize("name", _library.FUNCTIONS)
def test_prototypes(name):
    declaration = re.search(r"\b" + name + r"\(([^)]*)\);", without_comments())
    assert declaration, f"turboquant.h has no {name}"
    parameters = [part.strip() for part in declaration.group(1).split(",")]
    n = 0 if parameters == ["void"] else len(parameters)
    assert len(getattr(_library.lib, name).argtypes) == n
