# SPDX-License-Identifier: MIT
"""
The cache in Hugging Face Transformers: attention of its models over compressed keys and values. docs/python.md.

    install(model, preset="TQ4")
    model.generate(**inputs)

Or, with a cache of one's own:

    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache(preset="TQ4", config=model.config)
    model.generate(**inputs, cache=cache)

These lines belong together. `update` of a Transformers cache returns keys and values to the attention function; this one
returns handles of the compressed ones, on which any attention but "turboquant" fails. Without install "turboquant" refuses
ordinary tensors.

Padding is not stored: a sequence of the library holds a row's real tokens, and the row's columns say which these are.
"""
from __future__ import annotations

import copy
import inspect
import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import (DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, DynamicCache, DynamicLayer,
                                      DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from . import _threads, cache as _cache, weight_factors
from ._columns import Columns
from ._shapes import last_readers, layers_of, sort_layers, told
from ._torch_factors import factors_of
from ._torch_latent import Latents, keep_latents, not_known, queries_of, values_of
from ._torch_fold import fold as fold
from ._torch_rows import attend_rows
from ._torch_stores import DeviceStore, HostStore, is_device
from ._library import lib, log
from .errors import ArgumentError, SnapshotError, UnsupportedError
from .formats import format_info

NAME = "turboquant"
"""The attention implementation, for model.set_attn_implementation."""

# Layers of Transformers that an interrupted pass can be taken back from: they replace their tensors, and change none.
_WITH_KEYS = (DynamicLayer, DynamicSlidingWindowLayer)
_CACHE_NAMES = ("cache", "past_key_values")  # what models call the argument, the newer name first
_GUARDS = ("raise", "warn", "off")
_UNSERVED = ("keep", "refuse")
_INSTALLED = "_turboquant_installed"  # of a model, and of its attention modules, which then take ordinary keys, too
# Where Transformers' continuous batching begins.
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
# Options of attention functions, and what to do about them.
_UNSUPPORTED = {
    "position_bias": "position biases",
    "output_attentions": "output_attentions: the weights are never all in memory",
}


def _calling(is_wanted: Callable[[Any], bool]) -> Any:
    """The innermost such object whose method has come here, or None: keys and values do not know whose they are."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is not None and is_wanted(owner):
            return owner
        frame = frame.f_back
    return None


def _calling_model() -> PreTrainedModel | None:
    return _calling(lambda owner: isinstance(owner, PreTrainedModel))


def _can_set_attention(model: PreTrainedModel | type[PreTrainedModel]) -> bool:
    return getattr(model, "_can_set_attn_implementation", lambda: True)()


class _Handle(Latents):
    """What `update` returns in place of a tensor. Whoever takes it for one gets the reason, not a wrong result."""

    def _refuse(self, what: str) -> NoReturn:
        asked = f"{what} was asked of keys or values that are compressed"
        model = _calling_model()
        if model is not None and (not _can_set_attention(model) or model.config._attn_implementation == NAME):
            raise UnsupportedError(f"{asked}: {type(model).__name__} computes its attention itself, and no attention "
                                   "implementation of Transformers changes that. Use DynamicCache")
        raise ArgumentError(f'{asked}: they are only for the attention implementation "{NAME}". Call '
                            f'model.set_attn_implementation("{NAME}"), or pass no TurboQuantCache')

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy, pickle and inspect look for
            raise AttributeError(name)
        self._refuse(f"`{name}`")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> NoReturn:
        cls._refuse(None, getattr(function, "__name__", str(function)))


class _Compressed(_Handle):
    """A layer's new rows, not yet appended: [n_batch, n_head_kv, n_tok, head_dim]. `reader`: the model's layer that attended to
    them last."""

    def __init__(self, layer: TurboQuantLayer, rows: torch.Tensor) -> None:
        self.layer, self.rows, self.reader = layer, rows, -1


class _Stock(_Handle):
    """Keys or values of a layer that is left to Transformers."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Pass:
    """
    A forward pass that is not over, and what there was before it. Nobody tells the cache of one that was interrupted: a layer
    that comes a second time begins another pass.
    """

    def __init__(self, n_columns: int) -> None:
        self.n_columns = n_columns
        self.came: dict[int, Any] = {}  # layers that have come; of those left to Transformers, copies of before
        self.is_recurrent = False  # a recurrent state has changed, which knows no way back


class TurboQuantLayer(CacheLayerMixin):
    """One layer with full attention. `number`: of the library's layers; `index`: of the model's; `last_reader`: of the model's,
    the last one that attends to this one's keys and values."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: TurboQuantCache, number: int, index: int) -> None:
        super().__init__()
        # Weak, so that a cache and its memory go when the last user of the cache does.
        self._owner, self._number, self.index, self.last_reader = weakref.ref(owner), number, index, index
        self._model_config: Any = None
        self.n_columns = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the library's cache is there from the beginning."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
               ) -> tuple[_Compressed, _Compressed]:
        """Handles of the rows. They are appended when the attention that follows brings the queries."""
        if self.is_latent:
            module = _calling(lambda owner: isinstance(owner, torch.nn.Module))
            if not hasattr(module, "expand_kv"):
                raise not_known(module)
            keep_latents(module)
        return _Compressed(self, key_states), _Compressed(self, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Of whole forward passes."""
        return min(self.n_columns, self._cache()._n_whole)

    def get_max_length(self) -> int:
        return -1

    @property
    def is_latent(self) -> bool:
        return self._cache()._rank > 0

    def _cache(self) -> TurboQuantCache:
        owner = self._owner()
        if owner is None:
            raise ArgumentError("the TurboQuantCache of this layer is gone: keep the cache as long as its layers are used")
        return owner

    def _check(self, config: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._model_config is not None and self._model_config is not config:
            raise ArgumentError("this cache belongs to another model: make a TurboQuantCache for each, or reset() it first")
        if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad):
            raise UnsupportedError("there are no gradients through compressed attention: call the model under "
                                   "torch.no_grad()")
        self._cache()._use(query.device)
        store = self._cache().store
        wanted = (store.n_head_kv, store.head_dim, store.head_dim_v)
        found = (keys.shape[1], keys.shape[3], values.shape[3])
        if wanted != found:
            raise ArgumentError(f"a layer has {found[0]} KV heads of {found[1]} (keys) and {found[2]} (values), but the "
                                f"cache was made for {wanted[0]} of {wanted[1]} and {wanted[2]}: pass the model's config")
        self._model_config = config

    def _find_factors(self, module: torch.nn.Module, query: torch.Tensor, keys: torch.Tensor, scaling: float
                      ) -> np.ndarray | None:
        """Those of the keys to come, from the weights of the module that brings the first."""
        owner = self._cache()
        if self is owner._compressed[0] and owner._guard == "raise" and owner._factors != "off":
            owner._raise_formats(module, query, keys, scaling)
        is_exact = weight_factors.is_exact(owner._key_formats[self._number])
        # The first one speaks for all: later ones could not change the formats any more.
        is_first = self is owner._compressed[0] and not all(map(weight_factors.is_exact, owner._key_formats))
        if owner._factors == "off" or (is_exact and not is_first):
            return None
        of_weights = factors_of(module, query, keys, weight_factors.references_of(owner._options))
        if of_weights is None:
            owner._do_without_factors(module, self)
            return None
        if is_exact:
            return None
        factors, spread = of_weights
        if owner._guard != "off":
            layer = f"compressed layer {self._number}"
            weight_factors.warn_of_spread(owner._key_formats[self._number], spread * scaling, layer)
        return factors

    def attend(self, reader: int, module: torch.nn.Module, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
               mask: torch.Tensor | None, scaling: float | None, softcap: float | None = None,
               sinks: torch.Tensor | None = None) -> torch.Tensor:
        """
        Attend with queries of the last of the rows' tokens [n_batch, n_head, n_query, head_dim]: [n_batch, n_query, n_head,
        head_dim]; and append the rows, if `reader`, the model's layer that the queries are of, is the last one.
        mask: None, or bool [n_batch, n_columns + n_tok], where False is padding. A row of padding gives zeros.
        softcap: logits become softcap * tanh(logit / softcap). sinks [n_head]: logits of the denominator only.
        """
        owner = self._cache()
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        if sinks is not None:
            sinks = sinks.detach().to(torch.float32).contiguous()
        try:
            if reader == self.index:
                factors = self._find_factors(module, query, keys, scaling) if self.n_columns == 0 else None
                self._check(module.config, query, keys, values)
                if self.n_columns == 0:
                    owner._set_key_factors(self, factors, query.device)
                kept = owner._begin(self, query, mask)
            else:
                kept = owner._continue(self)
            out = attend_rows(owner._batch, self._number, query, keys, values, kept, scaling, softcap, sinks,
                               is_shared=reader != self.last_reader, out_dim=owner._rank)
        except BaseException:
            if owner._pass is not None and not owner._pass.is_recurrent:
                owner._take_back()
            raise
        if reader == self.last_reader:
            self.n_columns += keys.shape[2]
            self.is_initialized = True
        if reader == owner._last:
            owner._end()
        return out


class TurboQuantHybridLayer(LinearAttentionLayer, TurboQuantLayer):
    """A layer that has full attention and a recurrent state, which is Transformers' own. `options`: of its layer for that."""

    is_compileable = False

    def __init__(self, owner: TurboQuantCache, number: int, index: int, **options: Any) -> None:
        TurboQuantLayer.__init__(self, owner, number, index)
        LinearAttentionLayer.__init__(self, **options)


class TurboQuantCache(Cache):
    """
    A cache of Transformers whose layers of full attention are compressed. Layers with a window or a recurrent state keep
    what Transformers has for them; of hybrid ones, which have both, keys and values are compressed. Layers may share the keys
    and values of others. Kinds that are not known are refused.

    config: model.config. preset and options: those of libturboquant.Cache, as k_format="sq8", v_format="sq8" or
    layer_k_formats=[...], one for each layer of full attention, or exact_layers=1: the first and the last one stay exact.
    factors: "weights" (default) scales channels of keys by factors from the model's weights, so that outlier channels cost
    other channels no precision; "off" does not. With a calibration, which does what factors do, "off" is the default.
    guard: what happens to layers whose logits a preset's keys would move by more than 1, as the weights tell: "raise" (default)
    gives their keys better formats, with a warning; "warn" only warns, as formats that were chosen always do; "off" is silent.
    unserved: what happens to single layers of full attention that cannot be compressed, as for a head_dim that has no rotation:
    "keep" (default) leaves them as Transformers has them, and a warning names them; "refuse" refuses the model.
    n_take_back: so many tokens at the end can be cropped as if they had never come, as assisted generation does with drafts
    that were rejected, for memory of as many exact tokens.
    max_tokens: reserve memory for so many tokens of each row at first, as CUDA graphs need it.
    For generate(), forward() and pipelines; greedy, sampling, beams, assisted; batches with padding on any side. For one thread
    at a time. copy.deepcopy shares pages until they differ. The memory is the CPU's, or the model's CUDA device's.
    """

    def __init__(self, config: Any, preset: str = "TQ4", max_tokens: int | None = None, factors: str | None = None,
                 guard: str = "raise", unserved: str = "keep", **options: Any) -> None:
        self._factors = weight_factors.chosen(factors, options.get("calibration"))
        for name, value, known in (("guard", guard, _GUARDS), ("unserved", unserved, _UNSERVED)):
            if value not in known:
                raise ArgumentError(f"{name} is {value!r}; give one of {', '.join(map(repr, known))}")
        self._guard = guard
        self.config = config.get_text_config(decoder=True)
        found = sort_layers(self.config)
        self._rank = found.rank
        n_head_kv, head_dim, head_dim_v, kept = found.n_head_kv, found.head_dim, found.head_dim_v, found.kept
        if kept and unserved == "refuse":
            raise UnsupportedError(f"{told(kept)}. unserved='keep' leaves them to Transformers")
        layers: list[Any] = []
        for i, (layer_type, kwargs) in enumerate(zip(found.kinds, found.options)):
            if found.is_compressed(i):
                number = sum(isinstance(layer, TurboQuantLayer) for layer in layers)
                # Before 5.18 all layers have the options of those with a window.
                layers.append(TurboQuantHybridLayer(self, number, i, **kwargs) if layer_type == "hybrid"
                              else TurboQuantLayer(self, number, i))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
        super().__init__(layers=layers)
        self._compressed = [layer for layer in layers if isinstance(layer, TurboQuantLayer)]
        for index, reader in last_readers(self.config).items():
            if isinstance(layers[index], TurboQuantLayer):
                layers[index].last_reader = reader
        # With this layer all that can be taken back have come.
        self._last = max(getattr(layer, "last_reader", i) for i, layer in enumerate(layers)
                         if isinstance(layer, TurboQuantLayer) or type(layer) in _WITH_KEYS)
        if kept:
            warnings.warn(f"turboquant: {told(kept)}. Transformers keeps them as they are; unserved='refuse' refuses such a "
                          "model", UserWarning, stacklevel=2)
        of_model = {} if head_dim_v == head_dim else {"head_dim_v": head_dim_v}
        self._options = {"preset": preset, "n_threads": torch.get_num_threads()} | of_model | options
        if found.rank:
            self._options |= weight_factors.of_latents(self._options, len(self._compressed), self._factors)
            self._factors = "off"
        self._max_tokens = max_tokens
        # Of the CPU until a tensor on another device comes. Memory is taken when it is used.
        self.store: Any = HostStore(len(self._compressed), n_head_kv, head_dim, **self._options)
        self._key_formats = weight_factors.formats_of(self._options, len(self._compressed), "k")
        self.seqs: list[int] = []
        self._columns = Columns()
        self._pass: _Pass | None = None
        self._ended_after: int | None = None  # the layer with which the first pass ended, if it did not reach the last
        self._device: torch.device | None = None
        self._batch: _cache.Batch | None = None
        self._is_captured = False  # the pass, in a CUDA graph

    def __del__(self) -> None:
        # When a cycle of references is collected, the store may have been first; when Python ends, modules.
        if getattr(self, "seqs", None) and sys is not None and not sys.is_finalizing() and not self.store.closed:
            self._free(self.seqs)

    def __repr__(self) -> str:
        n_stock = len(self.layers) - len(self._compressed)
        return (f"TurboQuantCache({len(self._compressed)} layers compressed, {n_stock} left to Transformers, "
                f"{len(self.seqs)} sequences of {self._n_whole} tokens, {self.nbytes} bytes)")

    @property
    def is_initialized(self) -> bool:
        """Have all layers seen tokens?"""
        return all(layer.is_initialized for layer in self._compressed)

    @property
    def nbytes(self) -> int:
        """Bytes that the compressed layers hold, everything counted; of all copies that share pages."""
        return self.store.stats().allocated_bytes

    @torch.compiler.disable
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Handles for the attention implementation "turboquant"."""
        layer = self.layers[layer_idx]
        if isinstance(layer, TurboQuantLayer):
            return layer.update(key_states, value_states)
        self._come(layer_idx)
        handles = tuple(map(_Stock, layer.update(key_states, value_states, *args, **kwargs)))
        if layer_idx == self._last:
            self._end()
        return handles

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._come_recurrent(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
                               ) -> torch.Tensor:
        self._come_recurrent(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    # What models ask before a pass, so of whole ones.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self._pass is None else self._pass.n_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        before = None if self._pass is None else self._pass.came.get(layer_idx)
        return super().get_mask_sizes(query_length, layer_idx) if before is None else before.get_mask_sizes(query_length)

    # ---- a forward pass ----

    def _do_without_factors(self, module: torch.nn.Module, layer: TurboQuantLayer) -> None:
        """A layer that holds nothing has projections that are not known: all keys get 8 bits, unless formats were chosen."""
        if layer is self._compressed[0]:
            more = weight_factors.without(self._options, len(self._compressed), module)
            self._factors = "off"
            if more:
                self._options |= more
                self._renew_store()
                self._key_formats = weight_factors.formats_of(self._options, self.store.n_layer, "k")
        else:
            raise UnsupportedError(
                f"the projections of queries and keys in {type(module).__name__}, of compressed layer {layer._number}, are not "
                "known, while the first layer's are, so some keys would have factors for outlier channels and others none: "
                'make the cache with k_format="sq8", factors="off"')

    def _raise_formats(self, module: torch.nn.Module, query: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """The guard: before the first token, layers whose logits a preset's keys would move too far get better ones. `module`
        is the first layer's attention, query and keys what it makes."""
        model = _calling_model()
        if model is None or any(self._options.get(name) is not None for name in ("k_format", "layer_k_formats")):
            return
        found = {getattr(part, "layer_idx", None): (part, owner) for owner in model.modules() for part in owner.children()
                 if type(part) is type(module)}
        raised, n_ref = list(self._key_formats), weight_factors.references_of(self._options)
        for layer in self._compressed:
            other, owner = found.get(layer.index, (None, None))
            of_weights = None if other is None else factors_of(other, query, keys, n_ref, owner)
            if of_weights is not None:
                spread = of_weights[1] * (getattr(other, "scaling", None) or scaling)
                raised[layer._number] = int(lib.tq_key_guard(raised[layer._number], spread))
        if raised == self._key_formats:
            return
        better = [f"{layer.index} {format_info(fmt).name}" for layer, fmt, old in
                  zip(self._compressed, raised, self._key_formats) if fmt != old]
        warnings.warn(f"turboquant: by the model's weights {self._options['preset']} would move the logits of {len(better)} "
                      f"layers by more than 1, so their keys have better formats (layer {', '.join(better)}). guard='warn' "
                      "leaves the preset as it is", UserWarning, stacklevel=2)
        self._options["layer_k_formats"], self._key_formats = raised, raised
        self._renew_store()

    def _renew_store(self) -> None:
        """One of its own, while it holds no tokens."""
        self._free(self.seqs)
        self.seqs, self._columns = [], Columns()
        store = self.store
        self.store = HostStore(len(self._compressed), store.n_head_kv, store.head_dim, **self._options)
        self._device = self._batch = None

    def _set_key_factors(self, layer: TurboQuantLayer, factors: np.ndarray | None, device: torch.device) -> None:
        """Of a layer that holds nothing. Copies share a store, and may hold keys of another model."""
        if layer is self._compressed[0] and self.store.stats().n_sequences > len(self.seqs):
            self._renew_store()
            self._use(device)
        self.store.set_key_factors(layer._number, factors)

    @property
    def _n_whole(self) -> int:
        """Columns of whole passes."""
        return self._columns.n if self._pass is None else self._pass.n_columns

    def _come(self, index: int) -> _Pass:
        """A layer's turn. What it changes comes after this."""
        if self._pass is not None and index in self._pass.came:
            self._refuse_missing_layers()
            self._settle()
        if self._pass is None:
            self._pass = _Pass(self._columns.n)
        layer = self.layers[index]
        self._pass.came[index] = None if isinstance(layer, TurboQuantLayer) else copy.copy(layer)
        return self._pass

    def _come_recurrent(self, index: int) -> None:
        """The same, of a layer that comes several times in a pass, or after its end."""
        if index < self._last:
            if self._pass is None:
                self._pass = _Pass(self._columns.n)
            self._pass.is_recurrent = True

    def _refuse_missing_layers(self) -> None:
        """A model that has fewer layers than its configuration says never ends a pass."""
        if self._pass.n_columns > 0:
            return
        before, self._ended_after = self._ended_after, max(self._pass.came)
        if before == self._ended_after:
            raise ArgumentError(f"the first forward pass has ended after layer {before} of {len(self.layers)}, twice: make the "
                                "cache with a config that has the model's num_hidden_layers; if both were interrupted, "
                                "reset() the cache")

    def _settle(self) -> None:
        """Take back what a pass has left that was interrupted: for what never comes in the midst of one."""
        if self._pass is None:
            return
        if self._pass.is_recurrent:
            raise ArgumentError("a forward pass was interrupted, and layers with a recurrent state cannot go back: reset() the "
                                "cache and run the prompt again")
        log.warning("a forward pass was interrupted after layer %d of %d: the cache goes back to the %d tokens before it",
                    max(self._pass.came, default=0), len(self.layers), self._pass.n_columns)
        self._take_back()

    def _take_back(self) -> None:
        for index, before in self._pass.came.items():
            if before is not None:
                self.layers[index].__dict__ = dict(before.__dict__)
        self._roll_back(self._pass.n_columns)
        self._pass = None

    def _use(self, device: torch.device) -> None:
        """All layers are on one device, the first one's."""
        if device == self._device:
            return
        if self._device is not None:
            raise UnsupportedError(f"this cache is on {self._device}, and a layer on {device}: it keeps to one device. Load "
                                   'the model on one, as with device_map={"": 0}, and make a new cache for it')
        if is_device(device):
            if self._rank:
                raise UnsupportedError("latent attention is only served on the CPU. Use model.to('cpu'), or DynamicCache and "
                                       "model.set_attn_implementation('sdpa')")
            if any(layer.last_reader != layer.index for layer in self._compressed):
                raise UnsupportedError("layers of this model share the keys and values of others, which this cache can only "
                                       "give them on the CPU. Use model.to('cpu'), or DynamicCache and "
                                       "model.set_attn_implementation('sdpa')")
            store = DeviceStore(device, self.store.n_layer, self.store.n_head_kv, self.store.head_dim, **self._options)
            if self.seqs:  # which were loaded
                seqs = _move(self.store, self.seqs, store)
                self._free(self.seqs)
                self.seqs = seqs
            self.store, self._batch = store, None  # the CPU's goes with its last user
        elif device.type != "cpu":
            raise UnsupportedError(f"the model is on {device}: this cache computes on the CPU and on CUDA devices. Use "
                                   "model.to('cpu'), or a cache of Transformers")
        self._device = device

    def _open(self, n_batch: int) -> None:
        """Sequences for a new batch."""
        self.seqs = [self.store.seq_create() for _ in range(n_batch)]

    def _reserve(self) -> None:
        """What max_tokens asks for, again where rows were cropped."""
        for seq in self.seqs if self._max_tokens else ():
            self.store.reserve(seq, max(self._max_tokens - self.store.length(seq), 0))

    def _begin(self, layer: TurboQuantLayer, query: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray | None:
        """Which of the new columns of a layer's queries [n_batch, n_head, n_tok, head_dim] are tokens, bool [n_batch, n_tok];
        None: all. A pass's first layer adds them."""
        n_batch, n_head, n_tok, _ = query.shape
        if not self.seqs:
            self._open(n_batch)
        if len(self.seqs) != n_batch:
            raise ArgumentError(f"this cache holds a batch of {len(self.seqs)}, and was given one of {n_batch}: use a new one, "
                                "batch_repeat_interleave or batch_select_indices")
        begin = self._come(layer.index).n_columns
        if begin == self._columns.n:
            if self._batch is None or self._batch.n_rows != n_batch:
                self._batch = _cache.Batch(self.store, n_batch)
            self._is_captured = self._batch.is_captured
            tokens = self._extend(n_tok) if self._is_captured and mask is None else self._columns.extend(
                n_batch, n_tok, None if mask is None else mask.cpu().numpy())
            counts = [n_tok] * n_batch if tokens is None else tokens.sum(axis=1).tolist()
            if not self._is_captured:
                self._reserve()
            self._batch.begin(self.seqs, counts, n_head)
        if layer.n_columns != begin or begin + n_tok != self._columns.n:
            raise ArgumentError(f"layer {layer.index} holds {layer.n_columns} tokens and gets {n_tok}, others held {begin} and "
                                f"hold {self._columns.n}: it was left out of a forward pass. reset() the cache")
        return self._columns.tokens(begin)

    def _continue(self, layer: TurboQuantLayer) -> np.ndarray | None:
        """The same for another layer that attends to what `layer` has brought in this pass."""
        if self._pass is None or layer.index not in self._pass.came:
            raise ArgumentError(f"layer {layer.index}, whose keys and values others share, is not of this forward pass. "
                                "reset() the cache")
        return self._columns.tokens(self._pass.n_columns)

    def _extend(self, n_tok: int) -> np.ndarray | None:
        """Add columns without padding, whatever there was before."""
        kept = self._columns.kept
        mask = None if kept is None else np.pad(kept, ((0, 0), (0, n_tok)), constant_values=True)
        return self._columns.extend(len(self.seqs), n_tok, mask)

    def _end(self) -> None:
        """The last layer has come. What a CUDA graph has captured did not happen; replayed() says when it does."""
        if self._batch is not None:
            self._batch.end()
            if self._is_captured:
                self._forget_capture(self._pass.n_columns)
        self._pass = self._ended_after = None

    def _forget_capture(self, n: int) -> None:
        """Only the columns have counted what comes after n: the library's lengths are as they were."""
        self._is_captured = False
        self._columns.cut(n)
        for layer in self._compressed:
            layer.n_columns = min(layer.n_columns, n)

    def replayed(self, n_tok: int = 1) -> None:
        """Say that a CUDA graph of a step was replayed, which appended n_tok tokens to each row."""
        if self._batch is None or not is_device(self._device):
            raise ArgumentError("replayed() is for CUDA graphs of a model with this cache, which has seen none")
        self._batch.replayed(self.seqs, [n_tok] * len(self.seqs))
        self._extend(n_tok)
        for layer in self._compressed:
            layer.n_columns += n_tok

    def _roll_back(self, n: int) -> None:
        """Keep n columns: what there was before a forward pass that failed."""
        if self._is_captured:  # a captured pass has failed, here or where nobody told us
            self._forget_capture(min(layer.n_columns for layer in self._compressed))
        for seq, length in zip(self.seqs, self._columns.lengths(len(self.seqs), n)):
            self.store.trim(seq, length)
        for layer in self._compressed:
            layer.n_columns = min(layer.n_columns, n)
        self._columns.cut(n)  # at last: until then a roll back that is interrupted can be done again

    # ---- what generate() asks for ----

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove columns, as Transformers has it: a negative number."""
        tokens_to_remove = int(tokens_to_remove)  # some versions give a tensor
        if tokens_to_remove > 0:
            raise ArgumentError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
        self._settle()
        fixed = [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)
                 and not (layer.record_past and layer.is_croppable)]
        if fixed and tokens_to_remove < 0:
            raise UnsupportedError(f"layers of this model ({len(fixed)}) have a state of all tokens before, which none can be "
                                   "taken out of: copy the cache (copy.deepcopy) before tokens that may have to go, or run the "
                                   "prompt again")
        for layer in self._of_transformers():
            if layer not in fixed:
                layer.crop(tokens_to_remove)
        self._roll_back(max(self._columns.n + tokens_to_remove, 0))

    def reset(self) -> None:
        """Forget all tokens, and which model they were of."""
        for layer in self.layers:
            if isinstance(layer, TurboQuantLayer):
                layer.n_columns, layer._model_config, layer.is_initialized = 0, None, False
        for layer in self._of_transformers():
            layer.reset()
        self._free(self.seqs)
        self.seqs, self._columns, self._pass, self._ended_after = [], Columns(), None, None
        self._is_captured = False  # the batch stays where it is, as graphs want it

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row beam_idx[i] was: pages are shared."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.seqs)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self.seqs))[indices.cpu()])

    def _of_transformers(self) -> list[Any]:
        """Layers whose keys and values, or whose state, Transformers keeps."""
        return [layer for layer in self.layers if type(layer) is not TurboQuantLayer]

    def _select(self, indices: torch.Tensor) -> None:
        """Row i becomes what row indices[i] was. A row's first use keeps its sequence, others fork it."""
        rows = indices.tolist()
        self._settle()
        unused, seqs, forks = dict(enumerate(self.seqs)), [], []
        try:
            for row in rows:
                seq = unused.pop(row, None)
                if seq is None:
                    seq = self.store.seq_fork(self.seqs[row])
                    forks.append(seq)
                seqs.append(seq)
        except BaseException:
            self._free(forks)
            raise
        self._free(unused.values())
        self.seqs = seqs
        self._columns.select(rows)
        for layer in self._of_transformers():  # by this, since it is all that recurrent states have
            layer.reorder_cache(indices)

    def _free(self, seqs: Any) -> None:
        for seq in seqs:
            self.store.seq_free(seq)

    def __deepcopy__(self, memo: dict) -> TurboQuantCache:
        """For prefixes that several conversations begin with: the copy shares the library's pages."""
        self._settle()
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, seqs=[], _batch=None)
        memo[id(self)] = other
        other._columns = copy.deepcopy(self._columns)
        other.layers = [_copy_layer(layer, other, memo) for layer in self.layers]
        other._compressed = [layer for layer in other.layers if isinstance(layer, TurboQuantLayer)]
        for seq in self.seqs:
            other.seqs.append(self.store.seq_fork(seq))
        return other

    def __copy__(self) -> TurboQuantCache:
        """As a deep copy: two caches cannot append to one sequence."""
        return copy.deepcopy(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a TurboQuantCache cannot be pickled, which torch.save does: save() it to a file of its own")

    # ---- files ----

    def save(self, path: str | os.PathLike) -> None:
        """
        Write the cache to a file (docs/snapshot.md), which libturboquant.describe_snapshot looks at. Raises UnsupportedError
        where the file cannot hold everything: layers left to Transformers, and padding that is not on the left.
        """
        if self._of_transformers():
            raise UnsupportedError("this model has layers or states that are left to Transformers, and a snapshot holds "
                                   "compressed keys and values only: run the prompt again instead of saving it")
        self._settle()
        lengths = self._columns.lengths(len(self.seqs), self._columns.n)
        if not self.seqs or Columns.left_padded(lengths) != self._columns:
            raise UnsupportedError("only a cache that holds tokens, and whose padding is all on the left with a row that has "
                                   "none, can be saved")
        if any(layer.n_columns != self._columns.n for layer in self._compressed):
            raise ArgumentError("a layer was left out of a forward pass: reset() the cache and run the prompt again before "
                                "saving it")
        self.store.save(path, self.seqs)

    @classmethod
    def load(cls, path: str | os.PathLike, config: Any, preset: str | None = None, device: str | torch.device | None = None,
             **options: Any) -> TurboQuantCache:
        """
        A cache from a file that `save` wrote. Formats and what else the file says are the file's; where a preset or options are
        given, they must be those of the saved cache; factors are the file's, and `factors` is for tokens after a reset(). A
        calibration must be given. On a CUDA device if that is given, else in the CPU's memory, from which the first forward
        pass takes it to the model's. Raises SnapshotError; UnsupportedError where a device cannot hold it.
        """
        info = _cache.describe_snapshot(path)
        n_layer = layers_of(config.get_text_config(decoder=True))[0].count("full_attention")
        if info.n_layer != n_layer:
            raise SnapshotError(f"{os.fspath(path)} holds {info.n_layer} layers, and this model has {n_layer} of full "
                                "attention: it is of another model. Run the prompt again")
        of_file = {"page_size": info.page_size} | (_options_of(info) if preset is None else {})
        for side in "kv":  # one for each layer comes before one for all
            if f"{side}_format" in options:
                of_file.pop(f"layer_{side}_formats", None)
        cache = cls(config, "TQ4" if preset is None else preset, **(of_file | options))
        if device is not None:
            cache._use(_with_index(torch.device(device)))
        cache.seqs = cache.store.load(path)
        cache._columns = Columns.left_padded([cache.store.length(seq) for seq in cache.seqs])
        for layer in cache._compressed:
            layer.n_columns, layer.is_initialized = cache._columns.n, True
        return cache


def _move(host: _cache.Cache, seqs: Sequence[int], store: _cache.Cache) -> list[int]:
    """Sequences of another cache of the same options with the content of these, by a file: what they share stays shared."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cache.tqs")
        host.save(path, seqs)
        return store.load(path)


def _options_of(info: _cache.Snapshot) -> dict[str, Any]:
    """What a file says of how its cache was made."""
    found: dict[str, Any] = {"n_sink": info.n_sink, "n_recent": info.n_recent, "k_ref_block": info.k_ref_block,
                             "seed": info.seed}
    if info.n_take_back:
        found["n_take_back"] = info.n_take_back
    for side, formats in (("k", info.k_formats), ("v", info.v_formats)):
        same = len(set(formats)) == 1
        found |= {f"{side}_format": formats[0]} if same else {f"layer_{side}_formats": formats}
    return found


def _with_index(device: torch.device) -> torch.device:
    """As tensors name it: "cuda" is one of several."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _copy_layer(layer: Any, owner: TurboQuantCache, memo: dict) -> Any:
    if not isinstance(layer, TurboQuantLayer):
        return copy.deepcopy(layer, memo)
    other = copy.copy(layer)
    other._owner = weakref.ref(owner)
    if isinstance(layer, TurboQuantHybridLayer):  # whose state is changed in place
        vars(other).update((name, copy.deepcopy(getattr(layer, name), memo)) for name in vars(LinearAttentionLayer()))
    return other


def _stock_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """For layers left to Transformers: its "sdpa", or the model's own "eager" where logits are capped or have sinks."""
    n_query, n_columns = query.shape[2], key.shape[2]
    if n_query > 1 and (n_query < n_columns if mask is None else _is_padding(mask)):  # of a layer without a window
        causal = query.new_ones(n_query, n_columns, dtype=torch.bool).tril(n_columns - n_query)
        mask = causal[None, None] if mask is None else mask & causal
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if mask is None:  # what sdpa_mask leaves out: plain causality
        mask = query.new_ones(n_query, n_columns, dtype=torch.bool).tril(n_columns - n_query)
    mask = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    del kwargs["is_causal"]
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)


def _refuse_ordinary(module: torch.nn.Module) -> NoReturn:
    got = f'the attention implementation "{NAME}" got ordinary keys in {type(module).__name__}'
    text_only = ("model.set_attn_implementation('sdpa'), and then, only for the text part of a model with images or sound, "
                 f'model.set_attn_implementation({{"text_config": "{NAME}"}})')
    if not getattr(module, "is_causal", True):
        raise UnsupportedError(f"{got}, which sees all tokens at once and has no cache. Call {text_only}. Models with an "
                               "encoder for text are not supported")
    raise ArgumentError(f"{got}: pass cache=TurboQuantCache(config=model.config) to each call of the model. If one was passed, "
                        "this pass is not of that call's cache (guidance_scale adds a pass, and other parts of the model have "
                        f"passes): call {text_only}")


@torch.compiler.disable
def attention_forward(module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any, attention_mask: torch.Tensor | None,
                      dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any
                      ) -> tuple[torch.Tensor, None]:
    """The attention implementation "turboquant", as AttentionInterface calls it."""
    if isinstance(key, _Stock):
        return _stock_attention(module, query, key.tensor, value.tensor, attention_mask, dropout=dropout, scaling=scaling,
                                is_causal=is_causal, **kwargs)
    if not isinstance(key, _Compressed):
        if not hasattr(module, _INSTALLED):
            _refuse_ordinary(module)
        return _stock_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                is_causal=is_causal, **kwargs)
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) not in (None, False):
            raise UnsupportedError(f"there is no {what}. Use DynamicCache and another attention implementation")
    window = kwargs.get("sliding_window")
    if window is not None and key.layer.n_columns + key.rows.shape[2] > window:
        raise UnsupportedError(f"more tokens than a sliding window of {window} has, in a layer that has full attention as its "
                               "configuration says. Use DynamicCache and another attention implementation")
    if dropout:
        raise UnsupportedError("there is no dropout in compressed attention: call model.eval()")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedError("this attention is only causal: use DynamicCache and another attention implementation")
    padding = _padding_of(attention_mask)
    reader = key.layer.index if key.reader < 0 else getattr(module, "layer_idx", -1)
    if not key.reader < reader <= key.layer.last_reader:
        raise UnsupportedError(f"{type(module).__name__} attends to keys and values that another layer has brought, which this "
                               "cache cannot give it. Use DynamicCache and model.set_attn_implementation('sdpa')")
    key.reader = reader
    keys, values, n_turned = key.rows, value.rows, 0
    if key.layer.is_latent:
        n_turned, keys = values.shape[3], torch.cat([keys, values], dim=3)
        values, query = keys, queries_of(module, query, keys.shape[3] - n_turned, n_turned)
    out = key.layer.attend(reader, module, query, keys, values, padding, scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
    return values_of(module, out, n_turned) if n_turned else out, None


def _is_padding(mask: torch.Tensor) -> bool:
    """Is it, or a part of its queries, what attention_mask makes: the same columns for all queries?"""
    return mask.ndim == 4 and mask.dtype == torch.bool and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0)


