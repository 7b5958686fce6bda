/* SPDX-License-Identifier: MIT */
/* Messages go to the callback of tq_log_set; there is no other output. */
#ifndef TQ_BASE_LOG_H
#define TQ_BASE_LOG_H

#include "turboquant.h"

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void tq_log(tq_log_level level, const char *format, ...);

/*
 * Hold this thread's messages back, and send them: around a lock, so that a callback may call what takes the lock. Of more than
 * a few the last ones replace each other. Not to be nested.
 */
void tq_log_hold(void);
void tq_log_send(void);

/* Return a failing status of `expr` to the caller. */
#define TQ_TRY(expr)                          \
    do {                                      \
        tq_status status_ = (expr);           \
        if (status_ != TQ_OK) return status_; \
    } while (0)

#endif
