#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The same queries, keys and values of a real model through the CPU and a CUDA device: are codes equal, how far is attention?

    parity.py dump MODEL --text FILE --out DUMP.npz [--n-tok 4096] [--layers 0,12,23] [--skip 5000]
    parity.py compare DUMP.npz --csv OUT.csv [--device emulated] [--presets TQ6,TQ4,TQ3,TQ2] [--dtype float16]

MODEL is a GGUF file or a folder of Hugging Face's; dumped are the rows that attention gets, in float16, and factors from the
weights. compare appends all but the last 65 tokens, attends with 64 in one call and with one in the next. It counts the bytes
of pages and exact tokens that differ, references and scales included. Attention of the last token is held against double
precision over what the CPU's cache decodes to: the largest difference, in parts of the outputs' root mean square. That of the
64, each of which sees its own newest tokens exact, against double precision over the rows themselves: the root mean square of
the difference, in the same parts. With --device emulated TQ_CUDA_LIBRARY is that of tests/cuda, in host memory.
"""
import argparse
import csv
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

os.environ |= {"HF_HUB_OFFLINE": "1"}
PRESETS = "TQ6,TQ4,TQ3,TQ2"
N_PROMPT = 64
COLUMNS = ["model", "device", "dtype", "preset", "n_tok", "layer", "differing_bytes", "bytes", "cpu_from_decoded",
           "device_from_decoded", "cpu_from_rows", "device_from_rows"]


def dump(args):
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from libturboquant.transformers import TurboQuantCache
    file = {"gguf_file": args.model.name} if args.model.suffix == ".gguf" else {}
    folder = args.model.parent if file else args.model
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).eval()
    text = args.text.read_text()[args.skip : args.skip + 8 * args.n_tok]
    tokens = torch.tensor([tokenizer.encode(text)[: args.n_tok]])
    layers, arrays = [int(layer) for layer in args.layers.split(",")], {}

    def record(module, query, key, value, *rest, **more):
        if module.layer_idx in layers:
            for name, rows in (("q", query), ("k", key), ("v", value)):
                arrays[f"{name}{layers.index(module.layer_idx)}"] = rows[0].numpy().astype(np.float16)
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    AttentionInterface.register("record", record)
    with torch.no_grad():
        model.set_attn_implementation("record")
        model.model(tokens)
        model.set_attn_implementation("turboquant")
        for preset in args.presets.split(","):
            cache = TurboQuantCache(config=model.config, preset=preset)
            model.model(tokens[:, :1], past_key_values=cache, use_cache=True)
            found = [cache.store.key_factors(layer) for layer in layers]
            arrays[preset] = np.stack([np.zeros((arrays["k0"].shape[0], arrays["k0"].shape[2]), np.int8) if one is None else one
                                       for one in found])
    about = {"model": args.model.name, "layers": layers, "n_tok": tokens.shape[1]}
    np.savez(args.out, about=json.dumps(about), **arrays)
    print(f"{args.out}: {about}")


def through_cpu(layers, options):
    """Of layers (q, k, v, factors): the cache, its sequence, and outputs, each float32 [N_PROMPT + 1, n_head, head_dim]."""
    import libturboquant
    n_head_kv, _, head_dim = layers[0][1].shape
    cache = libturboquant.Cache(len(layers), n_head_kv, head_dim, **options)
    seq, outs = cache.seq_create(), []
    for number, (q, k, v, factors) in enumerate(layers):
        q, k, v = (np.ascontiguousarray(rows.swapaxes(0, 1), np.float32) for rows in (q, k, v))
        cache.set_key_factors(number, factors)
        begin = len(k) - N_PROMPT - 1
        cache.append(seq, number, k[:begin], v[:begin])
        outs.append(np.concatenate([cache.prefill(seq, number, q[part], k[part], v[part])
                                    for part in (slice(begin, len(k) - 1), slice(len(k) - 1, len(k)))]))
    return cache, seq, outs


def through_device(layers, options, device, dtype):
    """As through_cpu, of which the cache is that of the device's file."""
    import libturboquant
    from libturboquant._torch_stores import DeviceStore
    from libturboquant._torch_rows import attend_rows
    n_head_kv, n_tok, head_dim = layers[0][1].shape
    store = DeviceStore(device, len(layers), n_head_kv, head_dim, **options)
    for number, (_, _, _, factors) in enumerate(layers):
        store.set_key_factors(number, factors)
    seqs, batch, outs = [store.seq_create()], libturboquant.Batch(store, 1), [[] for _ in layers]
    n_head, begin = layers[0][0].shape[0], n_tok - N_PROMPT - 1
    rows = [[torch.from_numpy(np.ascontiguousarray(x)).to(device, dtype)[None] for x in layer[:3]] for layer in layers]
    for first, last in ((0, begin), (begin, n_tok - 1), (n_tok - 1, n_tok)):
        batch.begin(seqs, [last - first], n_head)
        for number, of_layer in enumerate(rows):
            q, k, v = (x[:, :, first:last] for x in of_layer)
            out = attend_rows(batch, number, q, k, v, None, head_dim ** -.5, None, None)[0].float().cpu().numpy()
            if first > 0:
                outs[number].append(out)
        batch.end()
    host = libturboquant.Cache(len(layers), n_head_kv, head_dim, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sequence.tqs")
        store.save(path, seqs)
        seq, = host.load(path)
    return host, seq, [np.concatenate(parts) for parts in outs]


def content(cache, seq):
    stats = cache.stats()
    pages = np.zeros((-(-cache.length(seq) // cache.page_size), stats.page_bytes), np.uint8)
    exact = np.zeros(stats.exact_bytes, np.uint8)
    cache.seq_export(seq, 0, pages, exact)
    return np.concatenate([pages.ravel(), exact])


def attention(q, k, v):
    """Of the last queries [n_query, n_head, head_dim], in double precision; k, v [n_tok, n_head_kv, head_dim]."""
    n_query, n_head, head_dim = q.shape
    k, v = (rows.astype(np.float64).repeat(n_head // rows.shape[1], axis=1) for rows in (k, v))
    score = np.einsum("qhd,thd->hqt", q.astype(np.float64) * head_dim ** -.5, k)
    score[:, ~np.tri(n_query, len(k), len(k) - n_query, dtype=bool)] = -np.inf
    weight = np.exp(score - score.max(axis=2, keepdims=True))
    return np.einsum("hqt,thd->qhd", weight / weight.sum(axis=2, keepdims=True), v)


def rms(x):
    return np.sqrt((x ** 2).mean())


def compare(args):
    file = np.load(args.dump)
    about = json.loads(str(file["about"]))
    device, dtype = torch.device("cuda" if args.device == "cuda" else "cpu"), getattr(torch, args.dtype)

    def rounded(rows):
        """As the device gets them."""
        return torch.from_numpy(rows).to(dtype).float().numpy()

    folder = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    with open(args.csv, "w", newline="") as out:
        out.write(f"# bench/parity.py compare, {args.device}, commit {commit.stdout.strip() or args.commit}\n")
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        for preset in args.presets.split(","):
            n_layer = len(about["layers"])
            layers = [(*(rounded(file[f"{name}{i}"]) for name in "qkv"), file[preset][i]) for i in range(n_layer)]
            options = {"preset": preset, "page_size": 64}
            ours, seq, wanted = through_cpu(layers, options)
            theirs, their_seq, found = through_device(layers, options, device, dtype)
            differing = content(ours, seq) != content(theirs, their_seq)
            differing, n_bytes = int(differing.sum()), differing.size
            for number, layer in enumerate(about["layers"]):
                q, k, v = (rows.swapaxes(0, 1) for rows in layers[number][:3])
                last = attention(q[-1:], *ours.read(seq, number))[0]
                prompt = attention(q[-1 - N_PROMPT : -1], k[:-1], v[:-1])
                outs = (wanted[number], found[number])
                figures = [f"{abs(one[-1] - last).max() / rms(last):.2g}" for one in outs]
                figures += [f"{rms(one[:-1] - prompt) / rms(prompt):.4f}" for one in outs]
                writer.writerow([about["model"], args.device, args.dtype, preset, about["n_tok"], layer, differing, n_bytes,
                                 *figures])
                print(f"{preset} layer {layer}: {differing} of {n_bytes} bytes differ; from what is decoded: CPU {figures[0]}, "
                      f"device {figures[1]}; from the rows: CPU {figures[2]}, device {figures[3]}", flush=True)
            out.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("dump", help="run a model and keep what its attention gets")
    step.add_argument("model", type=Path)
    step.add_argument("--text", type=Path, required=True)
    step.add_argument("--out", type=Path, required=True)
    step.add_argument("--n-tok", type=int, default=4096)
    step.add_argument("--layers", default="0,12,23")
    step.add_argument("--skip", type=int, default=5000)
    step.add_argument("--presets", default=PRESETS)
    step.set_defaults(run=dump)
    step = steps.add_parser("compare", help="the CPU and a device")
    step.add_argument("dump", type=Path)
    step.add_argument("--csv", type=Path, required=True)
    step.add_argument("--device", choices=["emulated", "cuda"], default="emulated")
    step.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    step.add_argument("--presets", default=PRESETS)
    step.add_argument("--commit", default="", help="where this folder is no git repository")
    step.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
