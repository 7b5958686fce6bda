/* SPDX-License-Identifier: MIT */
/* References of blocks: the mean of the ring when the first slot of a block is encoded. */
#include "base/threads.h"
#include "cache/store.h"

static bool is_set(tq_block reference)
{
    uint16_t scale = reference.scales[0];
    return scale == TQ_REFERENCE_OF_ZERO || (scale != 0 && !(scale & TQ_REFERENCE_LEFT));
}

bool tq_store_has_reference(const tq_store *store, const tq_rows_in *in, int64_t slot)
{
    for (int32_t head = 0; head < store->n_head_kv; head++) {
        if (!is_set(tq_page_view_refs(&in->pages, in->codec, head, slot))) return false;
    }
    return true;
}

typedef struct reference_task {
    const tq_store *store;
    const tq_rows_in *in;
    int64_t slot;
    const tq_window *window;
    bool is_new;
    int32_t n_decoded;
} reference_task;

static void reference_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    const reference_task *task = arg;
    const tq_rows_in *in = task->in;
    for (int32_t head = i_thread; head < task->store->n_head_kv; head += n_threads) {
        tq_block reference = tq_page_view_refs(&in->pages, in->codec, head, task->slot);
        if (is_set(reference) && !task->is_new) continue;
        bool is_found = task->n_decoded > 0 && tq_rows_recover_reference(in, head, task->slot, task->window, task->n_decoded);
        if (!is_found && task->window->n > 0) tq_rows_set_reference(in, head, task->slot, task->window);
        if (!is_set(reference)) reference.scales[0] = TQ_REFERENCE_OF_ZERO;
    }
}

void tq_store_set_reference(const tq_store *store, const tq_rows_in *in, int64_t slot, const tq_window *window, bool is_new,
                            int32_t n_decoded, const tq_executor *executor)
{
    reference_task task = {store, in, slot, window, is_new, n_decoded};
    /* A mean is not worth a thread, a search is. */
    tq_run(n_decoded > 0 ? executor : NULL, store->n_head_kv, reference_body, &task);
}
