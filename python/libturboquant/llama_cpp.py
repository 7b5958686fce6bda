# SPDX-License-Identifier: MIT
"""
llama-cpp-python with a compressed KV cache. docs/python.md.

    from libturboquant.llama_cpp import Llama

    llama = Llama("model.gguf", preset="TQ4", n_ctx=32768)
    llama.create_chat_completion([{"role": "user", "content": "Hello"}])
    print(llama.kv_cache)                            # what holds the keys and values, and in how many bytes

The class loads the plug-in for llama.cpp (docs/llama-cpp.md) into the llama.cpp that llama-cpp-python has loaded, names its
device, and turns flash attention on. All else is llama_cpp.Llama's.
"""
from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings

from .errors import ArgumentError, UnsupportedError
from .formats import preset as find_preset

log = logging.getLogger("turboquant")

_PREFIX = "turboquant:"
_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR
# llama.cpp's log and its devices are the process's.
_lock = threading.Lock()
_options: str | None = None


def plugin_path() -> Path:
    """
    The plug-in's file: what GGML_BACKEND_PATH names, or the one in this package. Raises UnsupportedError if the package was
    built without one.
    """
    named = os.environ.get("GGML_BACKEND_PATH")
    path = Path(named) if named else Path(__file__).resolve().parent / "libggml-turboquant.so"
    if not path.exists():
        raise UnsupportedError(f"{path} is not there. Set GGML_BACKEND_PATH to the plug-in's path, or install the package with "
                               "it (docs/python.md)")
    return path


