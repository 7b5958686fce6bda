#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Write a test program that calls every function of turboquant.h with NULL, zero, negative and enormous arguments.

    generate.py turboquant.h test_hostile.c

Each function is called with valid arguments (hostile.h makes them), with each argument replaced by each hostile value of its
type, and with each pair of arguments replaced. A call must return: no crash, no hang. By contract (turboquant.h, conventions)
handles are valid or NULL and memory is as large as counts say; so there are no wild pointers here, and the buffers are larger
than any count that is accepted. A prototype that cannot be parsed, or a type without values, is an error: a new function
cannot be forgotten.
"""
import itertools
import re
import sys
from pathlib import Path

# By type, without const: what is valid, and what is hostile.
NUMBERS = {
    "int32_t": ["1", "0", "-1", "INT32_MAX", "INT32_MIN"],
    "int64_t": ["1", "0", "-1", "INT64_MAX", "INT64_MIN"],
    "size_t": ["64", "0", "SIZE_MAX", "SIZE_MAX / 2"],
    "uint64_t": ["TQ_SEED_DEFAULT", "0", "UINT64_MAX"],
    "bool": ["true", "false"],
    "tq_format": ["TQ_FORMAT_TQ4", "(tq_format)-1", "TQ_FORMAT_COUNT", "(tq_format)INT32_MAX"],
    "tq_status": ["TQ_OK", "(tq_status)-1000", "(tq_status)INT32_MAX"],
    "tq_log_fn": ["drop_message", "NULL"],
}
HANDLES = {"tq_cache", "tq_codec", "tq_pool", "tq_store", "tq_stage"}
STRUCTS = {"tq_attend_params", "tq_attend_batch", "tq_cache_params", "tq_store_params", "tq_key_bias_params", "tq_preset",
           "tq_executor", "tq_openmp", "tq_cuda_store", "tq_cuda_append_params", "tq_cuda_attend_params"}
BUFFERS = {"float", "double", "int32_t", "int64_t", "size_t", "void", "tq_format", "tq_format_info", "tq_cache_stats",
           "tq_snapshot_info", "tq_cuda_info", "tq_cuda_sizes"}
VALID = {"head_dim": "64", "seq": "f.seq", "from": "f.seq", "layer": "0", "exact_bytes": "f.exact_bytes",
         "row_stride": "128", "memory_bytes": "sizeof f.memory", "first_page": "0", "first": "0", "first_slot": "0"}


def values(kind, name):
    """Values of one parameter, the valid one first."""
    base, stars = kind.replace("const ", "").replace("struct ", "").replace("*", "").strip(), kind.count("*")
    if stars == 0 and base in NUMBERS:
        own = NUMBERS[base]
        return [VALID[name], *own] if name in VALID and base not in ("tq_format",) and "*" not in kind else own
    if stars == 2:
        return ["(void *)f.handles", "NULL"]
    if stars == 1 and base == "char":
        return ["f.path" if name == "path" else '"tq4"', "NULL", '""', "f.long_text"]
    if stars == 1 and name == "memory":
        return ["f.memory", "NULL", "f.memory + 1"]
    if stars == 1 and base == "tq_calibration":
        return ["NULL"]  # its files are test_calibration.c's
    if stars == 1 and (base in HANDLES or base in STRUCTS):
        field = base.removeprefix("tq_")
        return [f"f.{field}", "NULL"] if base in HANDLES else [f"&f.{field}", "NULL", "(void *)f.zeros"]
    if stars == 1 and base in BUFFERS:
        return ["(void *)(f.buffer + sizeof f.buffer / 2)", "NULL"]
    sys.exit(f"tests/hostile/generate.py: there is no value for '{kind} {name}': say what is valid and what is hostile")


def prototypes(header):
    """(name, whether its result must be used, [(type, parameter), ...]) of every TQ_API function."""
    text = re.sub(r"/\*.*?\*/", " ", header, flags=re.S)
    text = re.sub(r"^\s*#.*$", "", text, flags=re.M)
    found = re.findall(r"\bTQ_API\s+(TQ_NODISCARD\s+)?[\w\s*]*?\b(tq_\w+)\s*\(([^()]*)\)\s*;", text)
    if len(found) != len(re.findall(r"\bTQ_API\b", text)) or not found:
        sys.exit(f"tests/hostile/generate.py: {len(found)} of {len(re.findall('TQ_API', text))} prototypes could be parsed")
    for must_use, name, parameters in found:
        words = [] if parameters.strip() == "void" else [" ".join(p.split()) for p in parameters.split(",")]
        parsed = [re.fullmatch(r"(.*?[\s*])(\w+)", word) for word in words]
        if not all(parsed):
            sys.exit(f"tests/hostile/generate.py: the parameters of {name} could not be parsed: {parameters}")
        yield name, bool(must_use), [(match[1].strip(), match[2]) for match in parsed]


def calls(parameters):
    """Lists of arguments: the valid ones, with one or two replaced."""
    choices = [values(kind, name) for kind, name in parameters]
    valid = [choice[0] for choice in choices]
    seen = {tuple(valid)}
    yield valid
    for i, j in itertools.combinations_with_replacement(range(len(choices)), 2):
        for a, b in itertools.product(choices[i], choices[j]):
            arguments = list(valid)
            arguments[i], arguments[j] = a, b
            if tuple(arguments) not in seen:
                seen.add(tuple(arguments))
                yield arguments


def main():
    header, out = Path(sys.argv[1]), Path(sys.argv[2])
    lines = ["/* Written by tests/hostile/generate.py. */", "#define _GNU_SOURCE /* MAP_ANONYMOUS */",
             '#include "hostile.h"', ""]
    tests = []
    for name, must_use, parameters in prototypes(header.read_text()):
        all_calls = [f"{name}({', '.join(arguments)})" for arguments in calls(parameters)]
        lines += [f"static void call_{name}(int i)", "{", "    switch (i) {"]
        for i, call in enumerate(all_calls):
            use = f"{'(void)!' * must_use}{call};"
            lines += [f"    case {i}:", f"        begin(i, {quoted(call)});", f"        {use}", "        break;"]
        lines += ["    }", "}", "", f"static void test_{name}(void **state)", "{", "    (void)state;",
                  f"    assert_survives(call_{name}, {len(all_calls)});", "}", ""]
        tests.append(f"        cmocka_unit_test(test_{name}),")
    lines += ["int main(void)", "{", "    const struct CMUnitTest tests[] = {", *tests, "    };",
              "    return cmocka_run_group_tests(tests, NULL, NULL);", "}", ""]
    out.write_text("\n".join(lines))


def quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    main()
