#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# What fewer kernels cost: builds an older commit and this tree for this machine's GPU, runs the tests of this one on it, and
# times both in turns (cuda_pairs.py, which needs torch).
#
#     bench/cuda_pairs.sh [--old FOLDER | --commit COMMIT] [--out FOLDER] [build] [test] [time [OPTION OF cuda_pairs.py ...]]
#
# Steps in that order, all if none is named. FOLDER of --old has the older sources; else they are a git worktree of COMMIT, by
# default the one before. Results: build.txt, test.txt and pairs.csv in --out, by default build/pairs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/pairs
out=$work old= commit=b51a0a2 steps= options=()
while [ $# -gt 0 ]; do
    case $1 in
    --old) old=$2; shift 2 ;;
    --commit) commit=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    build | test) steps="$steps $1"; shift ;;
    time) steps="$steps time"; shift; options=("$@"); set -- ;;
    *) sed -n '3,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
[ -n "$steps" ] || steps="build test time"
if [ -z "$old" ]; then
    old=$work/source
    [ -d "$old" ] || git -C "$root" worktree add --detach "$old" "$commit"
fi
mkdir -p "$out" "$work"
number=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$number" != 90 ] || number=90a

build() { # NAME SOURCE TARGET...
    local name=$1 source=$2
    shift 2
    cmake -G Ninja -S "$source" -B "$work/$name" -DCMAKE_BUILD_TYPE=Release -DTQ_BUILD_CUDA=ON \
        "-DTQ_CUDA_ARCHITECTURES=$number-real" -DTQ_BUILD_TOOLS=OFF -DTQ_BUILD_PLUGIN=OFF > "$work/$name.log"
    ninja -C "$work/$name" turboquant_shared "$@" >> "$work/$name.log"
    TIMEFORMAT="$name: libturboquant-cuda.so in %R s, %U s of user time"
    time ninja -C "$work/$name" turboquant_cuda >> "$work/$name.log"
    du -bc "$work/$name"/cuda/*.o | tail -1 | sed "s/total/bytes of objects: $name/"
}

for step in $steps; do
    case $step in
    build)
        { build old "$old"; build new "$root" test_device; } 2>&1 | tee "$out/build.txt"
        ;;
    test)
        TQ_CUDA_LIBRARY=$work/new/libturboquant-cuda.so "$work/new/tests/cuda/test_device" > "$out/test.txt" || true
        grep -E "^FAILED|test_device.c|device_model.c|device_engine.c" "$out/test.txt" | head -40 || true
        tail -1 "$out/test.txt"
        ;;
    time)
        python3 "$root/bench/cuda_pairs.py" --old "$work/old/libturboquant.so" --old-source "$old" \
            --new "$work/new/libturboquant.so" --csv "$out/pairs.csv" "${options[@]}"
        ;;
    esac
done
