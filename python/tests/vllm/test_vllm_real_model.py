# SPDX-License-Identifier: MIT
"""The plug-in in stock vLLM on a CPU with the real model, in float32: 8 bits give stock vLLM's tokens, 4 bits are near it."""
import pytest

EIGHT = {"formats": "sq8/sq8", "n_recent": 64}
TAILS = ["\n\nThe capital of France is", "\n\nIn short, this chapter says that"]


def tokens(results):
    return [row["tokens"] for row in results]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def logprobs(results):
    return [x for row in results for x in row["logprobs"]]


@pytest.fixture(scope="module")
def prompts(smollm, text):
    _, tokenizer = smollm
    prefix = tokenizer.encode(text[20000:24800])[:600]
    short = [tokenizer.encode(x) for x in ("The capital of France is", "Write a haiku about the sea.")]
    return [prefix + tokenizer.encode(x) for x in TAILS], short


@pytest.fixture(scope="module")
def measure(smollm, text):
    """Two passages of a novel."""
    passages = [smollm[1].encode(text[at : at + 8000])[:1000] for at in (20000, 120000)]
    return {"kind": "generate", "prompts": passages, "n": 1, "logprobs": True}


@pytest.fixture(scope="module")
def pressed(smollm, text):
    """Requests that do not find room together."""
    prompts = [smollm[1].encode(text[at : at + 2000])[:60] for at in (20000, 120000, 220000, 320000)]
    return {"kind": "generate", "prompts": prompts, "n": 100, "reset": True}


def ways(prompts):
    """Alone, from the prefix cache, together without it, and short ones."""
    long, short = prompts
    return [{"kind": "generate", "prompts": long[:1], "n": 48}, {"kind": "generate", "prompts": long, "n": 48},
            {"kind": "generate", "prompts": long, "n": 48, "reset": True}, {"kind": "generate", "prompts": short, "n": 48}]


@pytest.fixture(scope="module")
def stock(engine, smollm, prompts, measure):
    return engine(smollm[0], None, [*ways(prompts), measure])


@pytest.fixture(scope="module")
def four_bits(engine, smollm, prompts, measure):
    return engine(smollm[0], "tq4", [*ways(prompts), measure])


@pytest.fixture(scope="module")
def eight_bits(engine, smollm, prompts, pressed):
    return engine(smollm[0], EIGHT, [*ways(prompts), pressed])


def test_answers_are_stock_vllms(eight_bits, stock):
    ours = eight_bits[:4]
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


def test_preemption(engine, smollm, pressed, eight_bits):
    ours, counts = engine(smollm[0], EIGHT, [pressed, {"kind": "metrics"}], num_gpu_blocks_override=20, max_model_len=512,
                          max_num_batched_tokens=128)
    assert counts["vllm:num_preemptions"] > 0
    assert tokens(ours) == tokens(eight_bits[4]), "as where there is room"


def test_four_bits(four_bits, stock):
    ours, wanted = logprobs(four_bits[4]), logprobs(stock[4])
    assert len(wanted) == 2 * 999
    moved = [b - a for a, b in zip(ours, wanted)]
    distance, loss = mean(map(abs, moved)), mean(moved)
    error = (mean((x - loss) ** 2 for x in moved) / len(moved)) ** 0.5
    print(f"mean distance {distance:.5f}, NLL {-mean(wanted):.5f} and {loss:+.5f}, standard error {error:.5f}")
    assert distance < 0.036
    assert loss < 0.0018 + 2 * error, "of a text of this length"


def test_four_bits_do_not_depend_on_prefixes(four_bits):
    single, cached, cold, _ = map(tokens, four_bits[:4])
    assert single[0] == cached[0] == cold[0]
    assert cached[1] == cold[1]


def test_four_bits_do_not_depend_on_chunks(engine, smollm, measure, four_bits, stock):
    """Rounding takes other codes now and then: far less than coding."""
    ours = engine(smollm[0], "TQ4", [measure], max_num_batched_tokens=128)[0]
    whole, cut, wanted = map(logprobs, (four_bits[4], ours, stock[4]))
    distance, coding = (mean(abs(a - b) for a, b in zip(whole, x)) for x in (cut, wanted))
    print(f"mean distance between chunks {distance:.5f}, from stock vLLM {coding:.5f}")
    assert distance < 0.5 * coding
