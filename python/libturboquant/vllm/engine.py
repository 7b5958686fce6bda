# SPDX-License-Identifier: MIT
"""
What vLLM is told: attention of CPU_ATTN whose blocks are encoded pages, and next to each such layer a companion that has the
last exact tokens as a KV cache of its own with a sliding window. vLLM allocates, shares, hashes and frees the blocks of both.
The only file that imports vLLM.
"""
from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config import cache as cache_config_module
from vllm.distributed import get_world_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType,
                                       CommonAttentionMetadata, MultipleOf)
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.mla import amx_mla, cpu_mla
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, SlidingWindowSpec

from .. import weight_factors
from .._library import lib
from ..errors import UnsupportedError
from ..formats import format_info, format_number, head_dims
from . import options
from .module_factors import owner_of, spread_and_factors
from .pages import PAGE_TOKENS_MAX, PAGE_TOKENS_STEP, Batch, PageFormat, Window, keep_exact

EXACT = ".turboquant_exact"
DTYPE_NAMES = ("tq6", "tq4", "tq3", "tq2")
# Speculation without layers of its own.
DRAFTERS = ("ngram", "suffix")
# What stock attention on CPUs computes blocks in.
STOCK_TOKENS = 32
log = init_logger(f"vllm.{__name__}")


def register() -> None:
    """Override the attention of vLLM's CPU platform, which looks at no other name. Whoever does not ask gets the stock one."""
    _register_dtypes()
    if not current_platform.is_cpu():
        return
    for member, name in ((AttentionBackendEnum.CPU_ATTN, "Backend"), (AttentionBackendEnum.CPU_MLA, "RefusingMLA"),
                         (AttentionBackendEnum.AMX_MLA, "RefusingAMXMLA")):
        register_backend(member, f"{__name__}.{name}")


def _register_dtypes() -> None:
    """`--kv-cache-dtype tq4`, from vLLM 0.33 on. (Not tested: no build of it for CPUs exists.)"""
    register_dtype = getattr(cache_config_module, "register_kv_cache_dtype", None)
    if register_dtype is None:
        return
    for name in DTYPE_NAMES:
        register_dtype(name)(type(name, (_DtypeHandler,), {"name": name}))


class _DtypeHandler:
    name: str

    def torch_dtype(self) -> torch.dtype:
        return torch.uint8

    def is_quantized(self) -> bool:
        return True

    def quant_mode(self) -> Any:
        from vllm.v1.kv_cache_interface import KVQuantMode

        return KVQuantMode.CUSTOM

    def supports_platform(self, platform: Any) -> bool:
        return platform.is_cpu()


# ---- what an engine asks for ----


def asked(config: VllmConfig) -> options.Options | None:
    """Raises ArgumentError and UnsupportedError for what is asked for and cannot be."""
    dtype = config.cache_config.cache_dtype
    additional = config.additional_config
    found = options.of_config({options.KEY: dtype} if dtype in DTYPE_NAMES else additional)
    if found is not None:
        _check(config, dtype)
    return found


