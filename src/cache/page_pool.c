/* SPDX-License-Identifier: MIT */
/* See page_pool.h. */
#include "cache/page_pool.h"

#include <string.h>

#include "base/alloc.h"
#include "base/log.h"

void *tq_budget_alloc_vectors(tq_budget *budget, size_t bytes, size_t head_bytes)
{
    if (tq_alloc_bytes(bytes) > budget->limit - budget->used) return NULL;
    void *p = tq_alloc_zero(budget->is_dry ? head_bytes : bytes);
    if (p) budget->used += tq_alloc_bytes(bytes);
    return p;
}

void *tq_budget_alloc(tq_budget *budget, size_t bytes)
{
    return tq_budget_alloc_vectors(budget, bytes, bytes);
}

tq_status tq_budget_failure(const tq_budget *budget, size_t bytes)
{
    return bytes > budget->limit - budget->used ? TQ_ERR_FULL : TQ_ERR_MEMORY;
}

void tq_budget_free(tq_budget *budget, void *p, size_t bytes)
{
    if (!p) return;
    tq_free(p);
    budget->used -= tq_alloc_bytes(bytes);
}

static size_t region_bytes(const tq_page_pool *pool)
{
    return (size_t)pool->n_frames * pool->page_bytes;
}

tq_status tq_page_pool_init(tq_page_pool *pool, int32_t n_pages, int32_t n_frames, size_t page_bytes, tq_offload *offload,
                            tq_budget *budget, const tq_device *device, tq_memory *memory)
{
    *pool = (tq_page_pool){.page_bytes = page_bytes,
                           .n_pages = n_pages,
                           .n_free = n_pages,
                           .n_frames = n_frames,
                           .n_bare = n_frames,
                           .oldest = -1,
                           .newest = -1,
                           .budget = budget,
                           .offload = offload,
                           .device = device,
                           .memory = memory};
    if (offload) budget->used += tq_offload_bytes(offload->n_slots);
    size_t tables = tq_alloc_bytes((size_t)n_pages * sizeof *pool->data) +
                    tq_alloc_bytes((size_t)n_pages * sizeof *pool->pages) +
                    tq_alloc_bytes((size_t)n_frames * sizeof *pool->spare);
    tq_status failure = tq_budget_failure(budget, tables);
    pool->data = tq_budget_alloc(budget, (size_t)n_pages * sizeof *pool->data);
    pool->pages = tq_budget_alloc(budget, (size_t)n_pages * sizeof *pool->pages);
    pool->spare = tq_budget_alloc(budget, (size_t)n_frames * sizeof *pool->spare);
    bool has_region = !budget->is_dry && !device;
    if (has_region) pool->frames = tq_region_reserve(region_bytes(pool));
    if (!pool->data || !pool->pages || !pool->spare || (has_region && !pool->frames)) {
        tq_page_pool_deinit(pool);
        return failure;
    }
    for (int32_t i = 0; i < n_pages; i++) pool->pages[i] = (tq_page){.older = i + 1, .frame = -1, .slot = -1};
    for (int32_t i = 0; i < n_frames; i++) pool->spare[i] = i;
    return TQ_OK;
}

void tq_page_pool_deinit(tq_page_pool *pool)
{
    size_t n_pages = (size_t)pool->n_pages, n_frames = (size_t)pool->n_frames;
    if (pool->frames) tq_region_release(pool->frames, region_bytes(pool));
    pool->budget->used -= (n_frames - (size_t)pool->n_bare) * pool->page_bytes;
    tq_budget_free(pool->budget, pool->data, n_pages * sizeof *pool->data);
    tq_budget_free(pool->budget, pool->pages, n_pages * sizeof *pool->pages);
    tq_budget_free(pool->budget, pool->spare, n_frames * sizeof *pool->spare);
    if (pool->offload) pool->budget->used -= tq_offload_bytes(pool->offload->n_slots);
    tq_offload_close(pool->offload);
    *pool = (tq_page_pool){0};
}

/* Take a page out of the list of those kept. */
static void unlink_page(tq_page_pool *pool, int32_t id)
{
    tq_page *page = &pool->pages[id];
    *(page->older >= 0 ? &pool->pages[page->older].newer : &pool->oldest) = page->newer;
    *(page->newer >= 0 ? &pool->pages[page->newer].older : &pool->newest) = page->older;
    pool->n_kept--;
    pool->kept_bytes -= page->known_bytes;
}

