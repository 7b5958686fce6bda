# SPDX-License-Identifier: MIT
"""
TurboQuantCache on a device: its sequences under random changes against plain arrays, memory, refusals, and the bookkeeping of
CUDA graphs. With TQ_TEST_BACKEND=emulated or cuda (tiny.py).
"""
import contextlib
import copy
import ctypes
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import libturboquant
import tiny
from tiny import BACKEND, DEVICE, ON_DEVICE, SQ8, captured, compressed, generated, ids, logits, make_model, same_tokens, stock
from transformers import LlamaConfig
from libturboquant._torch_stores import DeviceStore
from libturboquant.transformers import TurboQuantCache, attention_forward
from libturboquant.weight_factors import formats_of

if not ON_DEVICE:
    pytest.skip("TQ_TEST_BACKEND is neither emulated nor cuda", allow_module_level=True)

N_LAYER, N_HEAD_KV, N_HEAD, HEAD_DIM = 3, 2, 4, 64
CONFIG = LlamaConfig(num_hidden_layers=N_LAYER, num_attention_heads=N_HEAD, num_key_value_heads=N_HEAD_KV, head_dim=HEAD_DIM,
                     hidden_size=N_HEAD * HEAD_DIM)
only_emulated = pytest.mark.skipif(BACKEND != "emulated", reason="hooks of the emulated device")
CALIBRATION = Path(__file__).parents[2] / "tests/golden/calibration_1.tqcal"  # of 3 layers, the second has none
# What a device multiplies in half precision.
TOLERANCE = 2e-3 if BACKEND == "emulated" else .1


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


