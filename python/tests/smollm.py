# SPDX-License-Identifier: MIT
"""SmolLM2-135M-Instruct from its GGUF by Transformers' own support, and a text for it. `make deps` gets both."""
import torch
from conftest import DEPS
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load():
    """(model in float32, tokenizer)"""
    folder = DEPS / "models"
    assert (folder / FILE).exists(), f"{folder / FILE} is not there: run `make deps` first"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    return model, tokenizer


def export(folder, model, tokenizer):
    """Save the model as Hugging Face has it. The weights are no longer those of a GGUF, which it would refuse to save."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def novel(tokenizer, n_tok):
    """The first tokens of a novel, [1, n_tok]."""
    text = (DEPS / "text" / "austen.txt").read_text()[: 8 * n_tok]
    return torch.tensor([tokenizer.encode(text)[:n_tok]])
