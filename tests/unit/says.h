/* SPDX-License-Identifier: MIT */
/* A call gives a status, and what it logs has a text in it; with another value in a field, which is put back. */
#ifndef TQ_TESTS_SAYS_H
#define TQ_TESTS_SAYS_H

#include <string.h>

#include "last_message.h"

#define SAYS(call, status, text)                                                      \
    do {                                                                              \
        last_message[0] = 0;                                                          \
        assert_int_equal(call, status);                                               \
        if (!strstr(last_message, text)) fprintf(stderr, "says: %s\n", last_message); \
        assert_non_null(strstr(last_message, text));                                  \
    } while (0)
#define WITH(field, value, call, status, text) \
    do {                                       \
        __typeof__(field) before_ = field;     \
        field = value;                         \
        SAYS(call, status, text);              \
        field = before_;                       \
    } while (0)

#endif