class Rows:
    """What one row of a cache should hold: its tokens, those that have been coded, and what they were coded against."""

    def __init__(self):
        self.tokens = np.zeros((0, N_LAYER, 2, N_HEAD_KV, HEAD_DIM), np.float32)
        self.coded = np.zeros(0, bool)
        self.references = {}  # of a layer, from a block's first coded position on

    def append(self, new, cache):
        store, block = cache.store, ref_block(cache)
        self.tokens = np.concatenate([self.tokens, new.astype(np.float16).astype(np.float32)])
        before, end = int(self.coded.sum()) + store.n_sink, max(len(self.tokens) - store.n_recent, store.n_sink)
        self.coded = np.concatenate([self.coded, np.zeros(len(new), bool)])
        self.coded[store.n_sink: end] = True
        for number in range(N_LAYER):
            for first in range(before, end if block else 0):
                if first == store.n_sink or first % block == 0:
                    ring = np.add.accumulate(self.tokens[first: first + store.n_recent, number, 0])  # one after the other
                    self.references[number, first] = decoded("sq8", ring[-1] / np.float32(store.n_recent))

    def held(self, cache, number, side):
        """What is read of keys or values."""
        x, block = self.tokens[:, number, side], ref_block(cache)
        shift = np.zeros_like(x)
        for (layer, first), reference in self.references.items():
            if side == 0 and layer == number:
                shift[first: (first // block + 1) * block] = reference
        format_ = formats_of(cache._options, N_LAYER, "kv"[side])[number]
        return np.where(self.coded[:, None, None], decoded(format_, x - shift) + shift, x)

    def cut(self, n, cache):
        """What is exact again was decoded."""
        store = cache.store
        if n < len(self.tokens):
            again = np.flatnonzero(self.coded[max(n - store.n_recent, 0): n]) + max(n - store.n_recent, 0)
            for number in range(N_LAYER):
                for side in range(2):
                    x = self.held(cache, number, side)[again]
                    self.tokens[again, number, side] = x.astype(np.float16)
            self.coded[again] = False
        self.tokens, self.coded = self.tokens[:n], self.coded[:n]
        self.references = {key: x for key, x in self.references.items() if self.coded[key[1]: key[1] + 1].any()}


def ref_block(cache):
    chosen = libturboquant.preset(cache._options["preset"]).k_ref_block
    return cache._options.get("k_ref_block", chosen) if cache.store.n_recent else 0


def decoded(format_, x):
    """Rows [..., head_dim] as they are after coding."""
    codec = libturboquant.Codec(format_, HEAD_DIM)
    return codec.decode(codec.encode(x.reshape(-1, HEAD_DIM))).reshape(x.shape)


class Checked:
    """A cache, driven as a model drives it, beside what it should hold."""

    module = types.SimpleNamespace(config=CONFIG)

    def __init__(self, rng, **options):
        self.rng, self.rows, self.real = rng, [], np.zeros((0, 0), bool)
        self.cache = TurboQuantCache(config=CONFIG, factors="off", **options)

    def run(self, n_batch, n_tok, padding=None, dtype=torch.float32):
        """A pass of random rows; `padding` [n_batch]: so many of its first columns are none."""
        if not self.rows:
            self.rows, self.real = [Rows() for _ in range(n_batch)], np.zeros((n_batch, 0), bool)
        new = np.ones((n_batch, n_tok), bool)
        for row, n in enumerate(padding or []):
            new[row, :n] = False
        self.real = np.concatenate([self.real, new], axis=1)
        mask = None if self.real.all() else torch.from_numpy(self.real).to(DEVICE)
        tokens = self.rng.standard_normal((n_batch, n_tok, N_LAYER, 2, N_HEAD_KV, HEAD_DIM)).astype(np.float32)
        tokens[:, :, :, 0] += np.linspace(-4, 4, HEAD_DIM, dtype=np.float32)  # as biases of keys do
        queries = torch.from_numpy(self.rng.standard_normal((N_LAYER, n_batch, N_HEAD, n_tok, HEAD_DIM)).astype(np.float32))
        outs = []
        for layer in range(N_LAYER):
            keys, values = (torch.from_numpy(tokens[:, :, layer, side]).transpose(1, 2).to(DEVICE, dtype) for side in range(2))
            handles = self.cache.update(keys, values, layer)
            out, _ = attention_forward(self.module, queries[layer].to(DEVICE, dtype), *handles, mask)
            outs.append(out.float().cpu().numpy())
        for row in range(n_batch):
            self.rows[row].append(tokens[row][new[row]], self.cache)
            for layer in range(N_LAYER):
                if new[row].any():
                    self.check_attention(row, layer, queries[layer, row].numpy(), outs[layer][row], new[row])
                assert not outs[layer][row][~new[row]].any()

    def check_attention(self, row, layer, q, out, new):
        """Each query sees the sinks and its own newest n_recent tokens exact, and the others as they are coded."""
        store, n = self.cache.store, int(new.sum())
        held = store.read(self.cache.seqs[row], layer)
        length = len(held[0])
        columns, queries = np.arange(length)[None], np.arange(length - n, length)[:, None]
        sees_exact = (columns < store.n_sink) | (columns > queries - store.n_recent)
        exact = [self.rows[row].tokens[:, layer, side] for side in range(2)]
        for h in range(N_HEAD):
            head = h * N_HEAD_KV // N_HEAD
            rows = q[h][new].astype(np.float64)
            scores = np.where(sees_exact, rows @ exact[0][:, head].T, rows @ held[0][:, head].T) * HEAD_DIM ** -.5
            scores[columns > queries] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            wanted = (weights * sees_exact) @ exact[1][:, head] + (weights * ~sees_exact) @ held[1][:, head]
            np.testing.assert_allclose(out[new][:, h], wanted, atol=TOLERANCE)

    def check(self):
        """All that is held, by reading it."""
        store = self.cache.store
        assert [store.length(seq) for seq in self.cache.seqs] == [len(row.tokens) for row in self.rows]
        for seq, row in zip(self.cache.seqs, self.rows):
            for layer in range(N_LAYER):
                for side, found in enumerate(store.read(seq, layer)):
                    np.testing.assert_allclose(found, row.held(self.cache, layer, side), atol=1e-5)

    def fork(self):
        other = copy.copy(self)
        other.cache, other.rows, other.real = copy.deepcopy(self.cache), copy.deepcopy(self.rows), self.real.copy()
        return other

    def select(self, rows):
        self.cache.reorder_cache(torch.tensor(rows))
        self.rows, self.real = [copy.deepcopy(self.rows[row]) for row in rows], self.real[rows]

    def crop(self, n):
        n = min(n, self.real.shape[1])
        self.cache.crop(-n)
        self.real = self.real[:, : self.real.shape[1] - n]
        for row, real in zip(self.rows, self.real):
            row.cut(int(real.sum()), self.cache)


def check_references(caches):
    """Pages are those of the sequences, shared ones counted once, and none is lost."""
    store, stats = caches[0].cache.store, caches[0].cache.store.stats()
    tables = [store.page_table(seq).tolist() for each in caches for seq in each.cache.seqs]
    assert all(len(set(table)) == len(table) for table in tables)
    used = [page for table in tables for page in table]
    assert stats.n_pages_used == len(set(used)) and stats.n_sequences == len(tables)
    assert stats.n_pages_shared == sum(used.count(page) > 1 for page in set(used))


@pytest.mark.parametrize("n_sink, n_recent", [(4, 16), (0, 40), (4, 0), (0, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_random_changes(seed, n_sink, n_recent):
    """Passes, padding, copies, reordering, cropping and freeing in random order; everything is compared after each."""
    rng = np.random.default_rng(seed)
    options = {"layer_k_formats": ["sq8", "sq4", "tt4"], "layer_v_formats": ["sq8", "sq4", "tt4"]}
    options |= {"k_ref_block": 0, "page_size": 32} if seed == 0 else {"page_size": 64}
    first = Checked(rng, n_sink=n_sink, n_recent=n_recent, **options)
    first.run(2, int(rng.integers(1, 90 if seed == 0 else 200)), padding=[0, int(rng.integers(0, 2))])
    caches = [first]
    for _ in range(14):
        one = caches[rng.integers(len(caches))]
        n_batch, change = len(one.rows), rng.integers(8)
        if change < 3:
            one.run(n_batch, 1)
        elif change == 3:
            n = int(rng.integers(2, 50))
            one.run(n_batch, n, padding=rng.integers(0, n, n_batch).tolist() if rng.integers(2) else None)
        elif change == 4 and len(caches) < 3:
            caches.append(one.fork())
        elif change == 5:
            one.select(rng.integers(0, n_batch, rng.integers(1, 4)).tolist())
        elif change == 6:
            one.crop(int(rng.integers(1, 60)))
        elif len(caches) > 1:
            caches = [each for each in caches if each is not one]
            del one
        for each in caches:
            each.check()
        check_references(caches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(dtype, monkeypatch):
    """Half precision goes to the device as it is."""
    monkeypatch.setattr("test_cuda.TOLERANCE", .1)
    cache = Checked(np.random.default_rng(1), **SQ8)
    for n_tok in (70, 1, 5):
        cache.run(2, n_tok, dtype=dtype)


def test_other_strides():
    """Projections that make queries, keys and values in one piece leave rows that are further apart."""
    rng = np.random.default_rng(5)
    caches = [TurboQuantCache(config=CONFIG, **SQ8) for _ in range(2)]
    for n_batch_tok in ((2, 80), (2, 1), (2, 3)):
        packed = torch.from_numpy(rng.standard_normal((*n_batch_tok, N_HEAD + 2 * N_HEAD_KV, HEAD_DIM)).astype(np.float32))
        query, keys, values = packed.to(DEVICE).transpose(1, 2).split([N_HEAD, N_HEAD_KV, N_HEAD_KV], dim=1)
        for layer in range(N_LAYER):
            found, wanted = (attention_forward(Checked.module, q, *cache.update(k, v, layer), None)[0] for cache, q, k, v in (
                (caches[0], query, keys, values),
                (caches[1], query.contiguous(), keys.contiguous(), values.contiguous())))
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.fixture
def short_of_scratch():
    """The device needs much for each query token, so that prompts go in parts."""
    tiny.emulated.tq_emulated_partials(4000)
    yield
    tiny.emulated.tq_emulated_partials(0)


@only_emulated
@pytest.mark.parametrize("padding", [None, [0, 33]])
def test_chunks(short_of_scratch, padding):
    """Where scratch is short a prompt is appended in parts, each of which attends before the next."""
    cache, halves = Checked(np.random.default_rng(2), n_recent=200, **SQ8), np.empty(256, np.int32)
    tiny.emulated.tq_emulated_halves(halves.ctypes.data_as(ctypes.c_void_p), 0)
    cache.run(2, 150, padding=padding)
    assert tiny.emulated.tq_emulated_halves(halves.ctypes.data_as(ctypes.c_void_p), 256) >= 2 * 3 * N_LAYER
    cache.check()
    cache.run(2, 1)
    cache.check()


@only_emulated
def test_a_last_part_of_one_token(short_of_scratch):
    """Of a prompt of 50 tokens that goes in parts of 7, before any step of decoding."""
    cache, halves = Checked(np.random.default_rng(3), n_recent=20, k_ref_block=0, **SQ8), np.empty(256, np.int32)
    tiny.emulated.tq_emulated_halves(halves.ctypes.data_as(ctypes.c_void_p), 0)
    cache.run(1, 50)
    n = tiny.emulated.tq_emulated_halves(halves.ctypes.data_as(ctypes.c_void_p), 256)
    assert halves[:n].tolist() == ([1, 2] * 7 + [0]) * N_LAYER
    cache.check()


@pytest.mark.parametrize("formats", [SQ8, {"preset": "TQ3"}, {"preset": "TQ4"}], ids=["sq8", "TQ3", "TQ4"])
def test_cuts_change_no_byte(formats):
    """What is held does not depend on the passes and chunks that the same rows came in."""
    rng, held = np.random.default_rng(6), []
    rows = torch.from_numpy(rng.standard_normal((2, 2, N_HEAD_KV, 300, HEAD_DIM)).astype(np.float32)).to(DEVICE)
    query = torch.from_numpy(rng.standard_normal((2, N_HEAD, 300, HEAD_DIM)).astype(np.float32)).to(DEVICE)
    for parts in (1, 7):
        cache = TurboQuantCache(config=CONFIG, factors="off", **formats)
        for part in torch.arange(300).tensor_split(parts):
            cut = slice(int(part[0]), int(part[-1]) + 1)
            for layer in range(N_LAYER):
                attention_forward(Checked.module, query[:, :, cut], *cache.update(*rows[:, :, :, cut], layer), None)
        held.append([cache.store.read(seq, layer) for seq in cache.seqs for layer in range(N_LAYER)])
    np.testing.assert_array_equal(*held)


def test_calls_of_different_shapes():
    """Scratch that a step of decoding has used is used by a call of more query rows, whose counters are elsewhere."""
    cache = Checked(np.random.default_rng(8), **SQ8)
    for n_tok in (1200, 1, 20, 1, 9, 1, 70):
        cache.run(2, n_tok)


@only_emulated
@pytest.mark.parametrize("k_ref_block", [0, 64])
def test_captured_passes_encode_first(k_ref_block):
    """What leaves the ring is encoded for all layers before the first stores its new tokens. Each pass is captured and replayed
    in one, behind a plain one of as many tokens."""
    cache = Checked(np.random.default_rng(5), max_tokens=500, k_ref_block=k_ref_block, **SQ8)
    cache.run(2, 120)
    end, found = cache.cache._end, np.empty(256, np.int32)

    def halves():
        n = tiny.emulated.tq_emulated_halves(found.ctypes.data_as(ctypes.c_void_p), 256)
        return found[:n].tolist()

    def end_and_replay():
        n_tok = cache.cache._columns.n - cache.cache._pass.n_columns
        end()
        cache.cache.replayed(n_tok)

    for n_tok in (1, 5, 64, 1):
        cache.cache._end = end
        cache.run(2, n_tok)
        halves()
        cache.cache._end = end_and_replay
        with captured():
            cache.run(2, n_tok)
        # Of several tokens those attend first that see what the others push out.
        assert halves() == ([1, 2] * N_LAYER if n_tok > 1 else [1] * N_LAYER + [2] * N_LAYER)
    cache.check()


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"s_aux": torch.linspace(-1, 2, N_HEAD)}], ids=["softcap", "sinks"])
def test_references_with(options):
    """They are part of scores that are capped or compared with a learned sink's."""
    caches = [TurboQuantCache(config=CONFIG, factors="off", **SQ8, **more) for more in ({}, {"k_ref_block": 0})]
    options = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in options.items()}
    for n_tok in (200, 1, 1):
        query, keys, values = (torch.randn(1, n, n_tok, HEAD_DIM, device=DEVICE) for n in (N_HEAD, N_HEAD_KV, N_HEAD_KV))
        keys += torch.linspace(-2, 2, HEAD_DIM, device=DEVICE)
        for layer in range(N_LAYER):
            found, wanted = (attention_forward(Checked.module, query, *cache.update(keys, values, layer), None, **options)[0]
                             for cache in caches)
            torch.testing.assert_close(found, wanted, atol=.05, rtol=0)


def test_memory_with_max_tokens(llama):
    """Everything is taken at first."""
    cache = compressed(llama, max_tokens=300)
    logits(llama, cache, ids(2, 100))
    tables, before = [cache.store.page_table(seq) for seq in cache.seqs], cache.store.stats()
    assert [len(table) for table in tables] == [-(-300 // 64)] * 2 and before.n_pages_used == 2 * -(-300 // 64)
    logits(llama, cache, ids(2, 200), parts=4)
    assert all(np.array_equal(cache.store.page_table(seq), table) for seq, table in zip(cache.seqs, tables))
    after = cache.store.stats()
    assert (after.n_pages_used, after.exact_bytes) == (before.n_pages_used, before.exact_bytes)
    logits(llama, cache, ids(2, 200))  # more tokens find room, too
    assert cache.get_seq_length() == 500


def test_factors_are_counted():
    store = DeviceStore(torch.device(DEVICE), 1, 2, 64)
    before = store.stats().allocated_bytes
    store.set_key_factors(0, np.full((2, 64), 4, np.int8))
    # On the device, and the host's copy, which is a block of the heap.
    assert store.stats().allocated_bytes == before + 2 * 64 + (2 * 64 + 16 + 63) // 64 * 64
    store.set_key_factors(0, None)
    assert store.stats().allocated_bytes == before


def test_memory_grows_with_use(llama):
    cache = compressed(llama)
    logits(llama, cache, ids(1, 100))
    few = cache.nbytes
    logits(llama, cache, ids(1, 3000), parts=3)
    stats = cache.store.stats()
    assert stats.n_pages_used == -(-3100 // 64) and cache.nbytes > few
    assert stats.allocated_bytes >= stats.exact_bytes + stats.n_pages_used * stats.page_bytes
    # Tables of all pages that there may be, and scratch, come besides.
    pages = 1.3 * stats.n_pages_used + 16
    small = compressed(llama, max_tok=4096)
    logits(llama, small, ids(1, 3100), parts=3)
    assert small.nbytes < 1.1 * pages * stats.page_bytes + stats.exact_bytes + (4 << 20)


def test_full_cache_changes_nothing(llama):
    cache = compressed(llama, max_tok=256)
    logits(llama, cache, ids(1, 150))
    with pytest.raises(libturboquant.CacheFullError, match="of 4 pages are available"):
        logits(llama, cache, ids(1, 150))
    assert cache.get_seq_length() == cache.store.length(cache.seqs[0]) == 150
    assert logits(llama, cache, ids(1, 5)).isfinite().all()


def test_reset_forgets_everything(llama):
    cache = compressed(llama)
    first = logits(llama, cache, ids(2, 150))
    cache.reset()
    stats = cache.store.stats()
    assert (stats.n_sequences, stats.n_pages_used) == (0, 0)
    assert torch.equal(logits(llama, cache, ids(2, 150)), first)


def run_rows(head_dim, **options):
    """A pass of rows of a head_dim through a cache."""
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim,
                         hidden_size=2 * head_dim)
    cache, rows = TurboQuantCache(config=config, factors="off", **options), torch.randn(1, 1, 40, head_dim, device=DEVICE)
    try:
        attention_forward(types.SimpleNamespace(config=config), rows.expand(1, 2, 40, head_dim), *cache.update(rows, rows, 0),
                          None)
    finally:
        assert cache.get_seq_length() in (0, 40)
    return cache


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("preset", ["TQ6", "TQ4", "TQ3", "TQ2"])
def test_presets(preset, head_dim):
    assert run_rows(head_dim, preset=preset).get_seq_length() == 40


@pytest.mark.parametrize("head_dim, options", [(64, {"k_format": "sq4", "v_format": "sq8"}),
                                               (256, {"k_format": "tt3", "v_format": "tt2"})])
def test_pairs_without_a_kernel_of_their_own(head_dim, options):
    assert run_rows(head_dim, **options).get_seq_length() == 40


@pytest.mark.parametrize("head_dim", libturboquant.head_dims())
def test_presets_at_all_head_dims(head_dim):
    assert run_rows(head_dim, preset="TQ3").get_seq_length() == 40
    assert run_rows(head_dim, k_format="sq4", v_format="sq3").get_seq_length() == 40


def test_formats_without_a_layout(llama):
    with pytest.raises(libturboquant.UnsupportedError, match="no device layout: sq8, sq4"):
        logits(llama, TurboQuantCache(config=llama.config, k_format="f16", v_format="f16"), ids(1, 10))


@pytest.mark.parametrize("options", [{"page_size": 32}, {"k_ref_block": 32}])
def test_options_that_references_refuse(options):
    with pytest.raises(libturboquant.ArgumentError, match="k_ref_block"):
        run_rows(64, **options)


def test_no_references_without_a_ring():
    assert run_rows(64, n_recent=0).get_seq_length() == 40


@pytest.mark.parametrize("options", [{"budget_bytes": 1 << 30}, {"dry_run": True}])
def test_refused_options(llama, options):
    why = "budget_bytes, an offload tier and dry runs need a cache in the CPU's memory"
    with pytest.raises(libturboquant.ArgumentError, match=why):
        logits(llama, TurboQuantCache(config=llama.config, **options), ids(1, 10))


def test_one_device(llama):
    cache = compressed(llama)
    logits(llama, cache, ids(1, 10))
    with pytest.raises(libturboquant.UnsupportedError, match="keeps to one device"):
        cache._use(torch.device("meta"))
    with pytest.raises(libturboquant.UnsupportedError, match="on meta"):
        compressed(llama)._use(torch.device("meta"))


def test_numbers_that_are_not_finite():
    """They are told of by the next pass, which need not wait for the device."""
    model = make_model("llama")
    cache = compressed(model)
    weight = model.model.layers[2].self_attn.k_proj.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(float("inf"))
    logits(model, cache, ids(1, 50))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    logits(model, compressed(model), ids(1, 5))  # another cache is not concerned
    with torch.no_grad():
        weight.copy_(kept)
    with pytest.raises(libturboquant.ArgumentError, match="NaN.*free its sequences"):
        for _ in range(2):  # what the first has asked for is there at the second
            logits(model, cache, ids(1, 5))
            if DEVICE == "cuda":
                torch.cuda.synchronize()
    cache.reset()
    assert logits(model, cache, ids(1, 5)).isfinite().all()


def test_failing_layer_is_rolled_back(llama):
    """A layer in the middle fails before it has appended: the layers before it forget the tokens again."""
    cache, input_ids, fresh = compressed(llama), ids(1, 150), compressed(llama)
    for each in (cache, fresh):
        logits(llama, each, input_ids)
    attend = cache._batch.attend

    def fail(number, *arguments):
        if number == 2:
            raise torch.OutOfMemoryError("as if")
        return attend(number, *arguments)

    cache._batch.attend = fail
    with pytest.raises(torch.OutOfMemoryError):
        logits(llama, cache, ids(1, 30, seed=8))
    del cache._batch.attend
    assert [each.n_columns for each in cache._compressed] == [150] * 4 and cache.store.length(cache.seqs[0]) == 150
    for layer in range(4):
        for found, wanted in zip(cache.store.read(cache.seqs[0], layer), fresh.store.read(fresh.seqs[0], layer)):
            # What the failed pass pushed out of the ring is there as it was coded; where it did not come, nothing has changed.
            np.testing.assert_allclose(found, wanted, atol=.05 if layer < 2 else 0)
    torch.testing.assert_close(logits(llama, cache, ids(1, 5)), logits(llama, fresh, ids(1, 5)), atol=.05, rtol=0)


@only_emulated
@pytest.mark.parametrize("n_calls", [0, 1, 2, 3, 5, 8, 15])
def test_failure_within_a_layer(llama, short_of_scratch, n_calls):
    """Between the parts of a prompt and the rows of a batch that a layer appends."""
    cache, fresh, mask = compressed(llama, n_recent=32), compressed(llama, n_recent=32), torch.ones(2, 100, dtype=torch.long)
    mask[0, :30] = mask[0, 70:75] = 0  # two parts for each row and layer
    mask = mask.to(DEVICE)
    for each in (cache, fresh):
        logits(llama, each, ids(2, 70), attention_mask=mask[:, :70])
    tiny.emulated.tq_emulated_fail_after(n_calls)
    with pytest.raises(libturboquant.TurboQuantError, match="as tests want it"):
        logits(llama, cache, ids(2, 30, seed=8), attention_mask=mask)
    tiny.emulated.tq_emulated_fail_after(-1)
    assert [cache.store.length(seq) for seq in cache.seqs] == [40, 70]
    for layer in range(4):
        for row, seq in enumerate(cache.seqs):
            for found, wanted in zip(cache.store.read(seq, layer), fresh.store.read(fresh.seqs[row], layer)):
                np.testing.assert_allclose(found, wanted, atol=.05 if layer <= n_calls // 4 else 0)
    more = torch.cat([mask[:, :70], torch.ones_like(mask[:, :5])], 1)
    torch.testing.assert_close(logits(llama, cache, ids(2, 5), attention_mask=more),
                               logits(llama, fresh, ids(2, 5), attention_mask=more), atol=.05, rtol=0)


@pytest.mark.parametrize("n_calls", [0, 1, 2])
def test_going_back_is_interrupted(llama, monkeypatch, n_calls):
    """It is done at the next use, of the rows that have not gone back."""
    cache, fresh = compressed(llama, n_recent=32), compressed(llama, n_recent=32)
    for each in (cache, fresh):
        logits(llama, each, ids(2, 150))
    store, trim, left = cache.store, cache.store.trim, n_calls

    def interrupted(*arguments):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        trim(*arguments)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        patch.setattr(store, "trim", interrupted)
        attend = cache._batch.attend
        patch.setattr(cache._batch, "attend", lambda layer, rows: 1 / 0 if layer == 2 else attend(layer, rows))
        logits(llama, cache, ids(2, 90))
    torch.testing.assert_close(logits(llama, cache, ids(2, 5)), logits(llama, fresh, ids(2, 5)), atol=.05, rtol=0)
    assert [store.length(seq) for seq in cache.seqs] == [155] * 2


@only_emulated
def test_replays(llama):
    """A captured step does not count; replayed() does. Here the captured step runs, as its first replay would."""
    input_ids, cache, plain = ids(2, 90), compressed(llama, max_tokens=200), compressed(llama, max_tokens=200)
    for each in (cache, plain):
        logits(llama, each, input_ids)
        logits(llama, each, ids(2, 1, seed=1))
    with captured():
        found = logits(llama, cache, ids(2, 1, seed=2))
    assert cache.get_seq_length() == cache.store.length(cache.seqs[0]) == 91
    cache.replayed()
    assert cache.get_seq_length() == cache.store.length(cache.seqs[0]) == 92
    assert torch.equal(found, logits(llama, plain, ids(2, 1, seed=2)))
    assert torch.equal(logits(llama, cache, ids(2, 3, seed=4)), logits(llama, plain, ids(2, 3, seed=4)))
    with pytest.raises(libturboquant.ArgumentError, match="more tokens than are reserved"):
        cache.replayed(200)


@only_emulated
def test_crop_after_replays(llama):
    """The pass that was captured is over: what is removed then is removed on the device, too."""
    input_ids, steps, found = ids(2, 150), ids(2, 10, seed=2), []
    for is_captured in (False, True):
        cache = compressed(llama, max_tokens=300)
        logits(llama, cache, input_ids)
        logits(llama, cache, ids(2, 1, seed=1))
        for step in steps.split(1, dim=1):
            with captured() if is_captured else contextlib.nullcontext():
                logits(llama, cache, step)
            if is_captured:
                cache.replayed()
        assert cache.get_seq_length() == 161
        cache.crop(-3)
        if is_captured:
            with pytest.raises(libturboquant.ArgumentError, match="capture +again"):
                cache.replayed()
        found.append(logits(llama, cache, steps[:, -3:]))
        assert [cache.store.length(seq) for seq in cache.seqs] == [161, 161]
    assert torch.equal(*found)


@only_emulated
def test_reset_between_replays(llama):
    """With the same batch a graph is good again once a plain step has run."""
    cache = compressed(llama, max_tokens=200)
    for _ in range(2):
        logits(llama, cache, ids(2, 90))
        logits(llama, cache, ids(2, 1, seed=1))
        batch = cache._batch
        with captured():
            logits(llama, cache, ids(2, 1, seed=2))
        cache.replayed()
        cache.reset()
        with pytest.raises(libturboquant.TurboQuantError):
            cache.replayed()
    assert cache._batch is batch


@only_emulated
def test_replay_after_memory_has_moved(llama):
    """Other sequences of the same store needed more pages than there were: the graph's addresses are old."""
    cache = compressed(llama, max_tokens=200)
    logits(llama, cache, ids(1, 90))
    logits(llama, cache, ids(1, 1, seed=1))
    with captured():
        logits(llama, cache, ids(1, 1, seed=2))
    cache.replayed()
    logits(llama, copy.deepcopy(cache), ids(1, 3000, seed=3))
    with pytest.raises(libturboquant.ArgumentError, match="memory grew"):
        cache.replayed()
    logits(llama, cache, ids(1, 1, seed=4))
    with captured():
        logits(llama, cache, ids(1, 1, seed=5))
    cache.replayed()


@only_emulated
def test_failing_capture(llama):
    """It leaves lengths and pages as they were: also where it failed between layers, and the cache is cropped afterwards."""
    cache = compressed(llama, max_tokens=300)
    logits(llama, cache, ids(1, 150))
    logits(llama, cache, ids(1, 1, seed=1))
    batch, table = cache._batch, cache.store.page_table(cache.seqs[0])
    mlp = llama.model.layers[2].mlp
    for owner, name in ((batch, "attend"), (mlp, "forward")):
        kept = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **options: 1 / 0)
        with captured(), pytest.raises(ZeroDivisionError):
            logits(llama, cache, ids(1, 1, seed=2))
        delattr(owner, name)
        assert getattr(owner, name) == kept
        assert cache.store.length(cache.seqs[0]) == 151
        logits(llama, copy.deepcopy(cache), ids(1, 1, seed=1))  # a plain step, which knows what the device has
    assert np.array_equal(cache.store.page_table(cache.seqs[0]), table)
    assert cache.get_seq_length() == 151
    cache.crop(-1)
    assert cache.get_seq_length() == cache.store.length(cache.seqs[0]) == 150
    assert [layer.n_columns for layer in cache._compressed] == [150] * 4


@only_emulated
def test_capture_after_padding(llama):
    """The cache knows of the padding: a captured step passes no mask."""
    input_ids, mask = ids(2, 90), torch.ones(2, 90, dtype=torch.long, device=DEVICE)
    mask[1, :40] = 0
    cache = compressed(llama, max_tokens=200)
    logits(llama, cache, input_ids, attention_mask=mask)
    with pytest.raises(libturboquant.ArgumentError, match="pass the whole mask"):
        logits(llama, cache, ids(2, 1))
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long, device=DEVICE)], dim=1)
    logits(llama, cache, ids(2, 1), attention_mask=more)
    with captured():
        logits(llama, cache, ids(2, 1))
    cache.replayed()
    assert [cache.store.length(seq) for seq in cache.seqs] == [92, 52] and cache.get_seq_length() == 92


@only_emulated
def test_capture_needs_what_is_reserved(llama):
    cache = compressed(llama)
    logits(llama, cache, ids(1, 128))
    with captured(), pytest.raises(libturboquant.ArgumentError, match="reserve all tokens.*before it"):
        logits(llama, cache, ids(1, 100))
    assert cache.get_seq_length() == 128


def test_replayed_without_a_graph(llama):
    with pytest.raises(libturboquant.ArgumentError, match="replayed"):
        compressed(llama).replayed()


def test_coded_generation(llama):
    """Beams and guesses that fork and crop what is coded: the same tokens as with everything exact, while nothing is close."""
    input_ids, assistant = ids(1, 150), make_model("llama", seed=2)
    wanted = generated(llama, compressed(llama, **SQ8), input_ids)
    assert same_tokens(llama, generated(llama, compressed(llama, **SQ8), input_ids, assistant_model=assistant), wanted)
    cache = compressed(llama, n_recent=16, **SQ8)
    generated(llama, cache, ids(2, 100), num_beams=3)
    assert cache.store.stats().n_pages_shared > 0


def test_calibration():
    """Keys go through a calibration's transforms on a device, too, and what is read is near what came."""
    model = make_model("llama", num_hidden_layers=N_LAYER)
    wanted = logits(model, stock(model), ids(1, 120))
    plain, calibrated = (compressed(model, n_recent=16, **SQ8, **options)
                         for options in ({"factors": "off"}, {"calibration": CALIBRATION}))
    for cache in plain, calibrated:
        assert abs(logits(model, cache, ids(1, 120), parts=3) - wanted).max() < .02 * abs(wanted).max()
        assert isinstance(cache.store, DeviceStore)
    # Of the first layer, whose keys do not depend on what was coded before.
    keys, others = (cache.store.read(cache.seqs[0], 0)[0] for cache in (plain, calibrated))
    coded = slice(plain.store.n_sink, 100)
    assert (keys[coded] != others[coded]).any() and abs(keys - others).max() < .1 * abs(keys).max()
    assert (keys[110:] == others[110:]).all()