static void keep_page(tq_page_pool *pool, int32_t id)
{
    tq_page *page = &pool->pages[id];
    page->older = pool->newest;
    page->newer = -1;
    *(pool->newest >= 0 ? &pool->pages[pool->newest].newer : &pool->oldest) = id;
    pool->newest = id;
    pool->n_kept++;
    pool->kept_bytes += page->known_bytes;
}

static void place(tq_page_pool *pool, int32_t id, int32_t frame)
{
    pool->pages[id].frame = frame;
    pool->pages[id].slot = -1;
    pool->data[id] = pool->frames ? pool->frames + (size_t)frame * pool->page_bytes : NULL;
}

static void free_page(tq_page_pool *pool, int32_t id)
{
    tq_page *page = &pool->pages[id];
    if (page->slot >= 0)
        tq_offload_free_slot(pool->offload, page->slot);
    else
        pool->spare[pool->n_idle++] = page->frame;
    page->frame = page->slot = -1;
    pool->data[id] = NULL;
    page->older = pool->first_free;
    pool->first_free = id;
    pool->n_free++;
}

/* Give up the kept page that was least recently used. */
static void evict(tq_page_pool *pool)
{
    int32_t id = pool->oldest;
    unlink_page(pool, id);
    pool->forget(pool->forget_context, id);
    pool->pages[id].is_known = false;
    pool->pages[id].known_bytes = 0;
    free_page(pool, id);
}

static bool has_room(const tq_page_pool *pool, size_t bytes)
{
    return bytes <= pool->budget->limit - pool->budget->used;
}

/* The page in memory that was least recently used, and not since `before`; -1 if there is none. */
static int32_t find_coldest(const tq_page_pool *pool, uint64_t before)
{
    int32_t coldest = -1;
    for (int32_t i = 0; i < pool->n_pages; i++) {
        const tq_page *page = &pool->pages[i];
        if (page->frame < 0 || page->n_pins > 0 || page->used_at >= before) continue;
        coldest = i;
        before = page->used_at;
    }
    return coldest;
}

/* Move the coldest page to the file; *frame gets what it leaves. Errors: FULL, IO. */
static tq_status offload(tq_page_pool *pool, uint64_t before, int32_t *frame)
{
    if (!pool->offload || pool->offload->n_free == 0) return TQ_ERR_FULL;
    int32_t id = find_coldest(pool, before), slot;
    if (id < 0) return TQ_ERR_FULL;
    tq_page *page = &pool->pages[id];
    TQ_TRY(tq_offload_put(pool->offload, pool->data[id], &slot));
    /* Nobody writes to a page before tq_page_pool_restore. */
    pool->data[id] = (uint8_t *)(uintptr_t)tq_offload_at(pool->offload, slot);
    page->slot = slot;
    *frame = page->frame;
    page->frame = -1;
    pool->n_offloads++;
    return TQ_OK;
}

/* Frames of a device, n_wanted of them or more, are idle then. */
static tq_status grow_device(tq_page_pool *pool, int64_t n_wanted)
{
    if (n_wanted > pool->n_bare) n_wanted = pool->n_bare;
    int32_t first = pool->n_frames - pool->n_bare;
    int32_t n = n_wanted > 0 ? pool->device->commit(pool->memory, first, (int32_t)n_wanted, pool->n_bare) : 0;
    if (n_wanted > 0 && n == 0) return TQ_ERR_MEMORY;
    pool->budget->used += (size_t)n * pool->page_bytes;
    /* Below those that are idle already, so that the lowest is taken first of the new ones. */
    memmove(pool->spare + n, pool->spare, (size_t)pool->n_idle * sizeof *pool->spare);
    for (int32_t i = 0; i < n; i++) pool->spare[i] = first + n - 1 - i;
    pool->n_idle += n;
    pool->n_bare -= n;
    return TQ_OK;
}

tq_status tq_page_pool_prepare(tq_page_pool *pool, int64_t n)
{
    if (!pool->device || n <= pool->n_idle) return TQ_OK;
    return grow_device(pool, n - pool->n_idle);
}

/* A frame that is free, or can be without a page's loss. Errors: FULL, MEMORY, IO. */
static tq_status find_frame(tq_page_pool *pool, uint64_t before, int32_t *frame)
{
    if (pool->device && pool->n_idle == 0) TQ_TRY(grow_device(pool, 1));
    if (pool->n_idle > 0) {
        *frame = pool->spare[--pool->n_idle];
        return TQ_OK;
    }
    if (pool->n_bare == 0 || !has_room(pool, pool->page_bytes)) return offload(pool, before, frame);
    int32_t bare = pool->spare[pool->n_frames - pool->n_bare];
    if (!pool->budget->is_dry && !tq_region_commit(pool->frames, (size_t)bare * pool->page_bytes, pool->page_bytes))
        return TQ_ERR_MEMORY;
    pool->budget->used += pool->page_bytes;
    pool->n_bare--;
    *frame = bare;
    return TQ_OK;
}

