# SPDX-License-Identifier: MIT
"""python -m libturboquant mlx: MLX-LM's commands on a small random model, with what they are told to keep in their caches."""
import importlib
import io
import re
import sys
import types

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as stock
import numpy as np
import pytest
import libturboquant.mlx
from conftest import ROOT
from tiny_mlx import F16, SIZES, ids, logits, make_model, save, words
from libturboquant.__main__ import main
from libturboquant.commands.mlx import COMMANDS
from libturboquant.mlx import TurboQuantKVCache

CALIBRATION = str(ROOT / "tests/golden/calibration_1.tqcal")  # of 3 layers
HERE = [name for name in COMMANDS if name != "evaluate"]  # which needs lm_eval
CHANGED = {"load", "sharded_load", "generate", "eval_ppl", "ModelProvider", "LRUPromptCache"}
EXACT = ["--kv-k-format", "f16", "--kv-v-format", "f16"]
PROMPT = words(ids(90)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def modules():
    """MLX-LM's modules by command."""
    return {name: importlib.import_module(f"mlx_lm.{name}") for name in HERE}


@pytest.fixture
def run(modules, capsys):
    """Run a command: (status, standard output, standard error). What it changes of MLX-LM is undone."""
    def call(*given):
        with pytest.MonkeyPatch.context() as patch:
            for module in modules.values():
                for name in CHANGED & vars(module).keys():
                    patch.setattr(module, name, getattr(module, name))
            patch.setattr(sys, "argv", ["python"])
            try:
                status = main(["mlx", *map(str, given)])
            except SystemExit as end:
                status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def installed(monkeypatch):
    """The options of install(), each time it is called."""
    found, install = [], libturboquant.mlx.install

    def noted(model, **options):
        found.append(options)
        return install(model, **options)

    monkeypatch.setattr(libturboquant.mlx, "install", noted)
    return found


@pytest.mark.parametrize("command", HERE)
def test_help(run, command):
    """Our options, each explained, and then the command's own."""
    status, out, _ = run(command, "--help")
    assert status == 0 and out.index("--kv-preset") < out.index("--model")
    ours = ["--kv-preset", "--kv-k-format", "--kv-v-format", "--kv-exact-layers", "--kv-n-sink", "--kv-n-recent",
            "--kv-exact-prefill", "--kv-calibration", "--kv-factors", "TQ3"]
    assert all(re.search(rf"  {option}\b.*\w\w|TQ3", out) for option in ours)
    assert ("--kv-cache-folder" in out) == (command == "server")
    own = {"generate": "--prompt-cache-file", "chat": "--system-prompt", "server": "--prompt-cache-size",
           "cache_prompt": "--eos-token", "perplexity": "--sequence-length", "benchmark": "--num-trials"}
    assert own[command] in out


def test_help_names_the_commands(run, capsys):
    for given in ("-h", "--help"):
        status, out, _ = run(given)
        assert status == 0 and all(f"  {name} " in out for name in COMMANDS)
    assert run()[0] == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "mlx " in capsys.readouterr().out


@pytest.mark.parametrize("given, told", [
    ("server --kv-preset TQ5", "unknown preset 'TQ5'; the presets are TQ6"), ("server --kv-preset=", "unknown preset ''"),
    ("chat --kv-calibration missing.tqcal", "missing.tqcal"), (f"server --kv-calibration {__file__}", "test_mlx_commands.py"),
    ("generate --kv-bits 8", "compressed already.*leave it out, or run `mlx_lm.generate`"), ("server --kv-bit=8", "compressed"),
    ("cache_prompt --kv-group-size 32", "compressed already"), ("server --quantized-kv-start=0", "compressed already"),
    ("generate --max-kv-size 64", "holds all tokens.*leave it out"), ("chat --max-kv=64", "--max-kv-size: .*drops none"),
    ("generate --kv-prest TQ4", "unknown option --kv-prest of generate; the options are --kv-preset"),
    ("generate --kv-cache-folder x", "unknown option --kv-cache-folder of generate"),
    ("generate --kv-k-format sq9", "sq9.*must be one of f16"),
    ("generate --kv-exact-layers one", "'one' is not a whole number"),
    ("generate --kv-exact-layers -1", "at least 0"), ("generate --kv-n-recent -1", "at least 0"),
    ("generate --kv-factors maybe", "invalid choice"),
    (f"generate --kv-factors weights --kv-calibration {CALIBRATION}", "leave one of them out"),
    ("perplexity --model x --kv-exact-prefill", "nothing compressed would be measured"),
    ("evaluate --kv-exact-prefill", "nothing compressed would be measured"),
    (f"server --kv-cache-folder {__file__}", "give a folder that can be written to"),
    ("server --kv-cache-folder-bytes much", "'much' is not a size: give 500MB"),
    ("server --kv-cache-folder-bytes 0", "not a size"),
    ("convert", "unknown command 'convert': the commands that make caches are generate"),
    ("--kv-preset TQ4", "unknown command '--kv-preset'")])
def test_refused_before_a_model_is_loaded(run, modules, monkeypatch, given, told):
    for module in modules.values():
        monkeypatch.setattr(module, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr(modules["server"], "run", lambda *args: pytest.fail("the server was started"))
    status, out, err = run(*given.split())
    assert status == 2 and out == "" and err.startswith("turboquant: ") and err.count("\n") == 1, err
    assert re.search(told, err) and "--help` has all options" in err


@pytest.mark.parametrize("name, told", [("{folder}/none", "Give a folder with config.json"),
                                        ("{other}", "latent attention.*run `mlx_lm.generate`")])
def test_refused_models(run, folder, tmp_path, name, told):
    """One line, as of all commands."""
    sizes = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
             "n_routed_experts": None, "first_k_dense_replace": 3}
    other = save(make_model("deepseek_v3", **sizes), tmp_path)
    status, out, err = run("generate", "--model", name.format(folder=folder, other=other))
    assert status == 1 and re.match(f"turboquant: .*{told}", err.splitlines()[-1])


@pytest.mark.parametrize("given, wanted", [
    ([], {"preset": "TQ4"}), (["--kv-preset", "tq3", "--kv-exact-layers", "1"], {"preset": "tq3", "exact_layers": 1}),
    (["--kv-k-format", "f16", "--kv-v-format=sq3"], {"preset": "TQ4", "k_format": "f16", "v_format": "sq3"}),
    (["--kv-n-sink", "0", "--kv-n-recent", "100", "--kv-factors", "off"],
     {"preset": "TQ4", "n_sink": 0, "n_recent": 100, "factors": "off"}),
    (["--kv-calibration", CALIBRATION, "--kv-exact-prefill"],
     {"preset": "TQ4", "calibration": CALIBRATION, "exact_prefill": True})], ids=str)
def test_options_are_those_of_install(run, folder, installed, given, wanted):
    status, out, _ = run("generate", "--model", folder, "--prompt", "w5", "--max-tokens", 1, *given)
    assert status == 0 and installed == [wanted]


def texts_of(run, folder, *options):
    status, out, err = run("generate", "--model", folder, "--prompt", PROMPT, "--max-tokens", 12, "--verbose", "F", *options)
    assert status == 0, err
    return out.split()


def test_generate(run, folder):
    """Its text is the stock command's with exact formats, and another one with few bits."""
    model, tokenizer = mlx_lm.load(str(folder))
    wanted = mlx_lm.generate(model, tokenizer, tokenizer.encode(PROMPT), max_tokens=12).split()
    assert texts_of(run, folder, *EXACT) == wanted
    assert texts_of(run, folder, "--kv-k-format", "sq2", "--kv-v-format", "sq2", "--kv-n-recent", "16") != wanted
    draft = ["--draft-model", folder, "--num-draft-tokens", "2"]
    assert texts_of(run, folder, *EXACT, *draft) == wanted


@pytest.fixture
def given_caches(modules, monkeypatch):
    """The caches that generate's generate() was given."""
    found = []
    generate = modules["generate"].generate

    def spy(*given, prompt_cache=None, **options):
        found.append(prompt_cache)
        return generate(*given, prompt_cache=prompt_cache, **options)

    monkeypatch.setattr(modules["generate"], "generate", spy)
    return found


def test_prompt_cache_files(run, folder, tmp_path, given_caches):
    """A file of cache_prompt goes on with its options; with others it is refused, and they are named."""
    path = tmp_path / "prompt.safetensors"
    options = ["--kv-preset", "TQ3", "--kv-exact-layers", "1"]
    status, out, err = run("cache_prompt", "--model", folder, "--prompt", PROMPT, "--prompt-cache-file", path, *options)
    assert status == 0 and "Saving" in out, err
    use = ["generate", "--prompt-cache-file", path, "--prompt", "w7 w8", "--max-tokens", "5", "--verbose", "F"]
    status, out, err = run(*use, *options)
    assert status == 0 and len(out.split()) > 0 and [cache._options["preset"] for cache in given_caches[0]] == ["TQ3"] * 3
    status, out, err = run(*use)
    assert status == 1 and re.search("made with preset=TQ3.*this is preset=TQ4.*same options as", err.splitlines()[-1])


def test_prompt_cache_files_of_mlx_lm(run, folder, tmp_path, given_caches):
    """Its own cache has read a prompt exactly, and is compressed; one that it has quantized is refused."""
    path, model = str(tmp_path / "prompt.safetensors"), make_model()
    for bits in (None, 8):
        caches = stock.make_prompt_cache(model)
        logits(model, caches, ids(90))
        caches = caches if bits is None else [cache.to_quantized(bits=bits) for cache in caches]
        stock.save_prompt_cache(path, caches, {"model": str(folder), "tokenizer_config": "{}"})
        status, out, err = run("generate", "--prompt-cache-file", path, "--prompt", "w7", "--max-tokens", "3", "--verbose", "F")
        if bits is None:
            (held,) = given_caches
            assert status == 0 and all(isinstance(cache, TurboQuantKVCache) and cache.offset > 90 for cache in held)
    assert status == 1 and "quantized, which are not read: make it again" in err


def test_chat(run, folder, monkeypatch, installed):
    """A conversation whose cache grows from question to question."""
    sizes, update = [], TurboQuantKVCache.update_and_fetch

    def counted(self, *rows):
        sizes.append(self.offset)
        return update(self, *rows)

    monkeypatch.setattr(TurboQuantKVCache, "update_and_fetch", counted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6 w7\nw8 w9\nq\n"))
    status, out, err = run("chat", "--model", folder, "--max-tokens", "4", "--kv-preset", "TQ6")
    assert status == 0 and installed == [{"preset": "TQ6"}] and max(sizes) >= 3 + 4 + 2, err


def test_benchmark(run, folder, installed):
    for batch in ("1", "2"):
        status, out, err = run("benchmark", "--model", folder, "-p", "20", "-g", "3", "-n", "1", "-b", batch)
        assert status == 0 and "Averages: prompt_tps=" in out, err
    assert len(installed) == 2


def test_perplexity(run, folder, modules, monkeypatch):
    """Is that of the compressed cache: with exact formats the stock command's, with few bits another."""
    texts = ids(200, n_batch=3)
    monkeypatch.setattr(modules["perplexity"], "load_data", lambda *given, **options: mx.array(texts))
    wanted, _ = modules["perplexity"].eval_ppl(make_model(), mx.array(texts))

    def measured(*options):
        status, out, err = run("perplexity", "--model", folder, *options)
        assert status == 0, err
        return float(re.search(r"Perplexity: ([\d.]+)", out)[1])

    exact, coded = measured(*EXACT), measured("--kv-k-format", "sq2", "--kv-v-format", "sq2", "--kv-n-recent", "16")
    assert exact == pytest.approx(wanted, rel=1e-4) and abs(coded / wanted - 1) > 1e-3


def test_evaluate(run, folder, monkeypatch, capsys):
    """Scores are those of the compressed cache. lm_eval itself is a stand-in here, which asks for one score."""
    harness = types.ModuleType("lm_eval")
    harness.api = types.ModuleType("lm_eval.api")
    for name, content in (("model", {"LM": object}), ("registry", {"register_model": lambda name: lambda kind: kind})):
        part = types.ModuleType(f"lm_eval.api.{name}")
        vars(part).update(content)
        setattr(harness.api, name, part)
        monkeypatch.setitem(sys.modules, part.__name__, part)
    text, found = PROMPT + " ", []

    def evaluate(model, **options):
        found.extend(model.loglikelihood([types.SimpleNamespace(args=(text, words(ids(60, seed=5)[0])))]))
        return {"results": {}}

    harness.simple_evaluate = evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.api", harness.api)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    for options in (EXACT, ["--kv-k-format", "sq2", "--kv-v-format", "sq2", "--kv-n-recent", "16"]):
        status, out, err = run("evaluate", "--model", folder, "--tasks", "none", "--output-dir", folder / "out", *options)
        assert status == 0, err
        del sys.modules["mlx_lm.evaluate"]
    model, rows = make_model(), np.concatenate([ids(90), ids(60, seed=5)], axis=1)
    scores = mx.array(logits(model, stock.make_prompt_cache(model), rows))
    scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    wanted = sum(scores[0, i - 1, rows[0, i]].item() for i in range(90, 150))
    assert found[0][0] == pytest.approx(wanted, rel=1e-4) and abs(found[1][0] / wanted - 1) > 1e-4


def test_evaluate_needs_its_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    status, out, err = run("evaluate", "--model", "x", "--tasks", "y")
    assert status == 1 and err.startswith("turboquant: mlx_lm.evaluate cannot be imported") and "mlx-lm[evaluate]" in err


def test_without_mlx_lm(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    status, out, err = run("generate", "--prompt", "x")
    assert (status, out, err.count("\n")) == (1, "", 1) and "pip install 'libturboquant[mlx]'" in err


@pytest.mark.parametrize("draft", [None, "draft"])
def test_server(run, folder, modules, monkeypatch, tmp_path, draft):
    """It loads compressed models; its prompts' caches are in memory and in the folder, by a key of what is loaded."""
    server, found = modules["server"], []

    def serve(host, port, provider):
        provider.load_default()
        prompts = server.LRUPromptCache(provider.cli_args.prompt_cache_size)
        models = [model for model in (provider.model, provider.draft_model) if model is not None]
        cache = [layer for model in models for layer in stock.make_prompt_cache(model)]
        kept, rest = prompts.fetch_nearest_cache(provider.model_key, list(range(20)))
        found.append((port, provider.is_batchable, [layer._options["layer"] for layer in cache], len(rest)))
        if kept is None:
            for i, model in enumerate(models):
                model(mx.arange(20)[None], cache=cache[3 * i : 3 * i + 3])
            prompts.insert_cache(provider.model_key, list(range(20)), cache)

    monkeypatch.setattr(server, "run", serve)
    given = ["--model", folder, *(["--draft-model", folder] if draft else []), "--port", "1", "--kv-calibration", CALIBRATION]
    layers = [[0, 3], [1, 3], [2, 3]] * (2 if draft else 1)
    for extra, n_rest in (([], 20), ([], 20), (["--kv-cache-folder", tmp_path / "new/prompts"], 20),
                          (["--kv-cache-folder", tmp_path / "new/prompts", "--kv-cache-folder-bytes", "2GB"], 1),
                          (["--kv-cache-folder", tmp_path / "new/prompts", "--kv-preset", "TQ3"], 20)):
        status, _, err = run("server", *given, *extra)
        assert status == 0, err
        assert found.pop() == (1, draft is None, layers, n_rest)
    assert (tmp_path / "new/prompts").stat().st_mode & 0o077 == 0  # prompts can be read in it
    monkeypatch.setattr(mx.distributed, "init", lambda: types.SimpleNamespace(size=lambda: 2))
    status, _, err = run("server", *given, *extra)
    assert status == 1 and "--kv-cache-folder: a model on several machines" in err
