#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
Whole models on one GPU, decoding at long context with a BF16 cache and with ours: tokens/s, the cache's memory by the
allocator's peak, and the longest context that the card holds.

The models are Qwen2.5-32B and Qwen2.5-7B by their configurations, with random BF16 weights: neither speed nor memory depends on
the values. Contexts are filled with random keys and values, not by prefill. Each step runs as a CUDA graph, so that the host
does not count; replays of all caches take turns, and the median is reported. The baseline is a preallocated BF16 cache, of
which torch's attention reads exactly the tokens that there are, by its flash or its cuDNN kernels, whichever is faster.

"decode" is Transformers' model as it is. Its norms, rotations and activations are dozens of small kernels, which take as long
beside either cache; "decode, compiled" has them fused by torch.compile, for all caches alike.

    headline.py --csv out.csv --json out.json [--only 32b,7b,longest] [--caches TQ3,sq4/sq3,sq3/sq3] [--modes decode,compiled]
                [--profile kernels.csv]

On PYTHONPATH: python; TURBOQUANT_LIBRARY and TQ_CUDA_LIBRARY name the libraries. --tiny tries the script itself, with a small
model on the CPU and an emulated device as TQ_CUDA_LIBRARY: its numbers mean nothing.
"""
import argparse
import contextlib
import csv
import gc
import inspect
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import transformers.models.qwen2.modeling_qwen2 as qwen2
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

import libturboquant.transformers
from libturboquant.cache import Batch
from libturboquant._torch_rows import attend_rows
from libturboquant.transformers import TurboQuantCache

COMMON = {"max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
          "use_sliding_window": False, "vocab_size": 152064}
MODELS = {
    "32b": ("Qwen2.5-32B", COMMON | {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40,
                                     "num_key_value_heads": 8, "intermediate_size": 27648}),
    "7b": ("Qwen2.5-7B", COMMON | {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
                                   "num_key_value_heads": 4, "intermediate_size": 18944}),
}
TINY = COMMON | {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                 "intermediate_size": 128, "vocab_size": 256}
# Batch and context.
SIZES = {"32b": [(1, 4096), (1, 16384), (1, 32768)], "7b": [(1, 32768), (8, 32768), (16, 32768)]}
TINY_SIZES = {"32b": [(1, 200)], "7b": [(2, 130)]}
CONTEXT_STEP, TINY_CONTEXT_STEP = 4096, 64
ROOM = 128  # tokens beyond the context: every replay of ours appends one
FILL_TOKENS = 2048  # that go through the cache
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
CACHE = "cache" if "cache" in inspect.signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"
# What the card must have left for activations, scratch and graphs, in searching the longest context.
MARGIN_BYTES = 1 << 30


def say(*words):
    print(*words, file=sys.stderr, flush=True)


class Machine:
    """The GPU, or the CPU of a trial."""

    def __init__(self, tiny):
        self.tiny = tiny
        self.device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
        if tiny:
            libturboquant._torch_stores.DEVICE_TYPES.add("cpu")

    @property
    def name(self):
        if self.tiny:
            return "a trial on the CPU, with an emulated device"
        gib = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        return (f"{torch.cuda.get_device_name(self.device)} ({gib:.0f} GiB), CUDA {torch.version.cuda}, "
                f"torch {torch.__version__}, transformers {transformers.__version__}")

    def synchronize(self):
        if not self.tiny:
            torch.cuda.synchronize()

    def clean(self):
        gc.collect()
        if not self.tiny:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def allocated(self):
        return 0 if self.tiny else torch.cuda.memory_allocated()

    def reset_peak(self):
        if not self.tiny:
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        return 0 if self.tiny else torch.cuda.max_memory_allocated()

    def free(self):
        """Bytes that can be allocated now, for a trial an amount that ends soon."""
        return MARGIN_BYTES + (1 << 20) if self.tiny else torch.cuda.mem_get_info()[0]


# ---- the baseline ----


class PlainLayer(CacheLayerMixin):
    """BF16 keys and values [n_batch, n_head_kv, room, head_dim], of which `length` are there. A step writes behind them, and
    always at the same place: replays cost what the first does."""

    is_sliding = False

    def __init__(self, n_batch, n_head_kv, room, head_dim, dtype, device):
        super().__init__()
        self.keys, self.values = (torch.empty(n_batch, n_head_kv, room, head_dim, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def lazy_initialization(self, key_states, value_states):
        """The buffers are there."""

    def update(self, key_states, value_states, *args, **kwargs):
        n = self.length + key_states.shape[2]
        self.keys[:, :, self.length: n] = key_states
        self.values[:, :, self.length: n] = value_states
        return self.keys[:, :, :n], self.values[:, :, :n]

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return self.keys.shape[2]


def plain_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """One query token of each sequence sees everything: no mask."""
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register("headline_plain", plain_attention)


# ---- caches under test ----


class Plain:
    """A context in BF16; name: of torch's kernels."""

    attention = "headline_plain"

    def __init__(self, machine, config, backend):
        self.machine, self.config, self.backend, self.name = machine, config, backend, f"bf16 {backend}"

    def token_bytes(self):
        c = self.config
        return 4 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)

    def fixed_bytes(self):
        return self.token_bytes()

    def open(self, n_batch, context, filled):
        c, device = self.config, self.machine.device
        shape = (n_batch, c.num_key_value_heads, context + 1, c.hidden_size // c.num_attention_heads, torch.bfloat16, device)
        self.cache = Cache(layers=[PlainLayer(*shape) for _ in range(c.num_hidden_layers)])
        for layer in self.cache.layers:
            layer.length = context
            for rows in (layer.keys, layer.values):
                rows.normal_() if filled else rows.zero_()

    def around(self):
        return sdpa_kernel(BACKENDS[self.backend])


class Ours:
    """Ours; name: a preset, or formats of keys and values."""

    attention = "turboquant"

    def __init__(self, machine, config, name):
        self.machine, self.config, self.name = machine, config, name
        self.options = {"preset": name} if "/" not in name else dict(zip(("k_format", "v_format"), name.split("/")))

    def make(self, max_tokens):
        cache = TurboQuantCache(config=self.config, max_tokens=max_tokens, **self.options)
        cache._use(self.machine.device)
        return cache

    def token_bytes(self):
        store = self.make(ROOM).store
        return store.stats().page_bytes / store.page_size

    def fixed_bytes(self):
        store = self.make(ROOM).store
        store.seq_create()
        return store.stats().allocated_bytes + ROOM * store.stats().page_bytes // store.page_size

    def open(self, n_batch, context, filled):
        """Some random tokens go through the cache; all pages are theirs, again and again, or zeros."""
        self.cache = cache = self.make(context + ROOM)
        store = cache.store
        source, n_filled = store.seq_create(), min(FILL_TOKENS, context)
        if filled:
            self.fill(store, source, n_filled)
        stats = store.stats()
        pages = np.zeros((max(n_filled // store.page_size, 1), stats.page_bytes), np.uint8)
        exact = np.zeros(stats.exact_bytes, np.uint8)
        if filled:
            store.seq_export(source, 0, pages, exact)
        store.seq_free(source)
        cache._open(n_batch)
        size = len(pages) * store.page_size
        for seq in cache.seqs:
            for begin in range(0, context, size):
                end = min(begin + size, context)
                part = pages[: -(-(end - begin) // store.page_size)]
                store.seq_import(seq, end, begin // store.page_size, part, exact)
        cache._extend(context)
        for layer in cache._compressed:
            layer.n_columns = context

    def fill(self, store, seq, n_tok):
        batch, n_head, device = Batch(store, 1), self.config.num_attention_heads, self.machine.device
        shapes = [(1, n, n_tok, store.head_dim) for n in (n_head, store.n_head_kv, store.n_head_kv)]
        batch.begin([seq], [n_tok], n_head)
        for number in range(store.n_layer):
            query, keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes)
            attend_rows(batch, number, query, keys, values, None, store.head_dim ** -.5, None, None)
        batch.end()

    def around(self):
        return torch.no_grad()


@contextlib.contextmanager
def compiled_pieces():
    """Norms, rotations and MLPs through torch.compile; their products of matrices stay cuBLAS's."""
    pieces = [(qwen2.Qwen2RMSNorm, "forward"), (qwen2.Qwen2MLP, "forward"), (qwen2, "apply_rotary_pos_emb")]
    stock = [getattr(owner, name) for owner, name in pieces]
    for (owner, name), function in zip(pieces, stock):
        setattr(owner, name, torch.compile(function, dynamic=False))
    try:
        yield
    finally:
        for (owner, name), function in zip(pieces, stock):
            setattr(owner, name, function)


class Step:
    """A decode step of a model with an open cache; captured, where there is a GPU."""

    def __init__(self, machine, model, tested, n_batch, context, captured=True):
        self.machine, self.tested = machine, tested
        token = torch.randint(model.config.vocab_size, (n_batch, 1), device=machine.device)
        position = torch.full((n_batch, 1), context, device=machine.device)

        def run():
            model.set_attn_implementation(tested.attention)
            with torch.no_grad(), tested.around():
                model(input_ids=token, position_ids=position, use_cache=True, logits_to_keep=1, **{CACHE: tested.cache})

        self.run, self.graph = run, None
        if machine.tiny or not captured:
            run()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            run()

    def milliseconds(self):
        """Of one step."""
        if self.graph is None:
            begin = time.perf_counter()
            self.run()
            return (time.perf_counter() - begin) * 1000
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def kernels(self):
        """(name, launches, microseconds of all of them) of one replay's kernels, the longest first."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.graph.replay()
            torch.cuda.synchronize()
        found = [(event.key, event.count, event.self_device_time_total) for event in profile.key_averages()]
        return sorted(found, key=lambda kernel: -kernel[2])


# ---- measurements ----


def make_model(machine, config):
    """Random weights, made where they are."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    model = model.to_empty(device=machine.device).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if "norm" in name else weight.normal_(std=.02)
    with machine.device:  # buffers have no content either
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    return model


class Bench:
    HEADER = ["model", "what", "cache", "batch", "context", "ms_per_step", "tokens_per_s", "speed_up", "cache_mib",
              "peak_mib", "expected_mib", "memory_ratio", "weights_mib"]

    def __init__(self, machine, arguments):
        self.machine, self.arguments, self.rows, self.kernels = machine, arguments, [], []
        self.n_replays = 3 if machine.tiny else arguments.replays

    def add(self, **values):
        row = {name: values.get(name, "") for name in self.HEADER}
        row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
        self.rows.append(row)
        print(",".join(map(str, row.values())), flush=True)

    def config(self, key):
        return Qwen2Config(**(TINY if self.machine.tiny else MODELS[key][1]), pad_token_id=None)

    def tested(self, config):
        backends = ["math"] if self.machine.tiny else ["flash", "cudnn"]
        return [*(Plain(self.machine, config, name) for name in backends),
                *(Ours(self.machine, config, name) for name in self.arguments.caches.split(","))]

    def speed(self, key, model, weights, what):
        for n_batch, context in (TINY_SIZES if self.machine.tiny else SIZES)[key]:
            rows, waiting = [], self.tested(model.config)
            while waiting:
                found, waiting = self.take_turns(model, waiting, n_batch, context, what)
                rows += found
            plain = [row for row in rows if row["cache"].startswith("bf16")]
            best = min((row["ms_per_step"] for row in plain), default=None)
            for row in rows:
                row |= {"model": MODELS[key][0], "batch": n_batch, "context": context, "weights_mib": weights / 2**20}
                if best is not None:
                    row |= {"speed_up": best / row["ms_per_step"], "memory_ratio": plain[0]["cache_mib"] / row["cache_mib"]
                            if row["cache_mib"] else ""}
                self.add(what=what, **row)

    def take_turns(self, model, tested, n_batch, context, what):
        """Rows of as many caches as fit beside each other, and those that are left. One that does not fit alone is left out."""
        machine, open_steps, rows, step = self.machine, [], [], None
        for i, one in enumerate(tested):
            say(f"{one.name}: {n_batch} x {context}")
            machine.clean()
            before = machine.allocated()
            machine.reset_peak()
            try:
                one.open(n_batch, context, filled=True)
                held = machine.allocated() - before
                step = Step(machine, model, one, n_batch, context)
            except torch.OutOfMemoryError:
                one.cache = step = None
                machine.clean()
                if open_steps:
                    break
                say(f"{one.name}: {n_batch} x {context} does not fit")
                return rows, tested[1:]
            except RuntimeError as error:  # torch has not every kernel for every shape
                if not isinstance(one, Plain):
                    raise
                say(f"{one.name}: {str(error).splitlines()[0]}")
                one.cache = step = None
                continue
            rows.append({"cache": one.name, "cache_mib": held / 2**20, "peak_mib": (machine.peak() - before) / 2**20,
                         "expected_mib": n_batch * context * one.token_bytes() / 2**20})
            open_steps.append(step)
        else:
            i = len(tested)
        times = [[step.milliseconds() for step in open_steps] for _ in range(self.n_replays + 3)][3:]
        for row, *of_step in zip(rows, *times):
            row["ms_per_step"] = statistics.median(of_step)
            row["tokens_per_s"] = n_batch * 1000 / row["ms_per_step"]
        if self.arguments.profile and not machine.tiny:
            for row, kernels in zip(rows, [one.kernels() for one in open_steps]):
                self.kernels += [(len(model.model.layers), what, row["cache"], n_batch, context, *kernel) for kernel in kernels]
        for one in tested[:i]:
            one.cache = None
        del open_steps, step
        machine.clean()
        return rows, tested[i:]

    def longest(self, key, model, weights):
        """By arithmetic, and proved by a step at that length; less, if that does not fit."""
        machine, size = self.machine, TINY_CONTEXT_STEP if self.machine.tiny else CONTEXT_STEP
        lengths = {}
        for one in self.tested(model.config):
            if isinstance(one, Plain) and one.backend == "flash":
                continue  # both have the same memory
            per_token, fixed = one.token_bytes(), one.fixed_bytes()
            machine.clean()
            context = int((machine.free() - MARGIN_BYTES - fixed) / per_token) // size * size
            while context > 0:
                say(f"{one.name}: 1 x {context}")
                before = machine.allocated()
                machine.reset_peak()
                try:
                    one.open(1, context, filled=False)
                    held = machine.allocated() - before
                    Step(machine, model, one, 1, context, captured=False)
                    machine.synchronize()
                    break
                except torch.OutOfMemoryError:
                    context -= size
                finally:
                    one.cache = None
                    machine.clean()
            lengths[one.name] = context
            if context > 0:
                plain = next(iter(lengths.values()))
                self.add(model=MODELS[key][0], what="longest context", cache=one.name, batch=1, context=context,
                         cache_mib=held / 2**20, peak_mib=(machine.peak() - before) / 2**20,
                         expected_mib=context * per_token / 2**20, memory_ratio=context / plain if plain else "",
                         weights_mib=weights / 2**20)
            else:
                say(f"{one.name}: does not fit")

    def model(self, key):
        say(f"{MODELS[key][0]}: making weights")
        before = self.machine.allocated()
        try:
            model = make_model(self.machine, self.config(key))
        except torch.OutOfMemoryError:
            say(f"{MODELS[key][0]}: does not fit")
            return None, 0
        return model, self.machine.allocated() - before

    def run(self, only):
        torch.manual_seed(1)
        print(",".join(self.HEADER), flush=True)
        for key in MODELS:
            if not {key, "longest"} & only or (key not in only and key != "32b"):
                continue
            model, weights = self.model(key)
            if model is not None and key in only:
                modes = self.arguments.modes.split(",")
                if "decode" in modes:
                    self.speed(key, model, weights, "decode")
                if "compiled" in modes:
                    with compiled_pieces():
                        self.speed(key, model, weights, "decode, compiled")
            if model is not None and key == "32b" and "longest" in only:
                self.longest(key, model, weights)
            del model
            self.machine.clean()


def commit_here():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv")
    parser.add_argument("--json")
    parser.add_argument("--only", default="32b,7b,longest", help="longest: of the 32b model")
    parser.add_argument("--caches", default="TQ3,sq4/sq3,sq3/sq3", help="presets, or formats of keys/values")
    parser.add_argument("--modes", default="decode,compiled", help="of the model beside the cache")
    parser.add_argument("--replays", type=int, default=30, help="of each step, of which the median counts; at least 20")
    parser.add_argument("--profile", help="a CSV file for the times of each step's kernels")
    parser.add_argument("--commit", help="what to write as the commit; by default what git says")
    parser.add_argument("--tiny", action="store_true", help="a trial of the script on the CPU")
    arguments = parser.parse_args()
    if not 20 <= arguments.replays <= ROOM - 10:
        parser.error(f"--replays: give 20 to {ROOM - 10}")
    machine = Machine(arguments.tiny)
    say(machine.name)
    bench, begin = Bench(machine, arguments), time.perf_counter()
    bench.run(set(arguments.only.split(",")))
    about = {"command": " ".join(["python3", *sys.argv]), "commit": arguments.commit or commit_here(), "machine": machine.name}
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Bench.HEADER, *about])
            writer.writerows([*row.values(), *about.values()] for row in bench.rows)
    if arguments.profile:
        with open(arguments.profile, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["layers", "what", "cache", "batch", "context", "kernel", "launches", "microseconds"])
            writer.writerows(bench.kernels)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(about | {"rows": bench.rows}, indent=1) + "\n")
    say(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
