#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the README promises, on the real model with 4096 tokens of real text, by stock llama-perplexity: KL divergence against
the FP16 cache beside stock q8_0 and q4_0, and memory.

What the stock configurations give is kept in TQ_TINY_DIR, beside the logits that all are compared with, because it does not
depend on this project; it is measured anew when llama.cpp, the model or the text changes.
"""
import json
import os
import re
import unittest

import common

CONTEXT = 4096
TEXT = common.path_from_env("TQ_TEXT")
BASE = common.TINY_DIR / "quality.logits"
STOCK = common.TINY_DIR / "quality.json"
MIB = 1024.0


def perplexity(*arguments, plugin=False, options=None):
    """Run stock llama-perplexity; returns (output, peak resident MiB)."""
    command = [common.LLAMA_BIN / "llama-perplexity", "-m", common.MODEL, "-f", TEXT, "-c", CONTEXT, "-b", 512, "--chunks", 1,
               "-fa", "on", "-t", common.THREADS, "-lv", 4, "--kl-divergence-base", BASE, *arguments]
    env = common.environment(TQ_GGML=options) if plugin else common.environment(GGML_BACKEND_PATH=None)
    log = BASE.with_suffix(".log")
    with open(log, "wb") as out:
        pid = os.posix_spawn(str(command[0]), [str(c) for c in command], env,
                             file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, out.fileno(), 2)])
        _, status, usage = os.wait4(pid, 0)
    text = log.read_text(errors="replace")
    log.unlink()
    if status:
        raise AssertionError(f"{' '.join(map(str, command))} ended with {status}:\n{text[-4000:]}")
    return text, usage.ru_maxrss / MIB


def measure(*arguments, plugin=False, options=None):
    for _ in range(3):  # the tool may drop the end of its log
        text, rss = perplexity("--kl-divergence", *arguments, plugin=plugin, options=options)
        if "Same top p" in text:
            break
    kld, error = re.search(r"Mean\s+KLD:\s+(\S+) ±\s+(\S+)", text).groups()
    cache = sum(float(mib) for mib in re.findall(r"KV buffer size =\s+([\d.]+) MiB", text)[-1:])
    return {"kld": float(kld), "error": float(error), "rss": rss, "cache": cache}


def identity():
    """What the stock figures depend on."""
    paths = [common.LLAMA_BIN / "llama-perplexity", common.MODEL, TEXT]
    return [[path.name, path.stat().st_size, int(path.stat().st_mtime)] for path in paths]


def stock_results():
    if STOCK.exists() and BASE.exists():
        kept = json.loads(STOCK.read_text())
        if kept["identity"] == identity():
            return kept
    perplexity()
    kept = {"identity": identity()}
    for name in ("f16", "q8_0", "q4_0"):
        kept[name] = measure("-ctk", name, "-ctv", name)
    STOCK.write_text(json.dumps(kept, indent=1))
    return kept


class Quality(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stock = stock_results()
        cls.ours = {name: cls.measure_ours(name) for name in ("TQ6", "TQ4", "TQ3")}
        bare = "recent=0,sinks=0,ref=0,balance=off"
        cls.trellis = cls.measure_ours("TQ4", bare)
        cls.scalar = cls.measure_ours("TQ4", f"k=tq4,v=tq4,{bare}")
        for name, row in [*cls.stock.items(), *cls.ours.items(), ("trellis", cls.trellis), ("scalar", cls.scalar)]:
            print(name, row)

    @staticmethod
    def measure_ours(name, options=None):
        return measure("-dev", name, "-ngl", 99, plugin=True, options=options)

    def test_6_bits_no_worse_than_q8_0(self):
        ours, stock = self.ours["TQ6"], self.stock["q8_0"]
        # The same tokens, so the two errors are no independent ones; one of them is the least that can be told apart.
        self.assertLessEqual(ours["kld"], stock["kld"] + stock["error"])

    def test_4_and_3_bits_far_below_q4_0(self):
        self.assertLess(self.ours["TQ4"]["kld"], self.stock["q4_0"]["kld"] / 8)
        self.assertLess(self.ours["TQ3"]["kld"], self.stock["q4_0"]["kld"] / 4)

    def test_trellis_alone_loses_less_at_the_same_bytes(self):
        self.assertEqual(self.trellis["cache"], self.scalar["cache"])
        self.assertLess(self.trellis["kld"], 0.65 * self.scalar["kld"])

    def test_formats_are_lossy_and_ordered(self):
        """A cache that silently stayed FP16 would pass the tests above."""
        f16, six, three = self.stock["f16"], self.ours["TQ6"], self.ours["TQ3"]
        self.assertGreater(six["kld"], 3 * f16["kld"] + 3 * six["error"])
        self.assertGreater(three["kld"], 1.5 * six["kld"])

    def test_memory_falls_by_what_the_table_says(self):
        f16 = self.stock["f16"]
        for name, row in self.ours.items():
            with self.subTest(name):
                self.assertLess(row["cache"], f16["cache"])
                saved, promised = f16["rss"] - row["rss"], f16["cache"] - row["cache"]
                self.assertAlmostEqual(saved, promised, delta=0.05 * f16["cache"])


if __name__ == "__main__":
    common.main()
