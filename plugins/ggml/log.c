/* SPDX-License-Identifier: MIT */
/*
 * The callback of ggml_log_set is asked for anew with every message: hosts replace it, for a part of their run too.
 *
 * An error goes to stderr as well. The stock tools write their log from a thread of its own and lose the end of it when they
 * give up, which is just what an error of ours makes them do.
 */
#include "log.h"

#include <stdarg.h>
#include <stdio.h>

#include "host.h"

static int max_level = TQ_LOG_INFO;

void tq_ggml_log_set_level(int level)
{
    max_level = level;
}

static void emit(tq_log_level level, const char *message)
{
    static const enum ggml_log_level levels[] = {
        [TQ_LOG_ERROR] = GGML_LOG_LEVEL_ERROR, [TQ_LOG_WARNING] = GGML_LOG_LEVEL_WARN, [TQ_LOG_INFO] = GGML_LOG_LEVEL_INFO};
    if ((int)level > max_level) return;
    char line[1100];
    snprintf(line, sizeof line, "turboquant: %s\n", message);
    ggml_log_callback callback = NULL;
    void *user = NULL;
    if (tq_ggml_host.ggml_log_get) tq_ggml_host.ggml_log_get(&callback, &user);
    if (callback) callback(levels[level], line, user);
    if (!callback || level == TQ_LOG_ERROR) fputs(line, stderr);
}

void tq_ggml_log(tq_log_level level, const char *format, ...)
{
    char message[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    emit(level, message);
}

void tq_ggml_log_from_library(void *user, tq_log_level level, const char *message)
{
    (void)user;
    emit(level, message);
}
