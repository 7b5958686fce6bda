# SPDX-License-Identifier: MIT
"""The folder where results wait for the others, so that an interrupted evaluation goes on where it was."""
import fcntl
import hashlib
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path

from .llama import LlamaError

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


def checksum(result):
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:20]


class Work:
    """
    Results in a folder, one JSON file each, named by a hash of all that they depend on. A file that save() did not write, or
    that was changed since, is none.
    """

    def __init__(self, folder, common):
        self.folder, self.common = Path(folder), plain(common)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LlamaError(f"--work: {self.folder} is not a folder and cannot be made one: {error.strerror}; name "
                             "another") from error

    def hold(self):
        """Two commands at a time would take each other's files away. The lock goes with the process."""
        lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise LlamaError(f"another tq eval is at work in {self.folder}; wait for it, or name another folder by "
                             "--work") from error

    def path(self, measurement):
        key = json.dumps([type(measurement).__name__, plain(measurement), self.common], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"

    def load(self, measurement):
        path = self.path(measurement)
        try:
            kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            return kept["result"] if kept and kept["checksum"] == checksum(kept["result"]) else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def save(self, measurement, result):
        path = self.path(measurement)
        new = path.with_suffix(f".{os.getpid()}")
        try:
            new.write_text(json.dumps({"result": result, "checksum": checksum(result)}, indent=1), encoding="utf-8")
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
