#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The presets' KL divergence in llama.cpp, Transformers and MLX-LM, on the same model, text, tokens and context.

    engines.py MODEL.gguf --text FILE --csv OUT.csv [--engines llama.cpp,llama.cpp-float32,transformers,mlx-lm]
               [--presets TQ6,TQ4,TQ3,TQ2] [--context 2048] [--chunks 1] [--threads 2]

A row is the divergence of the next-token distributions from those of the same engine with an FP16 cache, over the second half
of each window, which is read in parts of 512 tokens: llama-perplexity's way, in all of them. Next to the presets stands the
engine's floor, which is FP16 by another algorithm: llama.cpp without flash attention, Transformers' eager attention for sdpa,
MLX-LM with a prompt in parts of 256. Transformers and MLX-LM compute in float32 with the weights that the file's stand for.
So does llama.cpp-float32, on a copy of the file; on the file itself llama.cpp rounds activations to 8 bits.

All that is on the CPU. transformers-cuda and transformers-cuda-bfloat16 are Transformers on an NVIDIA GPU, in float32 and in
bfloat16; they are measured where they are named.

Each engine is a process of its own. A row is written as soon as it is known, and those that OUT.csv has are not measured again:
the same command goes on where it was stopped. It ends with a table, and with what the engines do not agree on.

