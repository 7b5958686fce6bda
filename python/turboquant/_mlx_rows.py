# SPDX-License-Identifier: MIT
"""What the caches of MLX-LM hand to a model in place of keys and values."""
from __future__ import annotations

from typing import Any, NoReturn

import mlx.core as mx

from .errors import ArgumentError


class Rows:
    """What update_and_fetch returns in place of an array: rows [n_batch, n_head_kv, n_tok, head_dim], not yet appended."""

    def __init__(self, cache: Any, rows: mx.array) -> None:
        self.cache, self.rows = cache, rows

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copy and inspect look for
            raise AttributeError(name)
        raise ArgumentError(f"`{name}` was asked of keys or values that are compressed: this model has an attention of its "
                            "own, which turboquant.mlx does not reach. Use mlx_lm.models.cache.make_prompt_cache")
