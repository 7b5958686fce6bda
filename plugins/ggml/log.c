/* SPDX-License-Identifier: MIT */
/*
 * The callback of ggml_log_set is asked for anew with every message: hosts replace it, for a part of their run too.
 *
 * An error goes to stderr as well. The stock tools write their log from a thread of its own and lose the end of it when they
 * give up, which is just what an error of ours makes them do.
 */
#define _GNU_SOURCE /* dladdr, RTLD_NODELETE */

#include "log.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>

#include "host.h"

#define LINE_MAX 1100

static char refusal[LINE_MAX]; /* "" if there was none */
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
    char line[LINE_MAX];
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

/* A host closes a plug-in that it could not use, and would end it before its own last words. */
static void stay_loaded(void)
{
    Dl_info info;
    if (dladdr(refusal, &info) && info.dli_fname) (void)dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

void tq_ggml_log_refusal(const char *format, ...)
{
    char message[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    emit(TQ_LOG_ERROR, message);
    snprintf(refusal, sizeof refusal, "turboquant: %s\n", message);
    stay_loaded();
}

void tq_ggml_log_forget_refusal(void)
{
    refusal[0] = '\0';
}

__attribute__((destructor)) static void say_refusal_again(void)
{
    fputs(refusal, stderr);
}

void tq_ggml_log_from_library(void *user, tq_log_level level, const char *message)
{
    (void)user;
    emit(level, message);
}
