# SPDX-License-Identifier: MIT
"""The file of a calibration (.tqcal); docs/calibrate.md has its bytes."""
import os
import struct

import numpy as np
import xxhash

MAGIC = b"\x89TQCAL\r\n"
VERSION = 1
NAME_BYTES = 64


def pack(layers, name, n_sink, n_recent, ref_block):
    """The file's bytes. layers: for each a list of its KV heads' Transforms, empty where there are none."""
    text = name.encode()[:NAME_BYTES - 1].decode(errors="ignore").encode()  # cut between two characters
    parts = [struct.pack("<4i", n_sink, n_recent, ref_block, 0), text.ljust(NAME_BYTES, b"\0")]
    parts += [struct.pack("<2i", len(heads), len(heads[0].bits) if heads else 0) for heads in layers]
    for transform in (transform for heads in layers for transform in heads):
        parts.append(transform.bits[np.tril_indices(len(transform.bits))].astype("<u2").tobytes())
    content = b"".join(parts)
    return MAGIC + struct.pack("<IiQ", VERSION, len(layers), xxhash.xxh3_64_intdigest(content)) + content


def write_whole(path, content):
    """All of it or nothing, also when the machine stops. Where the path is a link, the file that it names is written."""
    path = path.resolve()
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
