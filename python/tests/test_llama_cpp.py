# SPDX-License-Identifier: MIT
"""libturboquant.llama_cpp in stock llama-cpp-python, next to llama_cpp.Llama with its FP16 cache."""
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import DEPS, ROOT

llama_cpp = pytest.importorskip("llama_cpp")

from libturboquant.errors import ArgumentError, UnsupportedError  # noqa: E402
from libturboquant.llama_cpp import Llama, plugin_path  # noqa: E402

MODEL = str(DEPS / "models/SmolLM2-135M-Instruct.Q4_1.gguf")
N_TOK = 256


def arguments(**more):
    return {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 2, "verbose": False, "logits_all": True, **more}


def distributions(llama):
    """[N_TOK / 2, n_vocab]: natural logarithms, behind the first half of a novel's beginning."""
    tokens = llama.tokenize((DEPS / "text/austen.txt").read_bytes()[:4 * N_TOK], add_bos=True)[:N_TOK]
    assert len(tokens) == N_TOK
    llama.eval(tokens)
    logits = np.array(llama.scores[N_TOK // 2:N_TOK], dtype=np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def divergence(a, b):
    """Mean of KL(a, b)."""
    return np.sum(np.exp(a) * (a - b), axis=1).mean()


@pytest.fixture(scope="module")
def stock():
    return distributions(llama_cpp.Llama(MODEL, **arguments(flash_attn=True)))


@pytest.mark.parametrize("preset, low, high", [("TQ6", 1e-5, .02), ("tq4", 1e-4, .03), ("TQ2", 1e-3, .1)])
def test_divergence(stock, preset, low, high):
    """In use, so not FP16's to the last digit, and near it. (q4_0 has .05 here.)"""
    llama = Llama(MODEL, **arguments(preset=preset))
    assert low < divergence(stock, distributions(llama)) < high
    assert llama.kv_cache.startswith(f"{preset.upper()} holds the KV cache: keys ")
    assert "bits per value" in llama.kv_cache


def test_generation():
    llama = Llama(MODEL, **arguments(logits_all=False))
    assert "Paris" in llama("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"]
    chat = llama.create_chat_completion([{"role": "user", "content": "Name the capital of Italy."}], max_tokens=16,
                                        temperature=0)
    assert "Rome" in chat["choices"][0]["message"]["content"]


def test_states_and_pickles():
    llama = Llama(MODEL, **arguments(preset="TQ3", logits_all=False))
    first = llama("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"]
    state = llama.save_state()
    llama("Something else altogether:", max_tokens=8, temperature=0)
    llama.load_state(state)
    assert llama.n_tokens == state.n_tokens
    again = pickle.loads(pickle.dumps(llama))
    assert again.kv_cache == llama.kv_cache
    assert again("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"] == first


@pytest.mark.parametrize("wrong, words", [
    ({"preset": "TQ5"}, "TQ5"), ({"flash_attn": False}, "flash attention only"), ({"offload_kqv": False}, "offload_kqv"),
    ({"n_gpu_layers": 0}, "n_gpu_layers"), ({"n_gpu_layers": 1}, "n_gpu_layers=1"),
    ({"type_k": llama_cpp.GGML_TYPE_Q8_0}, "type_k"),
    ({"split_mode": llama_cpp.LLAMA_SPLIT_MODE_ROW}, "split_mode"), ({"kv_options": "recent=128"}, "whole process"),
])
def test_refused_arguments(wrong, words):
    Llama(MODEL, **arguments()).close()
    with pytest.raises(ArgumentError, match=words):
        Llama(MODEL, **arguments(**wrong))


def test_stock_errors_stay():
    with pytest.raises(ValueError, match="does not exist"):
        Llama("no-such-model.gguf", **arguments())


def run(script, **environment):
    """A process of its own: the plug-in is loaded once."""
    script = f"import sys; from libturboquant.llama_cpp import Llama; from libturboquant.errors import *; {script}"
    done = subprocess.run([sys.executable, "-c", script, MODEL], env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_options_are_the_plugins():
    code, out, err = run("print(Llama(sys.argv[1], n_ctx=256, verbose=False, kv_options='recent=128,exact=0').kv_cache)")
    assert code == 0 and "last 128 tokens exact, 1 layers exact" in out, err
    assert "Exception ignored" not in err


@pytest.mark.parametrize("options, words", [("exact=99", "exact"), ("recnt=1", "recnt")])
def test_refused_by_the_plugin(options, words):
    """The plug-in's reason is in the exception, not only in llama.cpp's log."""
    code, out, err = run(f"\ntry: Llama(sys.argv[1], n_ctx=256, verbose=False, kv_options={options!r})"
                         "\nexcept UnsupportedError as error: print('refused:', error)")
    assert code == 0 and out.startswith("refused:") and words in out, err
    assert "Exception ignored" not in err


def test_refused_options_are_gone():
    code, out, err = run("\ntry: Llama(sys.argv[1], verbose=False, kv_options='recnt=1')\nexcept UnsupportedError: pass"
                         "\nimport os; assert 'TQ_GGML' not in os.environ"
                         "\nprint(Llama(sys.argv[1], n_ctx=256, verbose=False).kv_cache, os.environ.get('TQ_GGML'))")
    assert code == 0 and out.startswith("TQ4 holds") and out.endswith("None\n"), err


def test_plugin_that_is_not_there():
    code, out, err = run("\ntry: Llama(sys.argv[1], verbose=False)\nexcept UnsupportedError as error: print(error)",
                         GGML_BACKEND_PATH="/nowhere/libggml-turboquant.so")
    assert code == 0 and "/nowhere/libggml-turboquant.so is not there. Set GGML_BACKEND_PATH" in out, err


def test_example():
    command = [sys.executable, ROOT / "examples/llama_cpp_generate.py", MODEL, "The capital of France is", "--n-tok", "8"]
    done = subprocess.run([*command, "--n-ctx", "256"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "TQ4 holds the KV cache" in done.stdout


def test_path(monkeypatch):
    monkeypatch.delenv("GGML_BACKEND_PATH", raising=False)
    try:
        assert plugin_path().name == "libggml-turboquant.so"  # a wheel's
    except UnsupportedError as error:
        assert "install the package with it" in str(error)
