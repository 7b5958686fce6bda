# SPDX-License-Identifier: MIT
"""
mx.fast.metal_kernel on the CPU: writes the function around a kernel's body as MLX does, compiles it as C++ with
tests/metal/shim.h, and runs it. What MLX demands of arrays and grids is asserted. Compiled kernels are kept in a folder.
"""
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
from libturboquant import metal_kernels

ROOT = Path(__file__).resolve().parent.parent.parent
SHIM, FOLDER = ROOT / "tests/metal/shim.h", ROOT / "build/metal"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
C_TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.uint32: "uint", mx.int32: "int",
           mx.int8: "int8_t"}
CONSTANT_BELOW = 8  # elements: MLX passes smaller inputs in another address space, which the kernels do not take
ASCENDING, DESCENDING, AHEAD_ASCENDING, AHEAD_DESCENDING = range(4)  # shim.h's orders of threads; more are seeds

order = ASCENDING


def source(name, template, in_types, out_types):
    """The C++ file of one kernel at one template and types."""
    kernel = metal_kernels.KERNELS[name]
    inputs = [f"const device {t} *{n}" for t, n in zip(in_types, kernel.inputs)]
    outputs = [f"device {t} *{n}" for t, n in zip(out_types, kernel.outputs)]
    arguments = [f"(const {t} *)buffers[{i}]" for i, t in enumerate(in_types)]
    arguments += [f"({t} *)buffers[{len(in_types) + i}]" for i, t in enumerate(out_types)]
    return f"""#include "{SHIM}"
{metal_kernels.header(name)}
template <{", ".join(f"int {n}" for n, _ in template)}> static void kernel_function({", ".join(inputs + outputs)})
{{
{metal_kernels.body(name)}
}}
static void call(void *argument)
{{
    void **buffers = (void **)argument;
    kernel_function<{", ".join(str(value) for _, value in template)}>({", ".join(arguments)});
}}
extern "C" void launch(void **buffers, const int *grid, const int *group, int order)
{{
    shim::run(call, buffers, grid, group, order);
}}
"""


def address_space_faults(name, template, in_types, out_types, text=None):
    """What clang says of a kernel (or of `text` in place of its header) when address spaces are types, as they are in Metal."""
    kernel = metal_kernels.KERNELS[name]
    parts = source(name, template, in_types, out_types).split("static void call(")
    code = parts[0].replace(str(SHIM), str(SHIM.with_name("address_spaces.h")))
    if text is not None:
        code = code.replace(metal_kernels.header(name), text)
    pointers = [f"const device {t} *{n}" for t, n in zip(in_types, kernel.inputs)]
    pointers += [f"device {t} *{n}" for t, n in zip(out_types, kernel.outputs)]
    values, arguments = ", ".join(str(value) for _, value in template), ", ".join(kernel.inputs + kernel.outputs)
    code += f"void instance({', '.join(pointers)})\n{{\n    kernel_function<{values}>({arguments});\n}}\n"
    command = ["clang++", "--target=aarch64-linux-gnu", "-nostdinc", "-std=c++14", "-fsyntax-only", "-Wall", "-Wextra",
               "-Wno-unknown-pragmas", "-Wno-unused", "-Wno-undefined-internal", "-x", "c++", "-"]
    return subprocess.run(command, input=code, capture_output=True, text=True).stderr


@functools.cache
def compiled(text):
    """The function `launch` of a source."""
    key = hashlib.sha256((COMPILER + SHIM.read_text() + text).encode()).hexdigest()[:32]
    library = FOLDER / f"{key}.so"
    if not library.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        file = FOLDER / f"{key}-{os.getpid()}.cpp"
        file.write_text(text)
        made = file.with_suffix(".so")
        # 32-bit floats, each operation rounded; longjmp between stacks is what the fortified one refuses.
        command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w", "-fPIC", "-shared", file,
                   "-o", made]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        made.rename(library)
        file.unlink()
    return ctypes.CDLL(str(library)).launch


libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = 4096
READ_WRITE, PRIVATE_ANONYMOUS = 3, 0x22


class Guarded:
    """Memory that ends where a page begins that may not be touched; before it, the same."""

    def __init__(self, n_bytes):
        self.n_bytes, self.size = n_bytes, (n_bytes + PAGE - 1) // PAGE * PAGE + 2 * PAGE
        self.base = libc.mmap(None, self.size, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        self.address = self.base + self.size - PAGE - n_bytes
        libc.mprotect(self.base, PAGE, 0)
        libc.mprotect(self.base + self.size - PAGE, PAGE, 0)

    def __del__(self):
        libc.munmap(self.base, self.size)


def launch(name, template, inputs, grid, threadgroup, shapes, dtypes):
    """As metal_kernels.launch_on_gpu, at once. Outputs begin as NaNs."""
    kernel = metal_kernels.KERNELS[name]
    assert len(inputs) == len(kernel.inputs) and len(shapes) == len(dtypes) == len(kernel.outputs)
    assert all(x.size >= CONSTANT_BELOW for x in inputs), [x.shape for x in inputs]
    assert all(g % t == 0 and g > 0 for g, t in zip(grid, threadgroup)), (grid, threadgroup)
    run = compiled(source(name, template, [C_TYPES[x.dtype] for x in inputs], [C_TYPES[t] for t in dtypes]))
    host = [np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x) for x in map(mx.contiguous, inputs)]
    out_bytes = [int(np.prod(shape)) * t.size for shape, t in zip(shapes, dtypes)]
    memory = [Guarded(n) for n in [x.nbytes for x in host] + out_bytes]
    for x, at in zip(host, memory):
        ctypes.memmove(at.address, x.ctypes.data, x.nbytes)
    for at in memory[len(host):]:
        ctypes.memset(at.address, 0xFF, at.n_bytes)
    buffers = (ctypes.c_void_p * len(memory))(*(at.address for at in memory))
    run(buffers, (ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*threadgroup), order)
    found = []
    for shape, dtype, at in zip(shapes, dtypes, memory[len(host):]):
        bits = {2: np.uint16, 4: np.uint32}[dtype.size]
        array = mx.array(np.frombuffer(ctypes.string_at(at.address, at.n_bytes), bits).reshape(shape))
        found.append(array.view(dtype))
    return found
