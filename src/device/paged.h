/* SPDX-License-Identifier: MIT */
/* What paged stores have in common, wherever they lie. */
#ifndef TQ_DEVICE_PAGED_H
#define TQ_DEVICE_PAGED_H

#include "turboquant.h"

#define TQ_PAGED_RING_MAX 65536

/* Vectors that the ring holds. */
static inline int32_t tq_paged_ring(const tq_paged_store *store)
{
    return store->n_ring ? store->n_ring : store->n_recent;
}

/* n_ring, and whether there is one where references want it; n_recent is a count. Errors: ARGUMENT, logged. */
tq_status tq_paged_check_ring(const tq_paged_store *store);

#endif
