#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Slots of stock llama-server: the time to restore one, our devices next to the f16 cache, by the server's own clock.

A slot's file goes back into the slot that it was saved from, which has read another text since (same); into one that nothing
was in (empty); and into one that has read another text (other). A swap is what the server does between two prompts of a slot
with --cache-ram: it saves one state and restores another. The servers take turns, round by round; a row has the median over
rounds, the spread, the ratio of medians to f16, and the median of what all threads of the server took (not of a swap).
"""
import argparse
import contextlib
import csv
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from eval.llama import Cache, Setup, commit, machine, running_server  # noqa: E402

FIELDS = ["config", "case", "tokens", "ms", "min", "max", "rounds", "ratio_vs_f16", "cpu_ms", "threads", "command", "commit",
          "machine"]


def children():
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


class Slots:
    """A server, the process that it runs in, and two prompts."""

    def __init__(self, server, process, prompts):
        self.server, self.process, self.prompts = server, process, prompts

    def cpu_ms(self):
        """What all threads have taken."""
        return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{self.process}/task").glob("*/schedstat")) / 1e6

    def read(self, prompt, slot):
        self.server.post("/completion", prompt=prompt, n_predict=1, id_slot=slot, cache_prompt=True, temperature=0)

    def save(self):
        """Returns the tokens of slot 0, which has read the first prompt."""
        self.read(self.prompts[0], 0)
        return self.server.post("/slots/0?action=save", filename="slot.bin")["n_saved"]

    def restore(self, slot):
        """(milliseconds by the clock, of all threads)"""
        begin = self.cpu_ms()
        reply = self.server.post(f"/slots/{slot}?action=restore", filename="slot.bin")
        return reply["timings"]["restore_ms"], self.cpu_ms() - begin

    def swap(self):
        """The milliseconds of the last swap, of the first prompt for the second."""
        self.read(self.prompts[1], -1)
        self.read(self.prompts[0], -1)
        return float(re.findall(r"prompt cache update took ([\d.]+) ms", self.server.read_log())[-1]), float("nan")

    def measure(self, i_round):
        """case -> times. Slot 1 + i_round has been empty until now."""
        self.read(self.prompts[1], 0)
        times = {"same": self.restore(0), "empty": self.restore(1 + i_round)}
        self.read(self.prompts[1], 1 + i_round)
        return {**times, "other": self.restore(1 + i_round)}


def tokens_of(server, text, n):
    """A prompt of n tokens."""
    return server.post("/tokenize", content=text)["tokens"][:n]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llama-bin", required=True, type=Path, help="folder of the stock llama.cpp tools")
    p.add_argument("--plugin", required=True, type=Path, help="libggml-turboquant.so")
    p.add_argument("--model", required=True, type=Path, help="a GGUF file")
    p.add_argument("--text", required=True, type=Path)
    p.add_argument("--configs", default="f16,TQ6,TQ4,TQ3,TQ2")
    p.add_argument("--tokens", type=int, default=520)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--csv", help="write the rows here")
    a = p.parse_args()

    setup, text = Setup(a.llama_bin, a.plugin, a.model, a.threads), a.text.read_text()
    n_slots, samples, commands = 1 + a.rounds, {}, {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        running = {}
        for i, name in enumerate(a.configs.split(",")):
            path = Path(folder) / str(i)
            path.mkdir()
            kinds = ("slots", n_slots, ["--cache-ram", "0", "--slot-save-path", path]), ("swap", 1, ["-lv", "4"])
            for case, n, more in kinds:
                arguments = ["-c", 2 * a.tokens * n, "-np", n, "--slots", *more]
                before = children()
                server = stack.enter_context(running_server(setup, Cache(name), list(map(str, arguments))))
                prompts = [tokens_of(server, text[start:start + 10 * a.tokens], a.tokens) for start in (20000, 60000)]
                running[name, case] = Slots(server, (children() - before).pop(), prompts)
                commands[name, case] = server.command.replace(str(path), "FOLDER")
        n_saved = {slots.save() for (_, case), slots in running.items() if case == "slots"}
        for i_round in range(a.rounds):
            for (name, case), slots in running.items():
                times = slots.measure(i_round) if case == "slots" else {"swap": slots.swap()}
                for kind, pair in times.items():
                    samples.setdefault((name, kind), []).append(pair)
                    commands[name, kind] = commands[name, case]
            print(f"round {i_round + 1} of {a.rounds}", file=sys.stderr)

    rows = []
    for (name, kind), pairs in samples.items():
        times, cpu = zip(*pairs)
        stock = [ms for ms, _ in samples.get(("f16", kind), pairs)]
        rows.append({"config": name, "case": kind, "tokens": max(n_saved), "ms": f"{statistics.median(times):.2f}",
                     "min": f"{min(times):.2f}", "max": f"{max(times):.2f}", "rounds": len(times),
                     "ratio_vs_f16": f"{statistics.median(times) / statistics.median(stock):.2f}",
                     "cpu_ms": "" if kind == "swap" else f"{statistics.median(cpu):.2f}", "threads": a.threads,
                     "command": commands[name, kind], "commit": commit(), "machine": machine()})
    for row in rows:
        print(" ".join(f"{row[field]:>8}" for field in FIELDS[:9]))
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
