# SPDX-License-Identifier: MIT
"""
Prompts' caches of MLX-LM's server in a folder, where a server that is started again finds them. docs/python.md.

A file is what MLX-LM's save_prompt_cache writes, with the tokens and a key of the model's weights and the options, and is named
by what it contains. So one that is not whole, was changed, or is of another model is never taken for a prompt's.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as stock
import numpy as np
from mlx.utils import tree_flatten

from . import __version__
from ._library import log
from ._mlx_batch import BatchCache
from .errors import SnapshotError

# No other file in the folder is read or removed. While it is written a file is a part.
_WHOLE = re.compile(r"kv-[0-9a-f]{32}\.safetensors")
_OURS = re.compile(r"kv-[0-9a-f]{32}(\.part)?\.safetensors")
_HEADER_MAX = 1 << 28


def key_of(models: Sequence[Any], options: dict[str, Any]) -> str:
    """Of models with all their weights, and of options of their caches: the same only where one's caches are the other's."""
    digest = hashlib.blake2b(digest_size=16)
    kinds = [(type(model).__module__, repr(getattr(model, "args", None))) for model in models]
    digest.update(json.dumps([kinds, options, __version__, mlx_lm.__version__], sort_keys=True, default=str).encode())
    parameters = [parameter for model in models for parameter in tree_flatten(model.parameters())]
    rows = [np.array(x.reshape(-1).view(mx.uint8), copy=False) for _, x in parameters]  # the model's own memory
    with ThreadPoolExecutor() as pool:
        for (name, x), of_rows in zip(parameters, pool.map(lambda each: hashlib.blake2b(each).digest(), rows)):
            digest.update(f"{name} {x.dtype} {x.shape}".encode() + of_rows)
    return digest.hexdigest()


def check(models: Sequence[Any], caches: Sequence[Any]) -> None:
    """Raises SnapshotError for caches that are not what these models' would be, as where another machine's factors differ."""
    fresh = [cache for model in models for cache in stock.make_prompt_cache(model)]
    layers = [model.layers[i] for model in models for i in range(len(stock.make_prompt_cache(model)))]
    if [type(cache) for cache in caches] != [type(cache) for cache in fresh]:
        raise SnapshotError("it holds caches of other kinds")
    for cache, new, layer in zip(caches, fresh, layers):
        if isinstance(cache, BatchCache) and (cache._options != new._options or not cache.fits(layer)):
            raise SnapshotError("its keys have other options, or other factors, than this model's have here")


class Entry(NamedTuple):
    key: str
    tokens: np.ndarray  # int64 [n_tok]
    is_trimmable: bool  # may be taken for the tokens that it has in common with others

    def n_common(self, tokens: np.ndarray) -> int:
        n = min(len(tokens), len(self.tokens))
        differ = np.flatnonzero(tokens[:n] != self.tokens[:n])
        return int(differ[0]) if len(differ) else n


class Folder:
    """Files in a folder that exists, of at most max_bytes together, and the one that is being written. Those that were used
    longest ago go first."""

    def __init__(self, path: str | os.PathLike, max_bytes: int) -> None:
        self.path, self.max_bytes = Path(path), max_bytes
        self.entries: dict[Path, Entry] = {}
        for file in self._files(_WHOLE):
            with self._ignoring(file):
                self.entries[file] = _read_entry(file)
        self._make_room()

    def find(self, key: str, tokens: Sequence[int], more_than: int) -> Path | None:
        """The file with the longest beginning of these tokens, if that is longer than more_than."""
        wanted, best, longest = np.array(tokens), None, more_than
        for file, entry in self.entries.items():
            n = entry.n_common(wanted) if entry.key == key else 0
            # A prompt's last token has to be read, for what comes after it.
            n_usable = min(n, len(wanted) - 1)
            if n_usable > longest and (entry.is_trimmable or n_usable == len(entry.tokens)):
                best, longest = file, n_usable
        return best

    def load(self, file: Path, accept: Callable[[list[Any]], None]) -> list[Any] | None:
        """What a file holds; None, with a warning, if it is bad, or `accept` raises."""
        entry = self.entries[file]
        with self._ignoring(file):
            if _digest(file) != file.name[3:35]:
                raise SnapshotError("it is not what was written")
            caches = stock.load_prompt_cache(str(file))
            accept(caches)
            os.utime(file)
            log.info("%d tokens are read from %s", len(entry.tokens), file)
            return caches
        del self.entries[file]
        return None

    def save(self, key: str, tokens: Sequence[int], caches: list[Any]) -> None:
        """Write a file, whole or not at all, unless one holds as much. Those that hold a part go. A failure is a warning."""
        if not all(isinstance(token, int) for token in tokens):
            return  # images are no tokens
        entry = Entry(key, np.array(tokens), stock.can_trim_prompt_cache(caches))
        mine = {file: other for file, other in self.entries.items() if other.key == key}
        for file, other in mine.items():
            holds_all = other.n_common(entry.tokens) == len(entry.tokens)
            if holds_all and (other.is_trimmable or len(other.tokens) == len(tokens)):
                with self._ignoring(file):
                    os.utime(file)
                    return
        part = self.path / f"kv-{uuid.uuid4().hex}.part.safetensors"
        try:
            metadata = {"key": key, "tokens": json.dumps(list(tokens)), "is_trimmable": json.dumps(entry.is_trimmable)}
            stock.save_prompt_cache(str(part), caches, metadata)
            if part.stat().st_size > self.max_bytes:
                log.warning("a prompt of %d tokens is not kept in %s: its %d bytes are more than all files may have, %d",
                             len(tokens), self.path, part.stat().st_size, self.max_bytes)
                return
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            file = self.path / f"kv-{_digest(part)}.safetensors"
            os.replace(part, file)
        except Exception as error:  # a full disk, for example, is no reason to end a server
            log.warning("a prompt of %d tokens is not kept in %s: %s", len(tokens), self.path, error)
            return
        finally:
            part.unlink(missing_ok=True)
        self.entries[file] = entry
        for other_file, other in mine.items():
            if entry.is_trimmable and other_file != file and entry.n_common(other.tokens) == len(other.tokens):
                self._remove(other_file)
        self._make_room()

    def _files(self, pattern: re.Pattern) -> list[Path]:
        """The one that was used longest ago first."""
        found = []
        for file in self.path.iterdir():
            if pattern.fullmatch(file.name):
                with contextlib.suppress(FileNotFoundError):  # another server's
                    found.append((file.stat().st_mtime_ns, file))
        return [file for _, file in sorted(found)]

    def _make_room(self) -> None:
        sizes = {}
        for file in self._files(_OURS):
            with contextlib.suppress(FileNotFoundError):
                sizes[file] = file.stat().st_size
        excess = sum(sizes.values()) - self.max_bytes
        for file, size in sizes.items():
            if excess <= 0:
                return
            self._remove(file)
            excess -= size

    def _remove(self, file: Path) -> None:
        self.entries.pop(file, None)
        with contextlib.suppress(OSError):
            file.unlink()

    @contextlib.contextmanager
    def _ignoring(self, file: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:  # another server has removed it, to make room
            pass
        except Exception as error:  # whatever MLX raises for what it cannot read
            log.warning("%s is ignored: %s. Remove it, or leave that to the folder's bound", file, error)


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read_entry(file: Path) -> Entry:
    """Of a file's header; the whole file is checked when it is loaded."""
    with open(file, "rb") as opened:
        n = int.from_bytes(opened.read(8), "little")
        if not 0 < n < min(_HEADER_MAX, file.stat().st_size):
            raise SnapshotError("it has no header")
        metadata = json.loads(opened.read(n))["__metadata__"]
    tokens = np.array(json.loads(metadata["0.tokens"]), np.int64)
    return Entry(metadata["0.key"], tokens, json.loads(metadata["0.is_trimmable"]))


