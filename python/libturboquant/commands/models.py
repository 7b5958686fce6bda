# SPDX-License-Identifier: MIT
"""What commands are given as a model: folders, GGUF files, names; and what its configuration says."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import CommandError, first_line

WITH_WEIGHTS = "a folder with config.json, a GGUF file, or a name on the Hugging Face Hub (owner/model)"
HELP = WITH_WEIGHTS + "; or a configuration of the installed Transformers (qwen2, Qwen2Config), with its default sizes"
# What Transformers raises for folders and files that it cannot read, and for packages that it lacks.
_FAULTS = (OSError, ValueError, ImportError, KeyError, AttributeError, RuntimeError, TypeError)


def need_transformers() -> Any:
    """The package transformers, with torch."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise CommandError(f"this needs torch and transformers, and one of them cannot be imported ({first_line(error)}): pip "
                           "install 'libturboquant[transformers]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def need_mlx() -> Any:
    """The package mlx_lm, with MLX on a device that there are caches for: an Apple GPU, or the CPU."""
    try:
        import mlx.core as mx
        if not mx.metal.is_available():
            mx.set_default_device(mx.cpu)  # before MLX-LM makes a stream
        import mlx_lm
    except ImportError as error:
        raise CommandError(f"this needs MLX-LM, which cannot be imported ({first_line(error)}): pip install "
                           "'libturboquant[mlx]'") from error
    return mlx_lm


def mlx_folder(name: str) -> Path:
    """A model's folder, for MLX-LM."""
    if not (Path(name) / "config.json").is_file():
        raise CommandError(f"{name} is not a folder with config.json: give one, which MLX-LM takes")
    return Path(name)


@contextlib.contextmanager
def faults_of(name: str, known: str = WITH_WEIGHTS) -> Iterator[None]:
    """Errors of other packages about a model, in one line; known: what a model can be."""
    try:
        yield
    except _FAULTS as error:
        raise CommandError(f"{name}: {first_line(error)}. Give {known}") from error


def source_of(name: str, known: str = WITH_WEIGHTS) -> dict[str, Any]:
    """Arguments of from_pretrained for a model whose weights there are; known: what a model can be."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"{name} has no config.json: give a folder as save_pretrained writes it, or a GGUF file")
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        if path.name == "config.json":
            return {"pretrained_model_name_or_path": str(path.parent)}
        if path.suffix != ".gguf":
            raise CommandError(f"{name} is neither a folder with config.json nor a GGUF file: give one of these")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.exists():
        return {"pretrained_model_name_or_path": name}
    raise CommandError(f"there is no folder or file {name}: give {known}")


def config_of(name: str) -> Any:
    """The configuration of a model, of which no weights are read."""
    transformers = need_transformers()
    kind = getattr(transformers, name, None) if name.endswith("Config") else None
    if kind is None and not Path(name).exists() and name in transformers.CONFIG_MAPPING:
        kind = transformers.CONFIG_MAPPING[name]
    if kind is None:
        source = source_of(name, HELP)
        with faults_of(name, HELP):
            return transformers.AutoConfig.from_pretrained(**source)
    with faults_of(name, HELP):
        return kind()


def weight_bytes(name: str) -> int | None:
    """Of the files that a model's weights are in; None where they are not here."""
    path = Path(name).parent if Path(name).name == "config.json" else Path(name)
    if path.is_file():
        return path.stat().st_size
    files = [file for suffix in ("safetensors", "bin") for file in path.glob(f"*.{suffix}")] if path.is_dir() else []
    chosen = [file for file in files if file.suffix == ".safetensors"] or files
    return sum(file.stat().st_size for file in chosen) or None


def class_of(config: Any) -> Any:
    """The class of models that a configuration is for; None if Transformers does not say."""
    import transformers
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    from transformers.models.auto import modeling_auto
    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def no_language_model(name: str, config: Any, error: AttributeError) -> CommandError:
    return CommandError(f"{name}: {type(config).__name__} is not a language model's configuration ({error}): give that of a "
                        "model that generates text")
