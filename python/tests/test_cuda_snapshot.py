# SPDX-License-Identifier: MIT
"""
Files of a device's TurboQuantCache: read again there and on the CPU, and the CPU's on a device. With TQ_TEST_BACKEND=emulated
or cuda (tiny.py).
"""
import contextlib
import copy
import resource
import signal
import types

import numpy as np
import pytest
import torch
import libturboquant
from tiny import BACKEND, DEVICE, ON_DEVICE, SQ8, compressed, generated, ids, logits, make_model, same_tokens
from transformers import LlamaConfig
from libturboquant import _torch_stores as stores
from libturboquant.transformers import TurboQuantCache, attention_forward

if not ON_DEVICE:
    pytest.skip("TQ_TEST_BACKEND is neither emulated nor cuda", allow_module_level=True)

N_LAYER, N_HEAD_KV, N_HEAD, HEAD_DIM = 2, 2, 4, 64
CONFIG = LlamaConfig(num_hidden_layers=N_LAYER, num_attention_heads=N_HEAD, num_key_value_heads=N_HEAD_KV, head_dim=HEAD_DIM,
                     hidden_size=N_HEAD * HEAD_DIM)
MODULE = types.SimpleNamespace(config=CONFIG)
MIXED = {"layer_k_formats": ["sq8", "sq4"], "layer_v_formats": ["tt4", "sq4"], "n_sink": 4, "n_recent": 16, "page_size": 64}
PLAIN = MIXED | {"k_ref_block": 0, "page_size": 32}
# What kernels of a device may differ by from run to run; pages and exact tokens never do.
TOLERANCE = 0 if BACKEND == "emulated" else 2e-3


@contextlib.contextmanager
def on_cpu():
    """Caches within are the CPU's, also where the device is emulated in its memory."""
    before = set(stores.DEVICE_TYPES)
    stores.DEVICE_TYPES.discard("cpu")
    try:
        yield
    finally:
        stores.DEVICE_TYPES.update(before)


def new(**options):
    return TurboQuantCache(config=CONFIG, factors="off", **options)


def run(cache, seed, n_tok, n_batch=1, padding=None, dtype=torch.float32, device=DEVICE, fail=False):
    """A pass of random rows with biased keys, as seed has them: what the layers' attention gives."""
    rng = np.random.default_rng(seed)
    mask = None
    if padding is not None:
        mask = torch.ones(n_batch, cache._columns.n + n_tok, dtype=torch.bool, device=device)
        for row, n in enumerate(padding):
            mask[row, :n] = False
    outs = []
    for layer in range(N_LAYER):
        shapes = [(n_batch, n_head, n_tok, HEAD_DIM) for n_head in (N_HEAD, N_HEAD_KV, N_HEAD_KV)]
        query, keys, values = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
        keys += torch.linspace(-6, 6, HEAD_DIM) * (1 + layer)
        if fail and layer == N_LAYER - 1:
            raise KeyboardInterrupt
        rows = [x.to(device, dtype) for x in (query, keys, values)]
        outs.append(attention_forward(MODULE, rows[0], *cache.update(*rows[1:], layer), mask)[0].float().cpu())
    return torch.stack(outs)


def go_on(cache, n_batch, padding=None, dtype=torch.float32, device=DEVICE):
    """Many steps and a prompt: what was exact is coded, pages are added."""
    sizes = [1] * 40 + [50, 1, 7]
    return [run(cache, 100 + i, n, n_batch, padding, dtype, device) for i, n in enumerate(sizes)]


def assert_same_attention(found, wanted, tolerance=TOLERANCE):
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def saved(cache, path):
    cache.save(path)
    return path.read_bytes()


def load(path, device=DEVICE, **options):
    return TurboQuantCache.load(path, CONFIG, device=device, **options)


@pytest.mark.parametrize("n_tok", [3, 10, 40, 100, 301])
@pytest.mark.parametrize("options", [MIXED, PLAIN, MIXED | {"n_sink": 0, "page_size": 128}, {"preset": "TQ3"},
                                     PLAIN | {"n_sink": 20, "n_recent": 0}, PLAIN | {"n_sink": 0, "n_recent": 0}])
