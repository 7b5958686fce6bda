#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""End-to-end speed: stock llama-bench on a real model, our devices beside the f16, q8_0 and q4_0 caches.

Configurations are interleaved round by round, so that a noisy machine hits all of them alike; the row gives the median over
rounds, the spread (min, max), and the ratio of medians to f16. One CSV row per (configuration, test, depth), each with the
command that made it, the commit and the machine.
"""
import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from measure import commit, machine  # noqa: E402

FIELDS = ["config", "test", "depth", "tokens_per_s", "min", "max", "rounds", "ratio_vs_f16", "command", "commit", "machine"]


OLD = " old"  # of a device, behind its name: that of the other build


def configurations(names, has_old):
    """name -> extra arguments of llama-bench."""
    out = {}
    for name in names:
        if name in ("f16", "q8_0", "q4_0"):
            out[name] = ["-ctk", name, "-ctv", name]
        else:
            out[name] = ["-dev", name, "-ngl", "99"]
            if has_old:
                out[name + OLD] = out[name]
    return out


def run_once(bench, args, plugin):
    """One run of llama-bench. The plug-in is loaded only for our devices, so that it can't serve a stock configuration."""
    env = {k: v for k, v in os.environ.items() if k != "GGML_BACKEND_PATH"}
    if "-dev" in args:
        env["GGML_BACKEND_PATH"] = plugin
    r = subprocess.run([bench] + args, capture_output=True, text=True, env=env)
    if r.returncode:
        sys.exit(f"speed: {' '.join([bench] + args)} failed:\n{r.stderr[-2000:]}")
    return json.loads(r.stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llama-bin", required=True, help="folder of the stock llama.cpp tools")
    p.add_argument("--plugin", required=True, help="libggml-turboquant.so")
    p.add_argument("--old-plugin", help="of another build, measured in turns with it: its devices are 'TQ4 old' and so on")
    p.add_argument("--model", required=True, help="a GGUF file")
    p.add_argument("--configs", default="f16,q8_0,q4_0,TQ6,TQ4,TQ3,TQ2")
    p.add_argument("--depths", default="0,1024,4096,8192")
    p.add_argument("--n-prompt", type=int, default=512)
    p.add_argument("--n-gen", type=int, default=32)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--once", default="", help="slow configurations, which are measured in the first round alone")
    p.add_argument("--csv", help="write the rows here")
    a = p.parse_args()

    bench = os.path.join(a.llama_bin, "llama-bench")
    configs = configurations(a.configs.split(","), a.old_plugin)
    samples, commands = {}, {}
    start = time.time()
    turns = [name for i_round in range(a.rounds) for name in configs if i_round == 0 or name not in a.once.split(",")]
    for done, name in enumerate(turns, 1):
        args = ["-m", a.model, "-t", str(a.threads), "-fa", "1", "-p", str(a.n_prompt), "-n", str(a.n_gen), "-d", a.depths,
                "-r", "1", "-o", "json"] + configs[name]
        for row in run_once(bench, args, a.old_plugin if name.endswith(OLD) else a.plugin):
            key = (name, "prefill" if row["n_prompt"] else "decode", row["n_depth"])
            samples.setdefault(key, []).append(row["avg_ts"])
        shown = ["-m", os.path.basename(a.model)] + args[2:]
        commands[name] = "llama-bench " + " ".join(shown)
        left = (time.time() - start) / done * (len(turns) - done)
        print(f"[{done}/{len(turns)}] {name}, about {left:.0f} s left", file=sys.stderr)

    rows = []
    for (name, test, depth), values in sorted(samples.items(), key=lambda kv: (kv[0][1], kv[0][2])):
        median = statistics.median(values)
        base = samples.get(("f16", test, depth))
        ratio = f"{median / statistics.median(base):.3f}" if base else ""
        rows.append(dict(config=name, test=test, depth=depth, tokens_per_s=f"{median:.1f}", min=f"{min(values):.1f}",
                         max=f"{max(values):.1f}", rounds=len(values), ratio_vs_f16=ratio, command=commands[name],
                         commit=commit(), machine=machine()))
    print(f"{'config':8} {'test':8} {'depth':>6} {'tokens/s':>9} {'min':>8} {'max':>8} {'vs f16':>7}")
    for r in rows:
        print(f"{r['config']:8} {r['test']:8} {r['depth']:6} {r['tokens_per_s']:>9} {r['min']:>8} {r['max']:>8} "
              f"{r['ratio_vs_f16']:>7}")
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            w = csv.DictWriter(f, FIELDS)
            w.writeheader()
            w.writerows(rows)
        print(f"wrote {a.csv}")


if __name__ == "__main__":
    main()
