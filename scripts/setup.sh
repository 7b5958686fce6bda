#!/bin/sh
# SPDX-License-Identifier: MIT
# Install what a task needs: Debian packages, and Python environments in build/deps.
#
#   scripts/setup.sh [--check] WHAT...
#
#   build    compilers and libraries of `make all`
#   run      also `make run`
#   test     also `make test`
#   cross    AArch64 and other x86-64 processors, emulated          (shards of `make test-full`, as the next three)
#   clang    libFuzzer and Clang's sanitizers
#   torch    PyTorch and Transformers: 6 GB where pip finds only the build for CUDA
#   vllm     vLLM for CPUs, and a PyTorch of its own: 6 GB likewise
#   release  what `make release` builds with: .4 GB
#
# build, run and test include those before them. --check installs nothing and says what is missing. Running it again takes no
# time.
set -eu
cd "$(dirname "$0")/.."
deps=${TQ_DEPS_DIR:-build/deps}
install=yes
if [ "${1:-}" = --check ]; then
    install=no
    shift
fi
if [ $# = 0 ]; then set -- build; fi

packages="build-essential cmake ninja-build pkg-config libcjson-dev libxxhash-dev libcmocka-dev python3"
environments=
for what; do
    case $what in
    build) ;;
    run)
        packages="$packages python3-venv"
        environments="$environments run"
        ;;
    test)
        packages="$packages python3-venv clang-format"
        environments="$environments run test"
        ;;
    cross) packages="$packages qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross" ;;
    clang)
        packages="$packages clang"
        # Where the sanitizer and libFuzzer runtimes are a package of their own.
        if apt-cache show libclang-rt-dev >/dev/null 2>&1; then packages="$packages libclang-rt-dev"; fi
        ;;
    torch | vllm | release)
        packages="$packages python3-venv"
        environments="$environments $what"
        ;;
    *)
        echo "setup.sh: unknown '$what'; there are build, run, test, cross, clang, torch, vllm and release" >&2
        exit 2
        ;;
    esac
done

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
        echo "setup.sh: not installed as Debian packages:$missing. If the build fails: scripts/setup.sh $*" >&2
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
if [ $install = no ]; then exit 0; fi

cache=$(python3 scripts/cache.py folder --explain)

# install_pinned ENVIRONMENT FILE [direct]: what a file of requirements lists, with the hashes of all files. The wheels are kept
# for other checkouts, unless they are to come straight into the environment.
install_pinned() {
    stamp=$deps/$1/.$(basename "$2")
    if cmp -s "$2" "$stamp"; then return; fi
    echo "Installing into $deps/$1: what $2 lists"
    if [ ! -x "$deps/$1/bin/pip" ]; then
        mkdir -p "$deps"
        python3 -I -m venv "$deps/$1"
    fi
    pip=$deps/$1/bin/pip
    # The list is complete, so pip need not look for more.
    pinned="-q --disable-pip-version-check --require-hashes --no-deps --only-binary :all: -r $2"
    # shellcheck disable=SC2086
    if [ "${3:-}" = direct ]; then
        "$pip" install $pinned
    elif ! "$pip" install --no-index --find-links "$cache/wheels" $pinned 2>/dev/null; then
        "$pip" download -d "$cache/wheels" $pinned
        "$pip" install --no-index --find-links "$cache/wheels" $pinned
    fi
    cp "$2" "$stamp"
}

for name in $environments; do
    case $name in
    run) install_pinned venv scripts/requirements-run.txt ;;
    test) install_pinned python-venv python/tests/requirements.txt ;;
    torch)
        install_pinned torch-venv python/tests/requirements.txt
        install_pinned torch-venv python/tests/requirements-torch.txt direct
        ;;
    vllm) install_pinned vllm-venv python/tests/requirements-vllm.txt direct ;;
    release) install_pinned release-venv scripts/requirements-release.txt ;;
    esac
done
