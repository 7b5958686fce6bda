#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Speed on a CUDA device, beside torch's attention in BF16 on the same shapes in the same run.

Decode is timed as a CUDA graph of many calls, the median of several replays. Calls rotate over page tables (for torch: over
buffers) that together exceed the L2 cache; pages are drawn from the pool in random order. The baseline is the fastest of
torch's flash and cuDNN attention. Times of ours include rotation of queries and results and the combine of splits.

    cuda_attention.py --library build/release/libturboquant.so --csv out.csv [--only decode,encode,prefill]
"""
import argparse
import csv
import math
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cuda_device import Cache, Library

PAGE = 64
POOL_TOKENS = 524288  # of one layer: 553 MB at 4 bits
DECODE = [(1, 4096), (1, 32768), (1, 131072), (8, 32768), (16, 32768), (64, 8192)]
PAIRS = ["sq4", "sq3", "sq2", "sq8/sq4", "sq8", "sq8/tt4", "tt4", "tt3", "tt3/tt2", "tt2"]
TORCH = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def time_graph(calls, n_calls, replays=7):
    """Microseconds of one call: calls[i % len(calls)]() for i < n_calls in one graph."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n_calls):
            calls[i % len(calls)]()
    times = []
    for i in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) * 1000 / n_calls)
    return statistics.median(times)


def calls_for(n_sets, size):
    return max(n_sets, 8 if size > 100 << 20 else 24) // n_sets * n_sets


