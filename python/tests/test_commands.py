# SPDX-License-Identifier: MIT
"""python -m libturboquant doctor, eval, plan, with small random models: figures against their definitions, and faults."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
import libturboquant
from conftest import ROOT
from tiny import CONFIGS, SIZES, ids, logits, make_model, make_shared_model, stock
from tokenizers import Tokenizer, models, pre_tokenizers
from libturboquant.__main__ import main
from libturboquant._divergence import scored
from libturboquant.commands import doctor, evaluate, kept_bytes, plan
from libturboquant.transformers import TurboQuantCache, TurboQuantLayer

N_CTX = 1024
WORDS = np.random.default_rng(1).integers(3, SIZES["vocab_size"], 2 * N_CTX + 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, as Hugging Face has them: word w5 is token 5."""
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    vocabulary = {"?" if i == 2 else f"w{i}": i for i in range(SIZES["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in WORDS))
    return path


@pytest.fixture
def run(capsys):
    """Run a command: (status, standard output, standard error)."""
    def call(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def found(run):
    """Run a command that works: what it prints as JSON."""
    def call(*words):
        status, out, err = run(*words, "--json")
        assert status == 0, err
        return json.loads(out)

    return call


def by_definition(model, window, preset):
    """KL divergences of the window's second half but for its last token, in nats, and the cache that was compared."""
    cache, tokens = TurboQuantCache(config=model.config, preset=preset, max_tok=N_CTX), torch.tensor(window)[None]
    p = logits(model, stock(model), tokens, parts=2)[0, N_CTX // 2 : -1].double().log_softmax(-1)
    q = logits(model, cache, tokens, parts=2)[0, N_CTX // 2 : -1].double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)), cache


def test_eval_by_its_definition(folder, text, found):
    result = found("eval", folder, text, "--context", N_CTX, "--chunks", 2, "--presets", "tq4,TQ2")
    assert [row["name"] for row in result["rows"]] == ["floor", "TQ4", "TQ2"]
    assert result["n_scored"] == 2 * (N_CTX // 2 - 1) and result["rows"][0]["kld_mean"] < 1e-8
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row in result["rows"][1:]:
        kl, same, caches = zip(*(by_definition(model, WORDS[i : i + N_CTX].tolist(), row["name"]) for i in (0, N_CTX)))
        kl, same = torch.cat(kl), torch.cat(same).double()
        assert row["kld_mean"] == pytest.approx(float(kl.mean()), rel=.01)
        assert row["kld_99_9"] == pytest.approx(float(kl.quantile(.999)), rel=.01)
        assert row["kld_mean_error"] == pytest.approx(float(kl.std()) / len(kl) ** .5, rel=.02)
        assert row["same_top_1"] == pytest.approx(100 * float(same.mean()), abs=.5)
        assert row["bits_per_value"] == pytest.approx(8 * kept_bytes(caches[0].store.stats()) / (4 * 2 * 128 * N_CTX))
        assert row["bits_per_value"] == pytest.approx(libturboquant.preset(row["name"]).bits_per_value(64, 2, N_CTX), rel=.1)
    assert result["rows"][2]["kld_mean"] > 2 * result["rows"][1]["kld_mean"] > 1e-4


@pytest.mark.parametrize("n_ctx, n_part", [(16, 4), (16, 16), (12, 5), (10, 8), (11, 3)])
def test_scored_tokens(n_ctx, n_part):
    """llama-perplexity's: those after the first half, but for the last."""
    tokens = np.arange(n_ctx)
    found = [tokens[begin : begin + n_part][scored(begin, len(tokens[begin : begin + n_part]), n_ctx)]
             for begin in range(0, n_ctx, n_part)]
    assert np.concatenate(found).tolist() == list(range(n_ctx // 2, n_ctx - 1))


def test_eval_in_mlx_lm(folder, text, found):
    pytest.importorskip("mlx_lm")
    options = ("eval", folder, text, "--context", N_CTX, "--presets", "TQ3", "--engine")
    (mlx,), (_, other) = (found(*options, engine)["rows"] for engine in ("mlx", "transformers"))
    assert mlx["kld_mean"] == pytest.approx(other["kld_mean"], rel=.15)
    assert mlx["bits_per_value"] == pytest.approx(other["bits_per_value"], rel=.02)


def test_windows_begin_as_texts_do(text):
    """With the token that a tokenizer puts before a text, in the place of their first."""
    class Host:
        class tokenizer:
            bos_token_id = 1
            encode = staticmethod(lambda text: [1, *map(int, text.replace("w", "").split())])

    args = type("args", (), {"text": text, "context": N_CTX, "chunks": 2})
    windows = evaluate.windows_of(Host, args)
    assert windows[0].tolist() == [1, *WORDS[: N_CTX - 1]] and windows[1].tolist() == [1, *WORDS[N_CTX : 2 * N_CTX - 1]]


def test_tables_for_people(folder, text, run):
    for words, said in ((("eval", folder, text, "--context", 256, "--presets", "TQ4"), "| TQ4 "),
                        (("plan", folder, "--memory", 1), "| BF16 "), (("doctor", folder), "layers 0-3")):
        status, out, _ = run(*words)
        assert status == 0 and said in out
    status, out, _ = run("--help")
    assert status == 0 and all(name in out for name in ("doctor", "eval", "plan"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_doctor_says_what_the_cache_does(kind, tmp_path, found):
    config = CONFIGS[kind](**SIZES)
    config.save_pretrained(tmp_path)
    layers = found("doctor", tmp_path)["model"]["layers"]
    cache = TurboQuantCache(config=config)
    assert [layer["state"] == "compressed" for layer in layers] == [isinstance(x, TurboQuantLayer) for x in cache.layers]
    assert all(layer["why"] for layer in layers)


def test_doctor_names_reasons(tmp_path, run, found):
    status, out, _ = run("doctor", "deepseek_v32", "--json")
    assert status == 1 and "indexed_attention" in json.loads(out)["model"]["refused"]
    status, out, _ = run("doctor", "T5Config")
    assert status == 1 and "encoder" in out
    make_shared_model("gemma4").config.save_pretrained(tmp_path)
    states = {(layer["state"], layer["why"].partition(",")[0]) for layer in found("doctor", tmp_path)["model"]["layers"]}
    assert states == {("kept", "sliding_attention of 16 tokens"), ("compressed", "full_attention"),
                      ("none", "no keys and values of its own")}


def mlx_caches(folder):
    """What MLX-LM's model of this configuration gets from libturboquant."""
    from mlx_lm.utils import load_model
    from libturboquant.mlx import make_prompt_cache
    return make_prompt_cache(load_model(folder, lazy=True, strict=False)[0])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "deepseek_v3"])
def test_doctor_says_what_mlx_lm_does(kind, folder, tmp_path, run):
    """By a configuration only, or with weights; layers and their shapes, or the reason for which a model is refused."""
    mlx_lm = pytest.importorskip("mlx_lm")
    path = folder if kind == "llama" else tmp_path
    if kind != "llama":
        transformers.AutoConfig.for_model(kind).save_pretrained(path)
    status, out, _ = run("doctor", path, "--engine", "mlx", "--json")
    model = json.loads(out)["model"]
    assert model["engine"] == "mlx" and model["configuration"] == kind
    if kind == "deepseek_v3":
        assert status == 1 and "latent attention" in model["refused"]
        return
    caches, states = mlx_caches(path), [layer["state"] for layer in model["layers"]]
    assert status == 0 and states == ["compressed" if "TurboQuant" in type(cache).__name__ else "kept" for cache in caches]
    whys = {layer["why"] for layer in model["layers"]}
    assert whys == {"llama": {"KVCache, 2 KV heads, head_dim 64"}, "qwen3": {"KVCache, 32 KV heads, head_dim 128"},
                    "gemma3_text": {"KVCache, 4 KV heads, head_dim 256",
                                    "RotatingKVCache of 4096 tokens, whose memory is bounded"}}[kind]
    assert f"({kind} in MLX-LM) compresses" in run("doctor", path, "--engine", "mlx")[1] and mlx_lm


def test_doctor_refuses_what_mlx_lm_would(tmp_path, run):
    pytest.importorskip("mlx_lm")
    transformers.LlamaConfig(hidden_size=480, num_attention_heads=4, num_hidden_layers=2).save_pretrained(tmp_path)
    status, out, _ = run("doctor", tmp_path, "--engine", "mlx")
    assert status == 1 and "is refused" in out and "head_dim 120 has no rotation" in out
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    status, out, err = run("doctor", tmp_path, "--engine", "mlx")
    assert (status, out) == (1, "") and "Model type none not supported. Give a folder with a model that MLX-LM has" in err
    status, out, err = run("doctor", "qwen2", "--engine", "mlx")
    assert (status, out) == (1, "") and "not a folder with config.json" in err


def test_doctor_takes_mlx_lm_where_it_is_alone(folder, monkeypatch, found):
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "torch" else "1.0")
    assert found("doctor", folder)["model"]["engine"] == "mlx"
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    assert found("doctor", folder)["model"]["engine"] == "transformers"


def test_doctor_knows_what_the_tests_run_with():
    """The releases that it calls tested are those of the requirements."""
    pins = "".join((ROOT / "python/tests" / name).read_text() for name in (
        "requirements.in", "requirements-torch.in", "requirements-vllm.in"))
    pinned = dict(line.split(";")[0].split("==") for line in pins.splitlines() if "==" in line)
    for packages, tested in doctor.HOSTS.values():
        versions = [pinned[package] for package in packages if package in pinned]
        assert versions and all(version.startswith(tested[0] + ".") for version in versions)
    assert {host["state"] for host in map(doctor.describe_host, ("torch", "transformers"))} == {"tested"}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_plan_counts_what_caches_hold(kind):
    options = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64} if kind == "gemma3" else {}
    n_tok, model = 1000, make_model(kind, **options)
    planned = plan.read_model(model.config)
    dynamic, cache = stock(model), TurboQuantCache(config=model.config, preset="TQ4", max_tok=n_tok)
    for read in (dynamic, cache):
        logits(model, read, ids(1, n_tok))
    n_value = sum(layer.keys.numel() + layer.values.numel() for layer in dynamic.layers)
    windows = sum(1 for kept in planned.kept if kept.window == 64)
    # DynamicCache leaves the next token's place free in a window.
    assert planned.bf16_bytes(n_tok) == 2 * (n_value + windows * 2 * 128)
    of_layer = planned.n_head_kv * planned.head_dim  # bytes of factors, whatever the context: blocks of the heap
    n_factor = planned.n_compressed * -(-(of_layer + 16) // 64) * 64
    assert planned.counted("TQ4", n_tok, 1, 128).allocated_bytes == cache.nbytes - n_factor


def test_plan_fills_the_memory_and_no_more(folder, found):
    result = found("plan", folder, "--memory", ".01", "--weights", 0, "--batch", 3)
    model = plan.read_model(transformers.AutoConfig.from_pretrained(folder))
    bf16, *ours = result["caches"]
    assert [cache["cache"] for cache in ours] == ["TQ6", "TQ4", "TQ3", "TQ2"]
    assert 3 * model.bf16_bytes(bf16["n_tok"]) <= result["cache_bytes"] < 3 * model.bf16_bytes(bf16["n_tok"] + 1)
    for cache in ours:
        fits, too_many = (model.counted(cache["cache"], cache["n_tok"] + more, 3, 128) for more in (0, 1))
        assert fits.allocated_bytes <= result["cache_bytes"] < too_many.allocated_bytes
        assert cache["bits_per_value"] == pytest.approx(8 * kept_bytes(fits) / (3 * cache["n_tok"] * model.n_value))
    assert found("plan", folder, "--memory", 1)["weight_bytes"] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("status, says, words", [
    (1, "text.txt does not exist", ("eval", "{folder}", "{empty}/text.txt")),
    (1, "fewer than 1 x 4096", ("eval", "{folder}", "{text}")),
    (1, "made for 4096 tokens", ("eval", "{folder}", "{text}", "--context", "8192")),
    (1, "no config.json", ("eval", "{empty}", "{text}")),
    (1, "no config.json", ("plan", "{empty}")),
    (1, "no config.json", ("doctor", "{empty}")),
    (1, "no folder or file", ("plan", "no-such-model")),
    (1, "neither a folder", ("doctor", "{text}")),
    (1, "UTF-8", ("eval", "{folder}", "{folder}/model.safetensors", "--context", "256")),
    (1, "indexed_attention", ("plan", "deepseek_v32", "--memory", "1")),
    (1, "not a language model", ("plan", "resnet", "--memory", "1")),
    (1, "not a language model", ("doctor", "resnet")),
    (1, "--weights", ("plan", "{folder}", "--memory", "0.0001")),
    (1, "--device", ("eval", "{folder}", "{text}", "--context", "256", "--device", "nonsense")),
    (2, "the presets are TQ6, TQ4, TQ3, TQ2", ("plan", "{folder}", "--presets", "TQ9")),
    (2, "the presets are TQ6, TQ4, TQ3, TQ2", ("eval", "{folder}", "{text}", "--presets", "TQ4,")),
    (2, "at least 256", ("eval", "{folder}", "{text}", "--context", "0")),
    (2, "size in GiB", ("plan", "{folder}", "--memory", "much")),
    (2, "COMMAND", ()),
])
def test_faults_are_one_line_with_a_cure(status, says, words, folder, text, tmp_path_factory, run):
    empty = tmp_path_factory.mktemp("empty")
    ended, out, err = run(*(word.format(folder=folder, text=text, empty=empty) for word in words))
    assert (ended, out, err.count("\n")) == (status, "", 1), err
    assert err.startswith("turboquant: ") and says in err


@pytest.mark.parametrize("words", [("doctor", "qwen2"), ("eval", "{folder}", "{text}"), ("plan", "qwen2")])
def test_without_torch(words, folder, text, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    status, out, err = run(*(word.format(folder=folder, text=text) for word in words))
    assert (status, out, err.count("\n")) == (1, "", 1) and "pip install 'libturboquant[transformers]'" in err


def test_without_a_library(tmp_path):
    """Or with one of another kind: one line, from the command."""
    for library in (tmp_path / "none.so", "libm.so.6"):
        environment = os.environ | {"TURBOQUANT_LIBRARY": str(library)}
        done = subprocess.run([sys.executable, "-m", "libturboquant", "doctor"], env=environment,
                              capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith("turboquant: ") and "set TURBOQUANT_LIBRARY" in done.stderr.replace("Set", "set")


def test_without_kernels():
    environment = os.environ | {"TQ_CPU": "nonsense"}
    done = subprocess.run([sys.executable, "-m", "libturboquant", "doctor"], env=environment,
                              capture_output=True, text=True)
    assert done.returncode == 1 and "TQ_CPU" in done.stdout and done.stderr == ""
