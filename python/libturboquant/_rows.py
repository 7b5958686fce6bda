# SPDX-License-Identifier: MIT
"""What adapters of frameworks share that hand rows of host memory to the library."""
from __future__ import annotations

from ._library import AttendParams


def attend_params(n_head: int, scale: float, sinks: int | None = None, softcap: float | None = None) -> AttendParams:
    """Parameters of an attention call, without queries and output. sinks: where learned ones lie, float32 [n_head]."""
    params = AttendParams()
    params.n_head, params.softmax_scale, params.softcap, params.sinks = n_head, scale, softcap or 0, sinks
    return params