Run it with build/deps/torch-venv/bin/python, PYTHONPATH=python and TURBOQUANT_LIBRARY=build/release/libturboquant.so. MLX's
wheel for Linux multiplies with the reference BLAS; with OpenBLAS in LD_PRELOAD, and --engines mlx-lm, it takes a tenth of the
time. Copies of the weights and logits wait in OUT.csv.work: 4 GB for a model of 0.5 billion parameters.
"""
import argparse
import hashlib
import importlib.metadata
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "python/tests")]
from eval import arguments, llama, options, quality  # noqa: E402

from rows import append_rows, read_rows  # noqa: E402
from libturboquant._divergence import divergences, figures_of  # noqa: E402

FLOOR = "floor"
PRESETS = "TQ6,TQ4,TQ3,TQ2"
SAME_SHARE = .15  # of a figure that stands out of the floor, by which engines may differ
STANDS_OUT = 5  # floors
COLUMNS = ["engine", "name", "model", "text", "n_ctx", "n_chunks", "tokens", "kld_mean", "kld_mean_error", "kld_99_9",
           "same_top_1", "seconds", "command", "machine", "commit", "versions"]
KEY = COLUMNS[:6]


def versions(*packages):
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def short_hash(tokens):
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32)).hexdigest()[:12]


class Llama:
    machine = staticmethod(llama.machine)

    def __init__(self, args, work):
        self.args, self.base = args, work / "logits.kld"
        self.setup = llama.Setup(options.find_llama_bin(args.llama_bin), options.find_plugin(args.plugin), self.model(work),
                                 args.threads)
        self.versions = llama.version(self.setup)
        quality.write_base(self.setup, self.quality(llama.F16), self.base)
        with open(self.base, "rb") as file:
            file.seek(len("_logits_") + 3 * 4)  # n_ctx, n_vocab, n_chunk
            self.tokens = short_hash(np.fromfile(file, np.int32, args.context * args.chunks))

    def model(self, work):
        return self.args.model

    def quality(self, cache):
        return quality.Quality(cache, self.args.text, self.args.context, self.args.chunks)

    def measure(self, name, advance):
        cache = llama.F16_NO_FLASH if name == FLOOR else llama.Cache(name)
        found = quality.measure(self.setup, self.quality(cache), self.base)
        advance(self.args.context * self.args.chunks)
        return {name: found[name] for name in ("kld_mean", "kld_mean_error", "kld_99_9", "same_top_1")}


class LlamaFloat32(Llama):
    def model(self, work):
        """A copy of the model, all of whose weights are 32-bit floats."""
        import gguf
        path, reader = work / "float32.gguf", gguf.GGUFReader(self.args.model)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        writer = gguf.GGUFWriter(path, fields.pop("general.architecture").contents())
        for name, field in fields.items():
            value = int(gguf.LlamaFileType.ALL_F32) if name == "general.file_type" else field.contents()
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], kind)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


class InPython:
    """An engine whose logits come as arrays."""

    machine = staticmethod(llama.machine)

    def __init__(self, args, work):
        self.args, self.work = args, work
        self.load()
        n_tok = args.context * args.chunks
        tokens = self.tokenizer.encode(args.text.read_text(encoding="utf-8"))[:n_tok]
        if len(tokens) < n_tok:
            raise ValueError(f"{args.text.name} has {len(tokens)} tokens, fewer than {args.chunks} windows of {args.context}")
        self.tokens = short_hash(tokens)
        self.windows = np.array(tokens, np.int32).reshape(args.chunks, -1)
        for number, window in enumerate(self.windows):
            self.keep(number, self.read(window, None, lambda n_tok: None))

    def keep(self, number, logits):
        np.save(self.work / f"{number}.npy", logits)

    def kept(self, number):
        return np.load(self.work / f"{number}.npy", mmap_mode="r")

    join, divergences = staticmethod(np.concatenate), staticmethod(divergences)

    @staticmethod
    def same(wanted, found):
        return wanted.argmax(axis=-1) == found.argmax(axis=-1)

    def read(self, window, name, advance):
        """Logits where llama-perplexity scores them: after each token of the second half, but for the last."""
        step, n_ctx, found = self.step(name), len(window), []
        forward = self.begin(name)
        for begin in range(0, n_ctx, step):
            part = window[begin : begin + step]
            n_scored = min(len(part), max(begin + len(part) - n_ctx // 2, 0))
            logits = forward(part, n_scored)
            if n_scored:
                found.append(logits)
            advance(len(part))
        return self.join(found)[:-1]

    def step(self, name):
        return min(quality.BATCH, self.args.context)

    def measure(self, name, advance):
        kl, same = [], []
        for number, window in enumerate(self.windows):
            wanted, found = self.kept(number), self.read(window, name, advance)
            kl.append(self.divergences(wanted, found))
            same.append(self.same(wanted, found))
        return figures_of(np.concatenate(kl), np.concatenate(same))


class Transformers(InPython):
    DEVICE, DTYPE = "cpu", "float32"

    def load(self):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
        torch.set_num_threads(self.args.threads)
        torch.set_grad_enabled(False)
        folder, file = self.args.model.parent, self.args.model.name
        self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=getattr(torch, self.DTYPE)).eval()
        self.model.to(self.DEVICE)
        self.torch, self.versions = torch, versions("transformers", "torch")

        class HalfCache(DynamicCache):
            def update(self, keys, values, *rest, **more):
                return super().update(keys.half().to(keys.dtype), values.half().to(values.dtype), *rest, **more)

        self.half_cache = HalfCache

    def begin(self, name):
        from libturboquant.transformers import TurboQuantCache
        is_ours = name not in (None, FLOOR)
        self.model.set_attn_implementation("turboquant" if is_ours else "eager" if name == FLOOR else "sdpa")
        config = self.model.config
        cache = TurboQuantCache(config=config, preset=name) if is_ours else self.half_cache(config=config)

        def forward(part, n_last):
            part = self.torch.from_numpy(part.astype(np.int64))[None].to(self.DEVICE)
            out = self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=max(n_last, 1))
            return self.taken(out.logits[0])

        return forward

    @staticmethod
    def taken(logits):
        return logits.numpy()


class TransformersCuda(Transformers):
    """Logits stay on the GPU, which has room for those of long contexts."""

    DEVICE = "cuda"

    @staticmethod
    def machine():
        import torch
        return torch.cuda.get_device_name()

    def keep(self, number, logits):
        self.logits = {**getattr(self, "logits", {}), number: logits}

    def kept(self, number):
        return self.logits[number]

    @staticmethod
    def taken(logits):
        return logits.float()

    def join(self, parts):
        return self.torch.cat(parts)

    @staticmethod
    def same(wanted, found):
        return (wanted.argmax(dim=-1) == found.argmax(dim=-1)).cpu().numpy()

    def divergences(self, wanted, found, rows=1024):
        parts = []
        for begin in range(0, len(wanted), rows):
            p, q = (x[begin : begin + rows].double().log_softmax(dim=-1) for x in (wanted, found))
            parts.append((p.exp() * (p - q)).sum(dim=-1).cpu().numpy())
        return np.concatenate(parts)


class TransformersBfloat16(TransformersCuda):
    DTYPE = "bfloat16"


class MlxLm(InPython):
    def load(self):
        # PyTorch reads the file, in a process whose memory and threads are gone afterwards.
        folder = self.work / "mlx"
        export = multiprocessing.Process(target=export_model, args=(self.args.model, folder))
        export.start()
        export.join()
        if export.exitcode:
            raise RuntimeError("Transformers did not write the model for MLX-LM")
        import mlx.core as mx
        import mlx_lm
        import mlx_lm.models.cache as stock
        mx.set_default_device(mx.cpu)
        self.model, self.tokenizer = mlx_lm.load(str(folder))
        self.mx, self.versions = mx, versions("mlx-lm", "mlx")

        class HalfCache(stock.KVCache):
            def update_and_fetch(self, keys, values):
                half = (x.astype(mx.float16).astype(x.dtype) for x in (keys, values))
                return super().update_and_fetch(*half)

        self.half_cache = HalfCache

    def step(self, name):
        return super().step(name) // (2 if name == FLOOR else 1)

    def begin(self, name):
        from libturboquant.mlx import make_prompt_cache
        is_ours = name not in (None, FLOOR)
        cache = make_prompt_cache(self.model, name) if is_ours else [self.half_cache() for _ in self.model.layers]

        def forward(part, n_last):
            model = self.model if n_last else self.model.model  # whose last layer takes a while
            out = model(self.mx.array(part[None]), cache=cache)
            return np.array(out[0, -n_last:].astype(self.mx.float32))

        return forward


def export_model(model, folder):
    """A GGUF file as Hugging Face has models."""
    import smollm
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    loaded = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    smollm.export(loaded, tokenizer, folder)


ON_CPU = {"llama.cpp": Llama, "llama.cpp-float32": LlamaFloat32, "transformers": Transformers, "mlx-lm": MlxLm}
ENGINES = {**ON_CPU, "transformers-cuda": TransformersCuda, "transformers-cuda-bfloat16": TransformersBfloat16}


def append_row(path, row):
    row = {name: f"{value:.8g}" if isinstance(value, float) else value for name, value in row.items()}
    append_rows(path, COLUMNS, [row])


def run_engine(kind, args, command, names):
    """Measure and write rows, in a process that ends with 1 if any is missing."""
    import tempfile

    from tqdm import tqdm
    common = {"engine": kind, "model": args.model.name, "text": args.text.stem, "n_ctx": args.context, "n_chunks": args.chunks,
              "command": command, "machine": ENGINES[kind].machine(), "commit": args.commit or llama.commit()}
    failed = False
    args.work.mkdir(parents=True, exist_ok=True)
    n_tok = args.context * args.chunks * len(names)
    with tempfile.TemporaryDirectory(dir=args.work) as work, tqdm(total=n_tok, unit="tok") as bar:
        bar.set_description(f"{kind}: FP16")
        try:
            engine = ENGINES[kind](args, Path(work))
        except Exception as error:  # of whatever kind an engine raises
            sys.exit(f"\nengines.py: {kind}: {type(error).__name__}: {error}")
        for name in names:
            bar.set_description(f"{kind}: {name}")
            begin = time.monotonic()
            try:
                found = engine.measure(name, bar.update)
            except Exception as error:  # the other rows are to be had all the same
                bar.write(f"engines.py: {kind}, {name}: {type(error).__name__}: {error}", file=sys.stderr)
                failed = True
                continue
            found = {column: float(value) for column, value in found.items()}
            append_row(args.csv, {**common, **found, "name": name, "tokens": engine.tokens, "versions": engine.versions,
                                  "seconds": round(time.monotonic() - begin, 1)})
    sys.exit(failed)


def agrees(figure, other, floor):
    """Whether an engine's figure is that of another with this floor, by the rule that presets are held to."""
    return abs(figure - other) <= (SAME_SHARE * other if other > STANDS_OUT * floor else floor)


