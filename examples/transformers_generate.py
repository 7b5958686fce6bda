# SPDX-License-Identifier: MIT
"""
Generate with a Transformers model and a compressed cache.

    python examples/transformers_generate.py MODEL "Once upon a time" [--preset TQ4] [--n-tok 64]

MODEL is a folder or name that from_pretrained takes, or a GGUF file.
"""
import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from libturboquant.transformers import install

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("prompt")
parser.add_argument("--preset", default="TQ4")
parser.add_argument("--n-tok", type=int, default=64)
args = parser.parse_args()

path = Path(args.model)
source = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
folder = path.parent if source else args.model
tokenizer = AutoTokenizer.from_pretrained(folder, **source)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **source).eval()

install(model, preset=args.preset)
inputs = tokenizer(args.prompt, return_tensors="pt")
found = model.generate(**inputs, max_new_tokens=args.n_tok, do_sample=False, return_dict_in_generate=True)
print(tokenizer.decode(found.sequences[0], skip_special_tokens=True))
print(found.cache)  # past_key_values in older releases
