# SPDX-License-Identifier: MIT
"""
SmolLM2-135M in MLX-LM, converted by its own converter: KL divergence from its own cache, greedy text, and a running
mlx_lm.server with two clients at once.
"""
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import memory
import mlx_lm
import numpy as np
import pytest
import smollm
from conftest import ROOT
from mlx_lm.models import cache as stock
from tiny_mlx import SQ8, divergence, logits
from libturboquant.mlx import make_prompt_cache

N_TOK = 96  # MLX multiplies slowly on the CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parent = tmp_path_factory.mktemp("smollm")
    subprocess.run([sys.executable, smollm.__file__, parent / "hf", str(memory.N_TOK), str(memory.PART)], check=True)
    mlx_lm.convert(str(parent / "hf"), str(parent / "mlx"), dtype="float32")
    return parent / "mlx"


@pytest.fixture(scope="module")
def model_and_tokenizer(folder):
    return mlx_lm.load(str(folder))


@pytest.fixture(scope="module")
def reference(model_and_tokenizer):
    """(tokens, logits with MLX-LM's own cache)"""
    model, tokenizer = model_and_tokenizer
    tokens = np.array([smollm.novel(tokenizer, N_TOK)])
    return tokens, logits(model, stock.make_prompt_cache(model), tokens, parts=2)


# A shorter ring, so that most of these few tokens are coded. docs/quality.md has .0057 for TQ4 with 16, its floor included.
@pytest.mark.parametrize("options, limit", [(SQ8 | {"n_recent": 16}, 1e-4), ({"preset": "TQ4", "n_recent": 16}, .0057)])
def test_divergence(model_and_tokenizer, reference, options, limit):
    model, _ = model_and_tokenizer
    tokens, wanted = reference
    found = divergence(wanted, logits(model, make_prompt_cache(model, **options), tokens, parts=2))
    print(f"{options}: mean KL divergence {found:.6f}")
    assert 0 < found < limit


def test_greedy_text(model_and_tokenizer):
    """mlx_lm.generate, 100 tokens, the same with the 8-bit formats."""
    model, tokenizer = model_and_tokenizer
    prompt = smollm.novel(tokenizer, 40)
    texts = [mlx_lm.generate(model, tokenizer, prompt, max_tokens=100, prompt_cache=cache)
             for cache in (stock.make_prompt_cache(model), make_prompt_cache(model, n_recent=16, **SQ8))]
    assert len(texts[0]) > 100 and texts[0] == texts[1]


def test_memory(folder):
    """
    A process's memory falls by the cache's saving, and MLX holds none of the keys and values. At its peak it has a layer's
    arrays twice, as the stock cache makes them longer.
    """
    plain, compressed = (memory.measure("mlx", folder, kind, folder.parent / "hf/context.f32") for kind in ("stock", "TQ4"))
    memory.check(plain, compressed, copies=plain["held"] / 30)
    assert compressed["mlx_peak"] < 1 and plain["held"] < plain["mlx_peak"] < 1.1 * plain["held"]


def test_example(folder):
    command = [sys.executable, ROOT / "examples/mlx_generate.py", folder, "The capital of France is", "--n-tok", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "bytes" in done.stdout


def ask(port, words, answers):
    """The answer, and how many of the prompt's tokens were found in a cache."""
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=240) as response:
        found = json.load(response)
    answers[words] = found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def ask_at_once(port, questions):
    answers = {}
    threads = [threading.Thread(target=ask, args=(port, words, answers)) for words in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@contextlib.contextmanager
def running_server(folder, log, *options):
    """The port of a server, which is terminated in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "libturboquant", "mlx", "server", *options, "--model", str(folder), "--port", str(port)]
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            for _ in range(240):
                assert server.poll() is None, log.read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(.5)
            yield port
        finally:
            server.terminate()
            server.wait(30)


def test_server(folder, tmp_path):
    """
    Two clients at once, twice: the second time the server finds the prompts' caches. A server that is started again finds them
    in the folder. The answers are the same.
    """
    log, kept = tmp_path / "server.log", tmp_path / "prompts"
    options = ["--kv-preset", "TQ6", "--kv-cache-folder", str(kept)]
    questions = ["What is the capital of France?", "Name three colours."]
    with running_server(folder, log, *options) as port:
        first, second = ask_at_once(port, questions), ask_at_once(port, questions)
        assert set(first) == set(questions), log.read_text()
        for _ in range(240):  # files are written behind the answers
            if len(list(kept.glob("kv-" + "[0-9a-f]" * 32 + ".safetensors"))) == 2:
                break
            time.sleep(.5)
    with running_server(folder, log, *options) as port:
        third = ask_at_once(port, questions)
    for words in questions:
        (answer, _), (again, n_second), (later, n_third) = (found[words] for found in (first, second, third))
        assert len(answer) > 5 and answer == again == later, log.read_text()
        assert n_third == n_second > 20
    assert "Paris" in first[questions[0]][0]
    assert "30 of 30 layers compressed" in log.read_text() and "tokens are read from" in log.read_text()


def test_commands(folder):
    """generate, as a user types it, with most of our options: the stock command's text, as all tokens are in the window."""
    words = ["generate", "--model", str(folder), "--prompt", "What is the capital of France?", "--max-tokens", "24",
             "--verbose", "F"]
    ours = ["--kv-preset", "TQ3", "--kv-k-format", "f16", "--kv-exact-layers", "2", "--kv-exact-prefill"]
    done = [subprocess.run([sys.executable, "-m", *given], capture_output=True, text=True, check=True)
            for given in (["mlx_lm", *words], ["libturboquant", "mlx", *words, *ours])]
    assert "Paris" in done[0].stdout and done[0].stdout == done[1].stdout
    assert "30 of 30 layers compressed" in done[1].stderr
