#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
Decoding on a machine that has other work: each engine with its stock cache and with ours, in turns, while busy loops run, by
default four for each core. SmolLM2-135M; `make deps` gets the model. CSV: one row for each round and cache, with what the
system counted: seconds of processor time, and how often a thread waited (voluntary) or lost its core (involuntary).

    build/deps/torch-venv/bin/python bench/busy.py transformers --csv build/busy.csv [--context 1024] [--loops 8]
    build/deps/torch-venv/bin/python bench/busy.py mlx --csv build/busy-mlx.csv --context 256
    python3 bench/busy.py llama --llama-bin build/deps/llama-bin --plugin build/release/libggml-turboquant.so --csv build/b.csv

For Python's engines the package must be installed; or put python/ on PYTHONPATH and name build/release/libturboquant.so in
TURBOQUANT_LIBRARY. --loops 0 measures an idle machine.
"""
import argparse
import contextlib
import csv
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("scripts", "python/tests"):
    sys.path.insert(0, str(ROOT / folder))
from measure import commit, machine  # noqa: E402
from speed import configurations, run_once  # noqa: E402

FIELDS = ["engine", "context", "loops", "threads", "cache", "round", "tokens_per_s", "cpu_s_per_token", "voluntary_per_token",
          "involuntary_per_token", "commit", "machine"]


@contextlib.contextmanager
def busy_loops(n):
    """n processes that never wait. They end with this one, however it ends."""
    program = f"import os\nwhile os.getppid() == {os.getpid()}:\n    for _ in range(1000000): pass"
    loops = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def counted(decode, n_tok):
    """Run decode(n_tok); what that took, for each token."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    decode(n_tok)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"tokens_per_s": n_tok / seconds, "cpu_s_per_token": cpu / n_tok,
            "voluntary_per_token": (after.ru_nvcsw - before.ru_nvcsw) / n_tok,
            "involuntary_per_token": (after.ru_nivcsw - before.ru_nivcsw) / n_tok}


def open_transformers(args):
    """{cache: a function that decodes so many tokens more}"""
    import torch
    from smollm import load
    from transformers import DynamicCache

    from libturboquant.transformers import TurboQuantCache
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model, tokenizer = load()
    model.to(getattr(torch, args.dtype))
    text = (Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build/deps")) / "text/austen.txt").read_text()
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, : args.context]

    def open_cache(kind):
        cache = DynamicCache(config=model.config) if kind == "stock" else TurboQuantCache(preset=kind, config=model.config)

        def run(tokens):
            model.set_attn_implementation("sdpa" if kind == "stock" else "turboquant")
            return model(tokens, cache=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

        for part in prompt.split(256, dim=1):
            token = run(part)

        def decode(n_tok):
            nonlocal token
            for _ in range(n_tok):
                token = run(token)

        return decode

    return {kind: open_cache(kind) for kind in ("stock", args.preset)}


def open_mlx(args):
    import mlx.core as mx
    import mlx_lm
    import mlx_lm.models.cache as stock

    import libturboquant.mlx
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: PyTorch's threads shall not be here.
        subprocess.run([sys.executable, ROOT / "python/tests/smollm.py", folder, "256", "256"], check=True)
        model, tokenizer = mlx_lm.load(folder)
        mx.eval(model.parameters())
    text = (Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build/deps")) / "text/austen.txt").read_text()
    prompt = mx.array(tokenizer.encode(text[: 8 * args.context])[: args.context])[None]

    def open_cache(kind):
        cache = (stock.make_prompt_cache(model) if kind == "stock" else
                 libturboquant.mlx.make_prompt_cache(model, preset=kind, n_threads=args.threads))
        token = mx.argmax(model(prompt, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)

        def decode(n_tok):
            nonlocal token
            for _ in range(n_tok):
                token = mx.argmax(model(token, cache=cache), axis=-1)
                mx.eval(token)

        return decode

    return {kind: open_cache(kind) for kind in ("stock", args.preset)}


def measure_python(args):
    caches = (open_transformers if args.engine == "transformers" else open_mlx)(args)
    for decode in caches.values():
        decode(2)
    with busy_loops(args.loops):
        for i_round in range(args.rounds):
            for name in list(caches)[:: 1 if i_round % 2 else -1]:
                yield name, i_round, counted(caches[name], args.n_gen)


def measure_llama(args):
    tools, names = Path(args.llama_bin), {"f16": "stock", args.preset: args.preset}
    configs = configurations(names)
    with busy_loops(args.loops):
        for i_round in range(args.rounds):
            for name in list(configs)[:: 1 if i_round % 2 else -1]:
                command = ["-m", args.model, "-t", str(args.threads), "-fa", "1", "-p", "0", "-n", str(args.n_gen), "-d",
                           str(args.context), "-r", "1", "-o", "json"]
                found = run_once(str(tools / "llama-bench"), command + configs[name], args.plugin)
                yield names[name], i_round, {"tokens_per_s": found[0]["avg_ts"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["transformers", "mlx", "llama"])
    parser.add_argument("--csv")
    parser.add_argument("--preset", default="TQ4")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--loops", type=int, default=4 * os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--n-gen", type=int, default=8, help="tokens of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine, and of the cache")
    parser.add_argument("--dtype", default="float32", help="of the model in Transformers")
    parser.add_argument("--llama-bin", help="folder of the stock llama.cpp tools")
    parser.add_argument("--plugin", help="libggml-turboquant.so")
    parser.add_argument("--model", default=str(ROOT / "build/deps/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    args = parser.parse_args()
    common = {"engine": args.engine, "context": args.context, "loops": args.loops, "threads": args.threads,
              "commit": commit(), "machine": machine()}
    rows = []
    for name, i_round, found in (measure_llama if args.engine == "llama" else measure_python)(args):
        rows.append(common | {"cache": name, "round": i_round} | {key: f"{value:.4g}" for key, value in found.items()})
        print(*(rows[-1].get(field, "") for field in FIELDS[:-2]), file=sys.stderr)
    speeds = {name: [float(row["tokens_per_s"]) for row in rows if row["cache"] == name] for name in ("stock", args.preset)}
    for name, found in speeds.items():
        print(f"{name:8} {statistics.median(found):8.4g} tokens/s, {min(found):.4g} to {max(found):.4g}")
    by_round = [b / a for a, b in zip(*speeds.values())]
    medians = [statistics.median(found) for found in speeds.values()]
    print(f"ratio of medians {medians[1] / medians[0]:.3f}; of rounds: median {statistics.median(by_round):.3f}, "
          f"{min(by_round):.3f} to {max(by_round):.3f}")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
