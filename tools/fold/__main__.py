# SPDX-License-Identifier: MIT
"""tq fold: an equal model whose keys have no channels that outweigh the others."""
import os
import shutil
import sys
import tempfile
from pathlib import Path

from .arguments import parse_arguments

try:
    import numpy as np
    from tqdm import tqdm

    from . import check, factors, file
    from .blocks import check as check_type
    from .layers import Model
except ImportError as error:
    parse_arguments(sys.argv[1:])  # --help, and mistakes in the words, do without
    sys.exit(f"tq fold: {error}. `make deps` installs what it needs; or: pip install numpy gguf tqdm, and name that Python in "
             "TQ_PYTHON")
from eval.llama import LlamaError, Setup
from eval.options import find_llama_bin, run_command
from eval.outputs import check_outputs

SPARE_BYTES = 1 << 28  # for logits, of a large vocabulary


def check_paths(args):
    if not args.model.is_file():
        raise LlamaError(f"{args.model} is not a file; name a GGUF model")
    check_outputs({"-o": args.output}, [args.model])
    if args.output.exists() and not args.output.is_file():
        raise LlamaError(f"-o: {args.output} is not a regular file; name another one")
    if args.output.exists() and not args.force:
        raise LlamaError(f"-o: {args.output} exists; name another file, or write over it by --force")
    needed = args.model.stat().st_size + SPARE_BYTES
    if shutil.disk_usage(args.output.resolve().parent).free < needed:
        raise LlamaError(f"-o: {args.output} and its check need {needed >> 20} MiB; free some, or name a file on another disk")


def plan(model):
    """({tensor's name: exponents of its rows}, lines that say what changes in each layer)"""
    changes, lines, n_held = {}, [], 0
    for group in tqdm(model.groups(), unit=" layers", desc="factors", leave=False, disable=None):
        sides = (group.keys, *group.queries)
        for target in (target for side in sides for target in side.targets):
            check_type(target.tensor)
        octaves, wanted = factors.find(group)
        n_held += int((octaves != wanted).sum())
        if not octaves.any():
            continue
        found = [pair for side in sides for pair in factors.exponents_of(side, octaves, -1 if side is group.keys else 1)]
        for rows, exponents in found:
            own = changes.setdefault(rows.tensor.name, np.zeros(rows.n_all, int))
            own[rows.first:rows.first + rows.n] += exponents
        names = dict.fromkeys(rows.tensor.name.partition(f"blk.{group.layer}.")[2] or rows.tensor.name for rows, _ in found)
        lines.append(f"layer {group.layer}: factors from 2^{octaves.min()} to 2^{octaves.max()} in {', '.join(names)}")
    if n_held:
        lines.append(f"{n_held} channels have smaller factors than would be best, so that no scale of a block is rounded")
    return changes, lines


def make(args, reader, changes, folder):
    """Write the new file in a folder of its own, and compare it. Returns its path and what to say of it."""
    new = folder / "folded.gguf"
    with tqdm(total=args.model.stat().st_size - int(reader.data_offset), unit="B", unit_scale=True, desc="writing",
              leave=False, disable=None) as bar:
        file.write(reader, new, changes, bar.update)
    try:
        n_rounded = check.compare_weights(reader, file.read(new), changes)
    except LlamaError as error:
        raise LlamaError(f"the new file is not equal to the old one: {error}. It was deleted; please report this") from error
    said = f"weights: {len(changes)} tensors are the old ones by powers of two, all others equal byte for byte"
    said += f"; {n_rounded} half floats became too small to be exact" if n_rounded else ""
    if args.check == "weights":
        return new, said
    try:
        setup = Setup(find_llama_bin(args.llama_bin), None, args.model, args.threads)
    except LlamaError:
        if args.llama_bin:
            raise
        return new, said + "\nlogits: not compared, as llama.cpp was not found (--llama-bin)"
    with tqdm(desc="comparing logits in llama.cpp", bar_format="{desc}", leave=False, disable=None):
        return new, f"{said}\n{judge(check.compare_logits(setup, folder, args.model, new), n_rounded)}"


def judge(found, n_rounded):
    """What to say of logits; raises LlamaError where they are of another model."""
    most = check.DIVERGENCE_ROUNDED_MAX if n_rounded else check.DIVERGENCE_MAX
    if not found.divergence <= most:
        raise LlamaError(f"the new file is not equal to the old one: in llama.cpp its logits have a divergence of "
                         f"{found.divergence:.2g}. It was deleted; please report this")
    how = "equal to the last bit" if found.largest == 0 else f"a divergence of {found.divergence:.1e}"
    return f"logits: {how} in llama.cpp, at {found.n} positions"


def keep(path, output, may_replace):
    """Give the new file its name, all of it or nothing, also when the machine stops."""
    with open(path, "rb") as new:
        os.fsync(new.fileno())
    if may_replace:
        path.replace(output)
        return
    try:
        os.link(path, output)
    except OSError as error:
        if output.exists():
            raise LlamaError(f"-o: {output} exists by now; name another file, or write over it by --force") from error
        path.replace(output)  # where files have one name only


def run(args):
    check_paths(args)
    reader = file.read(args.model)
    model = Model(reader, args.model)
    model.check()
    if model.get(file.MARK):
        raise LlamaError(f"{args.model} is folded already: use it as it is")
    changes, lines = plan(model)
    if not changes:
        raise LlamaError(f"{args.model} has no channels of keys that outweigh the others by more than half an octave: there is "
                         "nothing to fold, use it as it is")
    print("\n".join(lines), flush=True)
    output = args.output.resolve()  # where it is a link, the file that it names is written
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        new, said = make(args, reader, changes, Path(folder))
        keep(new, output, args.force)
    print(f"{said}\n{args.output}: {output.stat().st_size} bytes", flush=True)


def main(argv=None):
    return run_command("tq fold", parse_arguments, run, lambda args: f"{args.output} was not written", argv)


if __name__ == "__main__":
    sys.exit(main())