class _Messages:
    """
    What the plug-in says between two moments. Messages still go where they went before, only errors if not verbose. With _lock
    only.
    """

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.lines: list[tuple[int, str]] = []

    def __enter__(self) -> _Messages:
        self._before = bindings.llama_log_callback()
        self._user = ctypes.c_void_p()
        bindings.llama_log_get(ctypes.byref(self._before), ctypes.byref(self._user))
        self._ours = bindings.llama_log_callback(self._take)
        bindings.llama_log_set(self._ours, ctypes.c_void_p())
        return self

    def __exit__(self, *_: object) -> None:
        bindings.llama_log_set(self._before, self._user)

    def _take(self, level: int, text: bytes, _user: int | None) -> None:
        line = text.decode(errors="replace").strip()
        if line.startswith(_PREFIX):
            self.lines.append((level, line.removeprefix(_PREFIX).strip()))
        if self._before and (self.verbose or level == _ERROR):
            self._before(level, text, self._user)

    def error(self) -> str | None:
        return next((line for level, line in self.lines if level == _ERROR), None)


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the ggml that llama-cpp-python has loaded: a search in a library takes in those that it is linked with."""
    try:
        function = getattr(bindings._lib, name)
    except AttributeError:
        raise UnsupportedError(f"llama-cpp-python {llama_cpp.__version__} has a llama.cpp without {name}: install one of docs/"
                               "llama-cpp.md's range") from None
    function.restype, function.argtypes = result, arguments
    return function


@contextlib.contextmanager
def _environment(options: str) -> Iterator[None]:
    """The plug-in reads its options there, once. What is refused must not be there for the next Llama."""
    before = os.environ.get("TQ_GGML")
    if options:
        os.environ["TQ_GGML"] = options
    try:
        yield
    finally:
        if options:
            os.environ.pop("TQ_GGML")
            os.environ |= {} if before is None else {"TQ_GGML": before}


def _device(name: str, options: str, verbose: bool) -> int:
    """The plug-in's device of this name; loads the plug-in if no Llama before has. With _lock only."""
    global _options
    by_name = _function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
    device = by_name(name.encode())
    if device is None:
        load = _function("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)
        path = plugin_path()
        bindings.llama_backend_init()
        with _environment(options), _Messages(verbose) as messages:
            loaded = load(os.fsencode(path))
        device = by_name(name.encode()) if loaded else None
        if device is None:
            raise UnsupportedError(messages.error() or f"{path} was not loaded; llama.cpp's log has the reason")
        _options = options or os.environ.get("TQ_GGML", "")
    elif options and options != _options:
        state = f"with {_options!r}" if _options else "without options"
        raise ArgumentError(f"kv_options: the plug-in is loaded {state} already, and they hold for the whole process: give the "
                            "same ones, or start another process")
    return device


def _refuse(arguments: dict[str, Any]) -> None:
    """Raises ArgumentError for arguments of llama_cpp.Llama that would keep the cache off the device."""
    if not arguments.get("flash_attn", True):
        raise ArgumentError("flash_attn=False: the compressed cache is read by flash attention only; leave it out, or use "
                            "llama_cpp.Llama")
    if not arguments.get("offload_kqv", True):
        raise ArgumentError("offload_kqv=False: keys and values would stay with the CPU; leave it out, or use llama_cpp.Llama")
    if (n := arguments.get("n_gpu_layers", -1)) in (0, 1):  # the first one is the output, which has no keys and values
        raise ArgumentError(f"n_gpu_layers={n}: no layer's keys and values would be compressed; leave it out for all of them")
    if arguments.get("split_mode", llama_cpp.LLAMA_SPLIT_MODE_LAYER) not in (llama_cpp.LLAMA_SPLIT_MODE_LAYER,
                                                                             llama_cpp.LLAMA_SPLIT_MODE_NONE):
        raise ArgumentError("split_mode: one device has all keys and values; leave it out")
    for name in ("type_k", "type_v"):
        if arguments.get(name) not in (None, llama_cpp.GGML_TYPE_F16):
            raise ArgumentError(f"{name}: the preset says how keys and values are kept; leave it out")


class Llama(llama_cpp.Llama):
    """
    llama_cpp.Llama whose keys and values are held by the plug-in's device.

    preset: "TQ6", "TQ4", "TQ3" or "TQ2", in any case. kv_options: the plug-in's options as TQ_GGML has them ("recent=128");
    they hold for the whole process. All other arguments are llama_cpp.Llama's, where flash_attn and n_gpu_layers are set.

    `kv_cache` says what the plug-in made: formats, exact tokens, bytes, bits a value.

    Raises ArgumentError for arguments that would keep the cache off the device, UnsupportedError with the plug-in's reason
    where the model, or this llama.cpp, cannot be served; and what llama_cpp.Llama raises. Instances are made one at a time;
    each belongs to one thread at a time, as llama_cpp.Llama's do.
    """

    kv_cache: str

    def __init__(self, model_path: str, *, preset: str = "TQ4", kv_options: str = "", **arguments: Any) -> None:
        self.preset, self.kv_options = find_preset(preset).name, kv_options
        _refuse(arguments)
        arguments |= {"flash_attn": True, "n_gpu_layers": arguments.get("n_gpu_layers", -1)}
        verbose = arguments.get("verbose", True)
        with _lock:
            self._devices = (ctypes.c_void_p * 2)(_device(self.preset, kv_options, verbose), None)
            with _Messages(verbose) as messages:
                try:
                    super().__init__(model_path, **arguments)
                except (RuntimeError, ValueError) as error:
                    reason = messages.error()
                    if reason is None:
                        raise
                    raise UnsupportedError(reason) from error
        self.kv_cache = next((line for _, line in messages.lines if line.startswith(f"{self.preset} holds")), "")
        log.info("%s", self.kv_cache)

    # llama_cpp.Llama fills the parameters in its __init__ and loads the model there, and has no argument for devices.
    @property
    def model_params(self) -> Any:
        """llama.cpp's parameters of the model, with the device named."""
        return self._model_params

    @model_params.setter
    def model_params(self, parameters: Any) -> None:
        parameters.devices = ctypes.addressof(self._devices)
        self._model_params = parameters

    def close(self) -> None:
        """Free model and context, as llama_cpp.Llama does; nothing if the arguments were refused."""
        if hasattr(self, "_stack"):
            super().close()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"preset": self.preset, "kv_options": self.kv_options}
