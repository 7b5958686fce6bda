#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Write a test program that calls every function of turboquant.h with NULL, zero, negative and enormous arguments.

    generate.py turboquant.h test_hostile.c

Each function is called with valid arguments (hostile.h makes them), with each argument replaced by each hostile value of its
type, with each pair of arguments replaced, and with each field of each struct that it is given replaced. A call must return: no
crash, no hang. By contract (turboquant.h, conventions) handles are valid or NULL and memory is as large as counts say; so there
are no wild pointers here, and the buffers are larger than any count that is accepted. A prototype or struct that cannot be
parsed, or a type without values, is an error: a new function or field cannot be forgotten.
"""
import itertools
import re
import sys
from pathlib import Path

# By type, without const: what is valid, and what is hostile.
NUMBERS = {
    "int32_t": ["1", "0", "-1", "INT32_MAX", "INT32_MAX - 1", "INT32_MIN"],
    "int64_t": ["1", "0", "-1", "INT64_MAX", "INT64_MIN"],
    "size_t": ["64", "0", "SIZE_MAX", "SIZE_MAX / 2"],
    "uint64_t": ["TQ_SEED_DEFAULT", "0", "UINT64_MAX"],
    "bool": ["true", "false"],
    "tq_format": ["TQ_FORMAT_SQ4", "(tq_format)-1", "TQ_FORMAT_COUNT", "(tq_format)INT32_MAX"],
    "tq_status": ["TQ_OK", "(tq_status)-1000", "(tq_status)INT32_MAX"],
    "tq_dtype": ["TQ_DTYPE_F32", "(tq_dtype)-1", "(tq_dtype)INT32_MAX"],
    "tq_device_kind": ["TQ_DEVICE_CPU", "TQ_DEVICE_CUDA", "(tq_device_kind)-1", "(tq_device_kind)INT32_MAX"],
    "tq_append_half": ["TQ_APPEND_BOTH", "(tq_append_half)-1", "(tq_append_half)INT32_MAX"],
    "float": ["1", "0", "-1", "NAN", "INFINITY", "-INFINITY", "FLT_MAX", "FLT_TRUE_MIN"],
    "tq_log_fn": ["drop_message", "NULL"],
}
HANDLES = {"tq_batch", "tq_cache", "tq_codec", "tq_pool", "tq_store", "tq_stage"}
STRUCTS = {"tq_attend_params", "tq_cache_params", "tq_store_params", "tq_key_factors_params", "tq_preset",
           "tq_executor", "tq_openmp", "tq_batch_rows", "tq_paged_store", "tq_paged_append_params",
           "tq_paged_attend_params"}
BUFFERS = {"float", "double", "int8_t", "uint16_t", "int32_t", "int64_t", "size_t", "void", "tq_format", "tq_format_info",
           "tq_cache_stats", "tq_calibration_info", "tq_snapshot_info", "tq_cuda_info", "tq_paged_sizes"}
VALID = {"head_dim": "64", "seq": "f.seq", "from": "f.seq", "layer": "0", "exact_bytes": "f.exact_bytes",
         "row_stride": "128", "memory_bytes": "sizeof f.memory", "first_page": "0", "first": "0", "first_slot": "0"}


# Sequences that were freed are known by their ids, and must be refused.
FREED = {"seq": "freed_sequence()", "from": "freed_sequence()"}
# Where a pointer's content can be wrong.
CONTENTS = {
    "seqs": ["(freed_sequence(), id_list(f.seq))", "id_list(INT32_MAX)", "id_list(-1)"],
    "query_starts": ["place_list(0)", "place_list(-1)", "place_list(INT64_MAX)"],
    "n_tok": ["place_list(-1)", "place_list(INT64_MAX)"],
    "seq_lens": ["place_list(0)", "place_list(-1)", "place_list(INT64_MAX)"],
    "layer_k_formats": ["format_list((tq_format)-1)"], "layer_v_formats": ["format_list(TQ_FORMAT_COUNT)"],
    "angles": ["angle_list(NAN)", "angle_list(DBL_MAX)"],
    **{name: ["float_list(NAN)", "float_list(-INFINITY)", "float_list(FLT_MAX)"]
       for name in ("q", "mask", "alibi_slopes", "sinks", "k_square", "k_mean", "q_square")},
    "partners": ["partner_list(-1)", "partner_list(INT32_MAX)"], "factors": ["factor_list(127)", "factor_list(-128)"],
    "pages": ["f.memory + 1"], "workspace": ["f.memory + 1"], "exact": ["f.memory + 1"],
    "slot_mapping": ["place_list(-1)", "place_list(INT64_MAX)"], "positions": ["place_list(-1)", "place_list(INT64_MAX)"],
    **{name: ["id_list(-1)", "id_list(INT32_MAX)"] for name in ("page_table", "exact_slots")}, "seq_ids": ["id_list(-1)"],
    "k_factors": ["factor_list(127)", "factor_list(-128)"],
    "offload_folder": ['""', '"/"', "f.long_text"], "label": ['""', "f.long_text"], "name": ["f.long_text"],
}
# Parameters whose content is tried, too.
LISTS = {"seqs", "n_tok"}


def contents(base, name):
    """Hostile contents of what a parameter or field points to, where it can be wrong."""
    found = CONTENTS.get(name, [])
    return [value.replace("place_list(INT64_MAX)", "id_list(INT32_MAX)").replace("place_list", "id_list")
            for value in found] if base == "int32_t" else found


def plain(kind):
    """(a type without qualifiers and stars, the number of stars)"""
    return re.sub(r"\b(const|struct)\b|\*", "", kind).strip(), kind.count("*")


def values(kind, name):
    """Values of one parameter, the valid one first."""
    base, stars = plain(kind)
    if stars == 0 and base in NUMBERS:
        own = NUMBERS[base]
        return [VALID[name], *own, *([FREED[name]] if name in FREED else [])] if name in VALID and base != "tq_format" else own
    if stars == 2:
        return ["(void *)f.handles", "NULL"]
    if stars == 1 and base == "char":
        return ["f.path" if name == "path" else '"sq4"', "NULL", '""', "f.long_text"]
    if stars == 1 and name == "memory":
        return ["f.memory", "NULL", "f.memory + 1"]
    if stars == 1 and base == "tq_calibration":
        return ["NULL"]  # its files are test_calibration.c's
    if stars == 1 and (base in HANDLES or base in STRUCTS):
        field = base.removeprefix("tq_")
        return [f"f.{field}", "NULL"] if base in HANDLES else [f"&f.{field}", "NULL", "(void *)f.zeros"]
    if stars == 1 and base in BUFFERS:
        lists = contents(base, name) if name in LISTS else []
        return ["(void *)(f.buffer + sizeof f.buffer / 2)", "NULL", *lists]
    sys.exit(f"tests/hostile/generate.py: there is no value for '{kind} {name}': say what is valid and what is hostile")


def without_comments(header):
    return re.sub(r"^\s*#.*$", "", re.sub(r"/\*.*?\*/", " ", header, flags=re.S), flags=re.M)


def fields_of(text, name):
    """[(type, field), ...] of a struct; a function's type is "function"."""
    found = re.search(rf"\bstruct {name} \{{([^}}]*)\}}", text)
    if not found:
        sys.exit(f"tests/hostile/generate.py: struct {name} could not be parsed")
    for line in filter(None, map(str.strip, found[1].split(";"))):
        function = re.fullmatch(r"\w+ \(\*(\w+)\)\(.*\)", line, flags=re.S)
        if function:
            yield "function", function[1]
            continue
        kind, names = re.fullmatch(r"((?:const |struct )*\w+)\s*(.*)", line, flags=re.S).groups()
        for declared in names.split(","):
            stars, field = re.fullmatch(r"\s*(\**)(\w+)\s*", declared).groups()
            yield kind + stars, field


