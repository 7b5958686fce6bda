#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The plug-in's CUDA devices in stock llama.cpp on an NVIDIA GPU, next to llama.cpp's own f16, q8_0 and q4_0 caches there.

    llama_cuda.py --llama FOLDER --plugin libggml-turboquant.so --model model.gguf [model.gguf ...] --csv out.csv
                  [--devices CUDA0,TQ4-CUDA0,TQ3-CUDA0] [--only decode,prefill,kl,memory,server,soak] [--budget SECONDS]

The first of the devices is the stock caches'. FOLDER has llama.cpp's programs built with CUDA.

decode   llama-bench's tokens per second after each of --depths. Caches take turns in rounds, and a ratio is that to f16 of the
         same round.
prefill  the same of prompts of --prompts tokens
kl       divergence of next-token distributions from those with f16 on the same device, by llama-perplexity: in batches, and
         each token decoded by itself
memory   what a run with a full cache takes: the GPU's used memory (so nothing else may run on it), host memory, the cache by
         the log
server   llama-server with slots that share the cells, and clients at once: how many answers are those that f16 gives to one
         client, passwords that get into another client's answer, tokens per second
soak     many requests, and memory after the first of them and after the last

Each row of the CSV is one figure, and is written as soon as it is known. A file that exists is added to: rows of the same part,
model, cache, size and figure are replaced. A program that fails leaves a row "failed" with its reason, and the rest is
measured.

Without a GPU the script can be tried: --devices none,TQ4,TQ3 with the plug-in and programs for the CPU, and small sizes.
"""
import argparse
import contextlib
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from eval import llama, quality  # noqa: E402
from eval.llama import F16, Cache, LlamaError, Setup, kv_memory, run_command, running_server, tool_command  # noqa: E402

from llama_clients import agreement, answers, ask_all, make_prompts, resident_mib, traffic  # noqa: E402
from rows import read_rows  # noqa: E402

COLUMNS = ["part", "model", "cache", "size", "figure", "value", "min", "max", "rounds", "ratio_to_f16", "ratio_min",
           "ratio_max", "error", "command", "commit", "machine"]
KL_FIGURES = ("kld_mean", "kld_mean_error", "kld_99_9", "same_top_1", "ppl_ratio", "kv_mib", "bits_per_value")
FAILED = "failed"
SIZES = {"decode": "n_depth", "prefill": "n_prompt"}  # what llama-bench calls the size of a part
# Lines of a log that tell why, and are no information (" I ").
REASON = re.compile(r"^(?!.* I ).*(?:error|turboquant: |assert|abort|failed|unable|out of memory)", re.IGNORECASE)


class Step(NamedTuple):
    """What is measured at once."""
    part: str
    model: str
    cache: str
    size: object = ""


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def smi(query, gpu):
    """What nvidia-smi tells; None without it."""
    command = ["nvidia-smi", "-i", gpu, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def used_mib(gpu):
    used = smi("memory.used", gpu)
    return None if used is None else float(used)


def reason(error):
    """What ended, and the line of its log that says most. An error of a program begins with 'what happened: command'."""
    head, *log = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    if not log:
        return head
    told = next((line for line in reversed(log) if REASON.search(line)), log[-1])
    return f"{head.partition(': ')[0]}: {told}"[:300]


def shorten(text, paths):
    """Files by their names: where they lie on a machine says nothing."""
    folders = {str(folder).removeprefix(f"{ROOT}/") for path in paths for folder in (path.parent, path.resolve().parent)}
    for folder in sorted(folders, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(folder)}/", "", text.replace(f"{ROOT}/", ""))
    return text


class Watch:
    """Looks at a run again and again: ends it when it takes too long, and takes the peak of the GPU's memory."""

    def __init__(self, seconds, gpu=None):
        self.seconds, self.gpu = seconds, gpu
        self.end = time.monotonic() + seconds
        self.peak = 0

    def __call__(self, _):
        if time.monotonic() > self.end:
            raise LlamaError(f"took longer than {self.seconds:.0f} s")
        if self.gpu is not None:
            self.peak = max(self.peak, used_mib(self.gpu) or 0)