class FolderPromptCache(stock.LRUPromptCache):
    """
    The server's prompts in memory, and a folder of them. known: by the server's key of a model, that of the folder, and what
    raises for caches that are not such a model's.
    """

    def __init__(self, max_size: int, folder: Folder, known: dict[Any, tuple[str, Callable[[list[Any]], None]]]) -> None:
        super().__init__(max_size)
        self._folder, self._known = folder, known

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        found = self._nearest(model, tokens)
        if model not in self._known or not all(isinstance(token, int) for token in tokens):
            return found
        key, accept = self._known[model]
        while file := self._folder.find(key, tokens, len(tokens) - len(found[1])):
            entry, caches = self._folder.entries[file], self._folder.load(file, accept)
            if caches is not None:
                super().insert_cache(model, entry.tokens.tolist(), caches)
                return self._nearest(model, tokens)
        return found

    def _nearest(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """In memory. Of a prompt that is known to its end MLX-LM leaves nothing to read, and then has nothing to go on from."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and not rest and stock.can_trim_prompt_cache(cache):
            stock.trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        return cache, rest

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant") -> None:
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        # Parts of a prompt are in the file of the whole, unless that cannot be trimmed to them.
        if model in self._known and (cache_type == "assistant" or not stock.can_trim_prompt_cache(prompt_cache)):
            self._folder.save(self._known[model][0], tokens, prompt_cache)
