/* SPDX-License-Identifier: MIT */
/* Structs of parameters from callers that were compiled with another version of the header. */
#ifndef TQ_BASE_PARAMS_H
#define TQ_BASE_PARAMS_H

#include "base/log.h"

/*
 * Read a struct that begins with its struct_size over *to, of `size` bytes, all zero: of a shorter one what there is, of a
 * longer one what is known here, if the rest is zero. Errors: ARGUMENT, with a message: from is NULL, has no size that a struct
 * can have, or asks for what this version does not know.
 */
tq_status tq_params_read(void *to, size_t size, const void *from, const char *who, const char *name);

/* Declare `own`, a copy of the caller's struct that is whole, or return the error. */
#define TQ_PARAMS(type, own, from, who) \
    type own = {0};                     \
    TQ_TRY(tq_params_read(&own, sizeof own, from, who, #type))

#endif
