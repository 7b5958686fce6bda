# SPDX-License-Identifier: MIT
"""
Factors for channels of keys, from a model's weights: docs/quality.md, "Factors from the weights".

A coded key's error is even over its channels, so a channel that outweighs the others costs them their precision. Keys are
divided by a factor for each channel before they are coded, and queries multiplied by it: logits stay what they are, whatever
the factors. They depend on weights only, never on what is read. The library's caches and the Metal kernels take them.

An engine says what its modules are called with; the rest is here. Modules are those of Transformers or of MLX-LM, which have
the same names.
"""
from __future__ import annotations

import ctypes
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _library
from .errors import ArgumentError
from .formats import exact_ends, format_info, format_number, preset as find_preset

CHOICES = ("weights", "off")

# White vectors that are projected in place of a model's own: a pair's energies come out to some 9 %.
_N_PROBE = 128
_SEED = 1
# Projections of queries and keys: apart, side by side, or side by side in each head.
_APART, _SIDE_BY_SIDE, _IN_HEADS = ("q_proj", "k_proj"), "qkv_proj", "query_key_value"
# Of queries and of keys, behind their projections.
NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))


def from_energies(keys: np.ndarray, queries: np.ndarray, partners: np.ndarray, means: np.ndarray | None = None,
                  angles: np.ndarray | None = None, n_ref: int = 0) -> tuple[np.ndarray, float]:
    """
    Factors in quarters of an octave, int8 [n_head_kv, head_dim], from the mean squares of keys [n_head_kv, head_dim] and
    queries [n_head, head_dim] before RoPE, and the spread of their products: tq_key_factors. partners [head_dim]: the channel
    that RoPE turns each with, itself if it has no partner; angles [head_dim]: by how much from token to token; means: of keys;
    n_ref: how many tokens share a reference.
    """
    arrays = [np.ascontiguousarray(x, kind) if x is not None else None for x, kind in
              ((keys, np.float32), (means, np.float32), (queries, np.float32), (partners, np.int32), (angles, np.float64))]
    params = _library.KeyFactorsParams()
    params.n_head_kv, params.head_dim = keys.shape
    params.n_head, params.ref_block = len(queries), n_ref
    for name, x in zip(("k_square", "k_mean", "q_square", "partners", "angles"), arrays):
        setattr(params, name, None if x is None else x.ctypes.data)
    found, spread = np.empty(keys.shape, np.int8), ctypes.c_float()
    _library.lib.tq_key_factors(found.ctypes.data, ctypes.byref(spread), ctypes.byref(params))
    return found, spread.value


