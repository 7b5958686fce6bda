/* SPDX-License-Identifier: MIT */
/*
 * Synthetic traces: conversations begin as a Poisson process, each behind one of a few shared prefixes. Every turn's prompt is
 * the prefix, what was said so far, and a new message; the user reads the answer and thinks before the next.
 */
#include <math.h>
#include <stdlib.h>

#include "simulate.h"

#define EMPTY_MAX 1000 /* conversations in a row whose first prompt is too long */
#define REQUESTS_MAX (1 << 26)
#define READING_RATE 20.0 /* tokens a second: some 900 words a minute, faster than anybody reads */

static uint64_t next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* In (0, 1]. */
static double uniform(uint64_t *state)
{
    return (double)((next(state) >> 11) + 1) * 0x1p-53;
}

static double exponential(uint64_t *state, double mean)
{
    return -mean * log(uniform(state));
}

/* At least one token. */
static int64_t tokens(uint64_t *state, double mean)
{
    double n = exponential(state, mean);
    return n < 1 ? 1 : (int64_t)n;
}

static int32_t pick_prefix(uint64_t *state, const double *shares, int64_t n)
{
    double left = uniform(state);
    for (int32_t i = 0; i < n; i++) {
        left -= shares[i];
        if (left <= 0) return i;
    }
    return (int32_t)n - 1;
}

/* A conversation's turns, until it is over or the context full. */
static bool add_conversation(simulate_trace *trace, const simulate_workload *w, uint64_t *state, double time,
                             simulate_request request)
{
    int64_t said = request.prefix_tok;
    do {
        request.arrival = round(time * 1000) / 1000; /* as a file has it */
        request.prompt_tok = said + tokens(state, w->message_tok);
        request.output_tok = tokens(state, w->output_tok);
        said = request.prompt_tok + request.output_tok;
        if (said > w->context) return true;
        if (!simulate_trace_add(trace, &request)) return false;
        time += (double)request.output_tok / READING_RATE + exponential(state, w->think);
    } while (uniform(state) > 1 / w->turns);
    return true;
}

static int compare_requests(const void *a, const void *b)
{
    const simulate_request *x = a, *y = b;
    if (x->arrival != y->arrival) return x->arrival < y->arrival ? -1 : 1;
    if (x->chat != y->chat) return x->chat < y->chat ? -1 : 1;
    return (x->prompt_tok > y->prompt_tok) - (x->prompt_tok < y->prompt_tok);
}

static int64_t count_until(const simulate_trace *trace, double time)
{
    int64_t n = 0;
    for (int64_t i = 0; i < trace->n; i++) n += trace->requests[i].arrival <= time;
    return n;
}

/* Begin conversations until so many requests have arrived; those that arrive later are cut off, so that the end is as busy as
 * the middle. */
static bool add_conversations(simulate_trace *trace, const simulate_workload *w, uint64_t *state, const double *shares,
                              const double *lengths)
{
    double time = 0;
    int64_t n_empty = 0, next_count = w->n_requests;
    for (int32_t chat = (int32_t)w->n_prefixes;; chat++) {
        time += exponential(state, w->turns / w->rate);
        if (trace->n >= next_count) {
            if (count_until(trace, time) >= w->n_requests) return true;
            next_count = trace->n + trace->n / 64;
        }
        simulate_request request = {.prefix = -1, .chat = chat};
        if (w->n_prefixes > 0) {
            request.prefix = pick_prefix(state, shares, w->n_prefixes);
            request.prefix_tok = (int64_t)lengths[request.prefix];
        }
        int64_t before = trace->n;
        if (!add_conversation(trace, w, state, time, request)) return false;
        n_empty = trace->n > before ? 0 : n_empty + 1;
        if (n_empty == EMPTY_MAX || trace->n > REQUESTS_MAX) {
            tool_error(1, "no trace of this kind can be made; see to --context, --turns and --think");
            return false;
        }
    }
}

bool simulate_generate(simulate_trace *trace, const simulate_workload *w)
{
    uint64_t state = (uint64_t)w->seed;
    double *shares = calloc(2 * (size_t)w->n_prefixes + 1, sizeof *shares), *lengths = shares ? shares + w->n_prefixes : NULL;
    if (!shares) return tool_error(1, "out of memory") == 0;
    double sum = 0;
    for (int64_t i = 0; i < w->n_prefixes; i++) sum += shares[i] = pow((double)(i + 1), -w->zipf);
    for (int64_t i = 0; i < w->n_prefixes; i++) {
        shares[i] /= sum;
        lengths[i] = 1 + floor(w->prefix_tok * (0.5 + uniform(&state)));
    }
    bool good = add_conversations(trace, w, &state, shares, lengths);
    free(shares);
    if (!good) return false;
    qsort(trace->requests, (size_t)trace->n, sizeof *trace->requests, compare_requests);
    trace->n = w->n_requests;
    return true;
}
