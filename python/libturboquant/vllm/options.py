# SPDX-License-Identifier: MIT
"""What a user asks for by `--additional-config '{"turboquant": ...}'`. Imports nothing of vLLM."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..formats import format_number, preset, presets

KEY = "turboquant"
N_EXACT_MAX = 1024
# Sinks have room in each page, so they cost 16 bits a value divided by the page's tokens: one, not a preset's four.
N_SINK = 1
N_RECENT = 64


@dataclass(frozen=True)
class Options:
    """Formats by number; how many tokens stay exact; where factors of keys come from; may keys get a better format?"""

    name: str
    k_format: int
    v_format: int
    n_recent: int
    n_sink: int
    factors: str
    is_preset: bool


def of_config(additional: Any) -> Options | None:
    """
    The options of vLLM's additional_config, None if nothing is asked for. What is asked for is the name of a preset in any
    case, a pair of formats as "sq8/sq4", or {"formats": one of these, "n_recent": ..., "n_sink": ..., "factors": "weights" or
    "off"}. Raises ArgumentError with what is possible.
    """
    asked = additional.get(KEY) if isinstance(additional, Mapping) else None
    if asked is None or asked is False:
        return None
    if isinstance(asked, str):
        asked = {"formats": asked}
    if not isinstance(asked, Mapping):
        raise ArgumentError(f'{KEY} is {asked!r}; give the name of a preset, as {{"{KEY}": "TQ4"}}, or an object with '
                            '"formats"')
    known = {"formats", "n_recent", "n_sink", "factors"}
    if unknown := sorted(set(asked) - known):
        raise ArgumentError(f"{KEY} has no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    name = asked.get("formats", "TQ4")
    is_preset, k_format, v_format, n_recent = _formats(name)
    n_recent = _count(asked, "n_recent", n_recent, 1)
    n_sink = _count(asked, "n_sink", N_SINK, 0)
    if n_recent + n_sink > N_EXACT_MAX:
        raise ArgumentError(f"{KEY}: n_recent {n_recent} and n_sink {n_sink} are more than {N_EXACT_MAX} together; give fewer")
    factors = asked.get("factors", "weights")
    if factors not in ("weights", "off"):
        raise ArgumentError(f"{KEY}: factors is {factors!r}; give 'weights' or 'off'")
    return Options(str(name), k_format, v_format, n_recent, n_sink, factors, is_preset)


def _formats(name: Any) -> tuple[bool, int, int, int]:
    """Is it a preset; formats of keys and values; the window."""
    if not isinstance(name, str):
        raise ArgumentError(f'{KEY}: formats is {name!r}; give a preset or a pair, as "TQ4" or "sq8/sq4"')
    if "/" not in name:
        if name.upper() not in presets():
            raise ArgumentError(f"{KEY}: preset {name!r} does not exist; give {', '.join(presets())}, or a pair of formats "
                                'for keys and values, as "sq8/sq4"')
        found = preset(name)
        return True, found.k_format, found.v_format, found.n_recent
    k, _, v = name.partition("/")
    return False, format_number(k), format_number(v), N_RECENT


def _count(asked: Mapping[str, Any], name: str, default: int, least: int) -> int:
    value = asked.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= N_EXACT_MAX:
        raise ArgumentError(f"{KEY}: {name} is {value!r}; give a number from {least} to {N_EXACT_MAX}")
    return value
