#!/bin/sh
# SPDX-License-Identifier: MIT
# Get an unpatched llama.cpp: build/deps/llama.cpp (sources) and build/deps/llama-bin (a link to the folder of its programs).
#
# The sources come from the Python package llama-cpp-python, whose source distribution holds a copy of llama.cpp. They are
# needed in any case, because no installation has ggml-backend-impl.h, which the plug-in includes. If an installed llama.cpp of
# the tested range has the four programs, these are used and nothing is built; otherwise the four are built here, once, with
# the compiler's default flags for this machine. TQ_DEPS_DIR puts build/deps elsewhere.
set -eu
cd "$(dirname "$0")/.."
deps=${TQ_DEPS_DIR:-build/deps}
mkdir -p "$deps"
deps=$(cd "$deps" && pwd)

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
ggml_tested='0\.25\.' # ggml's versions that the plug-in is tested with
programs="llama-completion llama-server llama-bench llama-perplexity"

get_sources() {
    if [ "$(cat "$deps/llama.cpp/.version" 2>/dev/null)" = "$version" ]; then return; fi
    archive=$deps/downloads/llama_cpp_python-$version.tar.gz
    if [ ! -f "$archive" ]; then
        echo "Downloading llama.cpp (llama-cpp-python $version, 77 MB)"
        "$deps/venv/bin/pip" download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
            -d "$deps/downloads" "llama-cpp-python==$version"
    fi
    if ! echo "$sha256  $archive" | sha256sum -c --quiet -; then
        echo "get_llama.sh: $archive is not the file that was tested; it was deleted. Run this again." >&2
        rm -f "$archive"
        exit 1
    fi
    echo "Unpacking llama.cpp"
    rm -rf "$deps/llama.cpp" "$deps/llama.cpp.new"
    mkdir "$deps/llama.cpp.new"
    tar -xzf "$archive" -C "$deps/llama.cpp.new" --strip-components 3 "llama_cpp_python-$version/vendor/llama.cpp"
    echo "$version" >"$deps/llama.cpp.new/.version"
    mv "$deps/llama.cpp.new" "$deps/llama.cpp"
}

# Print the folder of an installed llama.cpp of the tested range, or nothing.
find_installed() {
    ggml=$(pkg-config --modversion ggml 2>/dev/null || true)
    if ! echo "$ggml" | grep -q "^$ggml_tested"; then return; fi
    bin=$(pkg-config --variable=prefix llama 2>/dev/null || true)/bin
    for program in $programs; do
        if [ ! -x "$bin/$program" ]; then return; fi
    done
    echo "$bin"
}

build() {
    stamp=$deps/llama-build/.built
    if [ "$(cat "$stamp" 2>/dev/null)" = "$version" ]; then return; fi
    echo "Building llama.cpp, unpatched, once: 4 to 5 minutes on 2 cores"
    cmake -G Ninja -S "$deps/llama.cpp" -B "$deps/llama-build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF \
        >"$deps/llama-build.log" 2>&1 || {
        tail -30 "$deps/llama-build.log" >&2
        exit 1
    }
    # shellcheck disable=SC2086
    NINJA_STATUS='[%f/%t %es] ' ninja -C "$deps/llama-build" $programs 2>&1 | tee -a "$deps/llama-build.log" |
        awk '/^\[[0-9]+\/[0-9]+ / { n++; if (n % 25 == 1) { print; fflush() } next } /^FAILED|error:|warning: unused/ { print }'
    for program in $programs; do
        if [ ! -x "$deps/llama-build/bin/$program" ]; then
            echo "get_llama.sh: the build of $program failed; the log is $deps/llama-build.log" >&2
            exit 1
        fi
    done
    echo "$version" >"$stamp"
}

get_sources
bin=$(find_installed)
if [ -n "$bin" ]; then
    echo "Using the installed llama.cpp in $bin"
else
    build
    bin=$deps/llama-build/bin
fi
ln -sfn "$bin" "$deps/llama-bin"