def test_there_and_back(tmp_path, n_tok, options):
    """A cache that was saved and loaded holds the same bits, and goes on with the same."""
    cache = new(**options)
    run(cache, 1, n_tok, 2, padding=[0, n_tok // 3])
    before = saved(cache, tmp_path / "a.tqs")
    assert libturboquant.describe_snapshot(tmp_path / "a.tqs", verify=True).page_size == cache.store.page_size
    loaded = load(tmp_path / "a.tqs", **options)
    assert loaded._columns == cache._columns and loaded.get_seq_length() == n_tok
    assert loaded.store.page_size == cache.store.page_size
    assert type(loaded.store) is type(cache.store)
    assert saved(loaded, tmp_path / "b.tqs") == before
    padding = [0, n_tok // 3]
    assert_same_attention(go_on(loaded, 2, padding), go_on(cache, 2, padding))
    assert saved(loaded, tmp_path / "b.tqs") == saved(cache, tmp_path / "c.tqs") != before
    for layer in range(N_LAYER):
        for mine, other in zip(loaded.store.read(loaded.seqs[1], layer), cache.store.read(cache.seqs[1], layer)):
            assert np.array_equal(mine, other)


PRESETS = [{"preset": name} for name in ("TQ6", "TQ4", "TQ3", "TQ2")]
# Sinks that fill a block, and the first of whose positions are coded in the middle of one.
SINKS = [MIXED | {"n_sink": 0}, MIXED | {"n_sink": 64}, MIXED | {"n_sink": 70, "page_size": 128}]


@pytest.mark.parametrize("options", [MIXED, PLAIN, *SINKS, *PRESETS])
@pytest.mark.parametrize("n_tok", [3, 18, 130, 301])
def test_the_bytes_are_the_cpus(tmp_path, n_tok, options):
    """The CPU writes the same file of the same tokens, whatever passes they came in."""
    options = {"page_size": 64} | options
    passes = ((1, n_tok), (2, 1), (3, 1), (4, 70), (5, 1))
    cache = new(**options)
    with on_cpu():
        other = new(**options)
        for seed, n in passes:
            run(other, seed, n, 2, device="cpu")
        wanted = saved(other, tmp_path / "cpu.tqs")
    for seed, n in passes:
        run(cache, seed, n, 2)
    assert saved(cache, tmp_path / "device.tqs") == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    cache = new(**MIXED)
    run(cache, 1, 80, dtype=dtype)
    cache.save(tmp_path / "a.tqs")
    with on_cpu():
        there = load(tmp_path / "a.tqs", None, **MIXED)
        for layer in range(N_LAYER):
            for mine, other in zip(there.store.read(there.seqs[0], layer), cache.store.read(cache.seqs[0], layer)):
                assert np.array_equal(mine, other)
    loaded = load(tmp_path / "a.tqs", **MIXED)
    assert_same_attention(go_on(loaded, 1, dtype=dtype), go_on(cache, 1, dtype=dtype))
    assert saved(loaded, tmp_path / "b.tqs") == saved(cache, tmp_path / "c.tqs")


@pytest.mark.parametrize("options", [MIXED, PLAIN, *PRESETS])
@pytest.mark.parametrize("n_tok", [40, 150])
def test_on_the_cpu(tmp_path, n_tok, options):
    """The CPU goes on with what a device wrote, with the same bits."""
    cache = new(**options)
    run(cache, 1, n_tok, 2, padding=[5, 0])
    cache.save(tmp_path / "a.tqs")
    with on_cpu():
        loaded = load(tmp_path / "a.tqs", None, **options)
        assert loaded.store.device_kind == "cpu" and loaded.store.stats().n_sequences == 2
        for row in range(2):
            for layer in range(N_LAYER):
                mine, other = (c.store.read(c.seqs[row], layer) for c in (loaded, cache))
                assert np.array_equal(mine[0], other[0]) and np.array_equal(mine[1], other[1])
        # Of the tokens of one pass the CPU's see more exact ones; a GPU's centroids are off by .3 %, and keys are large.
        tolerance = 5e-3 if BACKEND == "emulated" else 5e-2
        assert_same_attention(go_on(loaded, 2, [5, 0], device="cpu")[:40], go_on(cache, 2, [5, 0])[:40], tolerance)
        assert saved(loaded, tmp_path / "b.tqs") == saved(cache, tmp_path / "c.tqs")
        assert libturboquant.describe_snapshot(tmp_path / "b.tqs", verify=True).n_sequences == 2


@pytest.mark.parametrize("options", [PLAIN, MIXED], ids=["plain", "references"])
@pytest.mark.parametrize("crop", [0, 1, 30, 90])
def test_from_the_cpu(tmp_path, crop, options):
    """Codes and exact tokens are the CPU's; what the CPU has cropped and a device has exact is decoded once."""
    with on_cpu():
        cache = new(**options | {"page_size": 128})
        run(cache, 1, 120, 2, padding=[0, 9], device="cpu")
        cache.crop(-crop)
        wanted = [cache.store.read(seq, layer) for seq in cache.seqs for layer in range(N_LAYER)]
        cache.save(tmp_path / "a.tqs")
        later = load(tmp_path / "a.tqs", None, **options | {"page_size": 128})
        kept = copy.deepcopy(later)
    options = {name: value for name, value in options.items() if name != "page_size"}
    loaded = load(tmp_path / "a.tqs", **options)
    assert loaded.store.page_size == 128  # the file's
    found = [loaded.store.read(seq, layer) for seq in loaded.seqs for layer in range(N_LAYER)]
    for mine, other in zip(found, wanted):
        for x, y in zip(mine, other):
            np.testing.assert_allclose(x, y, atol=4e-3 if crop else 0)
    # It moves by itself when the model's tensors are there.
    assert later.store.device_kind == "cpu"
    padding = [0, 9]
    assert_same_attention(go_on(later, 2, padding), go_on(loaded, 2, padding))
    assert later.store.device_kind == "cuda" and kept.store.stats().n_sequences == 2
    with on_cpu():  # a copy stays where it was
        assert_same_attention(go_on(kept, 2, padding, device="cpu"), go_on(cache, 2, padding, device="cpu"), 0)


def test_shared_pages(tmp_path):
    """Pages of several rows are written once and shared again."""
    cache = new(**MIXED)
    run(cache, 1, 258)
    cache.batch_repeat_interleave(4)
    for i in range(20):
        run(cache, 2 + i, 1, 4)
    cache.batch_select_indices(torch.tensor([0, 1, 1, 3]))
    before = saved(cache, tmp_path / "a.tqs")
    loaded = load(tmp_path / "a.tqs", **MIXED)
    assert loaded.store.stats().n_pages_shared == cache.store.stats().n_pages_shared == 5
    assert loaded.store.stats().n_pages_used == cache.store.stats().n_pages_used
    assert saved(loaded, tmp_path / "b.tqs") == before
    assert_same_attention(go_on(loaded, 4), go_on(cache, 4))
    loaded.reset()
    assert loaded.store.stats().n_pages_used == 0


def test_rows_that_share_a_page_and_differ_in_length(tmp_path):
    cache = new(**PLAIN)
    run(cache, 1, 57, 1)
    store = cache.store
    cache.seqs.append(store.seq_fork(cache.seqs[0]))
    store.trim(cache.seqs[0], 50)
    cache.seqs.append(store.seq_fork(cache.seqs[1]))
    wanted = [store.read(seq, 1) for seq in cache.seqs]
    store.save(tmp_path / "a.tqs", cache.seqs)
    loaded = load(tmp_path / "a.tqs", **PLAIN)
    for seq, one in zip(loaded.seqs, wanted):
        for mine, other in zip(loaded.store.read(seq, 1), one):
            assert np.array_equal(mine, other)


def test_max_tokens(tmp_path):
    cache = new(**MIXED)
    run(cache, 1, 100, 2)
    cache.save(tmp_path / "a.tqs")
    loaded = load(tmp_path / "a.tqs", max_tokens=200, **MIXED)
    assert_same_attention([run(loaded, 2, 100, 2)], [run(cache, 2, 100, 2)])
    before = saved(loaded, tmp_path / "b.tqs")
    assert before == saved(cache, tmp_path / "c.tqs")
    with pytest.raises(libturboquant.CacheFullError):
        load(tmp_path / "a.tqs", max_tok=64, **MIXED)


def test_what_others_left_in_memory(tmp_path):
    """A device's memory is not cleared; no file has anything of earlier tokens."""
    fresh, used = new(**MIXED), new(**MIXED)
    run(used, 7, 300)
    used.reset()
    for i, n_tok in enumerate((20, 60)):
        run(fresh, i, n_tok)
        run(used, i, n_tok)
        assert saved(fresh, tmp_path / "a.tqs") == saved(used, tmp_path / "b.tqs")


def test_files_that_are_refused(tmp_path):
    cache = new(**MIXED)
    run(cache, 1, 100)
    good = saved(cache, tmp_path / "a.tqs")
    path = tmp_path / "bad.tqs"
    for bad in (good[:-1], good[:50], b"", good[:-500] + bytes([good[-500] ^ 1]) + good[-499:], b"x" + good[1:]):
        path.write_bytes(bad)
        with pytest.raises(libturboquant.SnapshotError):
            load(path, **MIXED)
    with pytest.raises(libturboquant.SnapshotError):
        load(tmp_path / "absent.tqs", **MIXED)
    for wrong in ({"n_recent": 32}, {"k_ref_block": 0}, {"layer_v_formats": ["sq4", "sq4"]}, {"seed": 5}, {"page_size": 128}):
        with pytest.raises(libturboquant.SnapshotError, match="another shape"):
            load(tmp_path / "a.tqs", **MIXED | wrong)
    with pytest.raises(libturboquant.ArgumentError, match="budget_bytes"):
        load(tmp_path / "a.tqs", budget_bytes=1 << 30, **MIXED)


def test_full_disk(tmp_path):
    """The old file stays, and nothing beside it."""
    cache = new(**MIXED)
    run(cache, 1, 10)
    before = saved(cache, tmp_path / "a.tqs")
    run(cache, 2, 200)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(libturboquant.SnapshotError, match="was not written"):
            cache.save(tmp_path / "a.tqs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [each.name for each in tmp_path.iterdir()] == ["a.tqs"] and (tmp_path / "a.tqs").read_bytes() == before
    cache.save(tmp_path / "a.tqs")


def test_interrupted_pass_is_not_in_the_file(tmp_path):
    torn = new(**MIXED)
    run(torn, 1, 40)
    with pytest.raises(KeyboardInterrupt):
        run(torn, 2, 5, fail=True)
    torn.save(tmp_path / "a.tqs")
    loaded = load(tmp_path / "a.tqs", **MIXED)
    assert loaded.get_seq_length() == torn.get_seq_length() == loaded.store.length(loaded.seqs[0]) == 40
    assert_same_attention(go_on(loaded, 1), go_on(torn, 1))


def test_caches_that_are_refused(tmp_path):
    path = tmp_path / "unused.tqs"
    with pytest.raises(libturboquant.UnsupportedError, match="holds tokens"):
        new(**MIXED).save(path)
    padded = new(**MIXED)
    run(padded, 1, 40, 2, padding=[3, 3])
    with pytest.raises(libturboquant.UnsupportedError, match="on the left"):
        padded.save(path)
    spoiled = new(**MIXED)
    run(spoiled, 1, 40)
    for layer in range(N_LAYER):
        rows = torch.full((1, N_HEAD_KV, 1, HEAD_DIM), float("inf"), device=DEVICE)
        attention_forward(MODULE, rows.repeat(1, N_HEAD // N_HEAD_KV, 1, 1), *spoiled.update(rows, rows, layer), None)
    with pytest.raises(libturboquant.ArgumentError, match="8 keys or values"):
        spoiled.save(path)
    assert not path.exists()


def test_empty_rows(tmp_path):
    """A batch of the CPU may hold rows of padding alone, whose exact data are anything."""
    with on_cpu():
        cache = new(**PLAIN)
        run(cache, 1, 40, 3, padding=[0, 40, 40], device="cpu")
        cache.save(tmp_path / "a.tqs")
        assert len(load(tmp_path / "a.tqs", None, **PLAIN).seqs) == 3
    loaded = load(tmp_path / "a.tqs", **PLAIN)
    assert [loaded.store.length(seq) for seq in loaded.seqs] == [40, 0, 0]


def test_changes_after_loading(tmp_path):
    """Copies, crops and reordered rows of a cache that was loaded, before its first pass."""
    cache = new(**MIXED)
    run(cache, 1, 100, 2)
    cache.save(tmp_path / "a.tqs")
    one, other = load(tmp_path / "a.tqs", **MIXED), cache
    kept = copy.deepcopy(one)
    for each in (one, other):
        each.crop(-30)
        each.reorder_cache(torch.tensor([1, 1]))
    assert_same_attention(go_on(one, 2), go_on(other, 2))
    assert saved(kept, tmp_path / "b.tqs") == (tmp_path / "a.tqs").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(tmp_path, dtype):
    model = make_model("llama", dtype)
    cache, prompt = compressed(model, preset="TQ4", **SQ8), ids(2, 150)
    logits(model, cache, prompt)
    cache.save(tmp_path / "a.tqs")
    loaded = TurboQuantCache.load(tmp_path / "a.tqs", model.config, device=DEVICE, **SQ8)
    more = torch.cat([prompt, ids(2, 5, seed=8)], dim=1)
    assert same_tokens(model, generated(model, loaded, more), generated(model, cache, more))
