/* SPDX-License-Identifier: MIT */
/* English for status codes, and the version. */
#include "turboquant.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

const char *tq_version_string(void)
{
    return TEXT(TQ_VERSION_MAJOR) "." TEXT(TQ_VERSION_MINOR) "." TEXT(TQ_VERSION_PATCH);
}

const char *tq_status_string(tq_status status)
{
    switch (status) {
    case TQ_OK:
        return "success";
    case TQ_ERR_ARGUMENT:
        return "invalid argument";
    case TQ_ERR_SHAPE:
        return "shapes of two arguments disagree";
    case TQ_ERR_NOT_FINITE:
        return "a key or value is NaN, infinite or beyond the FP16 range";
    case TQ_ERR_RANGE:
        return "no such slot, position, sequence or layer";
    case TQ_ERR_MEMORY:
        return "out of memory";
    case TQ_ERR_FULL:
        return "the cache has no free page";
    case TQ_ERR_THREAD:
        return "a thread could not be started";
    case TQ_ERR_DEVICE:
        return "a call of the device's driver failed";
    case TQ_ERR_IO:
        return "a file could not be read or written";
    case TQ_ERR_CORRUPT:
        return "the file is damaged or not a snapshot";
    case TQ_ERR_MISMATCH:
        return "the snapshot is of another version, or of a cache of another shape";
    case TQ_ERR_HEAD_DIM:
        return "unsupported head_dim";
    case TQ_ERR_FORMAT:
        return "unknown format or preset";
    case TQ_ERR_CPU:
        return "TQ_CPU names an instruction set that is unknown or that this machine lacks";
    case TQ_ERR_NO_DEVICE:
        return "no CUDA device, driver or libturboquant-cuda.so";
    }
    return "unknown status";
}