def _padding_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[n_batch, n_columns]"""
    if mask is None or mask.ndim == 2:
        return mask
    if _is_padding(mask):
        return mask[:, 0, 0]
    if mask.ndim == 4 and mask.dtype == torch.bool and mask.shape[1] == 1:  # of a window that no token has left
        (n_query, n_columns), kept = mask.shape[2:], mask[:, 0, -1]
        causal = kept[:, None] & mask.new_ones(n_query, n_columns).tril(n_columns - n_query)
        if ((mask[:, 0] == causal) | ~kept[:, n_columns - n_query:, None]).all():
            return kept
    raise UnsupportedError(f"a mask of {mask.ndim} dimensions is not supported: give attention_mask as [n_batch, n_tok], with "
                           "zeros for padding")


def attention_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
                   mask_function: Any = causal_mask_function, attention_mask: torch.Tensor | None = None,
                   local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
    """
    The mask that goes with it, as AttentionMaskInterface calls it: padding as bool [n_batch, 1, n_query, n_columns], which
    takes the memory of one query's; None without any.
    Layers left to Transformers, which have a local_size, get the mask of its "sdpa".
    """
    # Of caches that were passed to a model with install, some have columns that are not written yet.
    is_ahead = bool(_installed) and kv_offset + kv_length != q_offset + q_length
    if local_size is not None or is_ahead or (_installed and mask_function is not causal_mask_function):
        if is_ahead:
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
                         **kwargs)
    if mask_function is not causal_mask_function:
        raise UnsupportedError("this model or call adds to the causal mask (packed sequences, blocks, or a mask of its own). "
                               "Compressed attention cannot: use DynamicCache and another attention implementation")
    if attention_mask is None or attention_mask.all():
        return None
    return attention_mask.to(torch.bool)[:, None, None].expand(-1, 1, q_length, -1)


_installed: weakref.WeakSet[_Installed] = weakref.WeakSet()


class _Installed:
    """What install has changed of a model, and how caches are made."""

    def __init__(self, model: PreTrainedModel, options: dict[str, Any], before: str) -> None:
        self.options, self.before = options, before
        decoder = model.get_decoder()
        self.of_decoder, self.decoder = list(inspect.signature(type(decoder).forward).parameters), decoder
        self.prepare = model._prepare_cache_for_generation if hasattr(model, "_prepare_cache_for_generation") else None
        self.hook = decoder.register_forward_pre_hook(self.give_cache, with_kwargs=True)

    def make(self, config: Any) -> TurboQuantCache:
        return TurboQuantCache(config=config, **self.options)

    def give_cache(self, decoder: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A cache for a pass that would make one of Transformers; none where gradients are wanted."""
        name = next((name for name in _CACHE_NAMES if name in self.of_decoder), _CACHE_NAMES[0])
        has_cache = any(kwargs.get(other) is not None for other in _CACHE_NAMES) or (
            name in self.of_decoder and len(args) >= self.of_decoder.index(name))
        wants_cache = kwargs.get("use_cache")
        wants_cache = decoder.config.use_cache if wants_cache is None else wants_cache
        if has_cache or not wants_cache or torch.is_grad_enabled():
            return None
        return args, kwargs | {name: self.make(decoder.config)}

    def prepare_cache(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        """What generate() would give the model: the same, but its own plain cache."""
        given = {name: model_kwargs.get(name) for name in _CACHE_NAMES}
        done = self.prepare(generation_config, model_kwargs, *args, **kwargs)
        for name in _CACHE_NAMES:
            if given[name] is None and type(model_kwargs.get(name)) is DynamicCache:
                model_kwargs[name] = self.make(self.decoder.config)
        return done


def _refuse_batching(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError("Transformers' continuous batching (generate_batch) has a paged cache of its own, which cannot be "
                           "replaced: call generate() with a padded batch, run vLLM for a server (docs/vllm.md), or call "
                           "libturboquant.transformers.uninstall(model) first")


def check_kind(kind: type[PreTrainedModel], config: Any) -> None:
    """Refuse a class of models that install cannot switch, whatever its layers are."""
    if config.is_encoder_decoder:
        raise UnsupportedError("models with an encoder for text are not supported")
    if not _can_set_attention(kind):
        raise UnsupportedError(f"{kind.__name__} computes its attention itself, and no attention implementation of "
                               "Transformers changes that")


def install(model: PreTrainedModel, preset: str = "TQ4", **options: Any) -> PreTrainedModel:
    """
    Let a model compress its cache wherever it makes one itself: generate(), pipelines, chats, evaluations, servers. Options are
    those of TurboQuantCache, and are checked now. Caches that are passed are used as they are; passes with gradients, or
    without a cache, go through Transformers' own attention. Of a model with images or sound the text part is switched. A
    second call replaces the first one's options. Continuous batching (generate_batch) is refused: its cache cannot be replaced.
    Returns the model. Raises UnsupportedError, ArgumentError.
    """
    check_kind(type(model), model.config)
    TurboQuantCache(config=model.config, preset=preset, **options)
    uninstall(model)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    set_attention(model, NAME)
    installed = _Installed(model, {"preset": preset} | options, before)
    _installed.add(installed)
    if installed.prepare is not None:
        model._prepare_cache_for_generation = installed.prepare_cache
    for name in _BATCHING:
        if hasattr(model, name):
            setattr(model, name, _refuse_batching)
    for module in installed.decoder.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _INSTALLED, True)
    setattr(model, _INSTALLED, installed)
    return model


def uninstall(model: PreTrainedModel) -> PreTrainedModel:
    """Undo install; nothing, if the model has none. Returns the model."""
    installed = vars(model).pop(_INSTALLED, None)
    if installed is None:
        return model
    installed.hook.remove()
    _installed.discard(installed)
    for name in ("_prepare_cache_for_generation", *_BATCHING):
        vars(model).pop(name, None)
    for module in installed.decoder.modules():
        vars(module).pop(_INSTALLED, None)
    set_attention(model, installed.before)
    return model


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose the attention implementation of the text part, where a model has others."""
    is_whole = model.config.get_text_config(decoder=True) is model.config
    model.set_attn_implementation(name if is_whole else {"text_config": name})


_threads.use_openmp_of(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
