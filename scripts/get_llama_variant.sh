#!/bin/sh
# SPDX-License-Identifier: MIT
# Make build/deps/llama-VARIANT/bin: the stock programs of scripts/get_llama.sh with ggml's CPU kernels as another processor
# has them. Sums are added up in another order there, so a test that passes on one processor may fail on another:
#
#   scripts/get_llama_variant.sh avx2      x86-64 with AVX2, FMA and F16C, no AVX-512
#   scripts/get_llama_variant.sh avx512    x86-64 with AVX-512, VNNI and VBMI, no BF16 and no AMX (AMD's Zen 4)
#
# It prints the folder. Give it to the tests as TQ_LLAMA_BIN. Only libggml-cpu.so is compiled, 1 to 2 minutes on 2 cores.
# TQ_DEPS_DIR puts build/deps elsewhere.
set -eu
cd "$(dirname "$0")/.."
deps=${TQ_DEPS_DIR:-build/deps}

fail() {
    echo "get_llama_variant.sh: $*" >&2
    exit 1
}

avx2="-DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
case ${1:-} in
avx2) options=$avx2 ;;
avx512) options="$avx2 -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON" ;;
*) fail "which processor? Give avx2 or avx512" ;;
esac
[ "$(uname -m)" = x86_64 ] || fail "the variants are of x86-64; this machine is $(uname -m)"
[ -f "$deps/llama.cpp/CMakeLists.txt" ] && [ -d "$deps/llama-bin" ] ||
    fail "no llama.cpp in $deps: run scripts/get_llama.sh first"
deps=$(cd "$deps" && pwd)
stock=$(readlink -f "$deps/llama-bin")
folder=$deps/llama-$1
key="$(readlink -f "$deps/llama.cpp") $(stat -L -c '%Y %s' "$stock/llama-perplexity") $stock $(${CC:-cc} --version | head -1)"

if [ "$(cat "$folder/.built" 2>/dev/null)" != "$key" ]; then
    rm -rf "$folder"
    mkdir "$folder"
    echo "Compiling libggml-cpu.so for $1" >&2
    # shellcheck disable=SC2086
    cmake -G Ninja -S "$deps/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF \
        -DGGML_NATIVE=OFF $options >"$folder/build.log" 2>&1 &&
        cmake --build "$folder/build" --target ggml-cpu -j "${JOBS:-2}" >>"$folder/build.log" 2>&1 || {
        tail -30 "$folder/build.log" >&2
        fail "libggml-cpu.so could not be compiled; the log is $folder/build.log"
    }
    libraries=$stock
    [ -e "$libraries/libggml-cpu.so" ] || libraries=$(dirname "$stock")/lib
    [ -e "$libraries/libggml-cpu.so" ] || fail "$stock has no libggml-cpu.so, which is to be replaced"
    mkdir "$folder/bin"
    cp -P "$stock"/llama-* "$libraries"/lib*.so* "$folder/bin"
    rm "$folder/bin"/libggml-cpu.so*
    cp -P "$folder/build/bin"/libggml-cpu.so* "$folder/bin"
    # All name the stock folder as the place of their libraries: let them look in their own folder.
    for file in "$folder/bin"/*; do
        if [ -L "$file" ] || ! readelf -d "$file" | grep -qE '\((RUNPATH|RPATH)\)'; then continue; fi
        echo "file(RPATH_SET FILE \"$file\" NEW_RPATH \"\$ORIGIN\")"
    done >"$folder/rpath.cmake"
    cmake -P "$folder/rpath.cmake" >>"$folder/build.log"
    rm -rf "$folder/build" "$folder/rpath.cmake"
    echo "$key" >"$folder/.built"
fi
echo "$folder/bin"