class Table:
    """The CSV's rows, by what they are of."""

    def __init__(self, path, common):
        self.path, self.common = path, common
        self.rows = {self.key(row): row for row in read_rows(path)} if path else {}
        self.new = []

    @staticmethod
    def key(row):
        return tuple(str(row[column]) for column in (*Step._fields, "figure"))

    def put(self, step, figure, value="", **more):
        number = f"{value:.6g}" if isinstance(value, float) else value
        row = {**dict.fromkeys(COLUMNS, ""), **step._asdict(), "figure": figure, "value": number, **more, **self.common}
        self.rows[self.key(row)] = row
        self.new = [key for key in self.new if key != self.key(row)] + [self.key(row)]
        self.write()

    def remove_failure(self, step):
        self.rows.pop(self.key({**step._asdict(), "figure": FAILED}), None)

    def write(self):
        if self.path:
            with open(self.path, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows.values())

    def show(self):
        """What this call has found."""
        for key in self.new:
            row = self.rows[key]
            ratio = f" {row['ratio_to_f16']} of f16" if row["ratio_to_f16"] else ""
            print(*(part for part in key if part), f"{row['value']}{ratio}{row['error']}")


class Bench:
    def __init__(self, args):
        self.args, self.begin = args, time.monotonic()
        self.devices = args.devices.split(",")
        self.caches = caches_of(args)
        self.files = [args.llama / "llama-bench", args.plugin, args.text, *args.model]
        if args.dry_run:
            self.table = Table(None, {})
            return
        gpu = smi("name,driver_version", args.gpu)
        setup = Setup(args.llama, args.plugin, args.model[0], args.threads)
        version = llama.version(setup).removeprefix("version: ").partition(" built with")[0]
        machine = "; ".join(filter(None, [gpu and gpu.replace(", ", ", driver "), llama.machine(), f"llama.cpp {version}"]))
        self.table = Table(args.csv, {"commit": args.commit or llama.commit(), "machine": machine})

    def load(self, path):
        """The next steps are of this model."""
        self.model = path.stem
        self.setup = Setup(self.args.llama, self.args.plugin, path, self.args.threads, self.devices[0])

    def step(self, part, cache, size=""):
        return Step(part, self.model, cache.name, size)

    def shown(self, command, cache):
        return shorten(llama.shown(command, cache.variables(self.setup)), self.files)

    def attempt(self, step, command, measure):
        """What measure() returns; None if it fails, if there is no time for it, or if commands are only shown."""
        if self.args.dry_run:
            print(command)
            return None
        label, seconds = " ".join(str(part) for part in step if part != ""), time.monotonic() - self.begin
        if seconds > self.args.budget:
            say(f"[{seconds:.0f} s] {label}: not measured, the time is over")
            return None
        say(f"[{seconds:.0f} s] {label}")
        self.table.remove_failure(step)
        try:
            return measure()
        except Exception as error:  # whatever it is, the rest can be measured
            why = shorten(reason(error), self.files)
            say(f"    failed: {why}")
            self.table.put(step, FAILED, error=why, command=command)
            return None

    def run(self, cache, command, watch):
        return run_command(self.setup, command, cache.variables(self.setup), on_step=watch)

    def put_all(self, step, figures, command):
        for figure, value in figures.items():
            if value is not None:
                self.table.put(step, figure, value, command=command)


def caches_of(args):
    """f16 first, other stock types, the plug-in's devices, then one of those again with other options."""
    _, *ours = args.devices.split(",")
    found = [F16, *(Cache(name) for name in args.stock.split(",") if name not in ("", "f16")), *map(Cache, ours)]
    if ours:
        scalar = next((name for name in ours if name.startswith("TQ4")), ours[0])
        found += [Cache(f"{scalar}:{options}") for options in args.options]
    return found


def parse_bench(text, size):
    """{size: tokens per second} of llama-bench's lines. A program that crashed may have left a part of one."""
    found = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row[size]] = row["avg_ts"]
    return found


def speed_rows(samples):
    """(cache, size, columns) of {cache: {size: {round: tokens per second}}}."""
    for cache, sizes in samples.items():
        for size, rounds in sizes.items():
            stock = samples[F16.name].get(size, {})
            ratios = [value / stock[i] for i, value in rounds.items() if i in stock]
            spread = {"ratio_to_f16": f"{statistics.median(ratios):.3f}", "ratio_min": f"{min(ratios):.3f}",
                      "ratio_max": f"{max(ratios):.3f}"} if ratios else {}
            values = rounds.values()
            yield cache, size, {"value": statistics.median(values), "min": f"{min(values):.6g}", "max": f"{max(values):.6g}",
                                "rounds": len(values), **spread}


