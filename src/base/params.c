/* SPDX-License-Identifier: MIT */
#include "base/params.h"

#include <string.h>

#include "base/log.h"

#define SIZE_MAX_KNOWN 4096 /* bytes: beyond is no struct of ours in any version */

tq_status tq_params_read(void *to, size_t size, const void *from, const char *who, const char *name)
{
    if (!from) {
        tq_log(TQ_LOG_ERROR, "%s: %s is NULL", who, name);
        return TQ_ERR_ARGUMENT;
    }
    size_t given;
    memcpy(&given, from, sizeof given);
    if (given <= sizeof given || given > SIZE_MAX_KNOWN) {
        tq_log(TQ_LOG_ERROR, "%s: struct_size is %zu; set it to the size of %s", who, given, name);
        return TQ_ERR_ARGUMENT;
    }
    for (size_t i = size; i < given; i++) {
        if (((const uint8_t *)from)[i] == 0) continue;
        tq_log(TQ_LOG_ERROR, "%s: %s has more than this version of the library knows: take the one of the header", who, name);
        return TQ_ERR_ARGUMENT;
    }
    memcpy(to, from, given < size ? given : size);
    memcpy(to, &size, sizeof size);
    return TQ_OK;
}