def octaves_from_energies(keys: np.ndarray, queries: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """
    from_energies' factors as powers of two: their exponents, int [n_head_kv, head_dim]. A head's factors may all be shifted
    alike before they are rounded; of four shifts each head has the one that leaves coding the least error.
    """
    quarters, _ = from_energies(keys, queries, partners)
    of_groups = queries.reshape(len(keys), -1, keys.shape[1]).mean(axis=1)
    choices = np.rint((quarters + np.arange(4)[:, None, None]) / 4).astype(int)
    squares = 4.0 ** choices
    errors = (keys / squares).sum(axis=2) * (of_groups * squares).sum(axis=2)
    return choices[errors.argmin(axis=0), np.arange(len(keys))]


def channel_factors(quarters: np.ndarray) -> np.ndarray:
    """2^(quarters / 4), the library's float32 bits."""
    octaves, rest = np.divmod(quarters.astype(np.int32), 4)
    bits = np.array([0x3f800000, 0x3f9837f0, 0x3fb504f3, 0x3fd744fd], np.int32)[rest]
    return (bits + octaves * 0x800000).astype(np.int32).view(np.float32)


def partners_of(turn: Callable[[np.ndarray], np.ndarray], head_dim: int) -> np.ndarray:
    """The partner of each channel, for from_energies. turn: a rotation of rows [n, head_dim], in any axes' order."""
    turned = abs(turn(np.eye(head_dim, dtype=np.float32)))
    np.fill_diagonal(turned, 0)
    found = turned.argmax(axis=1)
    found = np.where(turned.max(axis=1) > 0, found, np.arange(head_dim))
    return np.where(found[found] == np.arange(head_dim), found, np.arange(head_dim))


def norm_before(module: Any, layer: Any = None) -> Any:
    """
    The norm whose output an attention takes, found in its layer: the one that is calling it now, if it is not given. None if
    there is no such layer, or none by a name that is known.
    """
    for owner in _callers() if layer is None else [layer]:
        parts = owner if isinstance(owner, dict) else getattr(owner, "_modules", None)
        if isinstance(parts, dict) and any(part is module for part in parts.values()):
            return next((parts[name] for name in _INPUT_NORMS if name in parts), None)
    return None


def _callers() -> Iterator[Any]:
    """
    Whose methods are being called now, the innermost first. No frame is looked at before it is its turn: one that was keeps
    what its variables held until it ends.
    """
    frame = sys._getframe(2)
    for _ in range(_FRAMES_MAX):
        yield frame.f_locals.get("self")
        if frame.f_back is None:
            return
        frame = frame.f_back


def has_projections(module: Any) -> bool:
    """Has this attention projections by names that are known here?"""
    return all(hasattr(module, name) for name in _APART) or hasattr(module, _SIDE_BY_SIDE) or hasattr(module, _IN_HEADS)


# Of layers, and how far above the cache they are called.
_INPUT_NORMS = ("input_layernorm", "attention_norm", "ln_1", "norm1", "operator_norm")
_FRAMES_MAX = 24


def _n_input(module: Any) -> int:
    """The width of what an attention with projections takes."""
    names = (_APART[0], _SIDE_BY_SIDE, _IN_HEADS)
    projection = next(getattr(module, name) for name in names if hasattr(module, name))
    if hasattr(projection, "in_features"):
        return int(projection.in_features)
    if hasattr(projection, "scales"):  # MLX's quantized matrices, which hold several values a word
        return int(projection.scales.shape[-1] * projection.group_size)
    return int(projection.weight.shape[-1])


def _projected(module: Any, x: Any, n_head: int | None, n_head_kv: int, head_dim: int) -> tuple[Any, Any]:
    """Queries [n, n_head, head_dim] and keys [n, n_head_kv, head_dim] of x [1, n, width], before RoPE, their norms applied."""
    n, n_key = x.shape[1], n_head_kv * head_dim

    def made_by(name: str) -> Any:
        return getattr(module, name)(x).reshape(n, -1)

    if all(hasattr(module, name) for name in _APART):
        q, k = map(made_by, _APART)
    elif hasattr(module, _SIDE_BY_SIDE):
        rows = made_by(_SIDE_BY_SIDE)
        n_query = rows.shape[-1] - 2 * n_key if n_head is None else n_head * head_dim
        q, k = rows[:, :n_query], rows[:, n_query : n_query + n_key]
    else:
        rows = made_by(_IN_HEADS).reshape(n, n_head_kv, 3 * head_dim)
        q, k = (rows[:, :, i * head_dim : (i + 1) * head_dim].reshape(n, n_key) for i in range(2))
    if n_head is not None and q.shape[-1] == 2 * n_head * head_dim:  # each head's queries, and a gate for its output
        q = q.reshape(n, n_head, 2 * head_dim)[:, :, :head_dim].reshape(n, -1)
    for names in NORMS:
        norms = [getattr(module, name, None) for name in names]
        if None not in norms:
            q, k = (_normed(norm, rows, head_dim) for norm, rows in zip(norms, (q, k)))
    found = q.reshape(n, -1, head_dim), k.reshape(n, n_head_kv, head_dim)
    if found[0].shape[1] % n_head_kv != 0 or n_head not in (None, found[0].shape[1]):
        raise ValueError(f"{found[0].shape[1]} query heads")
    return found


def _normed(norm: Any, rows: Any, head_dim: int) -> Any:
    """Norms are of heads, or of all of them together if they have that many weights."""
    weight = getattr(norm, "weight", None)
    is_of_all = weight is not None and len(weight.shape) == 1 and weight.shape[0] == rows.shape[-1]
    return norm(rows if is_of_all else rows.reshape(len(rows), -1, head_dim))


def _normed_input(norm: Any, white: Any) -> Any:
    """As the norm before makes it; white where that takes more than its input."""
    try:
        return white if norm is None else norm(white)
    except Exception:  # of a model's own kind: factors are then nearly as good
        return white


def energies_of_module(module: Any, n_head: int | None, n_head_kv: int, head_dim: int, to_engine: Callable[[np.ndarray], Any],
                       to_host: Callable[[Any], np.ndarray], norm: Any = None) -> tuple[np.ndarray, ...] | None:
    """
    What from_energies takes of an attention module: mean squares of keys, of queries, and means of keys. None if its
    projections of queries and keys are not known. n_head: None if it is to be found. to_engine, to_host: float32 arrays to the
    engine's and back.

    The projections are called with white vectors, the same ones each time, as `norm` (of norm_before) makes them, so quantized
    weights, adapters and weights that are kept elsewhere are what they are in the model. What keys have in common, a bias,
    counts with what references leave of it: in pairs that turn slowly that is nothing.
    """
    try:
        x = np.random.default_rng(_SEED).standard_normal((1, _N_PROBE, _n_input(module)), np.float32)
        white = to_engine(x)
        rows = [to_host(y) for y in _projected(module, _normed_input(norm, white), n_head, n_head_kv, head_dim)]
    except Exception:  # by these names modules of other kinds may do anything: they are not known, which is told
        return None
    queries, keys = (np.square(y, dtype=np.float32).mean(axis=0) for y in rows)
    return keys, queries, rows[1].mean(axis=0)


def of_module(module: Any, n_head: int | None, n_head_kv: int, head_dim: int, to_engine: Callable[[np.ndarray], Any],
              to_host: Callable[[Any], np.ndarray], rope: Callable[[], tuple[np.ndarray, np.ndarray]], n_ref: int,
              norm: Any = None) -> tuple[np.ndarray, float] | None:
    """from_energies of energies_of_module. rope: partners and angles of channels."""
    energies = energies_of_module(module, n_head, n_head_kv, head_dim, to_engine, to_host, norm)
    if energies is None:
        return None
    keys, queries, means = energies
    partners, angles = rope()
    return from_energies(keys, queries, partners, means, angles, n_ref)


class Known:
    """What was found for modules that still exist. Not a WeakKeyDictionary, since MLX's modules have no hash."""

    def __init__(self) -> None:
        self._found: dict[tuple, tuple[weakref.ref, Any]] = {}

    def get(self, module: Any, shape: tuple, make: Callable[[], Any]) -> Any:
        """make() for a module of which this shape is asked for the first time; None if it has no projections that are known."""
        if not has_projections(module):
            return None
        key = (id(module), *shape)
        held = self._found.get(key)
        if held is None or held[0]() is not module:
            held = self._found[key] = (weakref.ref(module, lambda _: self._found.pop(key, None)), make())
        return held[1]

    def forget(self, module: Any) -> None:
        """Of a module whose weights have changed."""
        for key in [key for key in self._found if key[0] == id(module)]:
            del self._found[key]


# ---- what the caches of both engines are told ----

def chosen(factors: str | None, calibration: Any) -> str:
    """factors= of a cache, checked. A calibration's transforms do what factors do, and were learnt from keys without them."""
    if factors not in (None, *CHOICES):
        raise ArgumentError(f"factors is {factors!r}; give one of {', '.join(map(repr, CHOICES))}")
    if factors == "weights" and calibration is not None:
        raise ArgumentError("factors='weights' with a calibration, which was learnt from keys without factors: leave one of "
                            "them out")
    return factors or ("off" if calibration is not None else "weights")


class Engine(NamedTuple):
    """How an engine's modules are called, as of_module takes it."""

    to_engine: Callable[[np.ndarray], Any]
    to_host: Callable[[Any], np.ndarray]
    rope: Callable[[], tuple[np.ndarray, np.ndarray]]


_known = Known()


def of_keys(fmt: int, module: Any, shape: tuple[int | None, int, int], n_ref: int, engine: Engine, scale: float, name: str,
            layer: Any = None) -> tuple[np.ndarray | None, bool]:
    """
    Factors of the keys that a module brings a layer with keys in this format, None for none; and are its projections known, or
    is that no matter? shape: of_module's n_head, n_head_kv and head_dim. layer: as of norm_before. Warns by the softmax's
    scale, the guard, of a layer of this name.
    """
    if is_exact(fmt):
        return None, True
    norm = norm_before(module, layer)
    found = _known.get(module, (*shape, n_ref), lambda: of_module(module, *shape, *engine, n_ref, norm))
    if found is None:
        return None, False
    factors, spread = found
    warn_of_spread(fmt, spread * scale, name)
    return factors if factors.any() else None, True


def warn_of_spread(fmt: int, spread: float, layer: str) -> None:
    """The guard: tell where a format moves logits, whose spread the weights tell, by more than attention bears."""
    better = int(_library.lib.tq_key_guard(fmt, spread))
    if better != fmt:
        name, more = (format_info(number).name for number in (fmt, better))
        warnings.warn(f"turboquant: by the model's weights the logits of {layer} have a spread of {spread:.1f}, which keys in "
                      f"{name} would move by more than 1: pass k_format={more!r}, which holds them", UserWarning, stacklevel=2)


def formats_of(options: dict[str, Any], n_layer: int, side: str) -> list[int]:
    """The format of each layer's keys, side "k", or values, "v", of a cache's options, a preset among them."""
    one = options.get(f"{side}_format")
    one = getattr(find_preset(options["preset"]), f"{side}_format") if one is None else one
    of_layers = exact_ends(options.get(f"layer_{side}_formats"), one, n_layer, options.get("exact_layers", 0))
    return [format_number(fmt) for fmt in ([one] * n_layer if of_layers is None else of_layers)]


def references_of(options: dict[str, Any]) -> int:
    """How many tokens share a reference of a cache's keys, of its options; 0: none has one."""
    of_preset = find_preset(options["preset"])
    n_ref, n_recent = (getattr(of_preset, name) if options.get(name) is None else int(options[name])
                       for name in ("k_ref_block", "n_recent"))
    return n_ref if n_recent else 0


def is_exact(fmt: int) -> bool:
    """Would factors change nothing? Half floats have a scale each."""
    return format_info(fmt).bits >= 16


def of_latents(options: dict[str, Any], n_layer: int, factors: str = "weights") -> dict[str, Any]:
    """
    What takes the place of options of a cache of latents (MLA), which have no factors, and which values are also read from: a
    preset's have 8 bits, as in llama.cpp. Formats that somebody else has chosen stay, as does a preset with factors="off".
    """
    few = any(format_info(fmt).bits < 8 for fmt in formats_of(options, n_layer, "k"))
    is_presets = options.get("k_format") is None and options.get("layer_k_formats") is None
    return {"values_in_keys": True} | ({"k_format": "sq8"} if few and is_presets and factors != "off" else {})


def without(options: dict[str, Any], n_layer: int, module: Any) -> dict[str, Any]:
    """
    What takes the place of a cache's options where a module's projections are not known: keys of 8 bits, for fewer that a
    preset, and nobody else, has chosen. Warns if keys have fewer than 8 bits, or would have.
    """
    if all(format_info(fmt).bits >= 8 for fmt in formats_of(options, n_layer, "k")):
        return {}
    is_presets = options.get("k_format") is None and options.get("layer_k_formats") is None
    what = f"keys have 8 bits, not those of {options['preset']}" if is_presets else "keys have the format that was asked for"
    warnings.warn(
        f"turboquant does not know the projections of queries and keys in {type(module).__name__}, so it has no factors for "
        f"outlier channels, and few bits may ruin what such a model says: {what}. To choose yourself pass k_format=, or "
        "factors='off', which leaves the preset as it is", UserWarning, stacklevel=2)
    return {"k_format": "sq8"} if is_presets else {}
