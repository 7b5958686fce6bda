# SPDX-License-Identifier: MIT
"""Which columns of a batch are tokens and which are padding. Frameworks count both, the library stores tokens alone."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import ArgumentError


class Columns:
    """n columns of a batch; `kept` is bool [n_batch, n], or None where all are tokens."""

    def __init__(self) -> None:
        self.n = 0
        self.kept: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Columns) or self.n != other.n:
            return False
        if self.kept is None or other.kept is None:
            return all(columns.kept is None or bool(columns.kept.all()) for columns in (self, other))
        return np.array_equal(self.kept, other.kept)

    @classmethod
    def left_padded(cls, lengths: Sequence[int]) -> Columns:
        """Rows of so many tokens, each with padding before them, as many columns as the longest has tokens."""
        columns = cls()
        columns.n = max(lengths, default=0)
        if any(length < columns.n for length in lengths):
            columns.kept = np.arange(columns.n)[None] >= columns.n - np.asarray(lengths)[:, None]
        return columns

    def extend(self, n_batch: int, n_new: int, mask: np.ndarray | None) -> np.ndarray | None:
        """
        Add columns. mask: bool [n_batch, n + n_new], None: all are tokens; what it says of the columns before must be what was
        said then, or it raises ArgumentError. Returns tokens(n).
        """
        begin, n = self.n, self.n + n_new
        if mask is None and self.kept is not None:
            mask = np.ones((n_batch, n), bool)
        if mask is not None:
            if mask.shape != (n_batch, n):
                raise ArgumentError(f"attention_mask: has shape {list(mask.shape)}; give [{n_batch}, {n}], with the tokens "
                                    "that the cache holds")
            before = np.ones((n_batch, begin), bool) if self.kept is None else self.kept
            if not np.array_equal(mask[:, :begin], before):
                raise ArgumentError("attention_mask: says something else about tokens that the cache holds than when they "
                                    "were given. Padding cannot become visible, nor tokens hidden: pass the whole mask each "
                                    "time")
            self.kept = mask.copy()
        self.n = n
        return self.tokens(begin)

    def tokens(self, begin: int) -> np.ndarray | None:
        """bool [n_batch, n - begin], None where all from `begin` on are tokens."""
        if self.kept is None or self.kept[:, begin:].all():
            return None
        return self.kept[:, begin:]

    def lengths(self, n_batch: int, n: int) -> list[int]:
        """Each row's tokens among the first n columns."""
        return [n] * n_batch if self.kept is None else self.kept[:, :n].sum(axis=1).tolist()

    def cut(self, n: int) -> None:
        """Keep n columns."""
        self.n = n
        if self.kept is not None:
            self.kept = self.kept[:, :n]

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was."""
        if self.kept is not None:
            self.kept = self.kept[list(rows)]