def _check(config: VllmConfig, dtype: str) -> None:
    """What does not concern single layers."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    if not current_platform.is_cpu():
        raise UnsupportedError("turboquant serves vLLM's CPU platform only: on another one leave the option `turboquant` out")
    if dtype not in ("auto", *DTYPE_NAMES):
        raise UnsupportedError(f"turboquant takes the place of --kv-cache-dtype {dtype}: leave one of them out")
    if scheduler.disable_hybrid_kv_cache_manager:
        raise UnsupportedError("turboquant keeps its exact tokens in a KV cache group of their own, for which vLLM needs its "
                               "hybrid KV cache manager: leave --disable-hybrid-kv-cache-manager out, and use a KV connector "
                               "that supports it")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedError("turboquant does not split the context over ranks: set the context parallel sizes to 1 and use "
                               "--tensor-parallel-size")
    if config.model_config.is_hybrid:
        raise UnsupportedError("turboquant does not serve models with recurrent states in vLLM: leave the option `turboquant` "
                               "out")
    drafter = getattr(config.speculative_config, "method", None)
    if drafter not in (None, *DRAFTERS):
        raise UnsupportedError(f"turboquant does not serve drafts of the method {drafter}, which have layers of their own: use "
                               f"one of {', '.join(DRAFTERS)}, or leave --speculative-config out")
    size = config.cache_config.block_size
    if size is not None and (size % PAGE_TOKENS_STEP or not 0 < size <= PAGE_TOKENS_MAX):
        raise UnsupportedError(f"turboquant's pages have {PAGE_TOKENS_STEP} to {PAGE_TOKENS_MAX} tokens, a multiple of "
                               f"{PAGE_TOKENS_STEP}: set --block-size to one of these, not {size}")


class Plan:
    """What all compressed layers of an engine have in common. Formats are final once the weights are loaded."""

    def __init__(self, asked_for: options.Options) -> None:
        self.options = asked_for
        self.k_format = asked_for.k_format
        self.factors: dict[str, np.ndarray] = {}
        self.is_agreed = False
        self.is_logged = False

    def raise_keys(self, k_format: int, why: str) -> None:
        """A better format for the keys of all layers, which share pages of one size."""
        if format_info(k_format).bits > format_info(self.k_format).bits:
            log.warning("turboquant: keys have %s, not %s: %s", *(format_info(f).name for f in (k_format, self.k_format)), why)
            self.k_format = k_format

    def agree(self) -> None:
        """All ranks have pages of one size: the best format that one of them needs."""
        if self.is_agreed:
            return
        self.is_agreed = True
        if not torch.distributed.is_initialized() or get_world_group().world_size == 1:
            return
        bits = torch.tensor([format_info(self.k_format).bits * 1000 + self.k_format])
        torch.distributed.all_reduce(bits, torch.distributed.ReduceOp.MAX, group=get_world_group().cpu_group)
        self.raise_keys(int(bits) % 1000, "another rank's heads need it")

    def page_format(self, n_head_kv: int, head_dim: int, head_dim_v: int) -> PageFormat:
        return PageFormat(self.k_format, self.options.v_format, n_head_kv, head_dim, head_dim_v, self.options.n_sink,
                          self.options.n_recent)


# The engine that is being loaded: vLLM asks a backend's class about specs, and does not say for whom.
_loading: tuple[weakref.ref, Plan] | None = None


def _plan_of(config: VllmConfig, asked_for: options.Options) -> Plan:
    global _loading
    owner = config.compilation_config
    if _loading is None or _loading[0]() is not owner:
        _loading = weakref.ref(owner), Plan(asked_for)
    return _loading[1]


# ---- attention ----


@dataclass
class Metadata:
    batch: Batch
    n_tokens: int


class Builder(cpu_attn.CPUAttentionMetadataBuilder):
    """Of groups of compressed layers and of their windows; of others the stock one."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
                 ) -> None:
        self.is_ours = _is_page(kv_cache_spec) or layer_names[0].endswith(EXACT)
        if self.is_ours:
            AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        else:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        if not self.is_ours:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        m = common_attn_metadata
        if not isinstance(m.causal, bool) or not m.causal:
            raise UnsupportedError("turboquant's attention is causal: leave the option `turboquant` out for this model")
        n = m.num_reqs
        batch = Batch(m.block_table_tensor[:n], m.seq_lens[:n], m.query_start_loc_cpu[: n + 1], m.max_query_len, m.max_seq_len)
        return Metadata(batch, m.num_actual_tokens)


def _is_page(spec: Any) -> bool:
    return isinstance(spec, FullAttentionSpec) and spec.num_head_slots == 1 and spec.dtype == torch.uint8