def measure_speed(bench, part):
    args = bench.args
    # A short prompt takes less time than loading the model: so it is repeated.
    what = {"decode": ["-p", "0", "-n", args.n_gen, "-d", args.depths, "-r", "1"],
            "prefill": ["-p", args.prompts, "-n", "0", "-r", "5"]}[part]
    samples = {cache.name: {} for cache in bench.caches}
    commands, broken = {}, set()
    for i in range(args.rounds):
        # Every other round backwards, so that a machine that gets warmer is no cache's disadvantage.
        for cache in bench.caches[::-1] if i % 2 else bench.caches:
            if cache in broken:
                continue
            command = tool_command(bench.setup, cache, "bench", [*what, "-o", "jsonl"])
            commands[cache.name] = bench.shown(command, cache)

            def measure():
                done = bench.run(cache, command, Watch(args.timeout))
                for size, value in parse_bench(done.output, SIZES[part]).items():
                    samples[cache.name].setdefault(size, {})[i] = value
                if done.status:
                    raise done.fail(f"ended with {done.status}")
                return done

            if not bench.attempt(bench.step(part, cache), commands[cache.name], measure):
                broken.add(cache)
        for name, size, columns in speed_rows(samples):
            bench.table.put(Step(part, bench.model, name, size), "tokens_per_s", command=commands[name], **columns)


def measure_kl(bench, part):
    args = bench.args
    kinds = [("", args.kl_context, args.kl_chunks, quality.BATCH), (" one by one", args.kl_single, 1, 1)]
    for kind, n_ctx, n_chunks, batch in kinds:
        if not n_ctx:
            continue
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            base, size = Path(work) / "logits.kld", f"{n_ctx}{kind}"
            wanted = quality.Quality(F16, args.text, n_ctx, n_chunks)
            command = tool_command(bench.setup, F16, "perplexity", quality.base_arguments(wanted, base))
            bench.attempt(Step(part, bench.model, "f16's logits", size), shorten(bench.shown(command, F16), [base]), lambda:
                          quality.write_base(bench.setup, wanted, base, Watch(args.timeout)))
            if not base.exists() and not args.dry_run:
                continue
            for cache in bench.caches:
                wanted = quality.Quality(cache, args.text, n_ctx, n_chunks, most_at_once=batch)
                command = tool_command(bench.setup, cache, "perplexity", quality.measure_arguments(wanted, base))
                command, step = shorten(bench.shown(command, cache), [base]), bench.step(part, cache, size)
                figures = bench.attempt(step, command, lambda: quality.measure(bench.setup, wanted, base,
                                                                               on_tokens=Watch(args.timeout)))
                bench.put_all(step, {name: figures[name] for name in KL_FIGURES if name in figures} if figures else {}, command)


def measure_memory(bench, part):
    args = bench.args
    for n_ctx in map(int, args.memory_contexts.split(",")):
        for cache in bench.caches:
            # Every cell is written. -v: the log has the cache's size.
            words = ["-p", "0", "-n", "1", "-d", n_ctx, "-r", "1", "--no-warmup", "-v"]
            command = tool_command(bench.setup, cache, "bench", words)

            def measure():
                before, watch = used_mib(args.gpu), Watch(args.timeout, args.gpu)
                done = bench.run(cache, command, watch)
                if done.status:
                    raise done.fail(f"ended with {done.status}")
                kv_mib, bits = kv_memory(done)
                return {"used_mib": None if before is None else watch.peak - before, "kv_mib": kv_mib, "bits_per_value": bits,
                        "host_mib": done.peak_rss / 2**20}

            step = bench.step(part, cache, n_ctx)
            bench.put_all(step, bench.attempt(step, bench.shown(command, cache), measure) or {}, bench.shown(command, cache))


def server_arguments(args):
    return ["-c", args.server_context, "-np", args.slots, "--no-kv-unified" if args.own_cells else "-kvu"]


def server_size(args, n_clients):
    return f"{n_clients} client{'s' * (n_clients > 1)}{', own cells' if args.own_cells else ''}"


@contextlib.contextmanager
def serving(bench, cache):
    """A server that is killed when it takes too long, so that its clients get an error in place of no answer."""
    with running_server(bench.setup, cache, server_arguments(bench.args)) as server:
        timer = threading.Timer(bench.args.timeout, os.kill, (server.pid, signal.SIGKILL))
        timer.start()
        try:
            yield server
        except LlamaError as error:
            if timer.finished.is_set():
                raise LlamaError(f"took longer than {bench.args.timeout:.0f} s") from error
            raise LlamaError(f"{error}\n{server.read_log()[-5000:]}") from error
        finally:
            timer.cancel()


