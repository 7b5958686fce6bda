# SPDX-License-Identifier: MIT
"""
The transform of a KV head's keys that hurts attention least when they are coded: what is learnt from keys and queries, and its
solution. docs/calibrate.md has the mathematics.
"""
from dataclasses import dataclass

import numpy as np

SLAB = 512  # queries at a time: bounds the memory of the weights, and with a causal mask saves most of the columns not visible
LEAST_EIGENVALUE = 1e-6  # of the largest; smaller ones are what few tokens leave undetermined
SHRINKAGE = 0.3  # of 0, 0.1 and 0.3 the one with the least loss in the worst tokens of other texts


def coded_columns(visible, n_sink, n_recent):
    """[n_query, n_col]: the columns that a query sees as they were coded; sinks and what is recent to it are exact."""
    columns = np.arange(visible.shape[1])
    last = visible.shape[1] - 1 - visible[:, ::-1].argmax(1)
    return visible & (columns >= n_sink) & (columns <= last[:, None] - n_recent)


def center_blocks(keys, block):
    """keys [n, head_dim] without the mean of each block of columns; with block 0 as they are."""
    if not block:
        return keys
    starts = np.arange(0, len(keys), block)
    sizes = np.diff(starts, append=len(keys))
    means = np.add.reduceat(keys, starts, axis=0) / sizes[:, None].astype(np.float32)
    return keys - np.repeat(means, sizes, axis=0)


def weighted_moments(queries, keys, centered, visible, coded, softcap=0.0):
    """
    (K, Q): second moments of the centered keys and of the queries of a KV head, weighted by the attention that coded columns
    get. An error e of a key moves the logit of a query q by q . e, and attention's output by p times that: what attention does
    not look at, or what is exact, must have no say. queries [n_head, n_query, head_dim] have the scale of the softmax in them.
    """
    head_dim = keys.shape[1]
    of_queries = np.zeros((head_dim, head_dim), np.float32)
    of_columns = np.zeros(len(keys), np.float32)
    for first in range(0, queries.shape[1], SLAB):
        seen, far = visible[first:first + SLAB], coded[first:first + SLAB]
        rows = far.any(1)  # the others have no weight
        if not rows.any():
            continue
        n = len(keys) - int(seen.any(0)[::-1].argmax())
        seen, far = seen[rows, :n], far[rows, :n]
        for q in queries[:, first:first + SLAB][:, rows]:
            weights = q @ keys[:n].T
            if softcap:
                weights = softcap * np.tanh(weights / softcap)
            weights[~seen] = -np.inf
            weights = np.exp(weights - weights.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            weights *= far
            of_columns[:n] += weights.sum(0)
            of_queries += (q * weights.sum(1, keepdims=True)).T @ q
    of_keys = (centered * of_columns[:, None]).T @ centered
    return of_keys.astype(np.float64), of_queries.astype(np.float64)


def to_halves(moments):
    """Moments of channels in pairs side by side, as of channels whose first and second of a pair are in two halves."""
    order = np.concatenate([np.arange(0, len(moments), 2), np.arange(1, len(moments), 2)])
    return moments[np.ix_(order, order)]


def power(matrix, exponent):
    """Of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, LEAST_EIGENVALUE * values.max()) ** exponent) @ vectors.T


def balance(of_keys, of_queries):
    """
    The symmetric A for which keys A k and queries A^-1 q have the same second moments, from those of k and q. It minimizes
    E[(q . e)^2] when e is the error of a codec that spreads its error evenly, as a rotation makes it do: E |A k|^2 E |A^-1 q|^2
    is least there.
    """
    root, inverse = power(of_keys, 0.5), power(of_keys, -0.5)
    return power(inverse @ power(root @ of_queries @ root, 0.5) @ inverse, 0.5)


def to_bfloat16(values):
    """Bits, of the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Transform:
    """Keys are coded as L^T k, queries become L^-1 q."""
    bits: np.ndarray  # L in bfloat16, lower triangular
    gain: float  # by how much the expected error of the logits falls, in energy

    @property
    def matrix(self):
        return from_bfloat16(self.bits).astype(np.float64)


def shrink(moments):
    """Towards the same energy in all directions (Ledoit and Wolf's estimate, with a fixed weight)."""
    n = len(moments)
    return (1 - SHRINKAGE) * moments + SHRINKAGE * np.trace(moments) / n * np.eye(n)


def factor(of_keys, of_queries):
    """
    L, the lower Cholesky factor of A^2: L^T k and A k differ by a rotation, which the codec adds anyway, and a triangle takes
    half the memory. Of its scales, which are all the same to a codec, the one that leaves the keys' mean energy as it is.
    """
    matrix = balance(of_keys, of_queries)
    lower = np.linalg.cholesky(matrix @ matrix)
    return lower * np.sqrt(np.trace(of_keys) / np.trace(lower.T @ of_keys @ lower))


def solve(of_keys, of_queries):
    """The Transform for these moments; where nothing was learnt, the identity."""
    identity = Transform(to_bfloat16(np.eye(len(of_keys))), 1.0)
    if not all(np.isfinite(moments).all() and np.trace(moments) > 0 for moments in (of_keys, of_queries)):
        return identity
    try:
        with np.errstate(all="ignore"):  # moments at the edge of the numbers
            transform = Transform(to_bfloat16(factor(shrink(of_keys), shrink(of_queries))), 1.0)
            lower = transform.matrix
            inverse = np.linalg.inv(lower)
    except np.linalg.LinAlgError:
        return identity
    if not (np.isfinite(lower).all() and np.isfinite(inverse).all() and np.diag(lower).min() > 0):
        return identity
    after = np.trace(lower.T @ of_keys @ lower) * np.trace(inverse @ of_queries @ inverse.T)
    transform.gain = float(np.trace(of_keys) * np.trace(of_queries) / after)
    return transform
