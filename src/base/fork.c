/* SPDX-License-Identifier: MIT */
/* See fork.h. */
#define _POSIX_C_SOURCE 200809L

#include "base/fork.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static tq_fork_record *first;
static int failure; /* of pthread_atfork */

/* Nobody who holds a resource's lock waits for the list's or for another resource's. */
static void before_fork(void)
{
    pthread_mutex_lock(&list_lock);
    for (tq_fork_record *r = first; r; r = r->next) {
        if (r->lock) pthread_mutex_lock(r->lock);
    }
}

static void after_fork(void)
{
    for (tq_fork_record *r = first; r; r = r->next) {
        if (r->lock) pthread_mutex_unlock(r->lock);
    }
    pthread_mutex_unlock(&list_lock);
}

static void after_fork_in_child(void)
{
    for (tq_fork_record *r = first; r; r = r->next) r->is_copy = true;
    after_fork();
}

static void watch_forks(void)
{
    failure = pthread_atfork(before_fork, after_fork, after_fork_in_child);
}

tq_status tq_fork_enter(tq_fork_record *record, pthread_mutex_t *lock)
{
    pthread_once(&once, watch_forks);
    if (failure != 0) return TQ_ERR_MEMORY;
    pthread_mutex_lock(&list_lock);
    *record = (tq_fork_record){.next = first, .lock = lock};
    if (first) first->previous = record;
    first = record;
    pthread_mutex_unlock(&list_lock);
    return TQ_OK;
}

void tq_fork_leave(tq_fork_record *record)
{
    pthread_mutex_lock(&list_lock);
    if (record->next) record->next->previous = record->previous;
    if (record->previous)
        record->previous->next = record->next;
    else
        first = record->next;
    pthread_mutex_unlock(&list_lock);
}
