# SPDX-License-Identifier: MIT
"""A sequence of MLX-LM's caches whose prompt is read with exact keys and values, and coded after it: exact_prefill=True."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from ._mlx_batch import Held, Shape


class ExactPrompt:
    """
    Around a sequence: rows stay the model's own arrays, and attention is MLX's, until a pass brings a single token after
    others, a prompt's last in MLX-LM, or `settle` is called. Then the sequence gets all of them, and all that comes later.
    One that holds tokens at first has settled. to_rows: of [1, n_head, n_tok, head_dim], what the sequence takes.
    """

    def __init__(self, held: Held, to_rows: Callable[[mx.array], Any], exact: tuple[mx.array, ...] = ()) -> None:
        self.held, self._to_rows = held, to_rows
        self.exact = exact  # keys and values [1, n_head_kv, n_tok, head_dim] that the sequence has not got yet

    @property
    def shape(self) -> Shape:
        return self.held.shape

    def __len__(self) -> int:
        return self.exact[0].shape[2] if self.exact else len(self.held)

    @property
    def exact_bytes(self) -> int:
        return sum(x.nbytes for x in self.exact)

    def fork(self) -> ExactPrompt:
        return ExactPrompt(self.held.fork(), self._to_rows, self.exact)

    def trim(self, length: int) -> None:
        if self.exact:
            self.exact = tuple(x[:, :, :length] for x in self.exact) if length > 0 else ()
        else:
            self.held.trim(length)

    def settle(self) -> None:
        """Give the sequence what it has not got yet."""
        if self.exact:
            self.held.attend(None, *map(self._to_rows, self.exact))
            self.exact = ()

    def attend(self, queries: mx.array | None, keys: mx.array, values: mx.array, scale: float = 1,
               sinks: mx.array | None = None) -> Any:
        if queries is None or len(self.held) > 0 or (self.exact and keys.shape[2] == 1):
            self.settle()
            return self.held.attend(queries if queries is None else self._to_rows(queries), self._to_rows(keys),
                                    self._to_rows(values), scale, sinks)
        rows = (keys, values)
        self.exact = tuple(mx.concatenate(pair, axis=2) for pair in zip(self.exact, rows)) if self.exact else rows
        return self.attend_again(queries, scale, sinks)

    def attend_again(self, queries: mx.array, scale: float, sinks: mx.array | None) -> Any:
        if not self.exact:
            return self.held.attend_again(self._to_rows(queries), scale, sinks)
        mask = "causal" if queries.shape[2] > 1 else None
        return self._to_rows(mx.fast.scaled_dot_product_attention(queries, *self.exact, scale=scale, mask=mask, sinks=sinks))
