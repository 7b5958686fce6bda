# SPDX-License-Identifier: MIT
"""TurboQuantCache in SmolLM2-135M: KL divergence from DynamicCache, greedy text, and what a process holds."""
import subprocess

import memory
import pytest
import smollm
import torch
import libturboquant
from tiny import SQ8, compressed, divergence, generated, logits, stock

N_TOK = 1024


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return smollm.load()


@pytest.fixture(scope="module")
def reference(model_and_tokenizer):
    """(tokens, logits with DynamicCache)"""
    model, tokenizer = model_and_tokenizer
    input_ids = torch.tensor([smollm.novel(tokenizer, N_TOK)])
    return input_ids, logits(model, stock(model), input_ids, parts=2)


# docs/quality.md's figures for this text and preset, 4096 tokens in llama.cpp. They hold its floor of .0033, which comes of
# other orders of additions there; here the reference is the same arithmetic in float32, so that all should be well below.
@pytest.mark.parametrize("preset, limit", [("TQ6", .0036), ("TQ4", .0045), ("TQ3", .0072), ("TQ2", .0118)])
def test_divergence(model_and_tokenizer, reference, preset, limit):
    model, _ = model_and_tokenizer
    input_ids, wanted = reference
    cache = compressed(model, preset=preset, k_format=None, v_format=None)
    found = divergence(wanted, logits(model, cache, input_ids, parts=2))
    print(f"{preset}: mean KL divergence {found:.5f}")
    assert 0 < found < limit


def test_eight_bits(model_and_tokenizer, reference):
    model, _ = model_and_tokenizer
    input_ids, wanted = reference
    found = logits(model, compressed(model, **SQ8), input_ids, parts=2)
    print(f"sq8: mean KL divergence {divergence(wanted, found):.6f}")
    assert divergence(wanted, found) < 2e-4
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > .99


def test_calibration(model_and_tokenizer, reference, tmp_path):
    """
    Learnt in llama.cpp, from the same text, which makes the gain sure: a third of the divergence is left. In the order of
    llama.cpp's channels there is no gain.
    """
    model, _ = model_and_tokenizer
    input_ids, wanted = reference
    path = tmp_path / "halves.tqcal"
    subprocess.run([*smollm.calibrate(N_TOK), "--order", "halves", "-o", path], check=True, capture_output=True)

    def found(**options):
        cache = compressed(model, preset="TQ2", k_format="tt2", v_format="sq8", **options)
        return divergence(wanted, logits(model, cache, input_ids, parts=2))

    plain, calibrated = found(), found(calibration=path)
    print(f"tt2 keys: {plain:.5f}, calibrated {calibrated:.5f}")
    assert calibrated < .6 * plain


def test_greedy_text(model_and_tokenizer):
    """200 tokens, the same with the 8-bit formats."""
    model, tokenizer = model_and_tokenizer
    prompt = torch.tensor([smollm.novel(tokenizer, 300)])
    model.generation_config.eos_token_id = None
    wanted, found = (generated(model, make(model), prompt, n=200) for make in (stock, lambda m: compressed(m, **SQ8)))
    assert found.shape == wanted.shape == (1, 500)
    assert tokenizer.decode(found[0]) == tokenizer.decode(wanted[0])


def test_memory(model_and_tokenizer, tmp_path):
    """
    A process's memory falls by the cache's saving. The stock attention copies a layer's keys and values for each of the 9
    heads at its peak.
    """
    model, tokenizer = model_and_tokenizer
    smollm.export(model, tokenizer, tmp_path)
    plain, compressed = (memory.measure("transformers", tmp_path, kind) for kind in ("stock", "TQ4"))
    memory.check(plain, compressed, copies=memory.N_TOK * 2 * 9 * 64 * 4 / 2**20)
    bits = libturboquant.preset("TQ4").bits_per_value(model.config.head_dim, model.config.num_key_value_heads, memory.N_TOK)
    assert compressed["held"] < plain["held"] * bits / 32 * 1.1 + 3  # MiB of the pool's tables
