# SPDX-License-Identifier: MIT
"""Factors from the weights of models of Transformers: weight_factors.py, with PyTorch's modules and Transformers' RoPE."""
from __future__ import annotations

import sys

import numpy as np
import torch

from . import weight_factors

_known = weight_factors.Known()
forget = _known.forget


@torch.no_grad()
def factors_of(module: torch.nn.Module, query: torch.Tensor, keys: torch.Tensor, n_ref: int,
                layer: torch.nn.Module | None = None) -> tuple[np.ndarray, float] | None:
    """
    weight_factors.of_module, once for each module; query and keys say what it makes, and where; layer: as of norm_before.
    """
    shape, norm = (query.shape[1], keys.shape[1], keys.shape[3]), weight_factors.norm_before(module, layer)
    return _known.get(module, (*shape, n_ref), lambda: weight_factors.of_module(
        module, *shape, lambda x: torch.from_numpy(x).to(query.device, query.dtype), lambda x: x.float().cpu().numpy(),
        lambda: rope(module, shape[2]), n_ref, norm))


def rope(module: torch.nn.Module, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Which channels RoPE turns together: what the model's own rotate_half does to the channels that are turned; and by which
    angles from token to token, without what a model does to slow ones for long contexts.
    """
    config = getattr(module, "config", None)
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = ropes.get("full_attention", ropes)
    share = ropes.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    theta = ropes.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    n_turned = int(head_dim * (share or 1))
    rotate = getattr(sys.modules[type(module).__module__], "rotate_half", None)

    def turn(x: np.ndarray) -> np.ndarray:
        turned = x[:, :n_turned]
        turned = np.roll(turned, n_turned // 2, axis=1) if rotate is None else rotate(torch.from_numpy(turned)).numpy()
        return np.concatenate([turned, x[:, n_turned:]], axis=1)

    partners, angles = weight_factors.partners_of(turn, head_dim), np.zeros(head_dim)
    first = np.flatnonzero(partners > np.arange(head_dim))
    angles[first] = angles[partners[first]] = theta ** (-np.arange(len(first)) / max(len(first), 1))
    return partners, angles
