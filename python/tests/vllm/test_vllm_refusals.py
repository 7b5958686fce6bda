# SPDX-License-Identifier: MIT
"""What the plug-in refuses, each with the reason and the remedy."""
import importlib.metadata
import sys
from types import SimpleNamespace

import pytest

import libturboquant.vllm as plug_in
from libturboquant import ArgumentError, UnsupportedError
from libturboquant.vllm import options

MODEL = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "block_size": 64, "skip_tokenizer_init": True}


def test_engines_are_not_started(run, toy):
    """In whole engines: what is wrong with options, the model, or another option of vLLM."""
    cases = [
        ({"model": "llama", "additional_config": {"turboquant": "TQ5"}}, "preset 'TQ5' does not exist; give TQ6, TQ4"),
        ({"model": "llama", "additional_config": {"turboquant": "TQ4"}, "kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"model": "llama", "additional_config": {"turboquant": "TQ4"}, "block_size": 288}, "set --block-size"),
        ({"model": "llama", "additional_config": {"turboquant": "TQ4"}, "disable_hybrid_kv_cache_manager": True},
         "leave --disable-hybrid-kv-cache-manager out"),
        ({"model": "deepseek", "additional_config": {"turboquant": "TQ4"}}, "latent attention (MLA)"),
    ]
    arguments = [MODEL | case | {"model": str(toy(case["model"]))} for case, _ in cases]
    said, _ = run({"refusals": arguments})
    for text, (_, expected) in zip(said, cases):
        assert expected in text, text


@pytest.mark.parametrize("asked, text", [
    ("TQ5", "preset 'TQ5' does not exist"),
    (4, "give the name of a preset"),
    ({"format": "TQ4"}, "no option 'format'; there are"),
    ({"formats": 4}, 'give a preset or a pair, as "TQ4"'),
    ({"formats": "TQ4", "n_recent": 0}, "n_recent is 0; give a number from 1"),
    ({"formats": "TQ4", "n_sink": -1}, "n_sink is -1; give a number from 0"),
    ({"formats": "TQ4", "n_sink": True}, "n_sink is True"),
    ({"formats": "TQ4", "n_recent": 1000, "n_sink": 25}, "more than 1024 together"),
    ({"formats": "TQ4", "factors": "on"}, "give 'weights' or 'off'"),
])
def test_options(asked, text):
    with pytest.raises(ArgumentError, match=text.replace("(", r"\(")):
        options.of_config({"turboquant": asked})


def test_unknown_formats():
    with pytest.raises(UnsupportedError, match="sq4"):
        options.of_config({"turboquant": "sq8/sq5"})


def test_what_is_asked_for():
    assert options.of_config({}) is options.of_config(None) is options.of_config({"turboquant": False}) is None
    assert options.of_config({"turboquant": "tq4"}) == options.of_config({"turboquant": {"formats": "tq4"}})
    for name, n_recent in (("TQ6", 64), ("tq4", 64), ("TQ3", 128), ("tQ2", 64)):
        assert options.of_config({"turboquant": name}).n_recent == n_recent
    pair = options.of_config({"turboquant": {"formats": "sq8/sq4", "n_recent": 32, "n_sink": 2}})
    assert (pair.n_recent, pair.n_sink, pair.is_preset) == (32, 2, False)


def config(**changes):
    parts = {
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "model_config": SimpleNamespace(is_hybrid=False),
        "cache_config": SimpleNamespace(cache_dtype="auto", block_size=64),
        "speculative_config": SimpleNamespace(method="ngram"),
        "additional_config": {"turboquant": "TQ4"},
    }
    for name, value in changes.items():
        part = next(part for part in parts.values() if hasattr(part, name))
        setattr(part, name, value)
    return SimpleNamespace(**parts)


@pytest.mark.parametrize("changes, text", [
    ({"decode_context_parallel_size": 2}, "use --tensor-parallel-size"),
    ({"prefill_context_parallel_size": 2}, "use --tensor-parallel-size"),
    ({"is_hybrid": True}, "recurrent states"),
    ({"method": "eagle"}, "use one of ngram"),
    ({"disable_hybrid_kv_cache_manager": True}, "hybrid KV cache manager"),
    ({"cache_dtype": "bfloat16"}, "takes the place of --kv-cache-dtype bfloat16"),
    ({"block_size": 40}, "not 40"),
])
def test_configurations(changes, text):
    from libturboquant.vllm import engine

    assert engine.asked(config()) is not None
    with pytest.raises(UnsupportedError, match=text):
        engine.asked(config(**changes))
    unasked = config(**changes)
    unasked.additional_config = {}
    assert engine.asked(unasked) is None


@pytest.mark.parametrize("arguments, text", [
    ({"attn_type": "encoder_only"}, "decoders only"),
    ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
    ({"head_size": 56}, "no head_dim 56; it has 32"),
])
def test_layers(arguments, text):
    from libturboquant.vllm import engine

    with pytest.raises(UnsupportedError, match=text):
        engine.Attention(**{"num_heads": 2, "head_size": 64, "scale": 1.0, "num_kv_heads": 2} | arguments)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "unknown"])
def test_versions(monkeypatch, caplog, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "turboquant.c/model"])
    plug_in.register()
    assert "install one of these" in caplog.text, "whoever did not ask goes on"
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "model", "--additional-config", '{"turboquant": "TQ4"}'])
    with pytest.raises(UnsupportedError, match=f"before 0.34, but {version} is installed"):
        plug_in.register()


def test_tested_versions(monkeypatch):
    for version in ("0.32.0", "0.33.1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=version: found)
        assert plug_in.version_fault() == ""
