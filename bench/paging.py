#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""`tq cache bench` over formats and page sizes: what pages, batches and the offload tier cost. One CSV row a measurement.

    paging.py --csv build/paging.csv [--tq build/release/tq] [--threads 2] [--offload FOLDER]

Needs nothing but tq and Python, so that it can be carried to another machine.
"""
import argparse
import csv
import io
import platform
import subprocess
import sys

RUNS = [(formats, page_size) for formats in ("TQ4", "sq4", "sq8") for page_size in (16, 64, 128, 256)]


def measure(tq, formats, page_size, threads, offload):
    command = [tq, "cache", "bench", "--formats", formats, "--page-size", str(page_size), "--threads", str(threads)]
    if offload:
        command += ["--offload", offload]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"paging.py: {' '.join(command)} failed:\n{done.stderr}")
    shown = " ".join(["build/release/tq", *command[1:-1], "FOLDER"] if offload else ["build/release/tq", *command[1:]])
    return [{"formats": formats, "page_size": page_size, **row, "command": shown}
            for row in csv.DictReader(io.StringIO(done.stdout))]


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--tq", default="build/release/tq")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", default="", help="what to write as the commit; of the source that tq was built from")
    parser.add_argument("--offload", metavar="FOLDER", help="measure the offload tier, too, with a file there")
    args = parser.parse_args()
    rows = []
    for i, (formats, page_size) in enumerate(RUNS):
        print(f"[{i + 1}/{len(RUNS)}] {formats}, pages of {page_size}", file=sys.stderr)
        rows += measure(args.tq, formats, page_size, args.threads, args.offload if page_size == 128 else None)
    for row in rows:
        row |= {"threads": args.threads, "cpu": processor(), "commit": args.commit}
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
