# SPDX-License-Identifier: MIT
"""Engines, models and texts of the vLLM tests. They run in an environment of their own: scripts/setup.sh vllm."""
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DEPS = Path(os.environ.get("TQ_DEPS_DIR", ROOT / "build/deps"))
GGUF = DEPS / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 64


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder that makes the sources' package look installed, with the entry points of pyproject.toml."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "turboquant-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: turboquant\nVersion: 0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [line for group, points in groups.items() for line in
             (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), "")]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def run(installed, tmp_path_factory):
    """run(job, **environment): the results of an engine, and its log."""
    folder = tmp_path_factory.mktemp("jobs")

    def call(job, **environment):
        n = len(list(folder.iterdir()))
        source, result, log = folder / f"{n}.json", folder / f"{n}-result.json", folder / f"{n}.log"
        source.write_text(json.dumps(job))
        paths = [str(ROOT / "python"), str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as out:
            done = subprocess.run([sys.executable, Path(__file__).with_name("engine_process.py"), source, result], stdout=out,
                                  stderr=subprocess.STDOUT,
                                  env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment})
        text = log.read_text(errors="replace")
        assert done.returncode == 0, text[-6000:]
        return json.loads(result.read_text()), text

    return call


@pytest.fixture(scope="session")
def engine(run):
    """engine(model, formats, steps): the results of a float32 engine; formats None: stock vLLM."""

    def call(model, formats, steps, environment=None, **more):
        llm = {"model": str(model), "dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "max_num_seqs": 8,
               "block_size": BLOCK, "max_num_batched_tokens": 2048, "disable_log_stats": False, "skip_tokenizer_init": True,
               **more}
        if formats is not None:
            llm["additional_config"] = {"turboquant": formats}
        results, log = run({"llm": llm, "steps": steps}, **(environment or {}))
        assert ("turboquant: keys" in log) == (formats is not None), log[-3000:]
        return results

    return call


@pytest.fixture(scope="session")
def smollm(tmp_path_factory):
    """The real model as a folder that vLLM loads, and its tokenizer."""
    if not GGUF.exists():
        pytest.skip(f"{GGUF} does not exist: make deps")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm")
    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    model = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture(scope="session")
def text():
    return (DEPS / "text/austen.txt").read_text()


def with_outliers(model):
    """Keys have channels that outweigh the others, as Qwen2's have, in pairs that RoPE turns slowly."""
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.view(-1, 64)
        bias.zero_()
        bias[:, 30] = bias[:, 62] = 40.0
    return model


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """toy(name): a small random model, made once."""
    import torch
    import transformers

    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, "initializer_range": 0.06,
             "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    kinds = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
            **shape | {"tie_word_embeddings": True}, sliding_window=128, attn_logit_softcapping=20.0,
            query_pre_attn_scalar=64)),
        "qwen2": lambda: with_outliers(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            **{name: value for name, value in shape.items() if name != "head_dim"} | {"hidden_size": 512}))),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)),
        "deepseek": lambda: transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(
            **{name: value for name, value in shape.items() if name not in ("head_dim", "num_key_value_heads")},
            kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
            first_k_dense_replace=4, n_routed_experts=8)),
    }
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(1)
            made[name] = tmp_path_factory.mktemp(name)
            kinds[name]().save_pretrained(made[name])
        return made[name]

    return make
