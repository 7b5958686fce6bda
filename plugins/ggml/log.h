/* SPDX-License-Identifier: MIT */
/* Messages, the library's included, go where the host's ggml sends its own. */
#ifndef TQ_GGML_LOG_H
#define TQ_GGML_LOG_H

#include "turboquant.h"

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void tq_ggml_log(tq_log_level level, const char *format, ...);

/*
 * An error that keeps the host from going on. It is said again when the process ends, since hosts print a page of their own
 * after it; tq_ggml_log_forget_refusal is for those that went on all the same.
 */
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void tq_ggml_log_refusal(const char *format, ...);
void tq_ggml_log_forget_refusal(void);
/* Drop what is less urgent than this tq_log_level; -1 drops all. The default keeps all. */
void tq_ggml_log_set_level(int level);

/* For tq_log_set. */
void tq_ggml_log_from_library(void *user, tq_log_level level, const char *message);

#endif
