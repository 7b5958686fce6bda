# SPDX-License-Identifier: MIT
"""What an FP16 cache gives, kept for later commands: a file of logits takes longer to make than a measurement against it."""
import os
from dataclasses import dataclass
from pathlib import Path

from .work import Work, fingerprint


@dataclass(frozen=True)
class Reference:
    """What logits depend on besides the model and llama.cpp. Another processor adds up in another order."""
    text: Path
    n_ctx: int
    n_chunks: int
    is_chat: bool
    machine: str


class References:
    """Files of logits in a folder; beyond `limit` bytes those go that were not used for the longest time."""

    def __init__(self, folder, common, limit):
        self.work, self.limit = Work(folder, common), limit

    def path(self, reference):
        return self.work.path(reference).with_suffix(".kld")

    def has(self, reference):
        kept, path = self.work.load(reference), self.path(reference)
        return bool(kept) and path.is_file() and kept["fingerprint"] == fingerprint(path)

    def get(self, reference, write):
        """The reference's file, which write(path) makes where it is not there."""
        path = self.path(reference)
        if self.has(reference):
            os.utime(path)
            return path
        new = path.with_suffix(f".{os.getpid()}")
        try:
            write(new)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        self.work.save(reference, {"fingerprint": fingerprint(path)})
        return path

    def forget(self, reference):
        self.path(reference).unlink(missing_ok=True)

    def trim(self):
        """Only while nobody else is at work in the folder: other files in it are of a command that was killed."""
        for path in self.work.folder.iterdir():
            if path.suffix not in (".kld", ".json"):
                path.unlink()
        files = sorted(self.work.folder.glob("*.kld"), key=lambda path: path.stat().st_mtime, reverse=True)
        n_bytes = 0
        for path in files:
            n_bytes += path.stat().st_size
            if n_bytes > self.limit:
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)
