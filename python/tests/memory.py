# SPDX-License-Identifier: MIT
"""
What a process grows by while SmolLM2 takes a text into a cache, the stock one or ours; a process for each. Linux.

    python memory.py transformers FOLDER stock|PRESET
    python memory.py mlx FOLDER stock|PRESET CONTEXT

FOLDER has the model as the framework wants it. MLX multiplies too slowly on the CPU to read so long a text, so CONTEXT has the
keys and values that Transformers made of it (`python smollm.py`), which reach the cache as a layer's own would.
"""
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import smollm

N_TOK, PART = 2048, 128  # small parts, so that passes need little for themselves


def mib(file, name):
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def grown(warm_up, fill):
    """MiB that the process holds more at fill()'s peak than before it, and after it; and its result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    warm_up()  # what the first pass loads and keeps
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    peak, steady = mib("status", "VmHWM"), mib("smaps_rollup", "Rss")
    result = fill()
    gc.collect()
    return {"peak": mib("status", "VmHWM") - peak, "steady": mib("smaps_rollup", "Rss") - steady}, result


def in_transformers(folder, kind):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from libturboquant.transformers import TurboQuantCache
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa" if kind == "stock" else "turboquant")
    tokens = torch.tensor([smollm.novel(AutoTokenizer.from_pretrained(folder), N_TOK)])

    def make_cache():
        return DynamicCache(config=model.config) if kind == "stock" else TurboQuantCache(preset=kind, config=model.config)

    def fill():
        for part in tokens.split(PART, dim=1):
            logits = model(part, cache=cache, logits_to_keep=1).logits
        return int(logits.argmax())

    cache = make_cache()
    found, following = grown(lambda: model(tokens[:, :PART], cache=make_cache(), logits_to_keep=1), fill)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) if kind == "stock" else cache.nbytes
    return found | {"held": held / 2**20, "following": following}


def in_mlx(folder, kind, context):
    import mlx.core as mx
    import mlx_lm
    import mlx_lm.models.cache as stock
    import numpy as np

    import libturboquant.mlx
    mx.set_cache_limit(0)  # nothing that was freed stays
    model, tokenizer = mlx_lm.load(folder)
    n_head_kv, head_dim = model.args.num_key_value_heads, model.args.hidden_size // model.args.num_attention_heads
    shape = (2, 1, n_head_kv, PART, head_dim)

    def make_cache():
        if kind == "stock":
            return stock.make_prompt_cache(model)
        # Keys come without the modules that made them. The tables of pools for a million tokens a layer, the default, take more
        # than these few tokens; what the warm-up gives back of its own would hide them.
        return libturboquant.mlx.make_prompt_cache(model, kind, factors="off", max_tok=4 * N_TOK * len(model.layers))

    def following(token, cache):
        return int(mx.argmax(model(mx.array([[token]]), cache=cache)))

    def fill():
        with open(context, "rb") as file:
            for _ in range(N_TOK // PART):
                for layer in cache:
                    k, v = map(mx.array, np.fromfile(file, np.float32, math.prod(shape)).reshape(shape))
                    keys, values = layer.update_and_fetch(k, v)
                    if kind != "stock":  # which appends when queries come
                        queries = mx.zeros(k.shape)
                        libturboquant.mlx.scaled_dot_product_attention(queries, keys, values, layer, 1.0, "causal")
                    else:
                        mx.eval(layer.state)

    def warm_up():
        following(1, make_cache())
        mx.reset_peak_memory()

    cache, before = make_cache(), mx.get_active_memory()
    found, _ = grown(warm_up, fill)
    found["mlx_peak"] = (mx.get_peak_memory() - before) / 2**20
    if kind == "stock":
        found["held"] = sum(layer.nbytes for layer in cache) / 2**20
    else:  # with the pools' tables, which no single layer counts
        found["held"] = sum(layer._sequences[0].store.stats().allocated_bytes for layer in cache) / 2**20
    return found | {"following": following(smollm.novel(tokenizer, N_TOK + 1)[-1], cache)}


def measure(*arguments):
    """What a process of its own finds with these arguments."""
    # Large arrays get mappings of their own, so that what is freed goes back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(arguments[2], {name: round(value, 1) for name, value in found.items()})
    return found


def check(plain, compressed, copies=0):
    """
    Does what the process holds fall by what the cache holds less, within 10 %? Its peak falls by up to `copies` MiB more, which
    the stock attention makes for itself.
    """
    assert plain["held"] == N_TOK * 2 * 30 * 3 * 64 * 4 / 2**20  # of SmolLM2, in float32
    saved = plain["held"] - compressed["held"]
    assert .9 * saved < plain["steady"] - compressed["steady"] < 1.1 * saved
    assert .9 * saved < plain["peak"] - compressed["peak"] < 1.1 * saved + copies
    # Both hold the same text.
    assert plain["following"] == compressed["following"]


if __name__ == "__main__":
    print(json.dumps({"transformers": in_transformers, "mlx": in_mlx}[sys.argv[1]](*sys.argv[2:])))
