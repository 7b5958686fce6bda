/* SPDX-License-Identifier: MIT */
/* Traces as JSON lines: docs/simulate.md has the format. */
#include <math.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "simulate.h"

#define LENGTH_MAX (1 << 24) /* tokens of one request */
#define LINE_MAX_BYTES 4096
#define REQUESTS_MAX (1 << 26)

bool simulate_trace_add(simulate_trace *trace, const simulate_request *request)
{
    if (trace->n == trace->room) {
        int64_t room = trace->room == 0 ? 1024 : 2 * trace->room;
        simulate_request *requests = realloc(trace->requests, (size_t)room * sizeof *requests);
        if (!requests) return tool_error(1, "out of memory") == 0;
        trace->requests = requests;
        trace->room = room;
    }
    trace->requests[trace->n++] = *request;
    int64_t length = request->prompt_tok + request->output_tok;
    if (length > trace->longest) trace->longest = length;
    return true;
}

void simulate_trace_free(simulate_trace *trace)
{
    free(trace->requests);
    *trace = (simulate_trace){0};
}

/* In a tree of tsearch. Prefixes and chats have names of their own, which begin with another letter; numbers are of both. */
typedef struct stream {
    int32_t number;
    char name[];
} stream;

typedef struct reader {
    const char *path;
    int64_t line;
    void *streams;
    int32_t n_streams;
    simulate_trace *trace;
} reader;

static int compare_streams(const void *a, const void *b)
{
    return strcmp(((const stream *)a)->name, ((const stream *)b)->name);
}

static bool fail(const reader *r, const char *what, const char *detail)
{
    tool_error(1, "%s:%lld: %s%s", r->path, (long long)r->line, what, detail);
    return false;
}

static bool find_stream(reader *r, char kind, const char *name, int32_t *number)
{
    size_t bytes = strlen(name) + 1;
    stream *asked = malloc(sizeof *asked + bytes + 1);
    if (!asked) return fail(r, "out of memory", "");
    asked->name[0] = kind;
    memcpy(asked->name + 1, name, bytes);
    asked->number = r->n_streams;
    stream **found = tsearch(asked, &r->streams, compare_streams);
    if (found && *found == asked)
        r->n_streams++;
    else
        free(asked);
    if (!found) return fail(r, "out of memory", "");
    *number = (*found)->number;
    return true;
}

/* A key's number; a missing one is `missing`, unless that is negative. */
static bool read_number(const reader *r, const cJSON *object, const char *key, double low, double missing, bool whole,
                        double *out)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    *out = missing;
    if (!item && missing >= 0) return true;
    if (!item) return fail(r, "the line lacks ", key);
    *out = item->valuedouble;
    if (cJSON_IsNumber(item) && *out >= low && *out <= (whole ? LENGTH_MAX : 1e12) && (!whole || *out == floor(*out)))
        return true;
    char range[96];
    snprintf(range, sizeof range, whole ? " must be a whole number from %.0f to %.0f" : " must be a number from %.0f to %.0f",
             low, whole ? LENGTH_MAX : 1e12);
    return fail(r, key, range);
}

/* *number stays as it is if there is no such key. */
static bool read_name(reader *r, const cJSON *object, const char *key, int32_t *number)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    if (!item) return true;
    if (!cJSON_IsString(item) || !*item->valuestring) return fail(r, key, " must be a text that is not empty");
    return find_stream(r, *key, item->valuestring, number);
}

static bool check_keys(const reader *r, const cJSON *object)
{
    static const char *const known[] = {"arrival", "prefix", "prefix_tok", "chat", "prompt_tok", "output_tok"};
    for (const cJSON *item = object->child; item; item = item->next) {
        size_t i = 0, n = sizeof known / sizeof known[0];
        while (i < n && strcmp(item->string, known[i]) != 0) i++;
        if (i == n) return fail(r, "unknown key ", item->string);
        if (cJSON_GetObjectItemCaseSensitive(object, item->string) != item) return fail(r, "the line has twice ", item->string);
    }
    return true;
}

