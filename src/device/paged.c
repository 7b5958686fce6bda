/* SPDX-License-Identifier: MIT */
/* See paged.h. */
#include "device/paged.h"

#include "base/log.h"

tq_status tq_paged_check_ring(const tq_paged_store *store)
{
    int32_t recent = store->n_recent;
    if (store->n_ring != 0 && (recent == 0 || store->n_ring < recent || store->n_ring > TQ_PAGED_RING_MAX)) {
        tq_log(TQ_LOG_ERROR, "paged store: n_ring must be 0 for n_recent, or n_recent to %d where n_recent is more than 0",
               TQ_PAGED_RING_MAX);
        return TQ_ERR_ARGUMENT;
    }
    if (store->k_ref_block == 0 || recent > 0) return TQ_OK;
    tq_log(TQ_LOG_ERROR, "paged store: with references (k_ref_block) n_recent must be more than 0: they are means of the ring");
    return TQ_ERR_ARGUMENT;
}
