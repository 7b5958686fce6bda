# SPDX-License-Identifier: MIT
"""The cache alone, with NumPy: a prompt, decoding, a fork, a file. `pip install .` is all that this needs."""
import tempfile
from pathlib import Path

import numpy as np

import libturboquant

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM = 2, 8, 2, 128
rng = np.random.default_rng(1)


def draw(n_tok, n_head):
    return rng.standard_normal((n_tok, n_head, HEAD_DIM), np.float32)


cache = libturboquant.Cache(N_LAYER, N_HEAD_KV, HEAD_DIM, preset="TQ4")
seq = cache.seq_create()

# A prompt: append its keys and values, and attend with its queries, in one call for each layer.
for layer in range(N_LAYER):
    out = cache.prefill(seq, layer, draw(1000, N_HEAD), draw(1000, N_HEAD_KV), draw(1000, N_HEAD_KV))
assert out.shape == (1000, N_HEAD, HEAD_DIM)

# Decoding is the same with one token.
for layer in range(N_LAYER):
    cache.prefill(seq, layer, draw(1, N_HEAD), draw(1, N_HEAD_KV), draw(1, N_HEAD_KV))

stats = cache.stats()
f16 = 1001 * N_LAYER * 2 * N_HEAD_KV * HEAD_DIM * 2
held = stats.n_pages_used * stats.page_bytes + stats.exact_bytes
print(f"{cache.length(seq)} tokens: {held} bytes in {stats.n_pages_used} pages, {f16 / held:.1f} times less than in FP16")

# A fork shares the pages; each goes its own way.
other = cache.seq_fork(seq)
cache.trim(other, 500)
print(f"after a fork: {cache.stats().n_pages_shared} pages are shared")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "conversation.tqs"
    cache.save(path, [seq])
    (loaded,) = libturboquant.Cache(N_LAYER, N_HEAD_KV, HEAD_DIM, preset="TQ4").load(path)
    print(f"saved {libturboquant.describe_snapshot(path).file_bytes} bytes, loaded as sequence {loaded}")

try:
    cache.append(seq, 0, draw(1, N_HEAD), draw(1, N_HEAD))
except libturboquant.ArgumentError as error:
    print(f"refused: {error}")