def torch_decode(n_seq, length, n_head, n_head_kv, head_dim):
    """{backend: us}; buffers rotate so that together they exceed 200 MB."""
    size = 2 * n_seq * length * n_head_kv * head_dim * 2
    n_sets = max(1, min(16, math.ceil((200 << 20) / size)))
    q = torch.randn(n_seq, n_head, 1, head_dim, dtype=torch.bfloat16, device="cuda")
    sets = [[torch.randn(n_seq, n_head_kv, length, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
            for _ in range(n_sets)]
    found = {}
    for name, backend in TORCH.items():
        try:
            with sdpa_kernel(backend):
                calls = [lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in sets]
                found[name] = time_graph(calls, calls_for(n_sets, size))
        except RuntimeError as error:
            print(f"torch {name} {n_seq}x{length}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def decode_calls(cache, n_seq, lens, n_head, deterministic, n_query=1):
    """Calls over disjoint page tables, and the bytes that one of them reads."""
    longest = max(lens)
    per_seq = math.ceil(longest / PAGE)
    n_sets = max(1, min(64, cache.store.n_pages // (per_seq * n_seq)))
    order = torch.randperm(cache.store.n_pages, device="cuda", dtype=torch.int32)
    order = order.repeat(math.ceil(n_sets * n_seq * per_seq / order.numel()))
    seq_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
    calls = []
    for i in range(n_sets):
        table = order[i * n_seq * per_seq:(i + 1) * n_seq * per_seq].view(n_seq, per_seq)
        q = torch.randn(n_seq * n_query, n_head, cache.store.head_dim, dtype=torch.bfloat16, device="cuda")
        params = cache.attend_params(q, torch.empty_like(q), table, seq_lens, longest, n_query, deterministic)
        calls.append(lambda params=params: cache.attend(params))
    n_bytes = sum(lens) * cache.sizes.page_bytes // PAGE
    return calls, n_bytes


def bench_decode(library, rows, quick, wanted):
    n_head_kv, shapes = 8, [(40, 128, DECODE)]
    if not quick:
        shapes += [(64, 128, [(8, 32768), (64, 8192)]), (40, 64, [(8, 32768), (64, 8192)])]
    baseline = {}
    for n_head, head_dim, sizes in shapes:
        for n_seq, length in sizes:
            found = torch_decode(n_seq, length, n_head, n_head_kv, head_dim)
            best = min(found.values())
            baseline[n_head, head_dim, n_seq, length] = best
            n_bytes = 4 * n_seq * length * n_head_kv * head_dim
            for name, us in found.items():
                rows.add("decode", f"torch {name} bf16", n_head, head_dim, f"{n_seq}x{length}", us, n_bytes, best)
    for n_head, head_dim, sizes in shapes:
        pairs = wanted if (n_head, head_dim) == (40, 128) else ["sq4", "sq8/sq4"] if head_dim == 64 else ["sq4", "sq3"]
        for pair in pairs:
            k, v = (pair.split("/") * 2)[:2]
            cache = Cache(library, k, v, head_dim, n_head_kv, PAGE, POOL_TOKENS // PAGE, 4, 64, 64)
            cache.fill()
            bare = Cache(library, k, v, head_dim, n_head_kv, PAGE, POOL_TOKENS // PAGE)
            bare.pages = cache.pages
            bare.store.pages = cache.store.pages
            variants = [("", bare, False)]
            if pair == "sq4" and n_head == 40 and head_dim == 128:
                variants += [(" deterministic", bare, True), (" 4 sinks, ring of 64", cache, False)]
            for n_seq, length in sizes:
                best = baseline[n_head, head_dim, n_seq, length]
                for suffix, used, deterministic in variants:
                    calls, n_bytes = decode_calls(used, n_seq, [length] * n_seq, n_head, deterministic)
                    us = time_graph(calls, calls_for(len(calls), n_bytes))
                    rows.add("decode", pair + suffix, n_head, head_dim, f"{n_seq}x{length}", us, n_bytes, best)
            if pair in ("sq4", "sq3") and n_head == 40 and head_dim == 128:
                generator = torch.Generator().manual_seed(1)
                lens = torch.randint(1024, 15361, (64,), generator=generator).tolist()
                calls, n_bytes = decode_calls(bare, 64, lens, n_head, False)
                us = time_graph(calls, calls_for(len(calls), n_bytes))
                best = baseline[40, 128, 64, 8192] * sum(lens) / (64 * 8192)  # torch has no ragged call; scaled by tokens
                rows.add("decode", pair + " ragged 1K-15K", n_head, head_dim, "64 ragged", us, n_bytes, best)
            del cache, bare, variants, calls, used
            torch.cuda.empty_cache()


def bench_encode(library, rows):
    """FP16 rows to pages; bytes are those of the input."""
    n_tok, n_head_kv, head_dim = 32768, 8, 128
    for name in ("sq8", "sq4", "sq3", "sq2", "tt4", "tt3", "tt2"):
        cache = Cache(library, name, name, head_dim, n_head_kv, PAGE, n_tok // PAGE)
        k, v = (torch.randn(n_tok, n_head_kv, head_dim, dtype=torch.float16, device="cuda") for _ in range(2))
        slots = torch.randperm(n_tok // PAGE, device="cuda")[:, None] * PAGE + torch.arange(PAGE, device="cuda")
        slots = slots.flatten()
        us = time_graph([lambda: cache.append(k, v, slots)], 4)
        rows.add("encode", name, n_head_kv, head_dim, f"{n_tok} tokens of a layer", us, 4 * n_tok * n_head_kv * head_dim, 0)


def bench_prefill(library, rows):
    """A chunk of 4096 queries at the end of 65536 tokens; "bytes" are operations: 4 per query row, visible column and
    dimension. torch attends without a mask, which is 3 % more of them."""
    n_query, length, n_head, n_head_kv, head_dim = 4096, 65536, 40, 8, 128
    operations = 4 * n_head * head_dim * n_query * (length - n_query // 2)
    q = torch.randn(1, n_head, n_query, head_dim, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, n_head_kv, length, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    found = {}
    for name, backend in TORCH.items():
        with sdpa_kernel(backend):
            found[name] = time_graph([lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)], 2, 3)
    for name, us in found.items():
        rows.add("prefill", f"torch {name} bf16", n_head, head_dim, "4096 of 65536", us, operations, min(found.values()))
    for pair in ("sq4", "sq3", "sq8/sq4", "tt4", "tt3"):
        names = (pair.split("/") * 2)[:2]
        cache = Cache(library, *names, head_dim, n_head_kv, PAGE, length // PAGE)
        cache.fill()
        table = torch.randperm(length // PAGE, device="cuda", dtype=torch.int32).view(1, -1)
        lens = torch.tensor([length], dtype=torch.int32, device="cuda")
        queries = torch.randn(n_query, n_head, head_dim, dtype=torch.bfloat16, device="cuda")
        params = cache.attend_params(queries, torch.empty_like(queries), table, lens, length, n_query)
        us = time_graph([lambda: cache.attend(params)], 2, 3)
        rows.add("prefill", pair, n_head, head_dim, "4096 of 65536", us, operations, min(found.values()))
        print(f"# workspace {params.workspace_bytes} bytes")


class Rows:
    HEADER = ["what", "kernel", "heads", "head_dim", "size", "us", "bytes", "tb_per_s", "ratio_to_best_torch"]

    def __init__(self):
        self.rows = []

    def add(self, what, kernel, heads, head_dim, size, us, n_bytes, best):
        ratio = f"{best / us:.3f}" if best else ""
        row = [what, kernel, heads, head_dim, size, f"{us:.2f}", n_bytes, f"{n_bytes / us * 1e-6:.3f}", ratio]
        self.rows.append(row)
        print(*row, sep=",", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, dest="path", help="libturboquant.so")
    parser.add_argument("--csv")
    parser.add_argument("--only", default="encode,prefill,decode")
    parser.add_argument("--quick", action="store_true", help="40 heads of 128 alone")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="formats of keys and values, as sq4 or sq8/sq4")
    arguments = parser.parse_args()
    library, rows = Library(arguments.path), Rows()
    info = library.describe()
    print(f"# {info.name.decode()}, driver {info.driver_version}, runtime {info.runtime_version}, torch {torch.__version__}")
    if "encode" in arguments.only:
        bench_encode(library, rows)
    if "prefill" in arguments.only:
        bench_prefill(library, rows)
    if "decode" in arguments.only:
        bench_decode(library, rows, arguments.quick, arguments.pairs.split(","))
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Rows.HEADER)
            writer.writerows(rows.rows)


if __name__ == "__main__":
    main()
