# SPDX-License-Identifier: MIT
"""GGUF files: reading one, and writing it again with some tensors' rows multiplied, everything else byte for byte."""
import struct

import numpy as np
from gguf import GGUFReader

from eval.llama import LlamaError

from .blocks import multiply

MARK = "turboquant.fold.version"  # a folded file has it
VERSION = 1
UINT32 = 4  # GGUF's number of the type
HEADER = struct.Struct("<4sIQQ")  # magic, version, counts of tensors and of metadata
PIECE = 1 << 24


def read(path):
    """gguf's reader of a whole file; LlamaError for another."""
    try:
        reader = GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # of many kinds, as it reads beyond the end, or what is no number
        raise LlamaError(f"{path} is not a GGUF file, or only a part of one ({error}): fetch it again") from error
    size = path.stat().st_size
    if any(tensor.data_offset + int(tensor.n_bytes) > size for tensor in reader.tensors) or not reader.tensors:
        raise LlamaError(f"{path} ends before its last tensor does: fetch it again")
    if reader.byte_order != "I":
        raise LlamaError(f"{path} was made for machines of another byte order: convert it (gguf-convert-endian)")
    return reader


def end_of(field):
    return field.offset + sum(part.nbytes for part in field.parts)


def marked_head(reader):
    """All that stands before the tensors' data, with the mark behind the other metadata."""
    head = bytes(reader.data[:reader.data_offset])
    infos = min(tensor.field.offset for tensor in reader.tensors)
    end = max(end_of(tensor.field) for tensor in reader.tensors)
    magic, version, n_tensors, n_metadata = HEADER.unpack_from(head)
    mark = struct.pack("<Q", len(MARK)) + MARK.encode() + struct.pack("<II", UINT32, VERSION)
    new = HEADER.pack(magic, version, n_tensors, n_metadata + 1) + head[HEADER.size:infos] + mark + head[infos:end]
    return new + bytes(-len(new) % reader.alignment)


def write(reader, path, changes, tick):
    """changes: {name: exponents of all rows}. tick(bytes) as it goes on."""
    data = reader.data
    with open(path, "xb+") as file:
        head = marked_head(reader)
        file.write(head)
        for first in range(reader.data_offset, len(data), PIECE):
            piece = data[first:first + PIECE]
            file.write(piece)
            tick(len(piece))
        for tensor in reader.tensors:
            if tensor.name in changes:
                own = np.array(data[tensor.data_offset:tensor.data_offset + int(tensor.n_bytes)])
                multiply(tensor.tensor_type, own, changes[tensor.name])
                file.seek(len(head) + tensor.data_offset - reader.data_offset)
                file.write(own)
