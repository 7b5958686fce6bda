/* SPDX-License-Identifier: MIT */
/*
 * Pages of equal size, handed out by number and counted by reference. A page with content lies in a *frame* of memory, or in
 * the file of an offload tier if there is one. Frames get memory when they are first used, within a budget that the pool shares
 * with the rest of its cache.
 *
 * A page is *used* (by n_refs sequences), *kept* (nobody uses it, but its content may be wanted again) or *free*. When a page
 * is needed and there is no frame for it, the least recently used page goes to the file; without a file, or when that is full,
 * kept pages are given up, least recently used first. A page that is pinned stays where it is.
 */
#ifndef TQ_CACHE_PAGE_POOL_H
#define TQ_CACHE_PAGE_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cache/offload.h"
#include "device/device.h"

/* Bytes held from the allocator; in a dry run those that would be held. */
typedef struct tq_budget {
    size_t used, limit;
    bool is_dry; /* vectors are counted and have no memory */
} tq_budget;

/* NULL on failure or beyond the limit. */
void *tq_budget_alloc(tq_budget *budget, size_t bytes);
/* Why allocations that take so many bytes of the heap (tq_alloc_bytes) failed: FULL, beyond the limit, or MEMORY. */
tq_status tq_budget_failure(const tq_budget *budget, size_t bytes);
/* As tq_budget_alloc, for memory that holds vectors behind its first head_bytes; in a dry run only those are there. */
void *tq_budget_alloc_vectors(tq_budget *budget, size_t bytes, size_t head_bytes);
void tq_budget_free(tq_budget *budget, void *p, size_t bytes);

typedef struct tq_page {
    int32_t n_refs;
    int32_t older, newer; /* neighbours among the kept pages, -1 at the ends; older: also the next free page */
    int32_t frame, slot;  /* where it lies: in memory or in the file; the other one is -1, both if it is free */
    int32_t n_pins;
    bool is_known;      /* its content is published: to be kept rather than freed, and not to be written */
    uint64_t used_at;   /* by the pool's clock */
    size_t known_bytes; /* of the budget, that come back when the content is forgotten */
} tq_page;

typedef struct tq_page_pool {
    size_t page_bytes;
    int32_t n_pages, n_frames;
    int32_t n_free, n_kept, n_pinned; /* pages; n_pinned: those in memory */
    int32_t n_idle, n_bare;           /* frames without a page: with memory, without */
    int32_t oldest, newest;           /* of the kept pages, -1 if there are none */
    int32_t first_free;               /* of a list of the free pages */
    size_t kept_bytes;                /* known_bytes of all kept pages */
    tq_budget *budget;
    uint8_t **data;          /* [n_pages], NULL where the page is free or a device's */
    tq_page *pages;          /* [n_pages] */
    int32_t *spare;          /* [n_frames] two stacks: idle frames from the beginning up, bare ones from the end down */
    const tq_device *device; /* with frames in its memory; NULL: they are the host's */
    tq_memory *memory;
    uint8_t *frames;                      /* the region that the host's lie in */
    tq_offload *offload;                  /* NULL: none */
    uint64_t clock;                       /* counts uses */
    int64_t n_offloads, n_restores;       /* so far */
    void (*forget)(void *, int32_t page); /* told when a kept page is given up */
    void *forget_context;
} tq_page_pool;

/* With at most n_frames pages in memory at a time. The pool owns `offload`, also after a failure; device and memory are NULL
 * for the host's. Errors: FULL (the tables), MEMORY. */
tq_status tq_page_pool_init(tq_page_pool *pool, int32_t n_pages, int32_t n_frames, size_t page_bytes, tq_offload *offload,
                            tq_budget *budget, const tq_device *device, tq_memory *memory);
void tq_page_pool_deinit(tq_page_pool *pool);
/* A page of zeros with one reference, in memory. Errors: FULL, MEMORY, IO. */
tq_status tq_page_pool_acquire(tq_page_pool *pool, int32_t *page);
/* n pages are about to be acquired: a device's memory grows for them at once. Errors: MEMORY. */
tq_status tq_page_pool_prepare(tq_page_pool *pool, int64_t n);
/* The content of a page. Not in a dry run. Errors: those of a device. */
tq_status tq_page_pool_copy(tq_page_pool *pool, int32_t to, int32_t from);
/* In the formats' own arrangement: where it lies, or in scratch [bytes of a page]; NULL if the device fails. */
const uint8_t *tq_page_pool_bytes(const tq_page_pool *pool, int32_t page, uint8_t *scratch);
tq_status tq_page_pool_fill(tq_page_pool *pool, int32_t page, const uint8_t *bytes);
/* A page's content is published, which takes so many bytes. */
void tq_page_pool_know(tq_page_pool *pool, int32_t page, size_t bytes);
/* One more reference to a used or kept page. */
void tq_page_pool_share(tq_page_pool *pool, int32_t page);
/* One reference fewer; at none the page is kept if its content is known, else free. */
void tq_page_pool_release(tq_page_pool *pool, int32_t page);
/*
 * What a call is about to take, so that it can be refused before anything is given up for it: bytes of the budget besides
 * pages, as many more for a while, pages, and pages that come back from the file or stay where they are because they are
 * written.
 */
typedef struct tq_need {
    size_t bytes, transient_bytes;
    int64_t n_pages, n_restores, n_pins;
    bool may_leave; /* the pages need not be in memory all at once */
} tq_need;
/* If the allocator and the disk do their part. */
bool tq_page_pool_can(const tq_page_pool *pool, const tq_need *need);
/* Offload or give up pages until the budget has room for so many bytes more. Errors: FULL (nothing was given up), IO. */
tq_status tq_page_pool_make_room(tq_page_pool *pool, size_t bytes);
/* *array of n_before items to one of n_after, what is new zero, within the budget, for which room is made. Errors: those of
 * that, MEMORY. */
tq_status tq_page_pool_grow(tq_page_pool *pool, void *array, int64_t n_before, int64_t n_after, size_t item_bytes);
/* Pages that could be acquired and be in memory all together, if the allocator gives memory. */
int32_t tq_page_pool_available(const tq_page_pool *pool);

/* Without an offload tier the following do nothing: no page moves. */
/* Hold pages where they are. */
void tq_page_pool_pin(tq_page_pool *pool, const int32_t *pages, int64_t n);
/*
 * The same for pages that are about to be read. Those in the file come back if frames are free, or hold pages that were not
 * used since these were last: so what is used again comes back, while pages that take turns, as those of one sequence that is
 * larger than memory would, are read from the file instead.
 */
void tq_page_pool_use(tq_page_pool *pool, const int32_t *pages, int64_t n);
void tq_page_pool_unpin(tq_page_pool *pool, const int32_t *pages, int64_t n);
/* Bring a page that nobody else has pinned back to memory. Errors: FULL, MEMORY, IO. */
tq_status tq_page_pool_restore(tq_page_pool *pool, int32_t page);

#endif
