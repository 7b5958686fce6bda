# SPDX-License-Identifier: MIT
"""How far next-token distributions are from each other, by llama-perplexity's definitions. docs/eval.md."""
from __future__ import annotations

import numpy as np

N_PART = 512
"""Tokens that a prompt is read in at a time."""


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergences(wanted: np.ndarray, found: np.ndarray, rows: int = 64) -> np.ndarray:
    """KL divergence of each row's distribution from that of wanted, both as logits [n, n_vocab]; in double precision."""
    parts = [np.empty(0)]
    for begin in range(0, len(wanted), rows):
        p, q = (log_softmax(x[begin : begin + rows].astype(np.float64)) for x in (wanted, found))
        parts.append((np.exp(p) * (p - q)).sum(axis=-1))
    return np.concatenate(parts)


def figures_of(kl: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """What llama-perplexity says of so many tokens, by the names of `tq eval`. same: is the most likely token the same?"""
    return {"kld_mean": float(kl.mean()), "kld_mean_error": float(kl.std() / max(1, len(kl) - 1) ** .5),
            "kld_99_9": float(np.quantile(kl, .999)), "same_top_1": float(100 * same.mean())}


def scored(begin: int, n: int, n_ctx: int) -> slice:
    """Which of a window's n tokens from `begin` on are scored: those of its second half, but for the last."""
    first = min(max(n_ctx // 2 - begin, 0), n)
    return slice(first, max(min(n_ctx - 1 - begin, n), first))
