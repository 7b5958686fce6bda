#!/bin/sh
# SPDX-License-Identifier: MIT
# Install what a task needs: Debian packages, and Python environments in build/deps.
#
#   scripts/setup.sh [--check] WHAT...
#
#   build    compilers and libraries of `make all`
#   run      also `make run`
#   test     also `make test`
#   cross    AArch64 and other x86-64 processors, emulated          (shards of `make test-full`, as the next two)
#   clang    libFuzzer and Clang's sanitizers
#   torch    PyTorch and Transformers: 6 GB where pip finds only the build for CUDA
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
    torch)
        packages="$packages python3-venv"
        environments="$environments torch"
        ;;
    *)
        echo "setup.sh: unknown '$what'; there are build, run, test, cross, clang and torch" >&2
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

# environment FOLDER FILE...: a Python environment with what the files list. It is made anew when a file changes.
environment() {
    venv=$deps/$1
    shift
    if cat "$@" | cmp -s - "$venv/.installed"; then return; fi
    echo "Installing into $venv: what $* lists"
    python3 -m venv "$venv"
    for file; do set -- "$@" -r "$file"; shift; done
    "$venv/bin/pip" install -q --disable-pip-version-check "$@"
    while [ $# -gt 0 ]; do
        cat "$2"
        shift 2
    done >"$venv/.installed"
}

for name in $environments; do
    case $name in
    run) environment venv scripts/requirements.txt ;;
    test) environment python-venv python/tests/requirements.txt ;;
    torch) environment torch-venv python/tests/requirements.txt python/tests/requirements-torch.txt ;;
    esac
done
