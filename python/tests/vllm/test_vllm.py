# SPDX-License-Identifier: MIT
"""The plug-in in stock vLLM on a CPU. All in float32, where stock vLLM gives the same however a prompt is cut."""
import os

import pytest

EIGHT = {"formats": "sq8/sq8", "n_recent": 64}
TAILS = ["\n\nThe capital of France is", "\n\nIn short, this chapter says that"]


def tokens(results):
    return [row["tokens"] for row in results]


@pytest.fixture(scope="module")
def prompts(smollm, text):
    _, tokenizer = smollm
    prefix = tokenizer.encode(text[20000:24800])[:600]
    short = [tokenizer.encode(x) for x in ("The capital of France is", "Write a haiku about the sea.")]
    return [prefix + tokenizer.encode(x) for x in TAILS], short


@pytest.fixture(scope="module")
def passages(smollm, text):
    _, tokenizer = smollm
    return [tokenizer.encode(text[at : at + 8000])[:1000] for at in (20000, 120000)]


def ways(prompts):
    """Alone, from the prefix cache, together without it, and short ones."""
    long, short = prompts
    return [{"kind": "generate", "prompts": long[:1], "n": 48}, {"kind": "generate", "prompts": long, "n": 48},
            {"kind": "generate", "prompts": long, "n": 48, "reset": True}, {"kind": "generate", "prompts": short, "n": 48}]


@pytest.fixture(scope="module")
def stock(engine, smollm, prompts, passages):
    measure = {"kind": "generate", "prompts": passages, "n": 1, "logprobs": True, "reset": True}
    return engine(smollm[0], None, [*ways(prompts), measure])


def test_answers_are_stock_vllms(engine, smollm, prompts, stock):
    ours = engine(smollm[0], EIGHT, ways(prompts))
    assert [tokens(step) for step in ours] == [tokens(step) for step in stock[:4]]
    assert [row["cached"] for row in ours[1]] == [576, 576], "both groups give a prefix back"
    assert ours[2][0]["cached"] == 0


def test_speculation(engine, smollm, prompts, stock):
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    steps = [{"kind": "generate", "prompts": prompts[0], "n": 48}, {"kind": "metrics"}]
    ours, counts = engine(smollm[0], EIGHT, steps, speculative_config=drafts, max_num_batched_tokens=512)
    assert tokens(ours) == tokens(stock[2])
    accepted, drafted = (counts[f"vllm:spec_decode_num_{x}_tokens"] for x in ("accepted", "draft"))
    assert 0 < accepted < drafted, "some drafts are taken, and some are rejected"
