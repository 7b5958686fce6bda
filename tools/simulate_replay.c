/* SPDX-License-Identifier: MIT */
/*
 * The server: requests wait in the order of their arrival and are admitted when the cache has room for their prompts and
 * outputs; prompts are computed one after the other, but for what the cache has of them; outputs then grow at a constant speed
 * each. Time is simulated. The cache is the library's own, in a dry run: it decides what is shared, kept, given up and refused.
 */
#include <math.h>
#include <stdlib.h>

#include "simulate.h"

typedef struct event {
    double time;
    int64_t order; /* among events of one time */
    int64_t request;
    bool is_end; /* of the output, else of prefill */
} event;

typedef struct replay {
    const simulate_trace *trace;
    const simulate_server *server;
    simulate_result *result;
    tq_cache *cache;
    event *heap; /* [2 * running], the next one first */
    int64_t n_events, n_ordered;
    int32_t *seqs;          /* [n requests], of those admitted */
    double *waits, *firsts; /* [n served] */
    int32_t *tokens;        /* [longest] */
    int64_t n_running;
    double prefill_free, area;
} replay;

static bool is_before(const event *a, const event *b)
{
    return a->time != b->time ? a->time < b->time : a->order < b->order;
}

static void push_event(replay *r, double time, int64_t request, bool is_end)
{
    event added = {time, r->n_ordered++, request, is_end};
    int64_t i = r->n_events++;
    for (; i > 0 && is_before(&added, &r->heap[(i - 1) / 2]); i = (i - 1) / 2) r->heap[i] = r->heap[(i - 1) / 2];
    r->heap[i] = added;
}

static event pop_event(replay *r)
{
    event first = r->heap[0], last = r->heap[--r->n_events];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < r->n_events; i = child) {
        if (child + 1 < r->n_events && is_before(&r->heap[child + 1], &r->heap[child])) child++;
        if (is_before(&last, &r->heap[child])) break;
        r->heap[i] = r->heap[child];
    }
    r->heap[i] = last;
    return first;
}

/* A token is its stream's number: where it stands follows from the tokens before it, which the cache compares, too. */
static void write_tokens(replay *r, const simulate_request *request, int64_t n_tok)
{
    for (int64_t i = 0; i < n_tok; i++) r->tokens[i] = i < request->prefix_tok ? request->prefix : request->chat;
}

static tq_status append_all(replay *r, int32_t seq, int64_t n_tok)
{
    tq_status status = TQ_OK;
    for (int32_t layer = 0; layer < r->server->cache.n_layer && status == TQ_OK; layer++)
        status = tq_cache_append(r->cache, seq, layer, n_tok, NULL, NULL, NULL);
    return status;
}

/* Bring a sequence to n_tok tokens, and let others find them. */
static tq_status grow(replay *r, int64_t i_request, int64_t n_tok)
{
    int32_t seq = r->seqs[i_request];
    tq_status status = append_all(r, seq, n_tok - tq_cache_length(r->cache, seq, 0));
    if (status != TQ_OK) return status;
    if (r->server->cache.checkpoint_stride == 0) return TQ_OK;
    write_tokens(r, &r->trace->requests[i_request], n_tok);
    status = tq_cache_seq_publish(r->cache, seq, r->tokens, n_tok);
    return status == TQ_ERR_FULL ? TQ_OK : status; /* then fewer pages can be found */
}

static tq_status note_peaks(replay *r)
{
    tq_cache_stats stats;
    tq_status status = tq_cache_get_stats(r->cache, &stats);
    if (status != TQ_OK) return status;
    if (stats.n_pages_used > r->result->pages_peak) r->result->pages_peak = stats.n_pages_used;
    if ((int64_t)stats.allocated_bytes > r->result->bytes_peak) r->result->bytes_peak = (int64_t)stats.allocated_bytes;
    if (r->n_running > r->result->running_peak) r->result->running_peak = r->n_running;
    return TQ_OK;
}

/* FULL: not now. */
static tq_status admit(replay *r, int64_t i_request, double now)
{
    const simulate_request *request = &r->trace->requests[i_request];
    const simulate_server *server = r->server;
    int64_t n_matched;
    write_tokens(r, request, request->prompt_tok);
    /* The last token must be computed for what follows it. */
    tq_status status = tq_cache_seq_match(r->cache, r->tokens, request->prompt_tok - 1, &r->seqs[i_request], &n_matched);
    if (status != TQ_OK) return status;
    status = tq_cache_reserve(r->cache, r->seqs[i_request], request->prompt_tok + request->output_tok - n_matched);
    if (status != TQ_OK) {
        tq_status freed = tq_cache_seq_free(r->cache, r->seqs[i_request]);
        return freed == TQ_OK ? status : freed;
    }
    double first = fmax(now, r->prefill_free) + (double)(request->prompt_tok - n_matched) / server->prefill_rate;
    r->prefill_free = first;
    push_event(r, first, i_request, false);
    push_event(r, first + (double)request->output_tok / server->decode_rate, i_request, true);
    simulate_result *result = r->result;
    r->waits[result->n_served] = now - request->arrival;
    r->firsts[result->n_served++] = first - request->arrival;
    result->prompt_tok += request->prompt_tok;
    result->output_tok += request->output_tok;
    result->matched_tok += n_matched;
    r->n_running++;
    return note_peaks(r);
}