def server_prompts(args, n, seed):
    # A character is at most a token: prompts of all slots take at most half of the cells.
    return make_prompts(args.text.read_text(errors="replace"), n, args.server_context // args.slots // 2, seed)


def measure_server(bench, part):
    args = bench.args
    prompts = server_prompts(args, args.requests, seed=1)
    reference = []

    def measure(cache, n_clients):
        with serving(bench, cache) as server:
            replies, seconds = ask_all(server, prompts, n_clients, args.n_predict)
            figures = traffic(prompts, replies, seconds)
            return answers(replies), {**figures, "errors_logged": server.read_log().count("E turboquant")}

    def command(cache):
        return bench.shown(llama.server_command(bench.setup, cache, server_arguments(args)), cache)

    for i, (cache, n_clients) in enumerate([(F16, 1), *((cache, args.clients) for cache in bench.caches)]):
        step = bench.step(part, cache, server_size(args, n_clients))
        texts, figures = bench.attempt(step, command(cache), lambda: measure(cache, n_clients)) or ([], {})
        if i == 0:
            reference = texts
        figures = {**figures, **agreement(texts, reference)}
        bench.put_all(step, figures, command(cache))


def measure_soak(bench, part):
    args = bench.args
    prompts = server_prompts(args, args.soak_requests, seed=2)
    n_first = min(2 * args.clients, len(prompts) // 2)

    def memory(server, when):
        return {f"used_mib_{when}": used_mib(args.gpu), f"host_mib_{when}": resident_mib(server.pid)}

    def measure(cache):
        with serving(bench, cache) as server:
            first, seconds = ask_all(server, prompts[:n_first], args.clients, args.n_predict)
            figures = memory(server, "first")
            others, more_seconds = ask_all(server, prompts[n_first:], args.clients, args.n_predict)
            figures |= traffic(prompts, first + others, seconds + more_seconds)
            return {**figures, **memory(server, "last"), "errors_logged": server.read_log().count("E turboquant")}

    for cache in (cache for cache in bench.caches if cache == F16 or not cache.is_stock):
        step = bench.step(part, cache, server_size(args, args.clients))
        command = bench.shown(llama.server_command(bench.setup, cache, server_arguments(args)), cache)
        bench.put_all(step, bench.attempt(step, command, lambda: measure(cache)) or {}, command)


PARTS = {"decode": measure_speed, "prefill": measure_speed, "kl": measure_kl, "memory": measure_memory,
         "server": measure_server, "soak": measure_soak}
TEXT_PARTS = {"kl", "server", "soak"}


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--plugin", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, nargs="+")
    parser.add_argument("--text", type=Path, default=ROOT / "build/deps/text/austen.txt")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--devices", default="CUDA0,TQ6-CUDA0,TQ4-CUDA0,TQ3-CUDA0,TQ2-CUDA0",
                        help="the stock caches' (none: the CPU), then the plug-in's")
    parser.add_argument("--stock", default="f16,q8_0,q4_0", help="stock caches; f16 is always one")
    parser.add_argument("--options", nargs="*", default=["k=sq4,v=sq4"], metavar="TQ_GGML",
                        help="options for more caches, on TQ4's device")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="nothing new begins after them")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="of one run")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--gpu", default="0", help="nvidia-smi's number of the device")
    parser.add_argument("--work", type=Path, help="a folder for logits, 250 KB a token of 128 thousand words")
    parser.add_argument("--commit", help="where git does not tell")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--rounds", type=int, default=3, help="of decode and prefill")
    parser.add_argument("--depths", default="0,8192,32768,65536")
    parser.add_argument("--n-gen", type=int, default=64)
    parser.add_argument("--prompts", default="512,4096", help="tokens, of prefill")
    parser.add_argument("--kl-context", type=int, default=4096)
    parser.add_argument("--kl-chunks", type=int, default=2)
    parser.add_argument("--kl-single", type=int, default=512,
                        help="the window of tokens that are decoded one by one, at least 256; 0: none")
    parser.add_argument("--memory-contexts", default="32768")
    parser.add_argument("--server-context", type=int, default=32768)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--own-cells", action="store_true", help="each slot has cells of its own, --server-context / --slots")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--n-predict", type=int, default=48)
    parser.add_argument("--soak-requests", type=int, default=300)
    args = parser.parse_args(words)
    args.only = args.only.split(",")
    unknown = [name for name in args.only if name not in PARTS]
    if unknown:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(PARTS)}")
    text = [args.text] if TEXT_PARTS & set(args.only) else []
    for path in (args.llama, args.plugin, *text, *args.model):
        if not path.exists():
            parser.error(f"{path} does not exist")
    return args


def main():
    args = parse_arguments()
    os.environ["GGML_NO_BACKTRACE"] = "1"  # which is longer than the part of a log that errors have
    bench = Bench(args)
    for path in args.model:
        bench.load(path)
        for part in args.only:
            PARTS[part](bench, part)
    bench.table.show()
    return any(key[-1] == FAILED for key in bench.table.new)


if __name__ == "__main__":
    sys.exit(main())
