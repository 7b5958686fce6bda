# SPDX-License-Identifier: MIT
"""
SmolLM2-135M-Instruct from its GGUF by Transformers' own support, and a text for it. `make deps` gets both.

    python smollm.py FOLDER N_TOK PART     writes the model there as Hugging Face has it, and write_context's file

MLX's tests run that as a process of its own, so that PyTorch's memory and threads are gone when they begin.
"""
import sys
from pathlib import Path

from conftest import DEPS

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load():
    """(model in float32, tokenizer)"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = DEPS / "models"
    assert (folder / FILE).exists(), f"{folder / FILE} is not there: run `make deps` first"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    return model, tokenizer


def export(model, tokenizer, folder):
    """Write the model as Hugging Face has it."""
    # The weights are no longer those of a GGUF, which Transformers would refuse to save.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_context(model, tokenizer, n_tok, part, path):
    """
    The novel's first n_tok tokens as keys and values, in parts: float32 [n_tok / part, n_layer, 2, n_head_kv, part, head_dim].
    """
    import torch
    from transformers import DynamicCache
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        for tokens in torch.tensor([novel(tokenizer, n_tok)]).split(part, dim=1):
            model(tokens, cache=cache, logits_to_keep=1)
        with open(path, "wb") as file:
            for i in range(0, n_tok, part):
                for layer in cache.layers:
                    for x in (layer.keys, layer.values):
                        file.write(x[0, :, i : i + part].numpy().tobytes())


def novel(tokenizer, n_tok):
    """The first tokens of a novel, a list."""
    return tokenizer.encode((DEPS / "text" / "austen.txt").read_text()[: 8 * n_tok])[:n_tok]


def calibrate(n_tok):
    """The words of a `tq calibrate` that learns from the first tokens of the novel, without its output."""
    llama_bin, root = DEPS / "llama-bin", Path(__file__).parents[2]
    assert (llama_bin / "llama-perplexity").exists(), f"llama.cpp is not in {llama_bin}: run `make deps` first"
    return [root / "build/release/tq", "calibrate", DEPS / "models" / FILE, "--text", DEPS / "text" / "austen.txt", "--context",
            str(n_tok), "--chunks", "1", "--llama-bin", llama_bin]


if __name__ == "__main__":
    loaded = load()
    export(*loaded, sys.argv[1])
    write_context(*loaded, int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[1]) / "context.f32")