/* Admit in the order of arrival, as far as it goes; *head is the first that waits. */
static tq_status admit_waiting(replay *r, int64_t *head, int64_t n_arrived, double now)
{
    while (*head < n_arrived) {
        if (r->server->max_running > 0 && r->n_running == r->server->max_running) break;
        tq_status status = admit(r, *head, now);
        if (status == TQ_ERR_FULL && r->n_running > 0) break;
        if (status == TQ_ERR_FULL)
            r->result->n_refused++;
        else if (status != TQ_OK)
            return status;
        ++*head;
    }
    return TQ_OK;
}

static tq_status handle(replay *r, const event *e)
{
    const simulate_request *request = &r->trace->requests[e->request];
    if (!e->is_end) return grow(r, e->request, request->prompt_tok);
    tq_status status = grow(r, e->request, request->prompt_tok + request->output_tok);
    if (status != TQ_OK) return status;
    r->n_running--;
    return tq_cache_seq_free(r->cache, r->seqs[e->request]);
}

static tq_status run(replay *r, void (*progress)(void *, double), void *context)
{
    const simulate_trace *trace = r->trace;
    double started = trace->requests[0].arrival, now = started;
    for (int64_t n_arrived = 0, head = 0; head < trace->n || r->n_events > 0;) {
        tq_status status = TQ_OK;
        double before = now;
        int64_t n_ran = r->n_running;
        bool is_event = r->n_events > 0 && (n_arrived == trace->n || r->heap[0].time <= trace->requests[n_arrived].arrival);
        /* Behind one that waits, an arrival changes nothing. */
        bool is_blocked = !is_event && head < n_arrived;
        if (is_event) {
            event e = pop_event(r);
            now = e.time;
            status = handle(r, &e);
        } else {
            now = trace->requests[n_arrived++].arrival;
        }
        r->area += (double)n_ran * (now - before);
        if (status == TQ_OK && !is_blocked) status = admit_waiting(r, &head, n_arrived, now);
        if (status != TQ_OK) return status;
        if (progress && is_event) progress(context, (double)head / (double)trace->n);
    }
    r->result->seconds = now - started;
    r->result->running_mean = now > started ? r->area / (now - started) : 0;
    return TQ_OK;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The least value that a share `part` of them does not exceed; 0 if there are none. */
static double percentile(const double *sorted, int64_t n, double part)
{
    return n > 0 ? sorted[(int64_t)ceil(part * (double)n) - 1] : 0;
}

static tq_status measure_cache(replay *r)
{
    tq_cache_stats empty, one;
    int32_t seq;
    tq_status status = tq_cache_get_stats(r->cache, &empty);
    if (status != TQ_OK) return status;
    r->result->n_pages = empty.n_pages_free;
    r->result->page_bytes = (int64_t)empty.page_bytes;
    status = tq_cache_seq_create(r->cache, &seq);
    if (status == TQ_ERR_FULL) return TQ_OK; /* then every request is refused */
    if (status == TQ_OK) status = tq_cache_get_stats(r->cache, &one);
    if (status != TQ_OK) return status;
    r->result->sequence_bytes = (int64_t)one.exact_bytes;
    return tq_cache_seq_free(r->cache, seq);
}

tq_status simulate_replay(simulate_result *out, const simulate_trace *trace, const simulate_server *server,
                          void (*progress)(void *context, double part), void *context)
{
    *out = (simulate_result){0};
    replay r = {.trace = trace, .server = server, .result = out, .prefill_free = 0};
    size_t n = (size_t)trace->n;
    tq_status status = tq_cache_create(&r.cache, &server->cache);
    if (status != TQ_OK) return status;
    r.heap = calloc(2 * n, sizeof *r.heap);
    r.seqs = calloc(n, sizeof *r.seqs);
    r.waits = calloc(n, sizeof *r.waits);
    r.firsts = calloc(n, sizeof *r.firsts);
    r.tokens = calloc((size_t)trace->longest, sizeof *r.tokens);
    if (!r.heap || !r.seqs || !r.waits || !r.firsts || !r.tokens) status = TQ_ERR_MEMORY;
    tool_show_log(false); /* that the cache is full is no error here */
    if (status == TQ_OK) status = measure_cache(&r);
    if (status == TQ_OK) status = run(&r, progress, context);
    tq_cache_stats stats;
    if (status == TQ_OK) status = tq_cache_get_stats(r.cache, &stats);
    if (status == TQ_OK) {
        out->n_evicted = stats.n_evicted_pages;
        out->n_copied = stats.n_copied_pages;
        qsort(r.waits, (size_t)out->n_served, sizeof *r.waits, compare);
        qsort(r.firsts, (size_t)out->n_served, sizeof *r.firsts, compare);
        out->wait_median = percentile(r.waits, out->n_served, 0.5);
        out->wait_p99 = percentile(r.waits, out->n_served, 0.99);
        out->first_median = percentile(r.firsts, out->n_served, 0.5);
        out->first_p99 = percentile(r.firsts, out->n_served, 0.99);
    }
    tool_show_log(true);
    tq_cache_free(r.cache);
    free(r.heap);
    free(r.seqs);
    free(r.waits);
    free(r.firsts);
    free(r.tokens);
    return status;
}
