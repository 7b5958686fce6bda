# SPDX-License-Identifier: MIT
"""
mlx_lm.server with compressed caches: its own options, and --kv-preset and --kv-calibration before them.

    python -m turboquant.mlx_server --kv-preset TQ4 --model MODEL --port 8080
"""
from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx_lm.server as server

from .mlx import install


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kv-preset", default="TQ4")
    parser.add_argument("--kv-calibration")
    arguments, rest = parser.parse_known_args()
    load = server.load

    def load_and_install(*args: Any, **kwargs: Any) -> Any:
        model, *others = load(*args, **kwargs)
        return install(model, arguments.kv_preset, calibration=arguments.kv_calibration), *others

    server.load = load_and_install
    sys.argv[1:] = rest
    server.main()


if __name__ == "__main__":
    main()
