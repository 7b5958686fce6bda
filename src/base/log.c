/* SPDX-License-Identifier: MIT */
/* The process-wide log callback and the formatting of messages. */
#include "base/log.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

enum { MESSAGE_BYTES = 512 /* a longer message is cut: it is one line for a human */, N_HELD_MAX = 4 };

static tq_log_fn log_fn;
static void *log_user;

typedef struct held_messages {
    bool is_holding;
    int n;
    tq_log_level levels[N_HELD_MAX];
    char messages[N_HELD_MAX][MESSAGE_BYTES];
} held_messages;

static _Thread_local held_messages held;

void tq_log_set(tq_log_fn log, void *user)
{
    log_fn = log;
    log_user = user;
}

void tq_log(tq_log_level level, const char *format, ...)
{
    if (log_fn == NULL) return;
    char message[MESSAGE_BYTES], *to = message;
    if (held.is_holding) {
        if (held.n < N_HELD_MAX) held.n++;
        to = held.messages[held.n - 1];
        held.levels[held.n - 1] = level;
    }
    va_list args;
    va_start(args, format);
    int n = vsnprintf(to, MESSAGE_BYTES, format, args);
    va_end(args);
    if (!held.is_holding && n >= 0) log_fn(log_user, level, message);
}

void tq_log_hold(void)
{
    held.is_holding = true;
    held.n = 0;
}

void tq_log_send(void)
{
    held.is_holding = false;
    if (held.n == 0) return;
    /* What the callback calls may hold messages of its own. */
    held_messages to_send = held;
    for (int i = 0; i < to_send.n; i++) log_fn(log_user, to_send.levels[i], to_send.messages[i]);
}
