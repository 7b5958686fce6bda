# SPDX-License-Identifier: MIT
"""Factors of key channels, as powers of two: from the library (tq_key_factors), by energies that a file's weights tell."""
import sys
from pathlib import Path

import numpy as np
from gguf import quants

from eval.llama import LlamaError

from .blocks import CURE, bounds

PACKAGE = Path(__file__).resolve().parents[2] / "python"  # in the sources; installed, it lies next to this one
if PACKAGE.is_dir():
    sys.path.insert(0, str(PACKAGE))
from libturboquant.weight_factors import octaves_from_energies  # noqa: E402

ROWS_AT_ONCE = 1024  # of a matrix, as floats


def floats(data, tensor):
    """Of a part of its data."""
    try:
        return quants.dequantize(data, tensor.tensor_type).astype(np.float32)
    except NotImplementedError as error:
        raise LlamaError(f"{tensor.name} is of type {tensor.tensor_type.name}, whose values are not known: {CURE}") from error


def values_of(rows):
    """A norm's or a bias's floats."""
    return floats(rows.tensor.data, rows.tensor).reshape(-1)[rows.first:rows.first + rows.n].astype(np.float64)


def projected(side):
    """The energy of each row for white vectors behind the norm before it, biases included, [n_head, head_dim]."""
    tensor = side.weight.tensor
    data = tensor.data.reshape(side.weight.n_all, -1)[side.weight.first:side.weight.first + side.weight.n]
    weight, shift = ([values_of(part) for part in side.input_norm] + [None, None])[:2]
    bias = sum(map(values_of, side.biases), np.zeros(side.weight.n))
    found = np.empty(side.weight.n)
    for first in range(0, side.weight.n, ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        x = floats(data[rows], tensor)
        mean = bias[rows] + (x @ shift if shift is not None else 0)
        x = x * weight.astype(np.float32) if weight is not None else x
        found[rows] = np.square(x).sum(axis=1) + np.square(mean)
    return found.reshape(side.n_head, -1)[:, :side.head_dim]


def energies(side):
    """The energy of each channel before RoPE, [n_head, head_dim]."""
    found = projected(side)
    if not side.norm:
        return found
    weight, shift = ([values_of(part) for part in side.norm] + [0.0])[:2]
    is_of_all = len(side.norm[0].tensor.shape) == 1 and not side.is_shared
    mean = found.mean() if is_of_all else found.mean(axis=1, keepdims=True)
    weight, shift = (np.resize(x, found.shape) for x in (weight, shift))
    return found / np.where(mean > 0, mean, 1) * np.square(weight) + np.square(shift)


def exponents_of(side, octaves, sign):
    """[(rows, exponents)] of a side: octaves [n_head_kv, head_dim] for each of its targets."""
    of_heads = sign * np.repeat(octaves, side.n_head // len(octaves), axis=0)
    return [(target, of_heads[0] if target.n == side.head_dim else of_heads.ravel()) for target in side.targets]


def limit(group, octaves):
    """The octaves that all rows bear, the nearest to those that are wanted, the same ones for channels that turn together."""
    low, high = np.full(octaves.shape, -np.inf), np.full(octaves.shape, np.inf)
    for side, sign in [(group.keys, -1), *((side, 1) for side in group.queries)]:
        for target in side.targets:
            own = [x[target.first:target.first + target.n] for x in bounds(target.tensor, target.n_all)]
            own = own if sign > 0 else [-own[1], -own[0]]
            n_own = len(octaves) if target.n > group.head_dim else 1  # of a weight that all heads share
            lowest, highest = (x.reshape(n_own, -1, group.head_dim) for x in own)
            low, high = np.maximum(low, lowest.max(axis=1)), np.minimum(high, highest.min(axis=1))
    low, high = np.maximum(low, low[:, group.partners]), np.minimum(high, high[:, group.partners])
    if any(side.is_shared for side in (group.keys, *group.queries)):
        low[:], high[:] = low.max(axis=0), high.min(axis=0)
    return np.clip(octaves, low, high).astype(int)


def find(group):
    """(octaves, wanted), both [n_head_kv, head_dim]: keys are to be divided by 2^octaves. wanted: before rows set limits."""
    keys = energies(group.keys)
    queries = np.concatenate([energies(side).reshape(group.n_head_kv, -1, group.head_dim) for side in group.queries], axis=1)
    if any(side.is_shared for side in (group.keys, *group.queries)):
        keys, queries = keys.mean(axis=0, keepdims=True), queries.reshape(1, -1, group.head_dim)
    wanted = octaves_from_energies(keys, queries.reshape(-1, group.head_dim), group.partners)
    wanted = np.repeat(wanted, group.n_head_kv // len(wanted), axis=0)
    return limit(group, wanted), wanted
