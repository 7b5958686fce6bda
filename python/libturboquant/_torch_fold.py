# SPDX-License-Identifier: MIT
"""Factors of key channels, as powers of two, folded into the weights of a model of Transformers: docs/fold.md."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from . import weight_factors
from ._torch_factors import forget, rope
from .errors import UnsupportedError

# Of the check: tokens, and how far logits may move, of the largest. Only half floats that become too small to be exact do.
_N_TOKENS, _MOVED_MAX = 64, 1e-3


@torch.no_grad()
def fold(model: torch.nn.Module) -> dict[str, float]:
    """
    Change a model's weights so that it computes the same, with keys that have no channels that outweigh the others: rows of
    queries are multiplied, rows of keys divided by powers of two, or else the weights of norms behind them. Any cache of few
    bits loses less then, and save_pretrained keeps it. Returns the largest factor of each attention module that was changed, by
    its name; nothing for a model that needs none. Logits are compared before and after, by an attention implementation of
    Transformers' own. Raises UnsupportedError, and leaves the model as it was, if it is not understood or its logits change.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = {name: module for name, module in decoder.named_modules()
             if hasattr(module, "layer_idx") and weight_factors.has_projections(module)}
    if any(getattr(module, "is_kv_shared_layer", False) for module in decoder.modules()):
        raise UnsupportedError("some layers see keys of another layer, which are not folded here: fold the model's GGUF file "
                               "(tq fold)")
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no projections of queries and keys that are known here")
    octaves = {name: _octaves(name, module, decoder) for name, module in found.items()}
    octaves = {name: each for name, each in octaves.items() if each.any()}
    changes = [change for name, each in octaves.items() for change in _changes(name, found[name], each)]
    before = _logits(model)
    kept = [weight.clone() for weight, _ in changes]
    for name in octaves:
        forget(found[name])
    try:
        for weight, scaled in changes:
            weight.copy_(scaled)
        moved = (_logits(model) - before).abs().max() / before.abs().max()
        if not moved <= _MOVED_MAX:
            raise UnsupportedError(f"the logits of {type(model).__name__} moved by {moved:.2g} of the largest: it makes its "
                                   "queries or keys otherwise than is known here. Its weights are what they were")
    except BaseException:
        for (weight, _), old in zip(changes, kept):
            weight.copy_(old)
        raise
    return {name: float(2.0 ** abs(each).max()) for name, each in octaves.items()}


def _logits(model: torch.nn.Module) -> torch.Tensor:
    """Of tokens by chance, the same ones each time."""
    n_vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(n_vocab, (1, _N_TOKENS), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float()


def _octaves(name: str, module: torch.nn.Module, decoder: torch.nn.Module) -> np.ndarray:
    """By which powers of two [n_head_kv, head_dim] keys are to be divided."""
    config = module.config.get_text_config(decoder=True)
    if not _norms(module) and not hasattr(module, "k_proj") and not hasattr(module, "qkv_proj"):
        raise UnsupportedError(f"{name} has queries, keys and values in one projection, head by head; this is not folded")
    weight = next(module.parameters())
    if not weight.is_floating_point() or weight.is_meta:
        raise UnsupportedError(f"the weights of {name} are quantized or not in memory: fold the model before it is "
                               "quantized")
    head_dim, n_head = module.head_dim, config.num_attention_heads
    n_head_kv = n_head // getattr(module, "num_key_value_groups", 1)
    layer = decoder.get_submodule(name.rpartition(".")[0])
    energies = weight_factors.energies_of_module(
        module, n_head, n_head_kv, head_dim, lambda x: torch.from_numpy(x).to(weight.device, weight.dtype),
        lambda x: x.float().cpu().numpy(), weight_factors.norm_before(module, layer))
    if energies is None:
        raise UnsupportedError(f"how {name} projects its queries and keys is not known here")
    keys, queries, _ = energies
    norm = _norms(module)[1] if _norms(module) else None
    if norm is not None and norm.weight.numel() == head_dim:  # for all heads
        keys, queries = keys.mean(axis=0, keepdims=True), queries.reshape(-1, head_dim)
    return weight_factors.octaves_from_energies(keys, queries, rope(module, head_dim)[0])


def _norms(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Of queries and of keys, behind their projections."""
    found = ([getattr(module, name, None) for name in names] for names in weight_factors.NORMS)
    return next((norms for norms in found if None not in norms and hasattr(norms[0], "weight")), [])


def _changes(name: str, module: torch.nn.Module, octaves: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights, and what is to be in them."""
    keys = torch.from_numpy(np.ldexp(1.0, -octaves))
    n_group = getattr(module, "num_key_value_groups", 1)
    queries = (1 / keys).repeat_interleave(n_group, 0)
    norms = _norms(module)
    if norms:
        for norm, factors in zip(norms, (queries if len(octaves) > 1 else 1 / keys, keys)):
            yield norm.weight, _scaled_norm(name, norm, factors)
            if getattr(norm, "bias", None) is not None:
                yield norm.bias, _scaled(norm.bias, factors.reshape(norm.bias.shape))
        return
    if hasattr(module, "k_proj"):
        parts = [(module.q_proj, queries.flatten()), (module.k_proj, keys.flatten())]
    else:
        parts = [(module.qkv_proj, torch.cat([queries.flatten(), keys.flatten(), torch.ones_like(keys).flatten()]))]
    for projection, rows in parts:
        yield projection.weight, _scaled(projection.weight, rows[:, None])
        if getattr(projection, "bias", None) is not None:
            yield projection.bias, _scaled(projection.bias, rows)


def _scaled(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return weight * factors.to(weight.device, weight.dtype)


def _scaled_norm(name: str, norm: torch.nn.Module, factors: torch.Tensor) -> torch.Tensor:
    """A norm multiplies by its weight, or by one more (Gemma)."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    signs = torch.ones_like(weight)[None, None]
    signs[..., ::2] = -1  # of mean 0 and square 1, which a norm leaves as it is
    multiplied = signs * (norm(signs) - (0 if bias is None else bias))
    for offset in (0, 1):
        if torch.allclose(multiplied[0, 0], weight + offset, rtol=.02, atol=.02):
            return _scaled(weight.float() + offset, factors.reshape(weight.shape)) - offset
    raise UnsupportedError(f"how the norms of {name} use their weights is not known here")
