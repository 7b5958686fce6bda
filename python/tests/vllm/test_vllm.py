# SPDX-License-Identifier: MIT
"""
The plug-in in stock vLLM on a CPU with small random models, mostly in float32, where stock vLLM gives the same however a prompt
is cut.
"""
import random

import pytest

EIGHT = {"formats": "sq8/sq8", "n_recent": 64}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def row(n, seed):
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(n)]


def measured(*lengths):
    return {"kind": "generate", "prompts": [row(n, seed) for seed, n in enumerate(lengths, 1)], "n": 16, "logprobs": True}


def moved(results, wanted):
    """Mean distance of the log-probabilities of the prompts' tokens."""
    pairs = [pair for a, b in zip(results, wanted) for pair in zip(a["logprobs"], b["logprobs"])]
    return mean(abs(a - b) for a, b in pairs)


def tokens(results):
    return [result["tokens"] for result in results]


@pytest.fixture(scope="module")
def stock(engine, toy):
    """stock(model): what vLLM itself gives."""
    known = {}

    def call(name):
        if name not in known:
            known[name] = engine(toy(name), None, [measured(400, 300)])[0]
        return known[name]

    return call


def test_tensor_parallel(engine, toy):
    """Each rank has its KV heads, and there is nothing to tell the others."""
    prompts = [row(600, 1), row(600, 1)[:500] + row(60, 2), row(9, 3)]
    steps = [{"kind": "generate", "prompts": prompts[:1], "n": 32}, {"kind": "generate", "prompts": prompts, "n": 32}]
    one, two, four = (engine(toy("llama"), EIGHT, steps, tensor_parallel_size=n) for n in (1, 2, 4))
    assert [tokens(step) for step in two] == [tokens(step) for step in one]
    assert [tokens(step) for step in four] == [tokens(step) for step in one]
    assert two[1][0]["cached"] > 500, "a prefix is hit on all ranks"


def test_layers_with_a_window_and_capped_logits(engine, toy, stock):
    """Gemma 2: every second layer has a window and is left to vLLM."""
    ours = engine(toy("gemma2"), EIGHT, [measured(400, 300)])[0]
    assert tokens(ours) == tokens(stock("gemma2"))
    assert 0 < moved(ours, stock("gemma2")) < 0.003


def test_bfloat16(engine, toy):
    """Rounding to BF16 moves more than eight bits do."""
    plain = engine(toy("qwen3"), None, [measured(400, 300)], dtype="bfloat16")[0]
    exact = engine(toy("qwen3"), None, [measured(400, 300)])[0]
    ours = engine(toy("qwen3"), EIGHT, [measured(400, 300)], dtype="bfloat16")[0]
    assert moved(ours, exact) < 1.5 * moved(plain, exact)


def test_factors_from_the_weights(engine, toy, stock):
    """Keys with outlier channels."""
    off = engine(toy("qwen2"), {"formats": "tt4/tt4", "factors": "off"}, [measured(400, 300)])[0]
    on = engine(toy("qwen2"), {"formats": "tt4/tt4"}, [measured(400, 300)])[0]
    assert moved(on, stock("qwen2")) < 0.7 * moved(off, stock("qwen2"))