class Backend(cpu_attn.CPUAttentionBackend):
    """CPU_ATTN, whose layers are compressed where that was asked for."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        if _is_page(kv_cache_spec):
            return [kv_cache_spec.block_size]  # pages are not cut
        return cpu_attn.CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype in DTYPE_NAMES or super().supports_kv_cache_dtype(kv_cache_dtype)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if _loading is None or spec.num_head_slots is not None:
            return spec
        if type(spec) is SlidingWindowSpec:
            return _smaller_blocks(_loading[1], spec)
        return _page_spec(_loading[1], spec) if _is_served(spec) else spec

    @staticmethod
    def get_impl_cls() -> type:
        global _loading
        if asked(get_current_vllm_config()) is not None:
            return Attention
        _loading = None
        return cpu_attn.CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type:
        return Builder


def _is_served(spec: Any) -> bool:
    return type(spec) is FullAttentionSpec and spec.sliding_window is None and spec.attention_chunk_size is None


def _page_spec(plan: Plan, spec: AttentionSpec) -> AttentionSpec:
    plan.agree()
    pages = plan.page_format(spec.num_kv_heads, spec.head_size, spec.head_size_v)
    return replace(spec, dtype=torch.uint8, num_head_slots=1,
                   state_content_bytes=pages.page_bytes(spec.block_size) // spec.block_size)


def _smaller_blocks(plan: Plan, spec: SlidingWindowSpec) -> AttentionSpec:
    """
    Of a layer with a window, which is left to vLLM: all layers' pages get the size of the largest, so that pages of as many
    tokens as ours would fill ours up. Those of fewer tokens fit into ours.
    """
    if spec.block_size == 1 or spec.head_size not in head_dims():  # a question about one token
        return spec
    room = plan.page_format(spec.num_kv_heads, spec.head_size, spec.head_size_v).page_bytes(spec.block_size)
    n = room // (spec.page_size_bytes // spec.block_size) // STOCK_TOKENS * STOCK_TOKENS
    return replace(spec, block_size=n) if n and spec.block_size % n == 0 else spec


class _Refusing:
    """An attention that is not compressed, so that asking for it fails and does not go unnoticed."""

    @staticmethod
    def refuse(what: str) -> None:
        if asked(get_current_vllm_config()) is not None:
            raise UnsupportedError(f"turboquant does not serve {what}, which vLLM keeps in a form of its own: leave the option "
                                   "`turboquant` out for this model")


class RefusingMLA(cpu_mla.CPUMLABackend):
    @staticmethod
    def get_impl_cls() -> type:
        _Refusing.refuse("multi-head latent attention (MLA)")
        return cpu_mla.CPUMLABackend.get_impl_cls()


class RefusingAMXMLA(amx_mla.AMXMLABackend):
    @staticmethod
    def get_impl_cls() -> type:
        _Refusing.refuse("multi-head latent attention (MLA)")
        return amx_mla.AMXMLABackend.get_impl_cls()


class ExactBackend(AttentionBackend):
    """Of windows: nobody attends with it."""

    @staticmethod
    def get_name() -> str:
        return "TURBOQUANT_EXACT"

    @staticmethod
    def get_impl_cls() -> type:
        return Attention

    @staticmethod
    def get_builder_cls() -> type:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)] if kv_cache_spec is None else [kv_cache_spec.block_size]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class ExactLayer(nn.Module, AttentionLayerBase):
    """The exact window of a layer: a KV cache without an attention of its own."""

    def __init__(self, layer: Any, plan: Plan) -> None:
        super().__init__()
        self.plan, self.num_heads, self.kv_cache, self.impl = plan, layer.num_heads, torch.tensor([]), None
        self.shape = {"num_kv_heads": layer.num_kv_heads, "head_size": layer.head_size, "head_size_v": layer.head_size_v}
        self._bf16_token_bytes = layer.num_kv_heads * (layer.head_size + layer.head_size_v) * 2
        self._n_tokens = self._max_len = 0

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlidingWindowSpec:
        self.plan.agree()
        self._n_tokens, self._max_len = vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len
        pages = self.plan.page_format(*self.shape.values())
        return SlidingWindowSpec(block_size=pages.window_tokens(self._n_tokens), dtype=torch.float16,
                                 sliding_window=self.plan.options.n_recent, **self.shape)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        if not self.plan.is_logged:
            self.plan.is_logged = True
            self._log_size(len(kv_cache), kv_cache.stride(0) * kv_cache.element_size(), kv_cache.shape[2])

    def _log_size(self, n_blocks: int, block_bytes: int, window_tokens: int) -> None:
        """Of requests of the greatest length, and of layers that are compressed only; one block is nobody's."""
        asked_for = self.plan.options
        n_of_request = -(-self._max_len // self._n_tokens) + -(-asked_for.n_recent // window_tokens) + 1
        held = (n_blocks - 1) * self._max_len // n_of_request
        in_bf16 = n_blocks * block_bytes // self._bf16_token_bytes
        log.info("turboquant: keys %s, values %s, %d recent and %d first tokens exact: the cache holds %s tokens in requests "
                 "of %s; in BF16 it would hold %s", format_info(self.plan.k_format).name, format_info(asked_for.v_format).name,
                 asked_for.n_recent, asked_for.n_sink, f"{held:,}", f"{self._max_len:,}", f"{in_bf16:,}")


class Attention(AttentionImpl):
    """Of a layer with full attention; for others the constructor gives the stock one."""

    def __new__(cls, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: Any = None,
                sliding_window: int | None = None, *args: Any, **more: Any) -> Any:
        if sliding_window is not None:
            return cpu_attn.CPUAttentionBackendImpl(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
                                                    *args, **more)
        return super().__new__(cls)

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: Any = None,
                 sliding_window: int | None = None, kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
                 attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None,
                 sinks: torch.Tensor | None = None) -> None:
        if attn_type != AttentionType.DECODER:
            raise UnsupportedError(f"turboquant serves decoders only, and this model has attention of the kind {attn_type}: "
                                   "leave the option `turboquant` out for it")
        if alibi_slopes is not None:
            raise UnsupportedError("turboquant does not serve ALiBi in vLLM: leave the option `turboquant` out for this model")
        if head_size not in head_dims():
            raise UnsupportedError(f"turboquant has no head_dim {head_size}; it has {', '.join(map(str, head_dims()))}: leave "
                                   "the option `turboquant` out for this model")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, float(scale), num_kv_heads
        self.kv_cache_dtype, self.kv_sharing_target_layer_name = kv_cache_dtype, kv_sharing_target_layer_name
        self.softcap = float(logits_soft_cap or 0)
        self.sinks = None if sinks is None else sinks
        self._config = config = get_current_vllm_config()
        self.context = config.compilation_config.static_forward_context
        self.plan = _plan_of(config, asked(config))
        # Whose attention this is: vLLM's constructors are running now, and tell nobody later.
        self._owner = owner_of(nn.Module)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        found = [(name, layer) for name, layer in self.context.items() if getattr(layer, "impl", None) is self]
        for name, layer in found:
            if self.kv_sharing_target_layer_name is not None:
                continue
            if not _is_served(layer.get_kv_cache_spec(self._config)):
                raise UnsupportedError(f"turboquant does not serve the attention of {name}, which does not see all tokens, or "
                                       "has some of its own: leave the option `turboquant` out for this model")
            self._find_factors(name, layer, act_dtype)
            if name + EXACT not in self.context:
                self.context[name + EXACT] = ExactLayer(layer, self.plan)

    def _find_factors(self, name: str, layer: Any, act_dtype: torch.dtype) -> None:
        """Those of the layer's keys, from the weights; and where a preset's keys do not suit it, better ones."""
        plan = self.plan
        if plan.options.factors == "off" or weight_factors.is_exact(plan.k_format):
            return
        found = spread_and_factors(self._owner, self.num_heads, self.num_kv_heads, self.head_size, act_dtype)
        if found is None:
            if plan.options.is_preset:
                plan.raise_keys(format_number("sq8"), f"the projections of {name} are not known, so it has no factors "
                                'for outlier channels ("factors": "off" leaves the preset as it is)')
            return
        spread, factors = found
        if factors is not None:
            plan.factors[name] = factors
        better = int(lib.tq_key_guard(plan.k_format, spread * self.scale))
        if better != plan.k_format:
            why = f"by the model's weights the logits of {name} have a spread of {spread * self.scale:.1f}"
            if plan.options.is_preset:
                plan.raise_keys(better, why)
            else:
                log.warning("turboquant: %s, which keys in %s move by more than 1; %s would hold them", why,
                            *(format_info(f).name for f in (plan.k_format, better)))

    def _owner_name(self, layer: Any) -> str:
        return self.kv_sharing_target_layer_name or layer.layer_name

    def _pages(self, layer: Any, kv_cache: torch.Tensor) -> tuple[PageFormat, torch.Tensor]:
        """The layer's view [blocks, 1, tokens, bytes of a token] as [blocks, tokens, bytes]."""
        if kv_cache.dtype != torch.uint8 or kv_cache.shape[1] != 1:
            raise UnsupportedError(f"vLLM gave {layer.layer_name} a cache that is not turboquant's: leave the option "
                                   "`turboquant` out for this model")
        return self.plan.page_format(self.num_kv_heads, self.head_size, layer.head_size_v), kv_cache[:, 0]

    def do_kv_cache_update(self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
                           slot_mapping: torch.Tensor) -> None:
        n, name = min(len(slot_mapping), len(key)), self._owner_name(layer)
        pages, memory = self._pages(layer, kv_cache)
        key, value = key[:n], value[:n]
        pages.append(memory, slot_mapping[:n].to(torch.int64), key, value, self.plan.factors.get(name))
        slots = get_forward_context().slot_mapping[name + EXACT][:n].to(torch.int64)
        keep_exact(self.context[name + EXACT].kv_cache, slots, key, value)

    def forward(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor,
                attn_metadata: Metadata | None, output: torch.Tensor, output_scale: Any = None, output_block_scale: Any = None
                ) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("turboquant's attention does not quantize its output: switch that fusion off")
        if attn_metadata is None:  # warming up
            return output
        name, n = self._owner_name(layer), attn_metadata.n_tokens
        of_window = _metadata_of(name + EXACT)
        pages, memory = self._pages(layer, kv_cache)
        window = Window(self.context[name + EXACT].kv_cache, of_window.batch.page_table)
        pages.attend(memory, window, attn_metadata.batch, query[:n], output[:n], self.scale, self.plan.factors.get(name),
                     self.softcap, None if self.sinks is None else self.sinks.float())
        return output


def _metadata_of(name: str) -> Metadata:
    found = get_forward_context().attn_metadata
    return (found[0] if isinstance(found, list) else found)[name]
