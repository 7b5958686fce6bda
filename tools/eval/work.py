# SPDX-License-Identifier: MIT
"""The folder where results wait for the others, so that an interrupted evaluation goes on where it was."""
import hashlib
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path

PIECE = 1 << 20


def fingerprint(path):
    """Of a file that may be large: its size, and a hash of its first and last mebibyte."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(PIECE))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - PIECE))
        digest.update(file.read(PIECE))
    return f"{size}-{digest.hexdigest()[:16]}"


def plain(value):
    """What a measurement depends on, for JSON: files by what is in them."""
    if is_dataclass(value):
        known = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        files = plain(getattr(value, "files", []))
        return {**known, "files": files} if files else known
    if isinstance(value, Path):
        return fingerprint(value)
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


class Work:
    """Results in a folder, one JSON file each, named by a hash of all that they depend on."""

    def __init__(self, folder, common):
        self.folder, self.common = Path(folder), plain(common)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, measurement):
        key = json.dumps([type(measurement).__name__, plain(measurement), self.common], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"

    def load(self, measurement):
        try:
            return json.loads(self.path(measurement).read_text())
        except (OSError, ValueError):
            return None

    def save(self, measurement, result):
        path = self.path(measurement)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(result, indent=1))
        new.replace(path)
