/* SPDX-License-Identifier: MIT */
/* For tests of what an error says: tq_log_set(keep_message, NULL), then last_message. */
#ifndef TQ_TESTS_LAST_MESSAGE_H
#define TQ_TESTS_LAST_MESSAGE_H

#include <stdio.h>

#include "turboquant.h"

static char last_message[512];

static void keep_message(void *user, tq_log_level level, const char *message)
{
    (void)user;
    (void)level;
    snprintf(last_message, sizeof last_message, "%s", message);
}

#endif
