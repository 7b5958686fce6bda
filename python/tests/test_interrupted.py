# SPDX-License-Identifier: MIT
"""A forward pass of Transformers that does not end: the next use of the cache goes back to what there was before it."""
import copy

import pytest
import torch
import libturboquant
from tiny import BACKEND, DEVICE, EXACT, F16, ON_DEVICE, SQ8, compressed, generated, ids, logits, make_model

# What the failed pass pushed out of the ring is coded: a part of what coding moves these models' logits by (.7 with sq4).
CODED = .05
# On a GPU products are added up in an order of their own.
SAME = .005 if BACKEND == "cuda" else 0
# The whole context in the ring: nothing is coded, and going back is exact.
IN_RING = SQ8 | EXACT


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end the tests."""


def interrupt(module):
    """Let the next call of a module raise. Returns what undoes that."""
    def fail(*arguments):
        handle.remove()
        raise Interrupted

    handle = module.register_forward_pre_hook(fail)


def places(model):
    """Where a pass may be interrupted: before a layer, between a layer's keys and its attention's end, behind it; and after all
    layers but before the end of the last."""
    layers = model.model.layers
    return {"first": layers[0], "attention": layers[1].self_attn.o_proj, "mlp": layers[2].mlp,
            "last": layers[-1].self_attn.q_proj}


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.mark.parametrize("n_first, n_interrupted, options", [
    (0, 300, SQ8), (0, 40, SQ8), (50, 300, IN_RING), (150, 30, IN_RING), (200, 1, IN_RING), (150, 30, F16)])
@pytest.mark.parametrize("place", ["first", "attention", "mlp", "last"])
def test_goes_on_as_if_never_interrupted(llama, place, n_first, n_interrupted, options):
    if ON_DEVICE and options is F16:
        pytest.skip("devices have no f16")
    cache, fresh = compressed(llama, **options), compressed(llama, **options)
    for each in (cache, fresh):
        if n_first:
            logits(llama, each, ids(2, n_first))
    interrupt(places(llama)[place])
    with pytest.raises(Interrupted):
        logits(llama, cache, ids(2, n_interrupted, seed=4))
    assert cache.get_seq_length() == n_first and cache.get_mask_sizes(7, 0) == (n_first + 7, 0)
    for n, seed in ((n_interrupted, 5), (1, 6), (20, 7)):
        wanted = logits(llama, fresh, ids(2, n, seed=seed))
        torch.testing.assert_close(logits(llama, cache, ids(2, n, seed=seed)), wanted, atol=SAME, rtol=0)
    assert cache.get_seq_length() == fresh.get_seq_length()
    assert [cache.store.length(seq) for seq in cache.seqs] == [fresh.store.length(seq) for seq in fresh.seqs]


@pytest.mark.parametrize("place", ["attention", "last"])
@pytest.mark.parametrize("n_interrupted", [1, 30, 200])
def test_what_left_the_ring_stays_coded(llama, place, n_interrupted):
    """A prompt of several rings, and then a pass that pushes tokens out of it."""
    options = SQ8 | {"n_recent": 64}
    cache, fresh = compressed(llama, **options), compressed(llama, **options)
    for each in (cache, fresh):
        logits(llama, each, ids(1, 300))
    interrupt(places(llama)[place])
    with pytest.raises(Interrupted):
        logits(llama, cache, ids(1, n_interrupted, seed=4))
    cache.crop(0)  # a use
    for layer in range(4):
        for found, wanted in zip(cache.store.read(cache.seqs[0], layer), fresh.store.read(fresh.seqs[0], layer)):
            assert found.shape == wanted.shape and abs(found - wanted).max() < CODED
    for n, seed in ((n_interrupted, 5), (1, 6)):
        wanted = logits(llama, fresh, ids(1, n, seed=seed))
        torch.testing.assert_close(logits(llama, cache, ids(1, n, seed=seed)), wanted, atol=CODED, rtol=0)


def test_every_place_in_turn(llama):
    """Interrupted again and again, with passes of several lengths between."""
    cache, fresh = compressed(llama, **IN_RING), compressed(llama, **IN_RING)
    for i in range(16):
        interrupt(list(places(llama).values())[i % 4])
        with pytest.raises(Interrupted):
            logits(llama, cache, ids(1, 1 + 7 * (i % 3), seed=50 + i))
        if i % 5 == 3:  # twice, in another place
            interrupt(list(places(llama).values())[(i + 1) % 4])
            with pytest.raises(Interrupted):
                logits(llama, cache, ids(1, 9, seed=80 + i))
        wanted = logits(llama, fresh, ids(1, 10, seed=i))
        torch.testing.assert_close(logits(llama, cache, ids(1, 10, seed=i)), wanted, atol=SAME, rtol=0)


def test_padded_rows(llama):
    """The interrupted pass has padding where the next has none, and the other way round."""
    cache, fresh = compressed(llama, **IN_RING), compressed(llama, **IN_RING)
    mask = torch.ones(2, 60, dtype=torch.long, device=DEVICE)
    mask[0, :20] = 0
    for each in (cache, fresh):
        logits(llama, each, ids(2, 60), attention_mask=mask)
    more = torch.cat([mask, torch.ones(2, 10, dtype=torch.long, device=DEVICE)], 1)
    more[1, 60:65] = 0
    interrupt(llama.model.layers[2].mlp)
    with pytest.raises(Interrupted):
        logits(llama, cache, ids(2, 10, seed=4), attention_mask=more)
    more[1, 60:65], more[0, 60:63] = 1, 0
    wanted = logits(llama, fresh, ids(2, 10, seed=5), attention_mask=more)
    torch.testing.assert_close(logits(llama, cache, ids(2, 10, seed=5), attention_mask=more), wanted, atol=SAME, rtol=0)


def test_whatever_comes_next(llama, tmp_path):
    """Cropping, copies, other rows and files find what there was before the interrupted pass."""
    prompt, more = ids(2, 60), ids(2, 10, seed=9)
    fresh = compressed(llama, **IN_RING)
    logits(llama, fresh, prompt)

    def interrupted():
        cache = compressed(llama, **IN_RING)
        logits(llama, cache, prompt)
        interrupt(llama.model.layers[2].mlp)
        with pytest.raises(Interrupted):
            logits(llama, cache, ids(2, 8, seed=4))
        return cache

    def check(cache, wanted):
        wanted = copy.deepcopy(wanted)
        found = logits(llama, cache, more)
        torch.testing.assert_close(found, logits(llama, wanted, more), atol=SAME, rtol=0)

    check(copy.deepcopy(interrupted()), fresh)
    cropped, cache = copy.deepcopy(fresh), interrupted()
    for each in (cropped, cache):
        each.crop(-5)
    assert cache.get_seq_length() == 55
    check(cache, cropped)
    turned, cache = copy.deepcopy(fresh), interrupted()
    for each in (turned, cache):
        each.reorder_cache(torch.tensor([1, 1]))
    check(cache, turned)
    cache = interrupted()
    cache.save(tmp_path / "cache.tqs")
    loaded = type(cache).load(tmp_path / "cache.tqs", llama.config, device=DEVICE if BACKEND == "cuda" else None)
    assert loaded.get_seq_length() == 60
    assert repr(interrupted()).count("2 sequences of 60 tokens")
    cache = interrupted()
    cache.reset()
    assert cache.get_seq_length() == 0


def test_beams_go_on(llama):
    """Interrupted in the midst of a beam search: the cache holds the beams of its last whole pass, and its next is right."""
    cache = compressed(llama, **IN_RING)
    layer, n = llama.model.layers[2].mlp, 0

    def count(*arguments):
        nonlocal n
        n += 1
        if n == 6:
            raise Interrupted

    handle = layer.register_forward_pre_hook(count)
    with pytest.raises(Interrupted):
        generated(llama, cache, ids(1, 40), num_beams=3)
    handle.remove()
    assert len(cache.seqs) == 3 and cache.get_seq_length() == 44
    other = copy.deepcopy(cache)
    assert torch.equal(logits(llama, cache, ids(3, 5)), logits(llama, other, ids(3, 5)))
    assert {cache.store.length(seq) for seq in cache.seqs} == {49}


def test_generation_goes_on(llama):
    """A long prompt in parts, whose third part is interrupted, is finished and generated from."""
    prompt, cache, fresh = ids(1, 400), compressed(llama, **IN_RING), compressed(llama, **IN_RING)
    for each in (cache, fresh):
        logits(llama, each, prompt[:, :300], parts=2)
    interrupt(llama.model.layers[2].mlp)
    with pytest.raises(Interrupted):
        logits(llama, cache, prompt[:, 300:])
    assert torch.equal(generated(llama, cache, prompt), generated(llama, fresh, prompt))


def test_whole_after_the_last_layer(llama):
    """What comes behind the last layer's attention has no part in the cache: all layers hold the tokens."""
    cache, fresh = compressed(llama, **IN_RING), compressed(llama, **IN_RING)
    interrupt(llama.lm_head)
    with pytest.raises(Interrupted):
        logits(llama, cache, ids(1, 30))
    logits(llama, fresh, ids(1, 30))
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(logits(llama, cache, ids(1, 5)), logits(llama, fresh, ids(1, 5)), atol=SAME, rtol=0)


