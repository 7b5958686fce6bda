# SPDX-License-Identifier: MIT
"""
What the caches of MLX-LM on the CPU and on Apple GPUs share: a batch of sequences of different lengths, its padding, and the
way back from a forward pass that was interrupted.
"""
from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import mlx.core as mx
import mlx_lm.models.cache as stock
import numpy as np

from . import weight_factors
from ._mlx_exact import ExactPrompt
from .errors import ArgumentError, UnsupportedError


Shape = tuple[int, int, int]  # n_head_kv, head_dim, head_dim of values


class Held(Protocol):
    """
    One sequence of one layer. attend: append keys and values [1, n_head_kv, n_tok, head_dim] and attend with queries [1,
    n_head, n_tok, head_dim], if there are any; attend_again: with queries of its last positions, appending nothing.
    """

    shape: Shape

    def __len__(self) -> int: ...
    def fork(self) -> Held: ...
    def trim(self, length: int) -> None: ...
    def attend(self, queries: Any, keys: Any, values: Any, scale: float = 1, sinks: mx.array | None = None
               ) -> Any: ...
    def attend_again(self, queries: Any, scale: float, sinks: mx.array | None) -> Any: ...


class Rows:
    """
    What update_and_fetch returns in place of an array: rows [n_batch, n_head_kv, n_tok, head_dim], not yet appended; None when
    they are, for the layers that share them.
    """

    def __init__(self, cache: BatchCache, rows: mx.array | None) -> None:
        self.cache, self.rows = cache, rows

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copy and inspect look for
            raise AttributeError(name)
        raise ArgumentError(f"`{name}` was asked of keys or values that are compressed: this model has an attention of its "
                            "own, which libturboquant.mlx does not reach. Use mlx_lm.models.cache.make_prompt_cache")


class Factors(NamedTuple):
    """Of a layer's keys: quarters of an octave [n_head_kv][head_dim], None for none; and the options that take the place of
    those given, where a layer's weights give no factors."""

    quarters: list[list[int]] | None = None
    instead: dict[str, Any] = {}

    @classmethod
    def of(cls, quarters: np.ndarray | None, instead: dict[str, Any] | None = None) -> Factors:
        return cls(None if quarters is None else quarters.tolist(), instead or {})

    @property
    def array(self) -> np.ndarray | None:
        """int8 [n_head_kv, head_dim]"""
        return None if self.quarters is None else np.array(self.quarters, np.int8)


def _find_factors(options: dict[str, Any], module: Any, layer: Any, n_head_kv: int, head_dim: int) -> Factors:
    """Those of a cache with these options, from the weights of the attention that brings it keys; layer: as of norm_before."""
    if weight_factors.chosen(options.get("factors"), options.get("calibration")) == "off":
        return Factors()
    engine = weight_factors.Engine(mx.array, lambda x: np.array(x.astype(mx.float32)), lambda: _rope(module, head_dim))
    fmt, n_ref = weight_factors.formats_of(options, 1, "k")[0], weight_factors.references_of(options)
    found, is_known = weight_factors.of_keys(fmt, module, (None, n_head_kv, head_dim), n_ref, engine,
                                             getattr(module, "scale", head_dim**-0.5), "a layer", layer)
    return Factors.of(found, None if is_known else weight_factors.without(options, 1, module))