/* The same, giving up kept pages if that helps. */
static tq_status take_frame(tq_page_pool *pool, int32_t *frame)
{
    tq_status status = find_frame(pool, UINT64_MAX, frame);
    while ((status == TQ_ERR_FULL || status == TQ_ERR_IO) && pool->n_kept > 0) {
        evict(pool);
        status = find_frame(pool, UINT64_MAX, frame);
    }
    return status;
}

tq_status tq_page_pool_acquire(tq_page_pool *pool, int32_t *page)
{
    if (pool->n_free == 0 && pool->n_kept > 0) evict(pool);
    if (pool->n_free == 0) return TQ_ERR_FULL;
    int32_t frame;
    TQ_TRY(take_frame(pool, &frame));
    int32_t id = pool->first_free;
    pool->first_free = pool->pages[id].older;
    pool->n_free--;
    pool->pages[id] = (tq_page){.n_refs = 1, .older = -1, .newer = -1, .used_at = ++pool->clock};
    place(pool, id, frame);
    *page = id;
    /* Else a snapshot of one sequence could show what another left behind. */
    if (pool->device) {
        tq_status status = pool->device->clear(pool->memory, frame);
        if (status != TQ_OK) tq_page_pool_release(pool, id);
        return status;
    }
    if (!pool->budget->is_dry) memset(pool->data[id], 0, pool->page_bytes);
    return TQ_OK;
}

tq_status tq_page_pool_copy(tq_page_pool *pool, int32_t to, int32_t from)
{
    if (pool->device) return pool->device->copy(pool->memory, pool->pages[to].frame, pool->pages[from].frame);
    memcpy(pool->data[to], pool->data[from], pool->page_bytes);
    return TQ_OK;
}

const uint8_t *tq_page_pool_bytes(const tq_page_pool *pool, int32_t page, uint8_t *scratch)
{
    if (!pool->device) return pool->data[page];
    return pool->device->page_out(pool->memory, pool->pages[page].frame, scratch) == TQ_OK ? scratch : NULL;
}

tq_status tq_page_pool_fill(tq_page_pool *pool, int32_t page, const uint8_t *bytes)
{
    if (pool->device) return pool->device->page_in(pool->memory, pool->pages[page].frame, bytes);
    memcpy(pool->data[page], bytes, pool->page_bytes);
    return TQ_OK;
}

void tq_page_pool_know(tq_page_pool *pool, int32_t id, size_t bytes)
{
    tq_page *page = &pool->pages[id];
    if (page->n_refs == 0) pool->kept_bytes += bytes - page->known_bytes;
    page->known_bytes = bytes;
    page->is_known = true;
}

void tq_page_pool_share(tq_page_pool *pool, int32_t page)
{
    if (pool->pages[page].n_refs++ == 0) unlink_page(pool, page);
}

void tq_page_pool_release(tq_page_pool *pool, int32_t page)
{
    if (--pool->pages[page].n_refs > 0) return;
    if (pool->pages[page].is_known)
        keep_page(pool, page);
    else
        free_page(pool, page);
}

static int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Frames that a call can have, with the budget as it is when it has taken so many bytes; negative: too few for the bytes. */
static int64_t frames_left(const tq_page_pool *pool, size_t bytes, int64_t n_restores, int64_t n_pins)
{
    int64_t n_in_use = pool->n_frames - pool->n_idle - pool->n_bare, n_can_leave = pool->n_kept;
    /* A page that comes back leaves a slot. */
    if (pool->offload)
        n_can_leave = min_i64(n_in_use - pool->n_pinned - n_pins, pool->offload->n_free + pool->n_kept + n_restores);
    size_t room = pool->budget->limit - pool->budget->used;
    if (pool->kept_bytes <= SIZE_MAX - room) room += pool->kept_bytes; /* comes back as kept pages are given up */
    size_t more = (room - bytes) / pool->page_bytes;
    if (room >= bytes) return pool->n_idle + n_can_leave + (more < (size_t)pool->n_bare ? (int64_t)more : pool->n_bare);
    size_t n_given_back = (bytes - room - 1) / pool->page_bytes + 1;
    return n_given_back > (size_t)pool->n_frames ? -1 : pool->n_idle + n_can_leave - (int64_t)n_given_back;
}

