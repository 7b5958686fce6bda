/* SPDX-License-Identifier: MIT */
/* See cuda_memory.h. */
#include "device/cuda_memory.h"

static _Thread_local char message[TQ_DEVICE_MESSAGE];

char *tq_cuda_message(void)
{
    message[0] = 0;
    return message;
}

tq_status tq_cuda_report(tq_status status)
{
    if (status != TQ_OK) tq_log(TQ_LOG_ERROR, "CUDA: %s", message[0] ? message : tq_status_string(status));
    return status;
}

void *tq_cuda_allocate(tq_memory *m, size_t bytes)
{
    void *p = NULL;
    if (m->allocator.alloc)
        p = m->allocator.alloc(m->allocator.user, bytes);
    else if (DEVICE(m, allocate, &p, bytes, false) != TQ_OK)
        p = NULL;
    if (p) m->bytes += bytes;
    return p;
}

void tq_cuda_release(tq_memory *m, void *p, size_t bytes)
{
    if (!p) return;
    m->bytes -= bytes;
    if (m->allocator.alloc)
        m->allocator.free(m->allocator.user, p);
    else
        m->table->release(p, false);
}

tq_status tq_cuda_check_finite(const tq_memory *m)
{
    if (*m->host_counter == 0) return TQ_OK;
    tq_log(TQ_LOG_ERROR,
           "CUDA: %d keys or values of earlier passes have NaN, infinity or a magnitude above 65504; the cache holds other "
           "numbers in their place: free its sequences",
           (int)*m->host_counter);
    return TQ_ERR_ARGUMENT;
}
