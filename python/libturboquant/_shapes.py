# SPDX-License-Identifier: MIT
"""What a configuration of Transformers says of a model's layers: which can be compressed, and which share keys and values."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from .errors import UnsupportedError
from .formats import head_dims


COMPRESSED_TYPES = {"full_attention", "hybrid"}
# What Transformers keeps for such layers is small or bounded: it stays as it is.
# "dummy" layers have none.
STOCK_TYPES = {"sliding_attention", "chunked_attention", "linear_attention", "conv", "hybrid_sliding", "dummy"}


@dataclass(frozen=True)
class Layers:
    """
    What becomes of a model's layers: their kinds and the options of Transformers' layers for them, the shape of those that are
    compressed, and why others of full attention are not.
    """

    kinds: list[str]
    options: list[dict[str, Any]]
    n_head_kv: int
    head_dim: int
    head_dim_v: int
    kept: dict[int, str]
    rank: int = 0
    """Of latent attention: a layer's one head has so many values of latents, and behind them the channels that RoPE turns. Keys
    and values are made from latents."""

    @property
    def n_values(self) -> int:
        """What is kept of a token in a layer."""
        return self.n_head_kv * (self.head_dim + (0 if self.rank else self.head_dim_v))

    def is_compressed(self, i: int) -> bool:
        return self.kinds[i] in COMPRESSED_TYPES and i not in self.kept


def sort_layers(config: Any) -> Layers:
    """Of a text model's configuration. Raises UnsupportedError for a model that cannot be served."""
    kinds, options = layers_of(config)
    for i, kind in enumerate(kinds):
        if kind not in COMPRESSED_TYPES | STOCK_TYPES:
            raise UnsupportedError(f"layer {i} of this model is of the kind {kind!r}, which this cache does not have. Use "
                                   "DynamicCache and model.set_attn_implementation('sdpa')")
    *shape, kept = served(config, [i for i, kind in enumerate(kinds) if kind in COMPRESSED_TYPES])
    return Layers(kinds, options, *shape, kept, getattr(config, "kv_lora_rank", None) or 0)


def layers_of(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The kinds of layers, and the options of Transformers' layer for each. A window that is no smaller than the model's
    context (Phi-3 of 128K) is full attention."""
    kinds, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # Transformers before 5.18: the same for all
        options = [options] * len(kinds)
    context = getattr(config, "max_position_embeddings", None)

    def is_idle(window: int | None) -> bool:
        return None not in (context, window) and window >= context

    return ["full_attention" if kind == "sliding_attention" and is_idle(of_layer.get("sliding_window")) else kind
            for kind, of_layer in zip(kinds, options)], options


def served(config: Any, numbers: Sequence[int]) -> tuple[int, int, int, dict[int, str]]:
    """(n_head_kv, head_dim, head_dim_v) that most of these layers have, as models read their configuration, and why others
    cannot be compressed. A layer of another shape than its configuration says is refused when it comes."""
    if not numbers:
        raise UnsupportedError("no layer of this model has full attention: there is nothing to compress. Use DynamicCache")
    of_layers, kept, shapes = getattr(config, "per_layer_config", None), {}, {}
    for i in numbers:
        shape = shape_of_layer(of_layers[i] if of_layers else config)
        missing = [dim for dim in shape[1:] if dim not in head_dims()]
        if missing:
            kept[i] = f"head_dim {missing[0]} has no rotation"
        else:
            shapes.setdefault(shape, []).append(i)
    if not shapes:
        raise UnsupportedError(f"no layer of this model can be compressed: {told(kept)}. Use DynamicCache")
    most = max(shapes, key=lambda shape: len(shapes[shape]))
    for shape, layers in shapes.items():
        if shape != most:
            kept |= {i: f"{shape[0]} KV heads of {shape[1]} and {shape[2]} are not {most[0]} of {most[1]} and {most[2]}, as in "
                        f"{len(shapes[most])} layers" for i in layers}
    return *most, kept


def told(kept: dict[int, str]) -> str:
    layers: dict[str, list[int]] = {}
    for i, why in sorted(kept.items()):
        layers.setdefault(why, []).append(i)
    return "; ".join(f"layer{'s' * (len(found) > 1)} {', '.join(map(str, found))} cannot be compressed ({why})"
                     for why, found in layers.items())


def last_readers(config: Any) -> dict[int, int]:
    """Of layers whose keys and values later layers share, instead of having their own: the last of those."""
    n_shared, types = getattr(config, "num_kv_shared_layers", None) or 0, getattr(config, "layer_types", None)
    if n_shared == 0 or types is None:
        return {}
    first = len(types) - n_shared
    sources = {layer_type: i for i, layer_type in enumerate(types[:first])}
    return {sources[layer_type]: i for i, layer_type in enumerate(types) if i >= first and layer_type in sources}


def shape_of_layer(config: Any) -> tuple[int, int, int]:
    rank = getattr(config, "kv_lora_rank", None)
    if rank:
        return 1, rank + config.qk_rope_head_dim, rank + config.qk_rope_head_dim
    n_head = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_head
    return getattr(config, "num_key_value_heads", None) or n_head, head_dim, getattr(config, "v_head_dim", None) or head_dim
