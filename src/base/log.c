/* SPDX-License-Identifier: MIT */
/* The process-wide log callback and the formatting of messages. */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

static tq_log_fn log_fn;
static void *log_user;

void tq_log_set(tq_log_fn log, void *user)
{
    log_fn = log;
    log_user = user;
}

void tq_log(tq_log_level level, const char *format, ...)
{
    if (log_fn == NULL) return;
    char message[512]; /* a longer message is cut: it is one line for a human */
    va_list args;
    va_start(args, format);
    int n = vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    if (n >= 0) log_fn(log_user, level, message);
}
