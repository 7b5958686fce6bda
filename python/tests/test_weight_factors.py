# SPDX-License-Identifier: MIT
"""Factors for channels of keys, against their definition; no engine is needed."""
import warnings

import numpy as np
import pytest
import libturboquant
from libturboquant import weight_factors


def from_energies(*energies):
    """Exponents of two, to the nearest, and the spread."""
    quarters, spread = weight_factors.from_energies(*energies)
    return np.rint(quarters / 4), spread


def of_module(*given):
    """The same of a module, to the nearest."""
    found = weight_factors.of_module(*given)
    return None if found is None else (np.rint(found[0] / 4), found[1])


def halves(n):
    return np.roll(np.arange(n), n // 2)


def error(keys, queries, partners, quarters):
    """What the error of a logit is in energy proportional to, for each KV head; keys and queries after RoPE."""
    queries = queries.reshape(len(keys), -1, keys.shape[1]).mean(axis=1)
    keys, queries = ((energy + energy[:, partners]) / 2 for energy in (keys, queries))
    squares = 2.0 ** (quarters / 2)
    return (keys / squares).sum(axis=1) * (queries * squares).sum(axis=1)


@pytest.mark.parametrize("partners", [halves(64), np.arange(64) ^ 1, np.arange(64)], ids=["halves", "neighbours", "none"])
def test_least_error(partners):
    """Near the least that any factors give: rounding them to quarters of octaves costs 1 %."""
    rng = np.random.default_rng(1)
    keys, queries = np.exp2(4 * rng.standard_normal((2, 64))), np.exp2(2 * rng.standard_normal((6, 64)))
    found, _ = weight_factors.from_energies(keys, queries, partners)
    assert found.dtype == np.int8 and found.shape == (2, 64) and (found == found[:, partners]).all()
    least = error(keys, queries, partners, found)
    assert (least < .5 * error(keys, queries, partners, 0 * found)).all()
    of_groups = queries.reshape(2, 3, 64).mean(axis=1)
    best = np.sqrt((keys + keys[:, partners]) * (of_groups + of_groups[:, partners])).sum(axis=1) ** 2 / 4
    assert (least < 1.02 * best).all()


@pytest.mark.parametrize("scale", [1e-12, 1, 1e12])
def test_a_common_factor_changes_nothing(scale):
    rng = np.random.default_rng(2)
    keys, queries = np.exp2(4 * rng.standard_normal((2, 64))), np.exp2(rng.standard_normal((4, 64)))
    plain, _ = from_energies(keys, queries, halves(64))
    assert np.array_equal(from_energies(scale * keys, queries / scale, halves(64))[0], plain)
    assert abs(plain.mean()) < .1


def test_channels_without_energy():
    """They get no factor without bound, and a head of nothing, or of what is not finite, none at all."""
    keys, queries = np.ones((2, 64)), np.ones((2, 64))
    keys[:, :8] = 0
    keys[:, 32:40] = 0
    assert abs(from_energies(keys, queries, halves(64))[0]).max() <= 4
    for bad in (0, np.nan, np.inf):
        keys[1] = bad
        assert not from_energies(keys, queries, halves(64))[0][1].any()


def test_factors_are_bounded():
    keys, queries = np.ones((1, 64)), np.ones((1, 64))
    keys[0, ::4], queries[0, ::4] = 1e30, 1e-30
    assert abs(from_energies(keys, queries, np.arange(64))[0]).max() <= 8


@pytest.mark.parametrize("n_turned", [64, 16])
@pytest.mark.parametrize("kind", ["halves", "neighbours"])
def test_partners(kind, n_turned):
    wanted = np.arange(64)
    wanted[:n_turned] = halves(n_turned) if kind == "halves" else np.arange(n_turned) ^ 1

    def rope(x):
        angle = np.where(np.arange(64) < n_turned, .5, 0)
        return x * np.cos(angle) + x[:, wanted] * np.sin(angle)

    assert np.array_equal(weight_factors.partners_of(rope, 64), wanted)


@pytest.mark.parametrize("n_ref", [1, 16, 64])
def test_what_references_leave_of_a_constant(n_ref):
    """By definition: the mean square, over a block, of what turns, less its mean. Factors are those of keys with only that."""
    angles = np.array([1, .3, .05, 1e-3, 1e-6, 0] + [.7] * 58)
    turned = np.exp(1j * angles[:, None] * np.arange(n_ref))
    left = (abs(turned - turned.mean(axis=1, keepdims=True)) ** 2).mean(axis=1)
    rng = np.random.default_rng(5)
    means, noise = 2 ** rng.standard_normal((1, 64)), 2 ** rng.standard_normal((1, 64))
    queries, none = np.ones((2, 64)), np.arange(64)
    for n, part in ((n_ref, left), (0, np.ones(64))):
        found, spread = from_energies(means**2 + noise, queries, none, means, angles, n)
        wanted, of_wanted = from_energies(part * means**2 + noise, queries, none)
        assert np.array_equal(found, wanted) and abs(spread / of_wanted - 1) < 1e-4


def test_biases_that_references_take_out(weights):
    """They do not count: in pairs that hardly turn within a block. In those that do, and without references, they do."""
    q, _, _ = weights
    bias, angles = np.tile(np.array([0, 1000, 0, 1000.0]), 4), np.tile(np.array([1, .9, 1e-4, 1e-4]), 2)
    module = Attention(q_proj=Projection(q), k_proj=Projection(np.abs(q[:16]), bias))
    found = [of_module(module, 4, 2, 8, lambda x: x, np.asarray, lambda: (halves(8), angles), n)[0]
             for n in (0, 64)]
    gaps = [exponents[:, [1, 3]] - exponents[:, [0, 2]] for exponents in found]
    assert (gaps[0] >= 2).all() and (gaps[1][:, 0] >= 2).all() and (abs(gaps[1][:, 1]) <= 1).all()


class Projection:
    def __init__(self, weight, bias=0):
        self.weight, self.bias = weight, bias

    def __call__(self, x):
        return x @ self.weight.T + self.bias


class Attention:
    def __init__(self, **parts):
        self.__dict__ |= parts


def exponents_of(module, n_head=4):
    found = of_module(module, n_head, 2, 8, lambda x: x, np.asarray, lambda: (halves(8), np.ones(8)), 0)
    return found if found is None else found[0]


@pytest.fixture(scope="module")
def weights():
    """Of queries and keys, and the factors by arithmetic on them."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((32, 48)), rng.standard_normal((16, 48)) * 2.0 ** np.tile([0, 4, 0, -4, 0, 4, 0, -4], 2)[:, None]
    return q, k, np.tile(np.array([0, 2, 0, -2], np.int8), (2, 2))


@pytest.mark.parametrize("n_head", [4, None], ids=["given", "found"])
def test_kinds_of_projections(weights, n_head):
    """Apart, side by side, with a gate in each head; keys with a bias that outweighs the rest."""
    q, k, wanted = weights
    v = np.zeros((16, 48))
    assert np.array_equal(exponents_of(Attention(q_proj=Projection(q), k_proj=Projection(k)), n_head), wanted)
    assert np.array_equal(exponents_of(Attention(qkv_proj=Projection(np.concatenate([q, k, v]))), n_head), wanted)
    flat = k / 2.0 ** np.tile([0, 4, 0, -4, 0, 4, 0, -4], 2)[:, None]
    bias = np.tile([0, 256 * 48**.5, 0, 0, 0, 0, 0, 0], 2)
    found = exponents_of(Attention(q_proj=Projection(q), k_proj=Projection(flat, bias)), n_head)
    assert (found[:, 1] - found[:, 0] >= 3).all() and np.array_equal(found[:, 1], found[:, 5])


def test_gates_and_heads_of_three(weights):
    q, k, wanted = weights
    gated = np.concatenate([q.reshape(4, 8, 48), 100 * np.ones((4, 8, 48))], axis=1).reshape(64, 48)
    assert np.array_equal(exponents_of(Attention(q_proj=Projection(gated), k_proj=Projection(k))), wanted)
    heads = np.concatenate([x.reshape(2, 8, 48) for x in (q[:16], k, 0 * k)], axis=1).reshape(48, 48)
    assert np.array_equal(exponents_of(Attention(query_key_value=Projection(heads)), 2), wanted)


def test_norms(weights):
    """Their weights are what counts, whatever the projections are; of a head, or of all heads together."""
    q, k, wanted = weights

    class Norm:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, x):
            return x / np.sqrt((x * x).mean(-1, keepdims=True)) * self.weight

    flat, by_channel = k / 2.0 ** np.tile([0, 4, 0, -4, 0, 4, 0, -4], 2)[:, None], 2.0 ** np.array([0, 4, 0, -4, 0, 4, 0, -4])
    parts = {"q_proj": Projection(q), "k_proj": Projection(flat)}
    for names in weight_factors.NORMS:
        for of_queries, of_keys in ((np.ones(8), by_channel), (np.ones(32), np.tile(by_channel, 2))):
            found = exponents_of(Attention(**parts, **dict(zip(names, (Norm(of_queries), Norm(of_keys))))))
            assert np.array_equal(found, wanted)


def test_the_norm_before_counts(weights):
    """It is found where its layer calls the attention, and its weights scale what is projected."""
    q, k, _ = weights

    class Layer:
        def __init__(self, **parts):
            self._modules = parts

        def __call__(self):
            return self._modules["self_attn"]()

    class Called(Attention):
        def __call__(self):
            return weight_factors.norm_before(self)

    norm, attention = object(), Called()
    assert Layer(input_layernorm=norm, self_attn=attention)() is norm
    assert Layer(self_attn=attention)() is None and weight_factors.norm_before(attention) is None
    gains = np.ones(48)
    gains[:8] = 64
    of_gains = k * np.where(np.arange(48) < 8, 0, 1)
    of_gains[1::8, :8] = 4  # channel 1 takes what the norm makes large
    module = Attention(q_proj=Projection(q), k_proj=Projection(of_gains))
    found = [weight_factors.of_module(module, 4, 2, 8, lambda x: x, np.asarray, lambda: (halves(8), np.ones(8)), 0, norm)[0]
             for norm in (None, lambda x: x * gains)]
    assert (found[1][:, 1] - found[1][:, 0] >= found[0][:, 1] - found[0][:, 0] + 4).all()


def test_the_guard_tells():
    with pytest.warns(UserWarning, match="k_format='sq8'"):
        weight_factors.warn_of_spread(libturboquant.format_info("tt3").number, 20, "layer 3")
    with warnings.catch_warnings(action="error"):
        weight_factors.warn_of_spread(libturboquant.format_info("tt3").number, 6, "layer 3")


def test_what_is_not_known(weights):
    q, k, _ = weights
    for module in (Attention(), Attention(c_attn=Projection(q)), Attention(q_proj=Projection(q), k_proj=Projection(k[:12])),
                   Attention(q_proj=Projection(q[:20]), k_proj=Projection(k)), Attention(qkv_proj="none"),
                   Attention(query_key_value=Projection(q))):
        assert exponents_of(module) is None


def test_choices():
    assert weight_factors.chosen(None, None) == "weights" and weight_factors.chosen(None, "x.tqcal") == "off"
    with pytest.raises(libturboquant.ArgumentError, match="give one of 'weights', 'off'"):
        weight_factors.chosen("on", None)
    with pytest.raises(libturboquant.ArgumentError, match="learnt from keys without factors"):
        weight_factors.chosen("weights", "x.tqcal")

def test_channel_factors():
    """2^(quarters / 4), correctly rounded."""
    quarters = np.arange(-32, 33, dtype=np.int8).reshape(5, 13)
    assert np.array_equal(weight_factors.channel_factors(quarters), np.float32(2.0 ** (quarters / 4.0)))


def test_octaves_leave_the_least_error():
    """No other shift of a head's factors before they are rounded is better; those of partners are the same."""
    chance = np.random.default_rng(1)
    keys, queries = (4.0 ** chance.normal(0, 2, (n, 32)) for n in (2, 6))
    partners = np.roll(np.arange(32, dtype=np.int32), 16)
    found = weight_factors.octaves_from_energies(keys, queries, partners)
    np.testing.assert_array_equal(found, found[:, partners])
    quarters, _ = weight_factors.from_energies(keys, queries, partners)

    def errors(octaves):
        return (keys / 4.0 ** octaves).sum(axis=1) * (queries.reshape(2, 3, 32).mean(axis=1) * 4.0 ** octaves).sum(axis=1)

    for shift in range(4):
        assert (errors(found) <= errors(np.rint((quarters + shift) / 4)) * 1.000001).all()
    assert (abs(found - quarters / 4) <= 1.25).all()
