# SPDX-License-Identifier: MIT
"""libturboquant.Cache against attention computed in double precision over what the cache says that it holds."""
import copy
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import libturboquant
from libturboquant._library import BatchRows

N_HEAD, N_HEAD_KV, HEAD_DIM = 6, 2, 64
CALIBRATION = Path(__file__).parents[2] / "tests/golden/calibration_1.tqcal"  # of 3 layers, the second has none


def make(n_layer=2, **options):
    return libturboquant.Cache(n_layer, N_HEAD_KV, HEAD_DIM, **({"max_tok": 4096} | options))


def vectors(rng, n, n_head=N_HEAD_KV):
    return rng.standard_normal((n, n_head, HEAD_DIM), np.float32)


def attention(q, k, v, first_pos=None):
    """[n_query, n_head, head_dim] over all of k, v; causal from first_pos on if given."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, N_HEAD // N_HEAD_KV, axis=1) for x in (k, v))
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)
    if first_pos is not None:
        hidden = np.arange(len(k))[None] > first_pos + np.arange(len(q))[:, None]
        logits[:, hidden] = -np.inf
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v)


def test_attention_over_what_is_read(rng):
    cache = make()
    seq = cache.seq_create()
    cache.append(seq, 1, vectors(rng, 300), vectors(rng, 300))
    assert (cache.length(seq, 0), cache.length(seq, 1)) == (0, 300)
    q = vectors(rng, 3, N_HEAD)
    np.testing.assert_allclose(cache.attend(seq, 1, q), attention(q, *cache.read(seq, 1)), atol=2e-5)
    np.testing.assert_allclose(cache.attend(seq, 1, q, causal=True, first_pos=297),
                               attention(q, *cache.read(seq, 1), first_pos=297), atol=2e-5)


def test_log_sum_exp(rng):
    cache = make()
    seq, q, lse = cache.seq_create(), vectors(rng, 1, N_HEAD), np.zeros((1, N_HEAD), np.float32)
    cache.append(seq, 0, vectors(rng, 50), vectors(rng, 50))
    cache.attend(seq, 0, q, lse=lse)
    k = np.repeat(cache.read(seq, 0)[0], N_HEAD // N_HEAD_KV, axis=1)
    logits = np.einsum("hd,khd->hk", q[0], k) / np.sqrt(HEAD_DIM)
    np.testing.assert_allclose(lse[0], np.log(np.exp(logits).sum(axis=1)), rtol=1e-5)


@pytest.mark.parametrize("options, middle", [
    ({}, ("tt4", "tt4")), ({"k_format": "sq8"}, ("sq8", "tt4")), ({"layer_v_formats": ["sq2", "sq3", "sq2"]}, ("tt4", "sq3"))])
def test_exact_layers(rng, options, middle):
    """The first and the last one get what they are given, to half precision; the format of those between is the one chosen."""
    cache, (k_format, v_format) = make(3, exact_layers=1, **options), middle
    named = make(3, layer_k_formats=["f16", k_format, "f16"], layer_v_formats=["f16", v_format, "f16"])
    k, v = vectors(rng, 300), vectors(rng, 300)
    for layer in range(3):
        read = []
        for each in (cache, named):
            seq = each.seq_create()
            each.append(seq, layer, k, v)
            read.append(each.read(seq, layer))
        np.testing.assert_array_equal(*read)
        assert (abs(read[0][1] - v).max() < 2e-3) == (layer != 1)


@pytest.mark.parametrize("n_layer, exact_layers", [(3, 2), (4, 2), (1, 1), (3, -1), (3, "one")])
def test_exact_layers_leave_some(n_layer, exact_layers):
    with pytest.raises(libturboquant.ArgumentError, match="exact_layers"):
        make(n_layer, exact_layers=exact_layers)


def test_prefill_is_token_by_token(rng):
    together, single = make(), make()
    a, b = together.seq_create(), single.seq_create()
    q, k, v = vectors(rng, 200, N_HEAD), vectors(rng, 200), vectors(rng, 200)
    out = together.prefill(a, 0, q, k, v)
    for i in range(200):
        one = slice(i, i + 1)
        single.append(b, 0, k[one], v[one])
        np.testing.assert_allclose(single.attend(b, 0, q[one]), out[one], atol=1e-4)
    assert np.array_equal(together.read(a, 0)[0], single.read(b, 0)[0])


def test_results_do_not_depend_on_threads(rng):
    q, k, v = vectors(rng, 100, N_HEAD), vectors(rng, 100), vectors(rng, 100)
    results = []
    for n_threads in (1, 3):
        cache = make(n_threads=n_threads)
        results.append(cache.prefill(cache.seq_create(), 0, q, k, v))
    assert np.array_equal(*results)


def test_forks_go_their_own_ways(rng):
    cache = make(1)
    a = cache.seq_create()
    cache.append(a, 0, vectors(rng, 400), vectors(rng, 400))
    b = cache.seq_fork(a)
    assert cache.stats().n_pages_shared > 0
    before = cache.read(a, 0)[0]
    cache.trim(b, 100)
    cache.append(b, 0, vectors(rng, 300), vectors(rng, 300))
    assert np.array_equal(cache.read(a, 0)[0], before)
    assert not np.array_equal(cache.read(b, 0)[0], before)
    cache.seq_free(a)
    assert cache.length(a) == -1 and cache.length(b) == 400


def test_published_prefix_is_found(rng):
    """And is what its tokens would be had they been appended."""
    cache = make(1, page_size=32, checkpoint_stride=64)
    a, plain, tokens = cache.seq_create(), cache.seq_create(), rng.integers(0, 1000, 200)
    k, v = vectors(rng, 200), vectors(rng, 200)
    cache.append(a, 0, k, v)
    cache.append(plain, 0, k[:128], v[:128])
    cache.seq_publish(a, tokens)
    b, n_matched = cache.seq_match(tokens[:150])
    assert n_matched == cache.length(b) == 128
    assert all(np.array_equal(x, y) for x, y in zip(cache.read(b, 0), cache.read(plain, 0)))
    stats = cache.stats()
    assert stats.checkpoint_bytes == 5 * stats.exact_bytes // stats.n_sequences  # at 64, 128 and 192 tokens, and at 64 and 128


def test_without_checkpoints_nothing_is_published(rng):
    cache = make(1)
    seq = cache.seq_create()
    cache.append(seq, 0, vectors(rng, 200), vectors(rng, 200))
    with pytest.raises(libturboquant.ArgumentError, match="create it with a checkpoint_stride"):
        cache.seq_publish(seq, range(200))
    with pytest.raises(libturboquant.ArgumentError, match="multiple of page_size 128"):
        make(1, checkpoint_stride=100)


def test_batches_are_prefills(rng):
    """A pass of sequences of different lengths, with one token or several, next to prefills of their forks."""
    cache, lengths, n_tok = make(1), [5, 130, 257], [1, 3, 1]
    seqs = [cache.seq_create() for _ in lengths]
    for seq, n in zip(seqs, lengths):
        cache.append(seq, 0, vectors(rng, n), vectors(rng, n))
    forks = [cache.seq_fork(seq) for seq in seqs]
    q, k, v = vectors(rng, sum(n_tok), N_HEAD), vectors(rng, sum(n_tok)), vectors(rng, sum(n_tok))
    out, batch = np.zeros_like(q), libturboquant.Batch(cache, len(seqs))
    rows = BatchRows()
    rows.q, rows.k, rows.v, rows.out = (x.ctypes.data for x in (q, k, v, out))
    batch.begin(seqs, n_tok, N_HEAD)
    batch.attend(0, rows)
    batch.end()
    ends = np.cumsum(n_tok)
    for i, (seq, fork) in enumerate(zip(seqs, forks)):
        own = slice(ends[i] - n_tok[i], ends[i])
        np.testing.assert_allclose(out[own], cache.prefill(fork, 0, q[own], k[own], v[own]), atol=2e-6)
        assert cache.length(seq) == lengths[i] + n_tok[i]
        assert all(np.array_equal(x, y) for x, y in zip(cache.read(seq, 0), cache.read(fork, 0)))


def test_save_and_load(rng, tmp_path):
    cache, path = make(), tmp_path / "conversation.tqs"
    seq = cache.seq_create()
    for layer in range(2):
        cache.append(seq, layer, vectors(rng, 300), vectors(rng, 300))
    cache.save(path, [seq])
    info = libturboquant.describe_snapshot(path, verify=True)
    assert (info.n_layer, info.n_sequences, info.n_head_kv) == (2, 1, N_HEAD_KV)
    assert info.k_formats == [libturboquant.format_info("tt4").number] * 2
    other = make()
    (loaded,) = other.load(path)
    assert np.array_equal(other.read(loaded, 1)[1], cache.read(seq, 1)[1])
    q = vectors(rng, 1, N_HEAD)
    assert np.array_equal(other.attend(loaded, 1, q), cache.attend(seq, 1, q))
    with pytest.raises(libturboquant.SnapshotError, match="TQ4|format|layer|shape"):
        make(preset="TQ3").load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(libturboquant.SnapshotError):
        make().load(path)


def test_formats_of_layers(rng):
    cache = make(layer_k_formats=["sq8", "sq2"], layer_v_formats=["f16", "sq4"], n_sink=0, n_recent=0, k_ref_block=0)
    seq, k = cache.seq_create(), vectors(rng, 100)
    errors = []
    for layer in range(2):
        cache.append(seq, layer, k, k)
        errors.append([float(((x - k) ** 2).mean()) for x in cache.read(seq, layer)])
    assert errors[0][0] < 1e-3 < .01 < errors[1][0]
    assert errors[0][1] < 1e-6 < errors[1][1]


def test_calibration(rng, tmp_path):
    calibration = libturboquant.Calibration(CALIBRATION)
    assert calibration.model == "golden" and calibration.nbytes > CALIBRATION.stat().st_size
    plain, by_path, shared = make(3), make(3, calibration=CALIBRATION), make(3, calibration=calibration)
    del calibration  # caches hold it
    k, v, q = vectors(rng, 300), vectors(rng, 300), vectors(rng, 3, N_HEAD)
    for cache in (plain, by_path, shared):
        assert cache.seq_create() == 0
        for layer in range(3):
            cache.append(0, layer, k, v)
    for layer in range(3):
        keys = [cache.read(0, layer)[0] for cache in (plain, by_path, shared)]
        assert (keys[0] == keys[1]).all() == (layer == 1)
        np.testing.assert_array_equal(keys[1], keys[2])
        np.testing.assert_allclose(shared.attend(0, layer, q), attention(q, *shared.read(0, layer)), atol=1e-4)
    shared.save(tmp_path / "x.tqs")
    assert by_path.load(tmp_path / "x.tqs") == [1]
    with pytest.raises(libturboquant.SnapshotError, match="another shape"):
        plain.load(tmp_path / "x.tqs")


def test_calibration_of_one_layer(rng):
    whole = libturboquant.Calibration(CALIBRATION)
    layers = [whole.layer(i) for i in range(3)]
    assert (whole.n_layer, layers[0].n_layer) == (3, 1) and sum(layer.nbytes for layer in layers) < 1.1 * whole.nbytes
    with pytest.raises(libturboquant.RangeError, match="3 layers; layer 3 does not exist"):
        whole.layer(3)
    all_layers = make(3, calibration=whole)
    del whole  # layers hold it
    k, seq = vectors(rng, 300), all_layers.seq_create()
    for i, layer in enumerate(layers):
        single = make(1, calibration=layer)
        single.append(single.seq_create(), 0, k, k)
        all_layers.append(seq, i, k, k)
        np.testing.assert_array_equal(single.read(0, 0)[0], all_layers.read(seq, i)[0])


def test_calibration_refusals(tmp_path):
    with pytest.raises(libturboquant.ArgumentError, match="golden.*3 layers, not 2: it is of another model"):
        make(2, calibration=CALIBRATION)
    with pytest.raises(OSError):
        make(3, calibration=tmp_path / "missing.tqcal")
    (tmp_path / "cut.tqcal").write_bytes(CALIBRATION.read_bytes()[:-1])
    with pytest.raises(libturboquant.TurboQuantError, match="damaged, cut off"):
        libturboquant.Calibration(tmp_path / "cut.tqcal")


def test_dry_run():
    cache = make(dry_run=True)
    seq = cache.seq_create()
    cache.append(seq, 0, n_tok=500)
    assert cache.length(seq) == 500 and cache.stats().n_pages_used == 4


def test_refusals(rng):
    cache = make(max_tok=256)
    seq, k = cache.seq_create(), vectors(rng, 10)
    with pytest.raises(libturboquant.ArgumentError, match=r"give \[any, 2, 64\]"):
        cache.append(seq, 0, k[:, :1], k)
    with pytest.raises(libturboquant.RangeError):
        cache.append(seq, 2, k, k)
    bad = k.copy()
    bad[3, 1, 5] = np.inf
    with pytest.raises(libturboquant.ArgumentError, match="layer 0.*position 3|position 3.*layer 0"):
        cache.append(seq, 0, bad, k)
    assert cache.length(seq) == 0
    with pytest.raises(libturboquant.CacheFullError):
        cache.append(seq, 0, vectors(rng, 300), vectors(rng, 300))
    with pytest.raises(libturboquant.ArgumentError, match="multiple of n_head_kv"):
        cache.attend(seq, 0, vectors(rng, 1, 3))
    with pytest.raises(libturboquant.ArgumentError, match="give a query for each"):
        cache.prefill(seq, 0, vectors(rng, 1, N_HEAD), k, k)
    with pytest.raises(libturboquant.ArgumentError, match="layer_k_formats"):
        make(layer_k_formats=["sq4"])
    with pytest.raises(libturboquant.UnsupportedError):
        libturboquant.Cache(1, 1, 100)
    with pytest.raises(TypeError, match="seq_fork"):
        copy.deepcopy(cache)
    cache.close()
    with pytest.raises(libturboquant.ArgumentError):
        cache.seq_create()


def test_threads_share_a_cache(rng):
    cache, results = make(1), []
    q, k, v = vectors(rng, 300, N_HEAD), vectors(rng, 300), vectors(rng, 300)

    def work():
        seq = cache.seq_create()
        for begin in range(0, 300, 60):
            part = slice(begin, begin + 60)
            cache.prefill(seq, 0, q[part], k[part], v[part])
        results.append(cache.attend(seq, 0, q))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(results[0], result) for result in results)


def test_closed_while_another_thread_is_in_a_call(rng):
    """The call ends as if nothing were; the memory goes afterwards, and calls that follow are refused."""
    q, k = vectors(rng, 64, N_HEAD), vectors(rng, 3000)

    def loop(cache, seq, call, started, ends):
        try:
            while True:
                call(cache, seq)
                started.set()
        except libturboquant.TurboQuantError as error:
            ends.append(error)

    calls = [lambda cache, seq: cache.attend(seq, 0, q), lambda cache, seq: cache.read(seq, 0),
             lambda cache, seq: cache.append(cache.seq_create(), 0, k, k), lambda cache, seq: cache.stats()]
    for call in calls:
        cache = make(1, max_tok=1 << 22, calibration=libturboquant.Calibration(CALIBRATION).layer(0))
        started, ends = threading.Event(), []
        seq = cache.seq_create()
        cache.append(seq, 0, k, k)
        threads = [threading.Thread(target=loop, args=(cache, seq, call, started, ends)) for _ in range(2)]
        for thread in threads:
            thread.start()
        started.wait()
        cache.close()
        del cache
        for thread in threads:
            thread.join()
        assert len(ends) == 2 and all(isinstance(error, libturboquant.ArgumentError) for error in ends)


def test_after_fork(rng):
    """A forked child has its own pool of threads."""
    cache = make(1, n_threads=2)
    seq, q = cache.seq_create(), vectors(rng, 1, N_HEAD)
    cache.append(seq, 0, vectors(rng, 2000), vectors(rng, 2000))
    wanted = cache.attend(seq, 0, q)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(cache.attend(seq, 0, q), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def integer_arguments():
    """A call for each integer argument of the functions of Cache and of its module, with the value as x."""
    zeros = np.zeros((1, N_HEAD_KV, HEAD_DIM), np.float32)
    q = np.zeros((1, N_HEAD, HEAD_DIM), np.float32)
    calls = {
        "seq_fork": lambda c, x: c.seq_fork(x), "seq_free": lambda c, x: c.seq_free(x),
        "seq_publish": lambda c, x: c.seq_publish(x, [1]), "seq_publish tokens": lambda c, x: c.seq_publish(0, [x]),
        "seq_match": lambda c, x: c.seq_match([x]), "trim seq": lambda c, x: c.trim(x, 0),
        "append seq": lambda c, x: c.append(x, 0, zeros, zeros), "append layer": lambda c, x: c.append(0, x, zeros, zeros),
        "attend seq": lambda c, x: c.attend(x, 0, q), "attend layer": lambda c, x: c.attend(0, x, q),
        "prefill seq": lambda c, x: c.prefill(x, 0, q, zeros, zeros), "prefill": lambda c, x: c.prefill(0, x, q, zeros, zeros),
        "read seq": lambda c, x: c.read(x, 0), "read layer": lambda c, x: c.read(0, x),
        "reserve": lambda c, x: c.reserve(x, 1), "page_table": lambda c, x: c.page_table(x),
        "Batch": lambda c, x: libturboquant.Batch(c, x),
        "batch seqs": lambda c, x: libturboquant.Batch(c, 1).begin([x], [1], N_HEAD),
        "batch n_head": lambda c, x: libturboquant.Batch(c, 1).begin([0], [1], x),
        "seq_export": lambda c, x: c.seq_export(x), "save": lambda c, x: c.save("unused.tqs", [x]),
    }
    wide = {
        "trim": lambda c, x: c.trim(0, x), "append n_tok": lambda c, x: make(dry_run=True).append(0, 0, n_tok=x),
        "first_pos": lambda c, x: c.attend(0, 0, q, causal=True, first_pos=x),
        "window": lambda c, x: c.attend(0, 0, q, window=x), "read first": lambda c, x: c.read(0, 0, x, 1),
        "read n": lambda c, x: c.read(0, 0, 0, x), "reserve n_tok": lambda c, x: c.reserve(0, x),
        "batch n_tok": lambda c, x: libturboquant.Batch(c, 1).begin([0], [x], N_HEAD),
        "first_page": lambda c, x: c.seq_export(0, x), "seed": lambda c, x: make(seed=x),
        "Codec": lambda c, x: libturboquant.Codec("sq4", 64, x), "budget_bytes": lambda c, x: make(budget_bytes=x),
        "offload_bytes": lambda c, x: make(offload_folder=".", offload_bytes=x), "max_tok": lambda c, x: make(max_tok=x),
    }
    shapes = {
        "n_layer": lambda c, x: libturboquant.Cache(x, 1, 64), "n_head_kv": lambda c, x: libturboquant.Cache(1, x, 64),
        "head_dim": lambda c, x: libturboquant.Cache(1, 1, x), "codec": lambda c, x: libturboquant.Codec("sq4", x),
        "format_info": lambda c, x: libturboquant.format_info(x), "info": lambda c, x: libturboquant.format_info("sq4", x),
        "bits": lambda c, x: libturboquant.preset("TQ4").bits_per_value(x, 2, 100),
        "layer": lambda c, x: libturboquant.Calibration(CALIBRATION).layer(x),
        "formats": lambda c, x: make(layer_k_formats=[x, 1]),
        **{name: lambda c, x, name=name: make(**{name: x})
           for name in ("head_dim_v", "k_format", "v_format", "n_sink", "n_recent", "k_ref_block", "checkpoint_stride",
                        "page_size", "n_threads")},
    }
    yield from ((name, call, 1 << 32) for name, call in (calls | shapes).items())
    yield from ((name, call, 1 << 64) for name, call in wide.items())


@pytest.mark.parametrize("call, period", [pytest.param(call, period, id=name) for name, call, period in integer_arguments()])
def test_integers_are_not_cut(rng, call, period):
    """A value that ctypes would cut to one that is there is refused, whichever argument it is, and nothing changes."""
    cache = make()
    seq = cache.seq_create()
    cache.append(seq, 0, vectors(rng, 5), vectors(rng, 5))
    before = cache.stats()
    for value in (period, period + 1, period + 64, -period, 1.5):
        with pytest.raises(libturboquant.TurboQuantError):
            call(cache, value)
    assert cache.length(seq) == 5 and cache.stats() == before


def test_integers_of_numpy_are_taken(rng):
    cache = make(np.int64(2), n_sink=np.int32(4), max_tok=np.int64(4096))
    seq = np.int64(cache.seq_create())
    cache.append(seq, np.int32(1), vectors(rng, 5), vectors(rng, 5))
    assert cache.length(seq, np.int8(1)) == 5 and cache.length(1 << 32) == cache.length(0, 1 << 32) == -1


@pytest.mark.parametrize("of", [
    lambda c, path: c.save(path), lambda c, path: c.load(path), lambda c, path: libturboquant.describe_snapshot(path),
    lambda c, path: libturboquant.Calibration(path), lambda c, path: make(3, calibration=path),
    lambda c, path: make(offload_folder=path, offload_bytes=1 << 20, budget_bytes=1 << 22)],
    ids=["save", "load", "describe_snapshot", "Calibration", "calibration", "offload_folder"])
@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_paths_are_not_cut(rng, tmp_path, monkeypatch, of, kind):
    """A NUL character ends a path in C: what it begins with must neither be read nor written."""
    monkeypatch.chdir(tmp_path)
    cache = make()
    cache.append(cache.seq_create(), 0, vectors(rng, 5), vectors(rng, 5))
    for name in ("file", "calibration"):
        cache.save(name) if name == "file" else (tmp_path / name).write_bytes(CALIBRATION.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for begin in ("file", "calibration", "new", "."):
        with pytest.raises(libturboquant.ArgumentError, match="NUL"):
            of(cache, kind(begin + "\0b"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_format_names_are_not_cut():
    with pytest.raises(libturboquant.ArgumentError, match="NUL"):
        libturboquant.format_info("sq4\0x")


def exported(rng):
    """A cache of 300 tokens in three pages, and the arrays of its sequence."""
    cache = make()
    seq = cache.seq_create()
    for layer in range(2):
        cache.append(seq, layer, vectors(rng, 300), vectors(rng, 300))
    stats = cache.stats()
    pages, exact = np.zeros((3, stats.page_bytes), np.uint8), np.zeros(stats.exact_bytes, np.uint8)
    cache.seq_export(seq, 0, pages, exact)
    return cache, seq, pages, exact


def test_sequences_go_through_arrays(rng):
    cache, seq, pages, exact = exported(rng)
    other = cache.seq_create()
    cache.seq_import(other, 300, 0, pages, exact.view(np.float16))
    assert all(np.array_equal(*both) for both in zip(cache.read(other, 1), cache.read(seq, 1)))


def arrays_of_another_size(x):
    """x of other sizes, types and layouts: the library would read or write beyond them, or between them."""
    cut, wide = np.ascontiguousarray(x[..., :-1]), np.concatenate([x, x], axis=-1)
    return {"short": cut, "long": wide, "strided": wide[..., ::2], "backwards": x[..., ::-1], "empty": x[..., :0],
            "number": x[..., :1].reshape(-1)[0], "objects": x.astype(object), "broadcast": np.broadcast_to(x[:1], x.shape)}


@pytest.mark.parametrize("side", ["pages", "exact"])
def test_arrays_of_another_size(rng, side):
    cache, seq, pages, exact = exported(rng)
    given = {"pages": pages, "exact": exact}
    wrong = arrays_of_another_size(given[side])
    if side == "pages":
        wrong |= {"float": pages.astype(np.float32), "one": pages[0], "flat": pages.reshape(-1), "many": pages[None],
                  "signed": pages.view(np.int8), "order": np.asfortranarray(pages)}
    before = cache.stats()
    for name, array in wrong.items():
        for call in (lambda arrays: cache.seq_export(seq, 0, **arrays), lambda arrays: cache.seq_import(seq, 300, 0, **arrays)):
            with pytest.raises(libturboquant.ArgumentError):
                call(given | {side: array})
                pytest.fail(name)
    frozen = given[side].copy()
    frozen.flags.writeable = False
    with pytest.raises(libturboquant.ArgumentError, match=f"{side}: is read-only"):
        cache.seq_export(seq, 0, **given | {side: frozen})
    for n in (2, 4):
        with pytest.raises(libturboquant.ArgumentError, match="pages"):
            cache.seq_import(seq, 300, 0, np.zeros((n, pages.shape[1]), np.uint8), exact)
    with pytest.raises(libturboquant.ArgumentError, match="pages: give 3"):
        cache.seq_import(seq, 300, 0, None, exact)
    with pytest.raises(libturboquant.RangeError):
        cache.seq_import(seq, 100, 2, None, exact)
    assert cache.length(seq) == 300 and cache.stats() == before


def test_collected_before_its_users():
    """In a cycle of references the handle may be finalized first: what comes later finds a closed cache."""
    found = []

    class User:
        def __init__(self):
            self.cache, self.me = make(), self
            self.handle = self.cache._handle

        def __del__(self):
            self.handle.__del__()
            found.append(self.cache.closed)
            with pytest.raises(libturboquant.ArgumentError):
                self.cache.seq_create()
            found.append("refused")

    User()
    gc.collect()
    assert found == [True, "refused"]