def short(figure):
    return f"{figure:.4f}".removeprefix("0") if figure >= 5e-5 else f"{figure:.0e}"


def report(rows, presets):
    """A table of rows of one model, text and context, and a line for each figure that the engines do not agree on."""
    found = {}
    for row in rows:
        numbers = {column: float(row[column]) for column in ("kld_mean", "kld_mean_error", "kld_99_9")}
        found.setdefault(row["engine"], {})[row["name"]] = numbers
    names = [FLOOR, *presets]
    lines = ["| engine | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
    for engine, of in found.items():
        cells = [f"{short(of[name]['kld_mean'])} ± {short(of[name]['kld_mean_error'])}, {short(of[name]['kld_99_9'])}"
                 if name in of else "" for name in names]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    if len({row["tokens"] for row in rows}) > 1:
        return [*lines, "The engines read different tokens, so that their figures cannot be compared."]
    for other in (engine for engine in found if FLOOR in found[engine] and issubclass(ENGINES[engine], Llama)):
        floor = found[other][FLOOR]["kld_mean"]
        for engine, name in ((engine, name) for engine in found if engine != other for name in presets):
            if name in found[engine] and name in found[other]:
                one, two = (found[e][name]["kld_mean"] for e in (engine, other))
                if not agrees(one, two, floor):
                    lines.append(f"{name}: {engine} has {short(one)}, {other} {short(two)}, its floor {short(floor)}: "
                                 f"{100 * (one / two - 1):+.0f} %")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--csv", type=Path, required=True, help="where rows are appended")
    parser.add_argument("--engines", default=",".join(ON_CPU),
                        help=f"some of {', '.join(ENGINES)} (those on the CPU)")
    parser.add_argument("--presets", nargs="+", default=[PRESETS], help="as tq eval has them, for llama.cpp with options")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window (%(default)s)")
    parser.add_argument("--chunks", type=int, default=1, help="windows (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--commit", help="of this folder, where it is no git repository")
    parser.add_argument("--llama-bin", type=Path, help="llama.cpp's programs (TQ_LLAMA_BIN, build/deps, PATH)")
    parser.add_argument("--plugin", type=Path, help="libggml-turboquant.so (TQ_PLUGIN, build/release)")
    args = parser.parse_args()
    args.engines, args.presets = args.engines.split(","), arguments.split_presets(args.presets)
    unknown = set(args.engines) - set(ENGINES)
    if unknown:
        parser.error(f"unknown engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    for path in (args.model, args.text):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    args.work = Path(f"{args.csv}.work")
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    command = " ".join(["bench/engines.py", *(re.sub(r".*/", "", word) for word in sys.argv[1:])])

    def of_this():
        wanted = [args.model.name, args.text.stem, str(args.context), str(args.chunks)]
        return [row for row in read_rows(args.csv) if [row[name] for name in KEY[2:]] == wanted]

    options.stop_by_signal()
    failed = []
    for kind in args.engines:
        have = {row["name"] for row in of_this() if row["engine"] == kind}
        missing = [name for name in [*args.presets, FLOOR] if name not in have]
        if missing:
            process = multiprocessing.Process(target=run_engine, args=(kind, args, command, missing))
            process.start()
            try:
                process.join()
            finally:
                process.terminate()
            if process.exitcode:
                failed.append(kind)
    print("\n".join(report(of_this(), args.presets)))
    if failed:
        sys.exit(f"engines.py: not all was measured in {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    main()