def _rope(module: Any, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Which channels the module's RoPE turns together, and by which angles from token to token; if it has none of its own,
    halves, by what is usual."""
    rope = getattr(module, "rope", None)

    def turn(x: np.ndarray) -> np.ndarray:
        if rope is None:
            return np.roll(x, head_dim // 2, axis=1)
        return np.array(rope(mx.array(x[:, None, None]), offset=1))[:, 0, 0]

    partners, channels = weight_factors.partners_of(turn, head_dim), np.arange(head_dim)
    if rope is None:
        return partners, 10000.0 ** (-(channels % (head_dim // 2)) / (head_dim // 2))
    turned = turn(np.eye(head_dim, dtype=np.float32))
    return partners, np.where(partners == channels, 0, np.arctan2(abs(turned[channels, partners]), turned[channels, channels]))


def _attention_of(layer: Any) -> Any:
    """The module of a model's layer that projects keys, by names that are known; None without one."""
    modules = [] if layer is None else layer.modules()
    return next((each for each in modules if weight_factors.has_projections(each)), None)


class BatchCache(stock._BaseCache):
    """
    The cache of one layer for a batch of sequences, in the place of MLX-LM's KVCache and BatchKVCache. Padding is not stored.
    Who inherits it has `state`, `nbytes`, and `_make`, which makes a sequence; `_rows` and `_arrays`, if that takes and gives
    other arrays than MLX's.
    """

    _arrays: Any = mx  # the module of what sequences give

    def __init__(self, options: dict[str, Any]) -> None:
        weight_factors.chosen(options.get("factors"), options.get("calibration"))
        if not isinstance(options.get("exact_prefill", False), bool):
            raise ArgumentError(f"exact_prefill is {options['exact_prefill']!r}; give True or False")
        self._options = options
        self._factors = Factors()  # of the keys that it holds
        self._sequences: list[Held | None] = [None]  # None: empty
        self._left = [0]  # padding to come before a row's first token
        self._to_come: list[int] | None = None  # tokens to come of each row, right padding after them; None: all
        self._batched = False
        self._pending = 0
        self._taken: list[tuple[int, int, int]] | None = None  # row, first token, number of tokens of the last pass

    def _make(self, shape: Shape) -> Held:
        """An empty sequence. Raises for a shape that it cannot have."""
        raise NotImplementedError

    @staticmethod
    def _rows(x: mx.array) -> Any:
        """[n_batch, n_head, n_tok, head_dim] as sequences take parts of it."""
        return x

    def _given(self, x: mx.array) -> Any:
        """[n_batch, n_head, n_tok, head_dim] as self._sequences take parts of it."""
        return x if self._options.get("exact_prefill") else self._rows(x)

    def _wrapped(self, held: Held, exact: tuple[mx.array, ...] = ()) -> Held:
        return ExactPrompt(held, self._rows, exact) if self._options.get("exact_prefill") else held

    def _coded(self) -> list[Held]:
        """The sequences, without what prompts that are still read exactly hold."""
        held = [sequence for sequence in self._sequences if sequence is not None]
        return [sequence.held if isinstance(sequence, ExactPrompt) else sequence for sequence in held]

    def _exact_bytes(self) -> int:
        """Of prompts that are still read exactly."""
        return sum(sequence.exact_bytes for sequence in self._sequences if isinstance(sequence, ExactPrompt))

    def _settle(self) -> None:
        """Prompts that are read exactly are over."""
        for sequence in self._sequences:
            if isinstance(sequence, ExactPrompt):
                sequence.settle()

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, sinks: mx.array | None = None
               ) -> mx.array:
        """
        Append the rows of update_and_fetch and attend with their queries [n_batch, n_head, n_tok, head_dim]: the same shape,
        zeros where there is padding. sinks [n_head]: learned logits of the denominator only.
        """
        if queries.shape[1] % keys.shape[1] != 0:
            raise ArgumentError(f"{queries.shape[1]} query heads do not share {keys.shape[1]} KV heads evenly")
        q, k, v = map(self._given, (queries, keys, values))
        return self._attend(queries, self._take(queries.shape[2]), lambda sequence, part: sequence.attend(
            q[part], k[part], v[part], scale, sinks))

    def append(self, keys: mx.array, values: mx.array, layer: Any = None) -> None:
        """Append rows [n_batch, n_head_kv, n_tok, head_dim], which have attended elsewhere; layer: of the model, theirs."""
        self._expect(keys, values, _attention_of(layer), layer)
        k, v = map(self._given, (keys, values))
        for i, sequence, begin, n in self._take(keys.shape[2]):
            sequence.attend(None, *(x[i : i + 1, :, begin : begin + n] for x in (k, v)))

    def attend_again(self, queries: mx.array, scale: float, sinks: mx.array | None = None) -> mx.array:
        """Attend with the queries of another layer, which shares the rows that were appended last. They see all of them coded
        that are by now, which in a long part of a prompt is more than those of the first layer saw."""
        q = self._given(queries)
        return self._attend(queries, self._take_again(), lambda sequence, part: sequence.attend_again(q[part], scale, sinks))

    def _attend(self, queries: mx.array, taken: Iterable[tuple[int, Held, int, int]],
                call: Callable[[Held, tuple[slice, slice, slice]], Any]) -> mx.array:
        n_batch, n_head, n_tok, _ = queries.shape
        xp, shape = self._arrays, (1, n_head, n_tok, self._sequences[0].shape[2])
        found: list[Any] = [None] * n_batch
        for i, sequence, begin, n in taken:
            out = call(sequence, (slice(i, i + 1), slice(None), slice(begin, begin + n)))
            found[i] = out if n == n_tok else xp.pad(out, [(0, 0), (0, 0), (begin, n_tok - begin - n), (0, 0)])
        found = [xp.zeros(shape, xp.float32) if out is None else out for out in found]
        return mx.array(found[0] if n_batch == 1 else xp.concatenate(found, axis=0)).astype(queries.dtype)

    # ---- what the models call ----

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token; in batches of each row, negative in the padding before it."""
        offsets = [length - left for length, left in zip(self._lengths(), self._left)]
        return mx.array(offsets) if self._batched else offsets[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """Handles of the rows. They are appended when the attention that follows brings the queries."""
        self._expect(keys, values, sys._getframe(1).f_locals.get("self"))  # the attention whose keys these are
        return Rows(self, keys), Rows(self, values)

    def _expect(self, keys: mx.array, values: mx.array, module: Any, layer: Any = None) -> None:
        """Be ready for rows that an attention has made."""
        if self._pending:
            raise ArgumentError("a forward pass was interrupted and could not be taken back: make a new cache")
        n_batch, n_head_kv, n_tok, head_dim = keys.shape
        shape = (n_head_kv, head_dim, values.shape[3])
        if n_batch != len(self._sequences) and any(self._lengths()):
            raise ArgumentError(f"this cache holds a batch of {len(self._sequences)}, and was given one of {n_batch}")
        if n_batch != len(self._sequences):
            self._sequences, self._left, self._batched = [None] * n_batch, [0] * n_batch, True
        if self.empty():
            self._factors = _find_factors(self._options, module, layer, n_head_kv, head_dim)
            self._sequences = [None] * n_batch  # those that were trimmed away may be of another model
        elif any(sequence is not None and sequence.shape != shape for sequence in self._sequences):
            raise ArgumentError(f"a layer has {n_head_kv} KV heads of {head_dim}, but the cache holds others: it belongs to "
                                "another model. Make a new one")
        self._sequences = [self._wrapped(self._make(shape)) if sequence is None else sequence for sequence in self._sequences]
        self._pending = n_tok

    def keys_and_values(self) -> tuple[Rows, Rows]:
        """Of the rows that were appended last, for a layer that shares them."""
        if self._pending or self._taken is None:
            raise ArgumentError("a layer shares keys and values that no layer has brought yet: make a new cache")
        return Rows(self, None), Rows(self, None)

    def fits(self, layer: Any) -> bool:
        """Would keys that this layer of a model brings have the factors of those that are held? layer: as of append."""
        n_head_kv, head_dim, _ = self._coded()[0].shape
        return _find_factors(self._options, _attention_of(layer), layer, n_head_kv, head_dim) == self._factors

    def _used_options(self) -> dict[str, Any]:
        """What sequences are made with."""
        not_theirs = ("factors", "exact_prefill")
        return {name: value for name, value in self._options.items() if name not in not_theirs} | self._factors.instead

    def _take(self, n_tok: int) -> Iterator[tuple[int, Held, int, int]]:
        """
        (row, sequence, first token, number of tokens) of the next n_tok tokens, without padding. A row that fails leaves the
        others longer; the next forward pass is refused by `_pending`.
        """
        taken: list[tuple[int, int, int]] = []
        for i, sequence in enumerate(self._sequences):
            begin = min(self._left[i], n_tok)
            n = n_tok - begin if self._to_come is None else min(n_tok - begin, self._to_come[i])
            if n > 0:
                yield i, sequence, begin, n
                taken.append((i, begin, n))
            self._left[i] -= begin
            if self._to_come is not None:
                self._to_come[i] -= n
        self._pending, self._taken = 0, taken

    def _take_again(self) -> Iterator[tuple[int, Held, int, int]]:
        for i, begin, n in self._taken or []:
            yield i, self._sequences[i], begin, n

    def _mark(self) -> tuple[dict[str, Any], list[int]]:
        """What there is, for _go_back."""
        state = {name: copy.copy(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        return state, self._lengths()

    def _go_back(self, mark: tuple[dict[str, Any], list[int]]) -> None:
        """Forget what a forward pass has brought since then."""
        state, lengths = mark
        vars(self).update(state)
        for sequence, length in zip(self._sequences, lengths):
            if sequence is not None:
                sequence.trim(length)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """None or "causal": there is no mask but causality, and padding is not stored."""
        if return_array or window_size is not None:
            raise UnsupportedError("this model asks for a mask as an array, or for a window, which compressed attention does "
                                   "not have: use mlx_lm.models.cache.make_prompt_cache")
        return None if N == 1 else "causal"

    # ---- what generation and the server call ----

    def _lengths(self) -> list[int]:
        return [0 if sequence is None else len(sequence) for sequence in self._sequences]

    def size(self) -> int:
        return max(self._lengths(), default=0)

    def empty(self) -> bool:
        return self.size() == 0

    @property
    def to_quantized(self) -> NoReturn:
        """MLX-LM looks whether a cache has this where it was given kv_bits, and only there."""
        raise UnsupportedError("kv_bits: keys and values are compressed already, in the formats of the preset. Leave kv_bits "
                               "(--kv-bits) out, or use a cache of MLX-LM, mlx_lm.models.cache.make_prompt_cache")

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens of each row; how many that were."""
        self._settle()  # drafts are rejected, so this is no prompt any more
        n = min(n, self.size())
        for sequence in self._sequences:
            if sequence is not None:
                sequence.trim(max(len(sequence) - n, 0))
        return n

    def prepare(self, *, left_padding: Sequence[int] | None = None, lengths: Sequence[int] | None = None,
                right_padding: Sequence[int] | None = None) -> None:
        """Say how what comes is padded: on the left, or with `lengths` tokens and right_padding after them."""
        if left_padding is not None:
            if not self.empty():
                raise ArgumentError("left padding can only be added to an empty cache")
            self._as_batch(len(left_padding))
            self._left = [a + b for a, b in zip(self._left, left_padding)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ArgumentError("right_padding: give the lengths, too")
            self._as_batch(len(lengths))
            self._to_come = list(lengths)

    def finalize(self) -> None:
        self._to_come = None

    def _as_batch(self, n: int) -> None:
        if len(self._sequences) != n:
            if not self.empty():
                raise ArgumentError(f"this cache holds a batch of {len(self._sequences)}, not of {n}")
            self._sequences, self._left = [None] * n, [0] * n
        self._batched = True

    def filter(self, batch_indices: Any) -> None:
        """Keep these rows."""
        indices = batch_indices.tolist() if isinstance(batch_indices, mx.array) else list(batch_indices)
        used: set[int] = set()
        sequences = []
        for i in indices:
            sequence = self._sequences[i]
            sequences.append(sequence.fork() if sequence is not None and i in used else sequence)
            used.add(i)
        self._sequences, self._left = sequences, [self._left[i] for i in indices]

    def extend(self, other: BatchCache) -> None:
        """Add another cache's rows."""
        if other._options != self._options:
            raise ArgumentError(f"caches of {self._options} and {other._options} do not go together in a batch")
        if not other.empty():
            if not self.empty() and other._factors != self._factors:
                raise ArgumentError("caches whose keys have different factors do not go together in a batch: they are of "
                                    "different layers or models")
            self._factors = other._factors
        self._sequences, self._left = self._sequences + other._sequences, self._left + other._left
        self._batched = True

    def extract(self, idx: int) -> BatchCache:
        """One row as a cache of its own; its pages are shared."""
        other = self._like([self._sequences[idx]])
        other._batched = False
        other._settle()  # such a cache is kept, by a server for example
        return other

    @classmethod
    def merge(cls, caches: Sequence[BatchCache]) -> BatchCache:
        """One cache for the rows of all; their pages are shared."""
        merged = caches[0]._like([])
        merged._batched = True
        for cache in caches:
            merged.extend(cache._like(cache._sequences))
        return merged

    def _like(self, sequences: Iterable[Held | None]) -> BatchCache:
        """A cache with these options and forks of these sequences."""
        other = copy.copy(self)
        other._options = dict(self._options)
        other._sequences = [None if sequence is None else sequence.fork() for sequence in sequences]
        other._left, other._to_come, other._pending, other._taken = [0] * len(other._sequences), None, 0, None
        return other

    def __deepcopy__(self, memo: dict) -> BatchCache:
        other = self._like(self._sequences)
        other._left, other._to_come = list(self._left), copy.copy(self._to_come)
        return other


def guard_passes(kind: type) -> None:
    """
    Let a forward pass of models of this class that raises anything, a KeyboardInterrupt too, take back what it has appended to
    compressed caches.
    """
    call = kind.__call__
    if getattr(call, "is_turboquant", False):
        return

    @functools.wraps(call)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        caches = [cache for given in (*args, *kwargs.values()) if isinstance(given, (list, tuple)) for cache in given]
        marks = [(cache, cache._mark()) for cache in caches if isinstance(cache, BatchCache)]
        if not marks:
            return call(self, *args, **kwargs)
        others = [(cache, _count(cache)) for cache in caches if isinstance(cache, stock._BaseCache)
                  and not isinstance(cache, BatchCache)]
        try:
            return call(self, *args, **kwargs)
        except BaseException:
            is_begun = any(cache._lengths() != lengths for cache, (_, lengths) in marks)
            can_go_back = all([_go_back(cache, before, is_begun) for cache, before in others])
            for cache, mark in marks:
                cache._go_back(mark)
                if not can_go_back:
                    cache._pending = 1
            raise

    guarded.is_turboquant = True
    kind.__call__ = guarded


def _count(cache: stock._BaseCache) -> int | None:
    """The columns of a cache of MLX-LM; None: it does not say."""
    counts = (getattr(cache, name, None) for name in ("offset", "_offset", "_idx"))
    return next((count for count in counts if isinstance(count, int)), None)


def _go_back(cache: stock._BaseCache, before: int | None, is_begun: bool) -> bool:
    """Trim a cache of MLX-LM to what it was, if it can be; windows that are full and recurrent states cannot."""
    after = _count(cache)
    if before is None or after is None:
        return not is_begun
    if after == before:
        return True
    return cache.is_trimmable() and cache.trim(after - before) == after - before
