# SPDX-License-Identifier: MIT
"""
How much does a compressed cache save, and what does it cost? A tutorial in cells (# %%) for an editor that runs them, or as a
script: `python examples/tutorial.py [MODEL.gguf TEXT.txt]`. Without a model it takes a small random one, whose figures say
nothing of real ones. The plot goes to tutorial.svg. Needs Transformers, PyTorch and matplotlib.
"""
# %% A model, and a text to look at.
import sys
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig

import libturboquant
from libturboquant.transformers import TurboQuantCache

torch.manual_seed(1)
torch.set_grad_enabled(False)
if len(sys.argv) > 2:
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()
    tokens = torch.tensor([tokenizer.encode(Path(sys.argv[2]).read_text()[:20000])[:1024]])
else:
    config = LlamaConfig(vocab_size=500, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, initializer_range=.06)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(500, (1, 1024))


# %% The reference: what the model says of each next token with the stock cache.
def next_token_logits(cache):
    """The text in two parts, so that the second reads what the cache keeps of the first."""
    model.set_attn_implementation("turboquant" if isinstance(cache, TurboQuantCache) else "sdpa")
    return torch.cat([model(part, cache=cache).logits.log_softmax(-1) for part in tokens.chunk(2, dim=1)], dim=1)


plain = DynamicCache(config=model.config)
reference = next_token_logits(plain)
n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers) * 16 // 32
print(f"The stock cache takes {n_bytes / 2**20:.1f} MiB for {tokens.shape[1]} tokens, in 16 bits a value.")

# %% The same with each preset. The KL divergence says how far the predictions move: .003 is what FP16 arithmetic itself moves
# when additions are ordered otherwise (docs/quality.md).
rows = []
for name, preset in libturboquant.presets().items():
    cache = TurboQuantCache(preset=name, config=model.config)
    found = next_token_logits(cache)
    divergence = float((reference.exp() * (reference - found)).sum(-1).mean())
    same = float((found.argmax(-1) == reference.argmax(-1)).float().mean())
    stats = cache.store.stats()
    held = stats.n_pages_used * stats.page_bytes + stats.exact_bytes
    rows.append((name, n_bytes / held, divergence))
    print(f"{name}: {held / 2**20:.1f} MiB, {n_bytes / held:.1f} times less; divergence {divergence:.5f}, "
          f"same best token {100 * same:.1f} %. {preset.description}")

# %% A plot of both.
matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots(figsize=(6, 4))
for name, saving, divergence in rows:
    axes.plot(saving, divergence, "o")
    axes.annotate(name, (saving, divergence), textcoords="offset points", xytext=(6, 4))
axes.set(xlabel="times less memory than 16 bits a value", ylabel="mean KL divergence, nats", yscale="log")
figure.savefig("tutorial.svg", bbox_inches="tight")
print("tutorial.svg shows both.")

# %% A conversation that begins with a long prompt: compute it once, save it, and go on from a copy.
model.set_attn_implementation("turboquant")
prompt = TurboQuantCache(preset="TQ4", config=model.config)
model(tokens, cache=prompt)
prompt.save("prompt.tqs")
print(f"prompt.tqs holds {libturboquant.describe_snapshot('prompt.tqs').file_bytes / 2**20:.1f} MiB.")
loaded = TurboQuantCache.load("prompt.tqs", model.config, preset="TQ4")
print(f"Loaded: {loaded.get_seq_length()} tokens.")