bool tq_page_pool_can(const tq_page_pool *pool, const tq_need *need)
{
    int64_t n_at_once = need->n_restores + (pool->offload && need->may_leave ? 0 : need->n_pages);
    return need->n_pages <= pool->n_free + pool->n_kept && frames_left(pool, need->bytes + need->transient_bytes, 0, 0) >= 0 &&
           n_at_once <= frames_left(pool, need->bytes, need->n_restores, need->n_pins);
}

int32_t tq_page_pool_available(const tq_page_pool *pool)
{
    return (int32_t)min_i64(pool->n_free + pool->n_kept, frames_left(pool, 0, 0, 0));
}

tq_status tq_page_pool_make_room(tq_page_pool *pool, size_t bytes)
{
    if (!has_room(pool, bytes) && !tq_page_pool_can(pool, &(tq_need){.bytes = bytes})) return TQ_ERR_FULL;
    while (!has_room(pool, bytes)) {
        int32_t frame;
        /* Not more memory for frames: what is taken from the budget here would be missing there. */
        if (pool->n_idle > 0) {
            frame = pool->spare[--pool->n_idle];
        } else {
            tq_status status = offload(pool, UINT64_MAX, &frame);
            if (status != TQ_OK && pool->n_kept == 0) return status;
            if (status != TQ_OK) {
                evict(pool);
                continue;
            }
        }
        if (!pool->budget->is_dry) tq_region_decommit(pool->frames, (size_t)frame * pool->page_bytes, pool->page_bytes);
        pool->budget->used -= pool->page_bytes;
        pool->spare[pool->n_frames - ++pool->n_bare] = frame;
    }
    return TQ_OK;
}

tq_status tq_page_pool_grow(tq_page_pool *pool, void *array, int64_t n_before, int64_t n_after, size_t item_bytes)
{
    size_t bytes = (size_t)n_after * item_bytes, bytes_before = (size_t)n_before * item_bytes;
    void *old, *new;
    memcpy(&old, array, sizeof old);
    TQ_TRY(tq_page_pool_make_room(pool, tq_alloc_bytes(bytes)));
    new = tq_budget_alloc(pool->budget, bytes);
    if (!new) return TQ_ERR_MEMORY;
    if (bytes_before > 0) memcpy(new, old, bytes_before);
    tq_budget_free(pool->budget, old, bytes_before);
    memcpy(array, &new, sizeof new);
    return TQ_OK;
}

void tq_page_pool_pin(tq_page_pool *pool, const int32_t *pages, int64_t n)
{
    for (int64_t i = 0; pool->offload && i < n; i++) {
        tq_page *page = &pool->pages[pages[i]];
        if (page->n_pins++ == 0 && page->frame >= 0) pool->n_pinned++;
    }
}

void tq_page_pool_unpin(tq_page_pool *pool, const int32_t *pages, int64_t n)
{
    for (int64_t i = 0; pool->offload && i < n; i++) {
        tq_page *page = &pool->pages[pages[i]];
        if (--page->n_pins == 0 && page->frame >= 0) pool->n_pinned--;
    }
}

/* A page with no pins but at most one of the caller's, who has found a frame. */
static void bring_back(tq_page_pool *pool, int32_t id, int32_t frame)
{
    tq_page *page = &pool->pages[id];
    const uint8_t *from = pool->data[id];
    int32_t slot = page->slot;
    place(pool, id, frame);
    memcpy(pool->data[id], from, pool->page_bytes);
    tq_offload_free_slot(pool->offload, slot);
    if (page->n_pins > 0) pool->n_pinned++;
    pool->n_restores++;
}

tq_status tq_page_pool_restore(tq_page_pool *pool, int32_t id)
{
    if (pool->pages[id].slot < 0) return TQ_OK;
    int32_t frame;
    TQ_TRY(take_frame(pool, &frame));
    bring_back(pool, id, frame);
    return TQ_OK;
}

void tq_page_pool_use(tq_page_pool *pool, const int32_t *pages, int64_t n)
{
    if (!pool->offload) return;
    /* First, so that they do not displace each other. */
    tq_page_pool_pin(pool, pages, n);
    uint64_t now = ++pool->clock;
    bool may_restore = true;
    for (int64_t i = 0; i < n; i++) {
        tq_page *page = &pool->pages[pages[i]];
        int32_t frame;
        if (page->slot >= 0 && page->n_pins == 1 && may_restore) {
            may_restore = find_frame(pool, page->used_at, &frame) == TQ_OK;
            if (may_restore) bring_back(pool, pages[i], frame);
        }
        page->used_at = now;
    }
}
