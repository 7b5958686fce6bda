# SPDX-License-Identifier: MIT
"""
Latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1) in Transformers. Its models hand the cache one latent of each
token, [rank] and the [rope] channels of the key that RoPE turns, and make keys and values of all heads from what the cache
returns (`expand_kv`). Here nothing is expanded: as that is linear, queries are brought to the latents' space instead, and what
attention returns of them to the values'.
"""
from __future__ import annotations

import types
from typing import Any

import torch

from .errors import UnsupportedError

_N_VALUE = "_turboquant_n_value"  # of an attention module whose weight has been looked at: what a head's values have


class Latents:
    """What expand_kv gives back as it is."""


def expand_kv(module: torch.nn.Module, latents: Any, turned: Any) -> tuple[Any, Any]:
    return (latents, turned) if isinstance(latents, Latents) else type(module).expand_kv(module, latents, turned)


def not_known(module: torch.nn.Module) -> UnsupportedError:
    return UnsupportedError(f"{type(module).__name__} makes keys and values from latents in a way that is not known: use "
                            "DynamicCache")


def keep_latents(module: torch.nn.Module) -> None:
    """Let a module's expand_kv give Latents back. Its class stays as it is."""
    if "expand_kv" not in vars(module):
        vars(module)["expand_kv"] = types.MethodType(expand_kv, module)  # which deepcopy binds to the copy


def expand_latents(module: torch.nn.Module) -> None:
    """Undo keep_latents."""
    vars(module).pop("expand_kv", None)
    vars(module).pop(_N_VALUE, None)


def _maps(module: torch.nn.Module, n_head: int, rank: int, n_turned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How a latent becomes the first part of a head's key and its value: views of the module's weight, [n_head, n_key, rank]
    and [n_head, n_value, rank]. Raises UnsupportedError."""
    weight = getattr(getattr(module, "kv_b_proj", None), "weight", None)
    is_plain = weight is not None and weight.is_floating_point() and weight.ndim == 2
    if not is_plain or weight.shape[0] % n_head or weight.shape[1] != rank:
        raise UnsupportedError(f"{type(module).__name__} has no plain weight that makes keys and values from latents "
                               "(kv_b_proj): use DynamicCache")
    of_heads = weight.detach().view(n_head, -1, rank)
    if _N_VALUE not in vars(module):
        vars(module)[_N_VALUE] = _look_at(module, of_heads, n_turned)
    return of_heads[:, :-vars(module)[_N_VALUE]], of_heads[:, -vars(module)[_N_VALUE]:]


def _look_at(module: torch.nn.Module, of_heads: torch.Tensor, n_turned: int) -> int:
    """What a head's values have, if expand_kv makes of random latents what the weight makes of them. Else UnsupportedError."""
    n_head, _, rank = of_heads.shape
    latents = torch.randn(1, 1, 3, rank + n_turned, generator=torch.Generator().manual_seed(1))
    latents, turned = latents.to(of_heads.device, of_heads.dtype).split([rank, n_turned], dim=-1)
    keys, values = type(module).expand_kv(module, latents, turned)
    n_value = values.shape[-1]
    own_keys = torch.cat([latents @ of_heads[:, :-n_value].mT, turned.expand(1, n_head, -1, -1)], dim=-1)
    bound = 1e-4 if of_heads.dtype == torch.float32 else 3e-2
    for wanted, own in ((keys, own_keys), (values, latents @ of_heads[:, -n_value:].mT)):
        if wanted.shape != own.shape or (wanted - own).abs().max() > bound * wanted.abs().max():
            raise not_known(module)
    return n_value


@torch.no_grad()
def queries_of(module: torch.nn.Module, query: torch.Tensor, rank: int, n_turned: int) -> torch.Tensor:
    """query [n_batch, n_head, n_tok, n_key + n_turned] as [n_batch, n_head, n_tok, rank + n_turned]: the same products with
    latents as with the keys that are made of them."""
    keys, _ = _maps(module, query.shape[1], rank, n_turned)
    own, turned = query.split([query.shape[3] - n_turned, n_turned], dim=-1)
    return torch.cat([own @ keys, turned], dim=-1)


@torch.no_grad()
def values_of(module: torch.nn.Module, out: torch.Tensor, n_turned: int) -> torch.Tensor:
    """What attention gives of latents [n_batch, n_tok, n_head, rank] as values [n_batch, n_tok, n_head, n_value]."""
    _, values = _maps(module, out.shape[2], out.shape[3], n_turned)
    return (out.transpose(1, 2) @ values.mT).transpose(1, 2).contiguous()
