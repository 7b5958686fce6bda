/* SPDX-License-Identifier: MIT */
/*
 * Resources that fork() copies into a child: which of them are such copies, and their locks, which are held while the process
 * forks, so that what they guard is whole in the child and no thread that is not there holds them.
 */
#ifndef TQ_BASE_FORK_H
#define TQ_BASE_FORK_H

#include <pthread.h>
#include <stdbool.h>

#include "turboquant.h"

/* Part of a resource. */
typedef struct tq_fork_record {
    struct tq_fork_record *previous, *next;
    pthread_mutex_t *lock; /* NULL: none */
    bool is_copy;          /* another process made it */
} tq_fork_record;

/* While the resource exists; its lock is not held. Errors: MEMORY. */
tq_status tq_fork_enter(tq_fork_record *record, pthread_mutex_t *lock);
void tq_fork_leave(tq_fork_record *record);

#endif
