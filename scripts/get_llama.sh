#!/bin/sh
# SPDX-License-Identifier: MIT
# Get an unpatched llama.cpp: build/deps/llama.cpp (a link to its sources), build/deps/llama-bin (a link to the folder of its
# programs) and build/deps/llama-cpp-python (a link to Python's bindings, without a library: LLAMA_CPP_LIB_PATH names one).
#
#   scripts/get_llama.sh [PROGRAM...]     llama-completion, llama-server, llama-bench, llama-perplexity; all if none is named
#   scripts/get_llama.sh --sources        only the sources
#   scripts/get_llama.sh --bindings       only Python's bindings
#   scripts/get_llama.sh --folder         print the folder of the build, and do nothing
#
# The sources come from the Python package llama-cpp-python, whose source distribution holds a copy of llama.cpp. They are
# needed in any case, because no installation has ggml-backend-impl.h, which the plug-in includes. If an installed llama.cpp of
# the tested range has the programs, these are used and nothing is built; otherwise they are built, once for all checkouts (see
# scripts/cache.py), with the compiler's default flags for this machine. TQ_DEPS_DIR puts build/deps elsewhere, JOBS says how
# many compilers run at a time.
set -eu
cd "$(dirname "$0")/.."
deps=${TQ_DEPS_DIR:-build/deps}

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
ggml_tested='0\.25\.' # ggml's versions that the plug-in is tested with
options="-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON -DLLAMA_BUILD_TESTS=OFF
-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF"

cache=$(python3 scripts/cache.py folder)
sources=$cache/llama.cpp-$version
bindings=$cache/llama-cpp-python-$version

# What the programs' code depends on. The compiler's macros for -march=native tell its version and the processor's instructions,
# so that machines with one cache never run each other's programs.
key() {
    {
        echo "$version $options ${CFLAGS:-} ${CXXFLAGS:-} ${LDFLAGS:-}"
        cat scripts/llama_flags.cmake
        "${CC:-cc}" --version
        "${CXX:-c++}" --version
        "${CC:-cc}" -march=native -dM -E -x c /dev/null | sort
    } | sha256sum | cut -c 1-12
}

# Replaces what earlier versions of this script kept there: folders.
link() {
    if [ -d "$2" ] && [ ! -L "$2" ]; then rm -rf "$2"; fi
    ln -sfn "$1" "$2"
}

# unpack FOLDER FILE STRIP MEMBER: a part of the source distribution, which has this file, as a folder.
unpack() {
    if [ ! -f "$1/$2" ]; then
        archive=$(python3 scripts/cache.py fetch "llama-cpp-python==$version" $sha256 "llama_cpp_python-$version.tar.gz")
        new=$(mktemp -d "$cache/llama.cpp-XXXXXX")
        tar -xzf "$archive" -C "$new" --strip-components "$3" "llama_cpp_python-$version/$4"
        chmod 755 "$new"
        # Another run may have been faster.
        mv -T "$new" "$1" 2>/dev/null || rm -rf "$new"
    fi
}

get_sources() {
    if [ ! -f "$sources/CMakeLists.txt" ]; then echo "Getting llama.cpp's sources (llama-cpp-python $version, 77 MB)"; fi
    unpack "$sources" CMakeLists.txt 3 vendor/llama.cpp
    link "$sources" "$deps/llama.cpp"
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

# Print Ninja's lines, "[files done/files seconds] command", as a line every 15 seconds. (awk may wait for more input.)
show_progress() {
    shown=0
    while IFS= read -r line; do
        case $line in
        "["[0-9]*/*)
            done_files=${line#[}
            done_files=${done_files%%/*}
            files=${line#*/}
            files=${files%% *}
            seconds=${line#* }
            seconds=${seconds%%.*}
            if [ "$done_files" = 0 ] || [ "$seconds" -lt $((shown + 15)) ]; then continue; fi
            shown=$seconds
            left=$((seconds * (files - done_files) / done_files))
            if [ $left -lt 90 ]; then left="about a minute"; else left="about $(((left + 30) / 60)) minutes"; fi
            echo "  $done_files of $files files, $left left"
            ;;
        FAILED* | *error:*) echo "$line" ;;
        esac
    done
}

# Ninja goes on where an interrupted build stopped, and takes no time where nothing is to be done.
build() {
    folder=$1
    log=$folder.log
    exec 9>"$folder.lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "Waiting for another build of llama.cpp in $folder"
        flock 9
    fi
    if [ ! -f "$folder/build.ninja" ]; then
        # A copy, because the build may outlive this checkout.
        cp scripts/llama_flags.cmake "$folder.cmake"
        # shellcheck disable=SC2086
        cmake -G Ninja -S "$sources" -B "$folder" $options "-DCMAKE_PROJECT_llama.cpp_INCLUDE=$folder.cmake" >"$log" 2>&1 || {
            tail -30 "$log" >&2
            echo "get_llama.sh: llama.cpp could not be configured; the log is $log" >&2
            exit 1
        }
    fi
    # shellcheck disable=SC2086
    if ! ninja -C "$folder" -n $programs | grep -q 'no work to do'; then
        echo "Building, unpatched and once: $programs"
        rm -f "$folder.failed"
        # The pipe would hide ninja's exit status.
        {
            NINJA_STATUS='[%f/%t %e] ' ninja -C "$folder" -j "${JOBS:-$(nproc)}" $programs 2>&1 ||
                echo failed >"$folder.failed"
        } | tee "$log" | show_progress
        if [ -f "$folder.failed" ]; then
            echo "get_llama.sh: the build failed; the log is $log" >&2
            exit 1
        fi
    fi
    exec 9>&-
}

mkdir -p "$deps"
deps=$(cd "$deps" && pwd)
if [ "${1:-}" = --folder ]; then
    echo "$cache/llama.cpp-$version-$(key)"
    exit 0
fi
if [ "${1:-}" = --bindings ]; then
    unpack "$bindings" llama_cpp/__init__.py 1 llama_cpp
    link "$bindings" "$deps/llama-cpp-python"
    exit 0
fi
get_sources
if [ "${1:-}" = --sources ]; then exit 0; fi
programs=${*:-llama-completion llama-server llama-bench llama-perplexity}
bin=$(find_installed)
if [ -n "$bin" ]; then
    echo "Using the installed llama.cpp in $bin"
else
    folder=$cache/llama.cpp-$version-$(key)
    build "$folder"
    bin=$folder/bin
fi
link "$bin" "$deps/llama-bin"
