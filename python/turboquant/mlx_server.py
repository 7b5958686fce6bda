# SPDX-License-Identifier: MIT
"""
mlx_lm.server with compressed caches: its own options, and --kv-preset, --kv-calibration and --kv-factors before them.

    python -m turboquant.mlx_server --kv-preset TQ4 --model MODEL --port 8080
"""
from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx_lm.server as server

from .cache import Calibration
from .errors import TurboQuantError
from .formats import preset, presets
from .mlx import install
from .weight_factors import CHOICES, chosen


# --kv-bits, --kv-group-size and --quantized-kv-start, which argparse also takes shortened.
_OF_STOCK_CACHES = ("--kv-b", "--kv-g", "--qua")


def _parse() -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those of mlx_lm.server. What is wrong with ours ends the program before a model is loaded."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="%(prog)s [--kv-preset NAME] "
                                     "[--kv-calibration FILE] [--kv-factors NAME] [options of mlx_lm.server]")
    group = parser.add_argument_group("options of turboquant")
    group.add_argument("--kv-preset", metavar="NAME", default="TQ4",
                       help=f"formats of keys and values: {', '.join(presets())} (default: %(default)s)")
    group.add_argument("--kv-calibration", metavar="FILE", help="what `tq calibrate` learnt of the model")
    group.add_argument("--kv-factors", metavar="NAME", choices=CHOICES,
                       help="factors for channels of keys: weights, from the model's (default without a calibration), or off")
    arguments, rest = parser.parse_known_args()
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())  # mlx_lm.server's own follows
        return arguments, rest
    for option in rest:
        if option.startswith(_OF_STOCK_CACHES):
            parser.error(f"{option}: keys and values are compressed already; leave it out, or run mlx_lm.server")
    try:
        preset(arguments.kv_preset)
        if arguments.kv_calibration is not None:
            arguments.kv_calibration = Calibration(arguments.kv_calibration)
        chosen(arguments.kv_factors, arguments.kv_calibration)
    except TurboQuantError as error:
        parser.error(str(error))
    return arguments, rest


def main() -> None:
    arguments, rest = _parse()
    load = server.load

    def load_and_install(*args: Any, **kwargs: Any) -> Any:
        model, *others = load(*args, **kwargs)
        options = {"calibration": arguments.kv_calibration, "factors": arguments.kv_factors}
        return install(model, arguments.kv_preset, **options), *others

    server.load = load_and_install
    sys.argv[1:] = rest
    server.main()


if __name__ == "__main__":
    main()