def replaced_fields(text, name, place):
    """Assignments of a hostile value to a field of the struct at `place`, one each."""
    for kind, field in fields_of(text, name):
        base, stars = plain(kind)
        target = f"{place}.{field}"
        if stars == 0 and base in STRUCTS:
            yield from replaced_fields(text, base, target)
        elif stars or base == "function":
            yield from (f"{target} = {value}" for value in ["NULL", *contents(base, field)])
        elif base in NUMBERS:
            yield from (f"{target} = {value}" for value in NUMBERS[base])
        else:
            sys.exit(f"tests/hostile/generate.py: a hostile value for '{kind} {field}' of {name} does not exist: add one")


def prototypes(text):
    """(name, whether its result must be used, [(type, parameter), ...]) of every function."""
    found = re.findall(r"^(?:TQ_API\s+)?(TQ_NODISCARD\s+)?[a-z][\w\s*]*?\b(tq_\w+)\s*\(([^()]*)\)\s*;", text, flags=re.M)
    wanted = len(re.findall(r"\b(?:TQ_API|(?<!TQ_API )TQ_NODISCARD)\b", text))
    if len(found) < wanted or not found:
        sys.exit(f"tests/hostile/generate.py: {len(found)} of {wanted} prototypes could be parsed")
    for must_use, name, parameters in found:
        words = [] if parameters.strip() == "void" else [" ".join(p.split()) for p in parameters.split(",")]
        parsed = [re.fullmatch(r"(.*?[\s*])(\w+)", word) for word in words]
        if not all(parsed):
            sys.exit(f"tests/hostile/generate.py: the parameters of {name} could not be parsed: {parameters}")
        yield name, bool(must_use), [(match[1].strip(), match[2]) for match in parsed]


def calls(text, parameters):
    """Lists of arguments: the valid ones, with one or two replaced, with a field replaced."""
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
    for i, (kind, _) in enumerate(parameters):
        base, stars = plain(kind)
        if base in STRUCTS and stars == 1 and "const" in kind:
            for assignment in replaced_fields(text, base, f"f.{base.removeprefix('tq_')}"):
                yield [*valid[:i], f"({assignment}, {valid[i]})", *valid[i + 1:]]


def main():
    *headers, out = map(Path, sys.argv[1:])
    lines = ["/* Written by tests/hostile/generate.py. */", "#define _GNU_SOURCE /* MAP_ANONYMOUS */",
             '#include "hostile.h"', ""]
    tests = []
    text = "".join(without_comments(header.read_text()) for header in headers)
    for name, must_use, parameters in prototypes(text):
        all_calls = [f"{name}({', '.join(arguments)})" for arguments in calls(text, parameters)]
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
