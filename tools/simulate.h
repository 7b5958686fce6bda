/* SPDX-License-Identifier: MIT */
/* tq cache simulate: a trace of requests, the server that replays it over a dry cache, and what came of it. */
#ifndef TQ_TOOL_SIMULATE_H
#define TQ_TOOL_SIMULATE_H

#include "tq.h"

/*
 * A prompt is prefix_tok tokens of one stream, then tokens of another, which the output continues. A stream is an endless text
 * known by its number; two prompts that begin with the same streams begin with the same tokens.
 */
typedef struct simulate_request {
    double arrival; /* seconds */
    int32_t prefix, chat;
    int64_t prefix_tok, prompt_tok, output_tok; /* the prompt's tokens include the prefix */
} simulate_request;

typedef struct simulate_trace {
    simulate_request *requests; /* [n], by arrival */
    int64_t n, room;
    int64_t longest; /* prompt and output */
} simulate_trace;

/* simulate_trace.c; false after an error that has been printed. */
bool simulate_trace_add(simulate_trace *trace, const simulate_request *request);
bool simulate_trace_read(simulate_trace *trace, const char *path);
bool simulate_trace_write(const simulate_trace *trace, const char *path);
void simulate_trace_free(simulate_trace *trace);

/* What a synthetic trace is drawn from; means are of geometric or exponential distributions. */
typedef struct simulate_workload {
    int64_t seed, n_requests, n_prefixes, context;
    double rate; /* requests a second */
    double zipf; /* the i-th prefix is asked for in proportion to i^-zipf */
    double prefix_tok, message_tok, output_tok, turns, think;
} simulate_workload;
/* simulate_generate.c */
bool simulate_generate(simulate_trace *trace, const simulate_workload *workload);

typedef struct simulate_server {
    tq_cache_params cache;
    double prefill_rate, decode_rate; /* tokens a second: of all requests together; of each */
    int64_t max_running;              /* 0: as many as the cache holds */
} simulate_server;

typedef struct simulate_result {
    int64_t n_pages;                    /* that the budget holds while there is no sequence */
    int64_t page_bytes, sequence_bytes; /* of a page; exact tokens of a sequence */
    int64_t n_served, n_refused;        /* refused: too long for the empty cache */
    int64_t running_peak;
    double running_mean, seconds;                /* from the first arrival to the last token */
    double wait_median, wait_p99;                /* from arrival to admission */
    double first_median, first_p99;              /* from arrival to the end of prefill */
    int64_t prompt_tok, matched_tok, output_tok; /* of those served */
    int64_t n_evicted, n_copied, pages_peak, bytes_peak;
} simulate_result;

/* simulate_replay.c; calls progress, if there is one, with the part that is done. */
tq_status simulate_replay(simulate_result *out, const simulate_trace *trace, const simulate_server *server,
                          void (*progress)(void *context, double part), void *context);

/* simulate_report.c */
typedef struct simulate_output {
    const char *json, *csv, *html, *plot; /* files, or NULL */
} simulate_output;
/* An object of the result for the array `rows`. NULL: out of memory. */
cJSON *simulate_row(const char *cache, double budget_gib, const simulate_result *result);
void simulate_print_table(const cJSON *rows);
/* Could simulate_write write all of it? To be asked before the work. False after an error that has been printed. */
bool simulate_check_output(const simulate_output *output);
/* Write what was asked for of {"command", "trace", "server", "rows"}. False after an error that has been printed. */
bool simulate_write(const cJSON *report, const simulate_output *output);

#endif