def test_layers_with_a_window():
    """They also go back, exactly."""
    model = make_model("gemma3", sliding_window=32, layer_types=["sliding_attention", "full_attention"] * 2)
    for last in ("full", "sliding"):
        if last == "sliding":
            model = make_model("gemma3", sliding_window=32, layer_types=["full_attention", "sliding_attention"] * 2)
        for n_first in (0, 20, 90):
            for layer in range(4):
                cache, fresh = compressed(model, **IN_RING), compressed(model, **IN_RING)
                for each in (cache, fresh):
                    if n_first:
                        logits(model, each, ids(1, n_first))
                interrupt(model.model.layers[layer].self_attn.q_proj)
                with pytest.raises(Interrupted):
                    logits(model, cache, ids(1, 10, seed=4))
                assert cache.get_seq_length() == n_first
                for n, seed in ((12, 5), (1, 6)):
                    wanted = logits(model, fresh, ids(1, n, seed=seed))
                    torch.testing.assert_close(logits(model, cache, ids(1, n, seed=seed)), wanted, atol=SAME, rtol=0)


def test_recurrent_states_cannot_go_back(llama):
    cache = compressed(llama, **IN_RING)
    logits(llama, cache, ids(1, 20))
    interrupt(llama.model.layers[2].mlp)
    with pytest.raises(Interrupted):
        logits(llama, cache, ids(1, 8))
    cache._come_recurrent(1)  # as a layer of linear attention does
    with pytest.raises(libturboquant.ArgumentError, match="recurrent state.*reset"):
        logits(llama, cache, ids(1, 8))
    cache.reset()
    logits(llama, cache, ids(1, 8))


def test_a_model_with_fewer_layers_than_it_says():
    """Its passes never end: that is said, rather than that each is taken back."""
    model = make_model("llama")
    cache = compressed(model)
    del model.model.layers[3]
    with pytest.raises(libturboquant.ArgumentError, match="after layer 2 of 4.*num_hidden_layers"):
        for _ in range(3):
            logits(model, cache, ids(1, 10))


def test_says_so(llama, caplog):
    cache = compressed(llama)
    logits(llama, cache, ids(1, 20))
    interrupt(llama.model.layers[2].mlp)
    with pytest.raises(Interrupted):
        logits(llama, cache, ids(1, 8))
    logits(llama, cache, ids(1, 8))
    assert "interrupted after layer 2 of 4" in caplog.text and "the 20 tokens before it" in caplog.text
