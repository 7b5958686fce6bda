# SPDX-License-Identifier: MIT
"""tq eval: how much of a model's output each KV cache changes, at how many bits."""
import re
import shutil
import sys

from .arguments import KINDS, parse_arguments

try:
    from tqdm import tqdm

    from . import chat, needle, quality, report
except ImportError as error:
    parse_arguments(sys.argv[1:])  # --help, and mistakes in the words, do without
    sys.exit(f"tq eval: {error}. `make deps` installs what it needs; or: pip install matplotlib jinja2 tqdm, and name that "
             "Python in TQ_PYTHON")
from .llama import (F16, F16_NO_FLASH, ROOT, STOCK_TYPES, Cache, LlamaError, commit, describe_model, list_devices, machine,
                    version)
from .needle import Needles
from .options import make_setup, run_command
from .outputs import check_outputs
from .quality import Quality
from .references import Reference, References
from .work import Work, fingerprint

SPARE_BYTES = 1 << 28

def fail(message):
    sys.exit(f"tq eval: {message}")


def check(args, setup, model):
    """All that can be told before the first measurement."""
    for name in args.baselines:
        if not Cache(name).is_stock:
            fail(f"unknown baseline '{name}'; give some of {', '.join(STOCK_TYPES)}, or KEYS/VALUES")
    known, _ = list_devices(setup, Cache("none"))
    if not known:
        fail(f"{setup.plugin} does not load into {setup.llama_bin}: {list_devices(setup, Cache('none'))[1]}")
    for name in args.presets:
        cache = Cache(name)
        if cache.device not in known:
            fail(f"unknown preset '{cache.device}'; the presets are {', '.join(known)}")
        devices, why = list_devices(setup, cache)
        if cache.device not in devices:
            fail(f"{name}: {why or 'the plug-in does not take these options'}")
    longest = max([*args.context, *args.needle])
    if longest > model["n_ctx_train"]:
        fail(f"the model was made for {model['n_ctx_train']} tokens; {longest} are too many")


def render(args, setup):
    """The files of all texts, each with whether it is a chat."""
    folders = [args.work / f"chat-{fingerprint(path)}-{fingerprint(args.model)}" for path in args.chat]
    return [*((path, False) for path in args.text),
            *((chat.render(setup, path, folder), True) for path, folder in zip(args.chat, folders))]


def plan(args, texts):
    """The measurements: groups of Quality, a group for each text and context, and Needles."""
    caches = [Cache(name) for name in [*args.baselines, *args.presets]]
    every = [F16, F16_NO_FLASH, *(cache for cache in caches if cache != F16)]
    groups = [[Quality(cache, text, n_ctx, args.chunks, is_chat) for cache in every]
              for text, is_chat in texts for n_ctx in args.context]
    needles = []
    if args.needle:
        needles = [Needles(cache, args.text[0], tuple(args.needle), args.needle_depths) for cache in every]
    return groups, needles


class Progress:
    """A part of the bar, which moves while it is measured and is full at its end, whatever was heard meanwhile."""

    def __init__(self, bar, total):
        self.bar, self.total, self.done = bar, total, 0

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not KeyboardInterrupt:
            self.reach(self.total)

    def reach(self, n):
        self.bar.update(max(0, n - self.done))
        self.done = max(n, self.done)

    def add(self, n):
        self.reach(self.done + n)


