# SPDX-License-Identifier: MIT
"""The server's folder of prompts' caches: what is found again, by whom, and what happens to files that are bad or too many."""
import copy
import logging
import os
from functools import partial

import mlx.core as mx
import mlx_lm.models.cache as stock
import numpy as np
import pytest
from tiny_mlx import SQ8, ids, logits, make_model, with_outliers
from libturboquant import _mlx_folder
from libturboquant._mlx_folder import Folder, FolderPromptCache, check, key_of
from libturboquant.mlx import TurboQuantKVCache, install

N_MANY = 1 << 30


class Server:
    """Its prompts, where a model is installed with these options; another one is a server that was started again."""

    def __init__(self, path, model, max_bytes=N_MANY, **options):
        self.model = install(model, **options)
        self.folder = Folder(path, max_bytes)
        known = {"m": (key_of([model], options), partial(check, [model]))}
        self.prompts = FolderPromptCache(10, self.folder, known)

    def read(self, tokens):
        """Read a prompt as a server does, keep its cache, and give the last token's logits, and how many tokens were found."""
        cache, rest = self.prompts.fetch_nearest_cache("m", tokens)
        cache = cache or stock.make_prompt_cache(self.model)
        found = logits(self.model, cache, np.array([rest]))[:, -1]
        self.prompts.insert_cache("m", tokens, cache)
        return found, len(tokens) - len(rest)


def prompt(n, seed=3):
    return ids(n, seed=seed)[0].tolist()


def files(path):
    return sorted(path.glob("kv-*"))


def test_found_again(tmp_path):
    """By a server that is started later: what goes on from there is what it would have been, bit for bit."""
    first = Server(tmp_path, make_model(), **SQ8)
    first.read(prompt(100))
    kept = copy.deepcopy(first.prompts.fetch_nearest_cache("m", prompt(100) + [7])[0])
    second = Server(tmp_path, make_model(), **SQ8)
    found, n = second.read(prompt(100) + [7, 8])
    assert n == 100 and len(second.prompts) == 1
    np.testing.assert_array_equal(found, logits(first.model, kept, np.array([[7, 8]]))[:, -1])
    assert second.read(prompt(100)[:60] + [9])[1] == 60  # what is longer is trimmed
    assert Server(tmp_path, make_model(), **SQ8).read(prompt(100))[1] == 99  # its last token has to be read


def test_files_of_parts_go(tmp_path):
    """A prompt's file holds those of its beginnings, and is written once."""
    server = Server(tmp_path, make_model())
    server.read(prompt(50))
    server.read(prompt(50) + [5, 6])
    (file,) = files(tmp_path)
    changed = file.stat().st_mtime_ns
    os.utime(file, ns=(0, 0))
    server.read(prompt(40))
    assert files(tmp_path) == [file] and file.stat().st_mtime_ns >= changed  # it was used
    server.prompts.insert_cache("m", prompt(9, seed=5), stock.make_prompt_cache(server.model), cache_type="system")
    assert files(tmp_path) == [file]


@pytest.mark.parametrize("change", ["weights", "one weight", "arguments", "options", "factors", "calls"])
def test_keys(tmp_path, change):
    """Another model, or other options, find nothing."""
    model, other, options = make_model(), make_model(), {}
    Server(tmp_path, model).read(prompt(50))
    if change == "weights":
        other = make_model(seed=2)
    elif change == "one weight":
        weight = other.layers[1].mlp.down_proj.weight
        weight[3, 5] += 2.0 ** -20
    elif change == "arguments":
        other = make_model(rope_theta=10001.0)
    elif change == "options":
        options = {"preset": "TQ3"}
    elif change == "factors":
        options = {"factors": "off"}
    else:
        options = {"exact_prefill": True}
    assert Server(tmp_path, other, **options).read(prompt(50))[1] == 0
    assert Server(tmp_path, make_model()).read(prompt(50))[1] == 49


@pytest.mark.parametrize("make_other, why", [
    (lambda: make_model(num_hidden_layers=2), "caches of other kinds"), (lambda: with_outliers(make_model()), "other factors"),
    (lambda: make_model(num_key_value_heads=4), "other factors")], ids=["layers", "factors", "heads"])
def test_a_key_is_not_enough(tmp_path, caplog, make_other, why):
    """Caches of another shape, or with another model's factors, are refused even by the right key."""
    for model in (make_other(), make_model()):
        server = Server(tmp_path, model)
        server.prompts._known["m"] = ("key", server.prompts._known["m"][1])
        assert server.read(prompt(50))[1] == 0
    assert why in caplog.text


