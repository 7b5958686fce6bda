#!/bin/sh
# SPDX-License-Identifier: MIT
# Install what the build, `make run` or `make test` needs: Debian packages, and Python environments in build/deps.
#
#   scripts/setup.sh [--check] build|run|test
#
# Each level includes those before it. --check installs nothing and says what is missing. Running it again takes no time.
set -eu
cd "$(dirname "$0")/.."
deps=${TQ_DEPS_DIR:-build/deps}
install=yes
if [ "${1:-}" = --check ]; then
    install=no
    shift
fi
level=${1:-build}

packages="build-essential cmake ninja-build pkg-config libcjson-dev libxxhash-dev libcmocka-dev python3"
case $level in
build) ;;
run) packages="$packages python3-venv" ;;
test)
    packages="$packages python3-venv qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross clang clang-format"
    # Where the sanitizer and libFuzzer runtimes are a package of their own.
    if apt-cache show libclang-rt-dev >/dev/null 2>&1; then packages="$packages libclang-rt-dev"; fi
    ;;
*)
    echo "setup.sh: the level is build, run or test, not '$level'" >&2
    exit 2
    ;;
esac

as_root=
if [ "$(id -u)" != 0 ]; then as_root=sudo; fi

if command -v dpkg-query >/dev/null; then
    missing=
    for package in $packages; do
        if ! dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed; then
            missing="$missing $package"
        fi
    done
    if [ -n "$missing" ] && [ $install = no ]; then
        # Compilers and tools may have come from elsewhere; the build says what it cannot find.
        echo "setup.sh: not installed as Debian packages:$missing. If the build fails: scripts/setup.sh $level" >&2
    elif [ -n "$missing" ]; then
        if [ -n "$as_root" ] && ! sudo -n true 2>/dev/null && [ ! -t 0 ]; then
            echo "setup.sh: missing packages. As root: apt-get install$missing" >&2
            exit 1
        fi
        echo "Installing:$missing"
        # The first attempt fails where package lists were never fetched.
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends $missing >/dev/null 2>&1 || {
            $as_root apt-get update -q
            DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends $missing
        }
    fi
elif [ $install = yes ]; then
    echo "setup.sh: not a Debian system; make sure to have these packages' programs:" >&2
    echo "    $packages" >&2
fi

if [ $install = no ] || [ "$level" = build ]; then exit 0; fi

cache=$(python3 scripts/cache.py folder --explain)
if [ ! -x "$deps/venv/bin/pip" ]; then
    mkdir -p "$deps"
    python3 -m venv "$deps/venv"
fi

# Install what a file of requirements lists into build/deps/venv. The wheels are kept for other checkouts.
install_pinned() {
    stamp=$deps/venv/.$(basename "$1")
    if cmp -s "$1" "$stamp"; then return; fi
    echo "Installing into $deps/venv: what $1 lists"
    pip=$deps/venv/bin/pip
    # The list is complete, so pip need not look for more.
    pinned="-q --disable-pip-version-check --require-hashes --no-deps --only-binary :all: -r $1"
    # shellcheck disable=SC2086
    "$pip" install --no-index --find-links "$cache/wheels" $pinned 2>/dev/null || {
        "$pip" download -d "$cache/wheels" $pinned
        "$pip" install --no-index --find-links "$cache/wheels" $pinned
    }
    cp "$1" "$stamp"
}

install_pinned scripts/requirements-run.txt
if [ "$level" = test ]; then install_pinned scripts/requirements-test.txt; fi
if [ "$level" != test ]; then exit 0; fi

# For python/tests: PyTorch, Transformers and MLX-LM, once, in a place of their own. Where pip finds a CPU build of PyTorch (by
# PIP_EXTRA_INDEX_URL), it is a fifth of the size.
wanted=python/tests/requirements.txt
stamp=$deps/python-venv/.installed
if ! cmp -s "$wanted" "$stamp"; then
    echo "Installing into $deps/python-venv: what $wanted lists (6 GB with PyTorch for CUDA)"
    python3 -m venv "$deps/python-venv"
    "$deps/python-venv/bin/pip" install -q --disable-pip-version-check -r "$wanted"
    cp "$wanted" "$stamp"
fi
