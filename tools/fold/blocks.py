# SPDX-License-Identifier: MIT
"""
Rows of weights times powers of two, in a file's own bytes. A block's values are its scales times codes, so that only scales
change; those are half floats, whose product is exact unless it leaves their range. Tensors are those of gguf's reader.
"""
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type

from eval.llama import LlamaError

# Where in a block its half floats are: ggml's ggml-common.h.
SCALES = {
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,),
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
    Type.IQ1_S: (0,), Type.IQ2_XXS: (0,), Type.IQ2_XS: (0,), Type.IQ2_S: (0,), Type.IQ3_XXS: (0,), Type.IQ3_S: (0,),
    Type.IQ4_NL: (0,), Type.IQ4_XS: (0,), Type.TQ1_0: (52,), Type.TQ2_0: (64,),
}
EXPONENTS = {Type.MXFP4: 0}  # where a byte is the scale's exponent
EXPONENT_MIN, EXPONENT_MAX = 2, 254  # below, a step is no factor of two; 255 is no number
CURE = "fold a file of this model in F16, BF16, Q8_0 or a K-quant, and quantize that"
FLOATS = {Type.F32: np.float32, Type.F16: np.float16}
FREE = 64  # of floats with 8 bits of exponent: no factor comes near
HALF_MAX = 65504.0
# A half float is a multiple of 2^-24. Of plain half floats the smallest may be rounded, by at most 2^-12 of a row's largest.
HALF_STEPS, HALF_ROUNDED = 24, 13


def check(tensor):
    """Raise LlamaError where the rows of this tensor can't be multiplied."""
    if tensor.tensor_type not in {*SCALES, *EXPONENTS, *FLOATS, Type.BF16}:
        raise LlamaError(f"{tensor.name} is of type {tensor.tensor_type.name}, whose rows have no scales that a factor could "
                         f"go into: {CURE}")


def bytes_of(tensor):
    return np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)


def blocks_of(kind, data, n):
    """data, a tensor's bytes, as [n rows, blocks, bytes of a block]."""
    return data.reshape(n, -1, GGML_QUANT_SIZES[kind][1])


def halves(blocks, at):
    return np.ascontiguousarray(blocks[:, :, at:at + 2]).view(np.float16)[..., 0].astype(np.float32)


def bounds_of_halves(values, may_round):
    """(lowest, highest) exponent of each row of half floats."""
    largest = abs(values).max(axis=1)
    exponent = np.frexp(np.where(largest > 0, largest, 1))[1] - 1  # floor of the logarithm
    highest = np.where(np.ldexp(largest, 15 - exponent) > HALF_MAX, 14 - exponent, 15 - exponent)
    if may_round:
        lowest = -(exponent + HALF_ROUNDED)
    else:
        steps = np.ldexp(values.astype(np.float64), HALF_STEPS).astype(np.int64)
        zeros = np.log2(np.where(steps != 0, steps & -steps, 1 << 40)).astype(int)
        lowest = -zeros.min(axis=1)
    return np.where(largest > 0, np.minimum(lowest, 0), -FREE), np.where(largest > 0, np.maximum(highest, 0), FREE)


def bounds(tensor, n):
    """(lowest, highest) [n]: by which powers of two each of n rows can be multiplied, exactly but for HALF_ROUNDED."""
    kind, data = tensor.tensor_type, bytes_of(tensor)
    if kind in EXPONENTS:
        found = blocks_of(kind, data, n)[:, :, EXPONENTS[kind]].astype(int)
        return np.minimum(EXPONENT_MIN - found.min(axis=1), 0), np.maximum(EXPONENT_MAX - found.max(axis=1), 0)
    if kind in SCALES:
        blocks = blocks_of(kind, data, n)
        found = [bounds_of_halves(halves(blocks, at), False) for at in SCALES[kind]]
        return np.max([low for low, _ in found], axis=0), np.min([high for _, high in found], axis=0)
    if kind == Type.F16:
        return bounds_of_halves(data.view(np.float16).reshape(n, -1).astype(np.float32), True)
    return np.full(n, -FREE), np.full(n, FREE)


def multiply(kind, data, exponents):
    """Multiply the rows of a tensor of this type by 2^exponents, one for each row, in its bytes."""
    n = len(exponents)
    exponents = np.asarray(exponents, np.int32)[:, None]
    if kind in EXPONENTS:
        blocks = blocks_of(kind, data, n)
        blocks[:, :, EXPONENTS[kind]] = blocks[:, :, EXPONENTS[kind]].astype(np.int32) + exponents
    elif kind in SCALES:
        blocks = blocks_of(kind, data, n)
        for at in SCALES[kind]:
            scaled = np.ldexp(halves(blocks, at), exponents).astype(np.float16)
            blocks[:, :, at:at + 2] = scaled[..., None].view(np.uint8)
    elif kind == Type.BF16:
        rows = data.view(np.uint16).reshape(n, -1)
        rows[:] = np.ldexp((rows.astype(np.uint32) << 16).view(np.float32), exponents).view(np.uint32) >> 16
    else:
        rows = data.view(FLOATS[kind]).reshape(n, -1)
        rows[:] = np.ldexp(rows.astype(np.float32), exponents)