static bool read_request(reader *r, const cJSON *object)
{
    double arrival, prefix_tok, prompt_tok, output_tok;
    if (!cJSON_IsObject(object)) return fail(r, "this is not a JSON object", "");
    if (!check_keys(r, object) || !read_number(r, object, "arrival", 0, -1, false, &arrival) ||
        !read_number(r, object, "prompt_tok", 1, -1, true, &prompt_tok) ||
        !read_number(r, object, "output_tok", 1, -1, true, &output_tok) ||
        !read_number(r, object, "prefix_tok", 1, 0, true, &prefix_tok))
        return false;
    const simulate_trace *trace = r->trace;
    if (trace->n == REQUESTS_MAX) return fail(r, "too many requests", "");
    if (trace->n > 0 && arrival < trace->requests[trace->n - 1].arrival)
        return fail(r, "arrival is before that of the line before; sort the file", "");
    if (prefix_tok > prompt_tok) return fail(r, "prefix_tok is more than prompt_tok", "");
    simulate_request request = {.arrival = arrival,
                                .prefix = -1,
                                .chat = -1,
                                .prefix_tok = (int64_t)prefix_tok,
                                .prompt_tok = (int64_t)prompt_tok,
                                .output_tok = (int64_t)output_tok};
    if (!read_name(r, object, "prefix", &request.prefix) || !read_name(r, object, "chat", &request.chat)) return false;
    if ((request.prefix >= 0) != (prefix_tok > 0)) return fail(r, "prefix and prefix_tok belong together", "");
    if (request.chat < 0) request.chat = r->n_streams++;
    return simulate_trace_add(r->trace, &request);
}

static bool read_lines(reader *r, FILE *file)
{
    char text[LINE_MAX_BYTES];
    while (fgets(text, sizeof text, file)) {
        r->line++;
        if (!strchr(text, '\n') && !feof(file)) return fail(r, "the line is too long", "");
        if (text[strspn(text, " \t\r\n")] == '\0') continue;
        const char *end;
        cJSON *object = cJSON_ParseWithOpts(text, &end, false);
        bool good = object && end[strspn(end, " \t\r\n")] == '\0';
        good = good ? read_request(r, object) : fail(r, "this is not a JSON object", "");
        cJSON_Delete(object);
        if (!good) return false;
    }
    if (ferror(file)) return fail(r, "cannot be read", "");
    return r->trace->n > 0 || fail(r, "the file has no requests", "");
}

bool simulate_trace_read(simulate_trace *trace, const char *path)
{
    FILE *file = fopen(path, "re");
    if (!file) {
        tool_error(1, "cannot read the trace %s", path);
        return false;
    }
    reader r = {.path = path, .trace = trace};
    bool good = read_lines(&r, file);
    while (r.streams) {
        stream *first = *(stream **)r.streams;
        tdelete(first, &r.streams, compare_streams);
        free(first);
    }
    fclose(file);
    return good;
}

bool simulate_trace_write(const simulate_trace *trace, const char *path)
{
    FILE *file = fopen(path, "we");
    for (const simulate_request *r = trace->requests; file && r < trace->requests + trace->n; r++) {
        fprintf(file, "{\"arrival\": %.3f, ", r->arrival);
        if (r->prefix_tok > 0)
            fprintf(file, "\"prefix\": \"%d\", \"prefix_tok\": %lld, ", (int)r->prefix, (long long)r->prefix_tok);
        fprintf(file, "\"chat\": \"%d\", \"prompt_tok\": %lld, \"output_tok\": %lld}\n", (int)r->chat, (long long)r->prompt_tok,
                (long long)r->output_tok);
    }
    bool good = file && !ferror(file);
    if (file && fclose(file) != 0) good = false;
    if (!good) tool_error(1, "cannot write the trace %s", path);
    return good;
}
