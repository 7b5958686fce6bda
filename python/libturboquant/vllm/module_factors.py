# SPDX-License-Identifier: MIT
"""Factors of keys from the weights of vLLM's attention modules. Knows their names, and imports nothing of vLLM."""
from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from .. import weight_factors

_FRAMES_MAX = 12


@dataclass(frozen=True)
class Owner:
    """The module with the projections, and the layer around it, as far as they were found."""

    module: Any
    layer: Any


def owner_of(kind: type) -> Owner:
    """
    The modules that are being constructed now around the attention that calls this: vLLM tells an attention nothing about them.
    The first `self` of this kind is the attention's own.
    """
    found: list[Any] = []
    frame = sys._getframe(1)
    for _ in range(_FRAMES_MAX):
        if frame is None or len(found) > 2:
            break
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind) and not any(owner is known for known in found):
            found.append(owner)
        frame = frame.f_back
    found += [None] * 3
    return Owner(found[1], found[2])


def spread_and_factors(owner: Owner, n_head: int, n_head_kv: int, head_dim: int, dtype: torch.dtype
                       ) -> tuple[float, np.ndarray | None] | None:
    """
    The spread of products of queries and keys, and factors int8 [n_head_kv, head_dim], None for none; of a rank's own heads.
    None if the projections are not known.
    """
    module, rope = owner.module, getattr(owner.module, "rotary_emb", None)
    if not hasattr(module, "qkv_proj") or rope is None:
        return None
    adapted = SimpleNamespace(qkv_proj=_Projection(module.qkv_proj, dtype))
    for names in weight_factors.NORMS:
        for name in names:
            if getattr(module, name, None) is not None:
                setattr(adapted, name, getattr(module, name))
    norm = next((getattr(owner.layer, name) for name in weight_factors._INPUT_NORMS if hasattr(owner.layer, name)), None)
    with torch.no_grad():
        found = weight_factors.of_module(adapted, n_head, n_head_kv, head_dim, lambda x: torch.from_numpy(x)[0].to(dtype)[None],
                                         lambda x: x.float().numpy(), lambda: _rope(rope, head_dim), 0, norm)
    if found is None:
        return None
    factors, spread = found
    return spread, factors if factors.any() else None


class _Projection:
    """vLLM's linear layers take rows, and return a bias next to their result."""

    def __init__(self, linear: Any, dtype: torch.dtype) -> None:
        self._linear, self._dtype, self.in_features = linear, dtype, linear.input_size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found = self._linear(x.reshape(-1, x.shape[-1]).to(self._dtype))
        return found[0] if isinstance(found, tuple) else found


def _rope(rope: Any, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Partners and angles of channels (weight_factors.from_energies) from vLLM's rotary embedding."""
    n, partners, angles = int(getattr(rope, "rotary_dim", head_dim)), np.arange(head_dim), np.zeros(head_dim)
    turned = np.arange(n)
    is_halves = bool(getattr(rope, "is_neox_style", True))
    partners[:n] = (turned + n // 2) % n if is_halves else turned ^ 1
    pair = turned % (n // 2) if is_halves else turned // 2
    angles[:n] = float(getattr(rope, "base", 10000.0)) ** (-pair / (n // 2))
    return partners, angles
