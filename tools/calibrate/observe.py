# SPDX-License-Identifier: MIT
"""Queries and keys of a model at work: stock llama-perplexity, whose attention the plug-in reports record by record."""
import math
import os
import re
import select
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.llama import Cache, LlamaError, path_option, run_tool

# All as the model has it: the plug-in changes nothing, and forgets nothing.
EXACT = Cache("TQ4:k=f16,v=f16,sinks=0,recent=0,ref=0")
HEADER = struct.Struct("<4s6i2f")
MAGIC = b"TQOB"
HIDDEN = 0xfc00  # -inf in FP16
MOST = 1 << 20  # of any count in a record
POLL_MS = 50


@dataclass
class Record:
    """One attention call of a layer."""
    layer: int
    queries: np.ndarray  # [n_query, n_head, head_dim], with the scale of the softmax
    keys: np.ndarray  # [n_col, n_head_kv, head_dim]; from the last column that a query sees on, there are none
    visible: np.ndarray  # [n_query, n_col]
    softcap: float

    @property
    def shape(self):
        return self.keys.shape[1:]


class Stream:
    """
    The pipe that the program writes to. This process has it open for writing, too, so that neither end waits for the other to
    open it, and no end of file comes between two writers; the end is when the program is gone and the pipe is empty.
    """

    def __init__(self, path):
        os.mkfifo(path, 0o600)
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.writer = os.open(path, os.O_WRONLY)
        self.process = None
        self.is_broken = False  # ended within a record

    def close(self):
        os.close(self.reader)
        os.close(self.writer)

    def wait(self):
        """Until there may be something to read; False if nothing can come."""
        poll = select.poll()
        poll.register(self.reader, select.POLLIN)
        while not poll.poll(POLL_MS):
            # Without taking its status, which the caller wants.
            if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return bool(poll.poll(0))
        return True

    def read(self, n_bytes):
        """So many bytes, or fewer at the end."""
        data = bytearray(n_bytes)
        view, have = memoryview(data), 0
        while have < n_bytes and self.wait():
            have += os.readv(self.reader, [view[have:]])
        view.release()
        del data[have:]
        return data

    def read_array(self, kind, *shape):
        n_bytes = math.prod(shape) * np.dtype(kind).itemsize
        data = self.read(n_bytes)
        if len(data) < n_bytes:
            raise EOFError
        return np.frombuffer(data, kind).reshape(shape)

    def read_record(self):
        """The next Record, or None at the end. EOFError: it came within a record."""
        header = self.read(HEADER.size)
        if not header:
            return None
        if len(header) < HEADER.size:
            raise EOFError
        magic, layer, n_query, n_head, n_head_kv, head_dim, n_col, scale, softcap = HEADER.unpack(header)
        counts = n_query, n_head, n_head_kv, head_dim, n_col
        if magic != MAGIC:
            raise LlamaError(f"the plug-in sent something else than records: {bytes(magic)!r} in place of {MAGIC!r}")
        if not 0 <= layer < MOST or min(counts) < 1 or max(counts) > MOST or n_head % n_head_kv:
            raise LlamaError(f"the plug-in sent a record of layer {layer} and the shape {counts}, which cannot be")
        queries = self.read_array("<f4", n_query, n_head, head_dim) * np.float32(scale)
        keys = self.read_array("<f4", n_col, n_head_kv, head_dim)
        visible = self.read_array("<u2", n_query, n_col) != HIDDEN
        n_used = int(visible.any(0).nonzero()[0].max(initial=-1)) + 1
        return Record(layer, queries, keys[:n_used], visible[:, :n_used], softcap)

    def take_all(self, process, take):
        self.process = process
        try:
            while record := self.read_record():
                take(record)
        except EOFError:
            self.is_broken = True


def observe(setup, text, n_ctx, n_chunks, take):
    """
    take(record) for all records of a text's first windows of n_ctx tokens. With one batch a window, a window is one record of
    each layer; the number of windows is returned, as the text may have fewer.
    """
    n_seen = {}

    def count_and_take(record):
        n_seen[record.layer] = n_seen.get(record.layer, 0) + 1
        take(record)

    arguments = ["-f", text, "-c", n_ctx, "-b", n_ctx, "-ub", n_ctx, "--chunks", n_chunks, "--no-warmup"]
    with tempfile.TemporaryDirectory(prefix="tq-calibrate-") as folder:
        stream = Stream(Path(folder) / "records")
        try:
            done = run_tool(setup, EXACT, "perplexity", arguments, path_option("observe", f"{folder}/records"),
                            meanwhile=lambda process: stream.take_all(process, count_and_take))
        finally:
            stream.close()
    if stream.is_broken:
        raise done.fail("the keys and queries end within a record")
    if not n_seen:
        found = re.search(r"tokenizes to only (\d+) tokens", done.log)
        if found:
            raise LlamaError(f"{text} has {found.group(1)} tokens; llama-perplexity asks for two windows, {2 * n_ctx} tokens: "
                             "give more text, or a smaller --context")
        raise done.fail("no keys and queries came from the plug-in")
    if len(set(n_seen.values())) > 1:
        raise done.fail("the keys and queries end within a window")
    return min(n_seen.values())
