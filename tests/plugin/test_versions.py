#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The plug-in is compiled with the headers of one ggml and serves hosts of others. It must compile with the headers of each
version, and what it touches must be where it is in the one that it is compiled with: structs, constants, functions' types.

scripts/get_ggml_headers.py gets the headers. Nothing is run in those hosts here."""
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import DEPS, ROOT, main  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
from get_ggml_headers import RELEASES, headers_folder  # noqa: E402

PLUGIN = ROOT / "plugins/ggml"
OURS = DEPS / "llama.cpp/ggml"
OWN_NAMES = re.compile(r"GGML_(MAJOR|MINOR_MIN|MINOR_MAX|BACKEND_PATH|DIR)$")
# What the plug-in reads, fills or copies. A host looks at every field of a table, also at those that are left empty.
FIELDS = {
    "ggml_tensor": "type buffer ne nb op op_params flags src view_src view_offs data name extra",
    "ggml_init_params": "mem_size mem_buffer no_alloc",
    "ggml_cgraph": "size n_nodes n_leafs nodes grads grad_accs leafs use_counts order uid",
    "ggml_backend_event": "device context",
    "ggml_backend_i": "get_name free set_tensor_async get_tensor_async set_tensor_2d_async get_tensor_2d_async "
                      "cpy_tensor_async synchronize graph_plan_create graph_plan_free graph_plan_update "
                      "graph_plan_compute graph_compute event_record event_wait graph_optimize",
    "ggml_backend": "guid iface device context",
    "ggml_backend_device_i": "get_name get_description get_memory get_type get_props init_backend get_buffer_type "
                             "get_host_buffer_type buffer_from_host_ptr supports_op supports_buft offload_op event_new "
                             "event_free event_synchronize",
    "ggml_backend_device": "iface reg context",
    "ggml_backend_buffer_i": "free_buffer get_base init_tensor memset_tensor set_tensor get_tensor set_tensor_2d get_tensor_2d "
                             "cpy_tensor clear reset",
    "ggml_backend_buffer": "iface buft context size usage",
    "ggml_backend_buffer_type_i": "get_name alloc_buffer get_alignment get_max_size get_alloc_size is_host",
    "ggml_backend_buffer_type": "iface device context",
    "ggml_backend_reg_i": "get_name get_device_count get_device get_proc_address",
    "ggml_backend_reg": "api_version iface context",
    "ggml_backend_dev_props": "name description memory_free memory_total type device_id caps.async caps.host_buffer "
                              "caps.buffer_from_host_ptr caps.events",
}
# These may grow at their end: the host makes them, and what is behind the fields above is not touched.
MAY_GROW = {"ggml_tensor", "ggml_cgraph"}


def sources(pattern="*.c"):
    return sorted(PLUGIN.glob(pattern))


def flags(ggml):
    return ["-std=c11", "-isystem", ggml / "include", "-isystem", ggml / "src"]


def constants():
    """Of ggml's, those that the plug-in uses."""
    text = re.sub(r'"[^"\n]*"', "", "".join(path.read_text() for path in sources("*.[ch]")))
    return sorted({name for name in re.findall(r"\bGGML_[A-Z0-9_]+\b", text) if not OWN_NAMES.match(name)})


def functions():
    """Those of the host that the plug-in calls."""
    listed = re.search(r"#define TQ_GGML_HOST_FUNCTIONS\(X\)(.*?)\n\n", (PLUGIN / "host.h").read_text(), re.DOTALL)[1]
    return [*re.findall(r"X\((\w+)\)", listed), "ggml_log_get"]


def layout(ggml, folder):
    """{what: number} of structs and constants, as the compiler has them."""
    lines = [f'    printf("{name} %ld\\n", (long){name});' for name in constants()]
    for struct, fields in FIELDS.items():
        for field in fields.split():
            where = f"offsetof(struct {struct}, {field}), sizeof ((struct {struct} *)0)->{field}"
            lines.append(f'    printf("{struct}.{field} %zu+%zu\\n", {where});')
        if struct not in MAY_GROW:
            lines.append(f'    printf("sizeof {struct} %zu\\n", sizeof(struct {struct}));')
    source = Path(folder) / "layout.c"
    source.write_text('#include <stddef.h>\n#include <stdio.h>\n#include "ggml-backend-impl.h"\n#include "ggml-impl.h"\n'
                      'int main(void)\n{\n' + "\n".join(lines) + "\n}\n")
    subprocess.run(["cc", "-O1", "-w", *flags(ggml), source, "-o", source.with_suffix("")], check=True)
    shown = subprocess.run([source.with_suffix("")], check=True, capture_output=True, text=True).stdout
    return dict(line.rsplit(" ", 1) for line in shown.splitlines())


