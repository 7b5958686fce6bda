# SPDX-License-Identifier: MIT
"""
Latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1) in Transformers. Its models hand the cache one latent of each
token, [rank] and the [rope] channels of the key that RoPE turns, and make keys and values of all heads from what the cache
returns (`expand_kv`). Here nothing is expanded: as that is linear, queries are brought to the latents' space instead, and what
attention returns of them to the values'.
"""
from __future__ import annotations

import types
import weakref
from typing import Any

import torch

from .errors import UnsupportedError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of attention modules whose weight has been looked at: what a head's values have.
_n_values: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()


class Latents:
    """What expand_kv gives back as it is."""


def expand_kv(module: torch.nn.Module, latents: Any, turned: Any) -> tuple[Any, Any]:
    """In the place of a module's own, for one call."""
    del vars(module)["expand_kv"]
    return (latents, turned) if isinstance(latents, Latents) else module.expand_kv(latents, turned)


def not_known(module: torch.nn.Module) -> UnsupportedError:
    return UnsupportedError(f"{type(module).__name__} makes keys and values from latents in a way that is not known: use "
                            "DynamicCache")


def keep_latents(module: torch.nn.Module) -> None:
    """Let a module's next expand_kv give Latents back. Its class stays as it is."""
    if "expand_kv" not in vars(module):
        vars(module)["expand_kv"] = types.MethodType(expand_kv, module)  # which deepcopy binds to the copy


def _plain_weight(projection: Any) -> torch.Tensor | None:
    """The weight of a layer that multiplies by it and does nothing else: adapters (LoRA) have one that is not all they do,
    quantized layers one that is not what they multiply by, and those in a file none at all."""
    if not isinstance(projection, torch.nn.Linear) or projection.bias is not None:
        return None
    forward = getattr(projection, "_old_forward", projection.forward)  # behind the hooks of accelerate
    weight = projection.weight
    is_plain = (getattr(forward, "__func__", None) is torch.nn.Linear.forward and weight.dtype in _DTYPES and not weight.is_meta
                and type(weight) in (torch.Tensor, torch.nn.Parameter))
    return weight if is_plain else None


def _maps(module: torch.nn.Module, n_head: int, rank: int, n_turned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How a latent becomes the first part of a head's key and its value: views of the module's weight, [n_head, n_key, rank]
    and [n_head, n_value, rank]. Raises UnsupportedError."""
    weight = _plain_weight(getattr(module, "kv_b_proj", None))
    if weight is None or weight.shape[0] % n_head or weight.shape[1] != rank:
        raise UnsupportedError(f"{type(module).__name__} has no plain weight in memory that makes keys and values from latents "
                               "(kv_b_proj): merge its adapters, load it without quantization and offloading, or use "
                               "DynamicCache")
    of_heads = weight.view(n_head, -1, rank)
    if module not in _n_values:
        _n_values[module] = _look_at(module, of_heads, n_turned)
    return of_heads[:, :-_n_values[module]], of_heads[:, -_n_values[module]:]


@torch.no_grad()
def _look_at(module: torch.nn.Module, of_heads: torch.Tensor, n_turned: int) -> int:
    """What a head's values have, if expand_kv makes of random latents what the weight makes of them. Else UnsupportedError."""
    n_head, _, rank = of_heads.shape
    latents = torch.randn(1, 1, 3, rank + n_turned, generator=torch.Generator().manual_seed(1))
    latents, turned = latents.to(of_heads.device, of_heads.dtype).split([rank, n_turned], dim=-1)
    with torch.autocast(of_heads.device.type, enabled=False):
        keys, values = type(module).expand_kv(module, latents, turned)
        n_value = values.shape[-1]
        own_keys = torch.cat([latents @ of_heads[:, :-n_value].mT, turned.expand(1, n_head, -1, -1)], dim=-1)
        own_values = latents @ of_heads[:, -n_value:].mT
    bound = 1e-4 if of_heads.dtype == torch.float32 else 3e-2
    for wanted, own in ((keys, own_keys), (values, own_values)):
        if wanted.shape != own.shape or (wanted - own).abs().max() > bound * wanted.abs().max():
            raise not_known(module)
    return n_value


def queries_of(module: torch.nn.Module, query: torch.Tensor, rank: int, n_turned: int) -> torch.Tensor:
    """query [n_batch, n_head, n_tok, n_key + n_turned] as [n_batch, n_head, n_tok, rank + n_turned]: the same products with
    latents as with the keys that are made of them. They want gradients where the query or the weight does, as attention looks
    for, which has none."""
    keys, _ = _maps(module, query.shape[1], rank, n_turned)
    own, turned = query.split([query.shape[3] - n_turned, n_turned], dim=-1)
    return torch.cat([own @ keys, turned], dim=-1)


@torch.no_grad()
def values_of(module: torch.nn.Module, out: torch.Tensor, n_turned: int) -> torch.Tensor:
    """What attention gives of latents [n_batch, n_tok, n_head, rank] as values [n_batch, n_tok, n_head, n_value]."""
    _, values = _maps(module, out.shape[2], out.shape[3], n_turned)
    return (out.transpose(1, 2) @ values.mT).transpose(1, 2).contiguous()