class Evaluation:
    def __init__(self, args, setup, model):
        self.setup, self.model, self.n_vocab = setup, model, model["n_vocab"]
        common = [setup.model, setup.plugin, version(setup)]
        self.work, self.fresh, self.failed = Work(args.work, common), args.fresh, []
        self.work.hold()
        self.references = References(args.work / "references", [setup.model, version(setup)], args.keep * 2**30)

    def stored(self, measurement):
        return None if self.fresh else self.work.load(measurement)

    def run(self, groups, needles):
        every = [measurement for group in groups for measurement in group] + needles
        missing = [m for m in every if self.stored(m) is None]
        if len(missing) < len(every):
            print(f"tq eval: {len(every) - len(missing)} of {len(every)} measurements are in {self.work.folder} already",
                  file=sys.stderr)
        wanted = set(missing)
        total = sum(m.tokens for m in missing)
        total += sum(group[0].tokens for group in groups if wanted & set(group) and not self.has_reference(group))
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not missing) as bar:
            for group in groups:
                self.run_group([m for m in group if m in wanted], bar)
            for m in needles:
                if m in wanted:
                    self.attempt(m, bar, lambda part, m=m: needle.measure(self.setup, m, part.add))

    def reference(self, group):
        return Reference(group[0].text, group[0].n_ctx, group[0].n_chunks, group[0].is_chat, machine())

    def has_reference(self, group):
        return not self.fresh and self.references.has(self.reference(group))

    def make_reference(self, group, bar):
        """The path of the group's file of logits."""
        def write(base):
            needed = quality.base_bytes(group[0], self.n_vocab)
            if shutil.disk_usage(base.parent).free < needed + SPARE_BYTES:
                fail(f"{self.work.folder} needs {needed >> 20} MiB for the logits of one window; free some, or name another "
                     "--work")
            bar.set_description(f"{group[0].text.stem} {group[0].n_ctx}: reference")
            with Progress(bar, group[0].tokens) as part:
                quality.write_base(self.setup, group[0], base, part.reach)
            if group[0].is_chat:
                chat.check_tokens(group[0].text, quality.base_tokens(base))

        reference = self.reference(group)
        if self.fresh:
            self.references.forget(reference)
        return self.references.get(reference, write)

    def run_group(self, group, bar):
        if not group:
            return
        try:
            base = self.make_reference(group, bar)
            for m in group:
                self.attempt(m, bar, lambda part, m=m: quality.measure(self.setup, m, base, on_tokens=part.reach))
        except LlamaError as error:
            bar.write(f"tq eval: {group[0].text.stem}, {group[0].n_ctx}: no reference: {error}", file=sys.stderr)
            self.failed += [{"name": f"{m.name}, {m.text.stem}, {m.n_ctx}", "error": str(error)} for m in group]
        finally:
            self.references.trim()

    def attempt(self, m, bar, measure):
        bar.set_description(f"{m.text.stem} {getattr(m, 'n_ctx', 'needles')}: {m.name}")
        with Progress(bar, m.tokens) as part:
            try:
                self.work.save(m, {**measure(part), "machine": machine()})
            except LlamaError as error:
                self.failed.append({"name": f"{m.name}, {m.text.stem}", "error": str(error)})
                bar.write(f"tq eval: {m.name} failed: {error}", file=sys.stderr)

    def rows(self, groups):
        for group in groups:
            results = [(m, self.work.load(m)) for m in group]
            f16_mib = next((figures["kv_mib"] for m, figures in results if m.cache == F16 and figures), None)
            for m, figures in results:
                if not figures:
                    continue
                bits = figures["bits_per_value"] or (16 * figures["kv_mib"] / f16_mib if f16_mib else None)
                kind = "floor" if m.cache in (F16, F16_NO_FLASH) else "stock" if m.cache.is_stock else "ours"
                yield {"name": m.name, "kind": kind, "text": m.text.stem, "n_ctx": m.n_ctx, "n_chunks": m.n_chunks, **figures,
                       "bits_per_value": bits}


def collect(args, evaluation, groups, needles):
    rows = list(evaluation.rows(groups))
    found = [(m, evaluation.work.load(m)) for m in needles]
    command = "tq eval " + " ".join(re.sub(r"(.*[\s*].*)", r"'\1'", str(word)) for word in args.words)
    return {"version": 1, "command": command.replace(str(ROOT) + "/", ""), "machine": machine(), "commit": commit(),
            "llama_cpp": version(evaluation.setup), "model": {**evaluation.model, "file": args.model.name}, "rows": rows,
            "needle": [{"name": m.name, **result} for m, result in found if result],
            "failed": evaluation.failed}


def run(args):
    outputs = {f"--{kind}": getattr(args, kind) for kind in KINDS}
    setup = make_setup(args, *args.chat)
    check_outputs(outputs, [args.model, *args.text, *args.chat])
    model = describe_model(setup)
    check(args, setup, model)
    evaluation = Evaluation(args, setup, model)
    groups, needles = plan(args, render(args, setup))
    evaluation.run(groups, needles)
    result = collect(args, evaluation, groups, needles)
    try:
        report.write_files(args, result)
        print(report.markdown(result), flush=True)
    except (LlamaError, OSError) as error:
        raise LlamaError(f"{error}; what was measured is in {args.work}, and the same command writes it") from error
    return 1 if evaluation.failed else 0


def what_is_left(args):
    return f"what was measured is in {args.work}, and the same command goes on from there"


def main(argv=None):
    return run_command("tq eval", parse_arguments, run, what_is_left, argv)


if __name__ == "__main__":
    sys.exit(main())