def prototypes(ggml):
    """{function: its type}, without names of parameters, as the headers declare it."""
    text = "".join(path.read_text() for path in sorted((ggml / "include").glob("ggml*.h")))
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text + (ggml / "src/ggml-backend-impl.h").read_text(), flags=re.DOTALL)
    found = {}
    for name in functions():
        match = re.search(rf"^[^\n;#]*?GGML_(?:BACKEND_)?API([^;(]*?)\b{name}\s*\(([^;]*)\);", text, re.MULTILINE)
        parameters = [re.sub(r"\s*\b\w+$", "", parameter.strip()) if " " in parameter.strip() else parameter.strip()
                      for parameter in match[2].split(",")]
        found[name] = " ".join(f"{match[1]} ({', '.join(parameters)})".replace("*", " * ").split())
    return found


def version_of(ggml):
    text = (ggml / "CMakeLists.txt").read_text()
    return ".".join(re.search(rf"set\(GGML_VERSION_{part} (\d+)\)", text)[1] for part in ("MAJOR", "MINOR", "PATCH"))


class Versions(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name)
        cls.headers = {version: headers_folder() / version for version in RELEASES} | {version_of(OURS): OURS}
        cls.layout = layout(OURS, cls.folder)

    def test_they_are_what_they_should_be(self):
        for version, ggml in self.headers.items():
            self.assertEqual(version_of(ggml), version)

    def test_they_span_what_the_plug_in_is_made_for(self):
        entry = (PLUGIN / "entry.c").read_text()
        ends = [re.search(rf"#define GGML_MINOR_{end} (\d+)", entry)[1] for end in ("MIN", "MAX")]
        versions = sorted(self.headers, key=lambda version: int(version.split(".")[1]))
        self.assertEqual([versions[0].split(".")[1], versions[-1].split(".")[1]], ends)

    def test_the_plug_in_compiles(self):
        include = [f"-I{ROOT / name}" for name in ("include", "src", "plugins/ggml")]
        for version, ggml in self.headers.items():
            with self.subTest(version):
                command = ["cc", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *include, *flags(ggml), *sources()]
                done = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_layouts_are_equal(self):
        for version, ggml in self.headers.items():
            with self.subTest(version):
                self.assertEqual(layout(ggml, self.folder), self.layout)

    def test_functions_are_equal(self):
        for version, ggml in self.headers.items():
            with self.subTest(version):
                self.assertEqual(prototypes(ggml), prototypes(OURS))

    def test_operations_are_there_by_name(self):
        """And within the part of the enumeration that the plug-in looks through."""
        names = re.findall(r'^    X\(\w+, "(\w+)"\)', (PLUGIN / "host.h").read_text(), re.MULTILINE)
        n_ops = int(re.search(r"#define N_OPS (\d+)", (PLUGIN / "host.c").read_text())[1])
        self.assertIn("FLASH_ATTN_EXT", names)
        for version, ggml in self.headers.items():
            with self.subTest(version):
                enumeration = re.search(r"enum ggml_op \{(.*?)\}", (ggml / "include/ggml.h").read_text(), re.DOTALL)[1]
                found = re.findall(r"\bGGML_OP_(\w+)", enumeration)
                self.assertEqual(found.pop(), "COUNT")
                self.assertGreaterEqual(len(found), n_ops)
                self.assertLessEqual(set(names), set(found[:n_ops]))

    def test_the_field_that_headers_may_lack(self):
        """The plug-in fills caps.mmap_support by its place: behind caps.events, where others have nothing."""
        for version, ggml in self.headers.items():
            with self.subTest(version):
                text = (ggml / "include/ggml-backend.h").read_text()
                caps = re.search(r"struct ggml_backend_dev_caps \{(.*?)\}", text, re.DOTALL)[1]
                self.assertIn(re.findall(r"bool (\w+);", caps)[4:], ([], ["mmap_support"]))

    def test_a_moved_field_is_found(self):
        changed = self.folder / "changed"
        shutil.copytree(OURS / "include", changed / "include")
        shutil.copytree(OURS / "src", changed / "src", ignore=lambda folder, names: [n for n in names if not n.endswith(".h")])
        header = changed / "include/ggml.h"
        header.write_text(header.read_text().replace("        int32_t flags;\n", "        int64_t flags;\n", 1))
        self.assertNotEqual(layout(changed, self.folder), self.layout)


if __name__ == "__main__":
    main()