def damage(file, how):
    data = bytearray(file.read_bytes())
    if how == "cut":
        data = data[:-20]
    elif how == "empty":
        data = b""
    elif how == "a bit":
        data[len(data) // 2] ^= 1
    elif how == "tokens":
        data = data.replace(b"tokens", b"token$")
    elif how == "header":
        data[:8] = (1 << 60).to_bytes(8, "little")
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "a bit", "tokens", "header"])
def test_bad_files(tmp_path, caplog, how):
    """They are ignored, with a warning, and prompts are read as without them."""
    wanted, _ = Server(tmp_path, make_model()).read(prompt(50))
    (file,) = files(tmp_path)
    damage(file, how)
    server = Server(tmp_path, make_model())
    found, n = server.read(prompt(50))
    assert n == 0 and np.array_equal(found, wanted)
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{file} is ignored" in told.getMessage()
    assert Server(tmp_path, make_model()).read(prompt(50))[1] == 49


def test_files_that_others_remove(tmp_path, caplog):
    Server(tmp_path, make_model()).read(prompt(50))
    server = Server(tmp_path, make_model())
    files(tmp_path)[0].unlink()
    assert server.read(prompt(50))[1] == 0 and not caplog.records


def test_bound(tmp_path, caplog):
    """Those that were used longest ago go, also half-written ones; nothing else in the folder is touched."""
    Server(tmp_path, make_model()).read(prompt(50))
    size = files(tmp_path)[0].stat().st_size
    others = [tmp_path / name for name in ("model.safetensors", "kv-x.safetensors", "kv-notes.txt")]
    part = tmp_path / f"kv-{'0' * 32}.part.safetensors"
    for file in (*others, part):
        file.write_bytes(bytes(2 * size))
    os.utime(part, ns=(0, 0))
    server = Server(tmp_path, make_model(), max_bytes=int(2.5 * size))
    assert not part.exists()
    for seed in (4, 5):
        server.read(prompt(50, seed))
        server.read(prompt(50, seed=3))  # used again each time
    held = [entry.tokens.tolist() for entry in server.folder.entries.values()]
    assert held == [prompt(50, seed=3), prompt(50, seed=5)] and all(file.exists() for file in others)
    ours = [file for file in files(tmp_path) if file not in others]
    assert len(ours) == 2 and sum(file.stat().st_size for file in ours) <= 2.5 * size
    Server(tmp_path, make_model(), max_bytes=size - 1).read(prompt(50, seed=6))
    assert "are more than all files may have" in caplog.text and files(tmp_path) == sorted(others[1:])


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("[save] failed")], ids=str)
def test_whole_or_not_at_all(tmp_path, caplog, monkeypatch, error):
    """A write that fails leaves nothing, and the server goes on."""
    def fail(path, *given):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise error

    server = Server(tmp_path, make_model())
    with monkeypatch.context() as patch:
        patch.setattr(_mlx_folder.stock, "save_prompt_cache", fail)
        server.read(prompt(50))
    assert files(tmp_path) == [] and str(error) in caplog.text and len(server.prompts) == 1
    server.read(prompt(50) + [5])
    assert len(files(tmp_path)) == 1


def test_windows(tmp_path):
    """A full window cannot be trimmed, so such a prompt is found by those that begin with all of it. Its parts stay."""
    options = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 32}
    server = Server(tmp_path, make_model(**options))
    cache = stock.make_prompt_cache(server.model)
    assert isinstance(cache[1], TurboQuantKVCache)
    logits(server.model, cache, np.array([prompt(60)]))
    server.prompts.insert_cache("m", prompt(60), copy.deepcopy(cache), cache_type="system")
    logits(server.model, cache, np.array([[5, 6]]))
    server.prompts.insert_cache("m", prompt(60) + [5, 6], cache)
    assert len(files(tmp_path)) == 2
    for rest, n in (([5, 6, 7], 62), ([5, 7], 60), ([8], 60)):
        assert Server(tmp_path, make_model(**options)).read(prompt(60) + rest)[1] == n
    assert Server(tmp_path, make_model(**options)).read(prompt(40))[1] == 0


def test_images_are_not_kept(tmp_path):
    server = Server(tmp_path, make_model())
    cache = stock.make_prompt_cache(server.model)
    logits(server.model, cache, ids(10))
    server.prompts.insert_cache("m", [*prompt(9), "an image"], cache)
    assert files(tmp_path) == [] and server.prompts.fetch_nearest_cache("m", [*prompt(9), "an image", 4])[1] == [4]


def test_keys_of_other_types(tmp_path):
    """Half and quantized weights count, bit for bit."""
    model = make_model(dtype=mx.bfloat16)
    first = key_of([model], {})
    model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    assert first != key_of([model], {}) and first == key_of([make_model(dtype=mx.bfloat16)], {})
    assert key_of([model], {}) != key_of([model, model], {})
