#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What factors from the weights give on a real model: KL divergence from DynamicCache, in Transformers and MLX-LM on the CPU.

    factors.py MODEL --text FILE --csv OUT.csv [--presets TQ6,TQ4,TQ3,TQ2] [--n-tok 1024] [--skip 5000] [--outliers FACTOR]
               [--engine transformers]

MODEL is a GGUF file or a folder of Hugging Face's, for MLX-LM a folder of its own. The text's first n_tok tokens behind `skip`
characters are read in parts of 256, in float32; the divergence is that of the next-token distributions of the second half.
--outliers multiplies pairs of key channels by up to FACTOR, each by one that is log-uniform, and divides queries by as much,
which gives the same model with outlier keys (in Transformers, models with q_proj and k_proj).
"""
import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

os.environ |= {"HF_HUB_OFFLINE": "1"}
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
PART = 256
COLUMNS = ["engine", "model", "outliers", "preset", "factors", "n_tok", "mean_kl", "kl_99.9", "same_top_percent"]


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class Transformers:
    def __init__(self, path, outliers):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.torch, file = torch, {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if file else path
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).eval()
        if outliers > 1:
            self.add_outliers(outliers)

    def add_outliers(self, largest):
        chance = np.random.default_rng(1)
        with self.torch.no_grad():
            for module in self.model.modules():
                if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
                    n_kv = module.k_proj.out_features // module.head_dim
                    of_keys = np.tile(largest ** chance.random((n_kv, module.head_dim // 2)), 2)
                    of_queries = np.repeat(1 / of_keys, module.q_proj.out_features // module.k_proj.out_features, axis=0)
                    for linear, rows in ((module.k_proj, of_keys), (module.q_proj, of_queries)):
                        rows = self.torch.from_numpy(rows.ravel()).float()
                        linear.weight.mul_(rows[:, None])
                        if linear.bias is not None:
                            linear.bias.mul_(rows)

    def read(self, tokens, preset, factors):
        """Log probabilities after each token of the second half."""
        from transformers import DynamicCache
        from libturboquant.transformers import TurboQuantCache
        stock = "sdpa" if self.model._supports_sdpa else "eager"
        self.model.set_attn_implementation("turboquant" if preset else stock)
        config, found = self.model.config, []
        cache = TurboQuantCache(config=config, preset=preset, factors=factors) if preset else DynamicCache(config=config)
        with self.torch.no_grad():
            for begin in range(0, len(tokens), PART):
                part = self.torch.tensor([tokens[begin : begin + PART]])
                found.append(log_softmax(self.model(part, past_key_values=cache, use_cache=True).logits[0].numpy()))
        return np.concatenate(found)[len(tokens) // 2 :]


class Mlx:
    def __init__(self, path, outliers):
        import mlx.core as mx
        import mlx_lm
        if outliers > 1:
            sys.exit("factors.py: --outliers is for Transformers; save such a model there and convert it")
        self.mx = mx
        mx.set_default_device(mx.cpu)
        self.model, self.tokenizer = mlx_lm.load(str(path))

    def read(self, tokens, preset, factors):
        import mlx_lm.models.cache as stock
        from libturboquant.mlx import make_prompt_cache
        cache, found = stock.make_prompt_cache(self.model), []
        if preset:
            cache = make_prompt_cache(self.model, preset, factors=factors)
        for begin in range(0, len(tokens), PART):
            out = self.model(self.mx.array([tokens[begin : begin + PART]]), cache=cache)
            found.append(log_softmax(np.array(out[0].astype(self.mx.float32))))
        return np.concatenate(found)[len(tokens) // 2 :]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--presets", default="TQ6,TQ4,TQ3,TQ2")
    parser.add_argument("--factors", default="off,weights")
    parser.add_argument("--engine", choices=["transformers", "mlx"], default="transformers")
    parser.add_argument("--n-tok", type=int, default=1024)
    parser.add_argument("--skip", type=int, default=5000)
    parser.add_argument("--outliers", type=float, default=1)
    args = parser.parse_args()
    engine = (Transformers if args.engine == "transformers" else Mlx)(args.model, args.outliers)
    text = args.text.read_text()[args.skip : args.skip + 8 * args.n_tok]
    tokens = list(engine.tokenizer.encode(text))[: args.n_tok]
    wanted = engine.read(tokens, None, None)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                            text=True).stdout.strip()
    with open(args.csv, "w", newline="") as file:
        file.write(f"# {' '.join(['bench/factors.py', args.model.name, *sys.argv[2:]])}, commit {commit}\n")
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for preset in args.presets.split(","):
            for factors in args.factors.split(","):
                found = engine.read(tokens, preset, factors)
                kl = (np.exp(wanted) * (wanted - found)).sum(axis=-1)
                same = 100 * (wanted.argmax(-1) == found.argmax(-1)).mean()
                writer.writerow([args.engine, args.model.name, args.outliers, preset, factors, len(tokens), f"{kl.mean():.5f}",
                                 f"{np.quantile(kl, .999):.4f}", f"{same:.1f}"])
                file.flush()
                print(f"{preset} {factors}: mean KL {kl.mean():.5f}, 99.9 % {np.quantile(kl, .999):.4f}, same top {same:.1f} %",
                      flush=True)


if __name__ == "__main__":
    main()
