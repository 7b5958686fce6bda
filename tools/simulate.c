/* SPDX-License-Identifier: MIT */
/* tq cache simulate: its options, and the replay of one trace for each cache and budget. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "simulate.h"

static const char help[] =
    "usage: tq cache simulate [OPTIONS]\n\n"
    "How many requests a memory budget serves, with an FP16 cache and with ours: a trace is replayed in simulated time over\n"
    "the library's cache without its vectors, which shares, keeps, gives up and refuses as it would. docs/simulate.md\n"
    "explains the model, the trace format and the figures.\n\n"
    "model:     --shape NAME        qwen2.5-7b, qwen2.5-0.5b, qwen2.5-32b, llama3.1-8b, llama3.1-70b, smollm2-135m\n"
    "           --n-layer N --n-head-kv N --head-dim D   (those of qwen2.5-7b: 28, 4, 128)\n"
    "caches:    --presets A,B,...   next to f16 (TQ4,TQ2)\n"
    "           --budgets G,G,...   GiB for the cache (1,2,4,8,16)\n"
    "           --page-size N       tokens (64)\n"
    "           --checkpoint-stride N   tokens between places where others can begin, in pages; 0: nothing is shared (1024)\n"
    "server:    --prefill-rate R    tokens/s of all prompts together (10000)\n"
    "           --decode-rate R     tokens/s of each request (25)\n"
    "           --max-running N     requests at once; 0: as many as the cache holds (0)\n"
    "trace:     --trace FILE        JSON lines; without it one is made up:\n"
    "           --requests N        (2000)          --seed S          (1)\n"
    "           --rate R            requests/s (4)  --context N       longest conversation (32768)\n"
    "           --prefixes N        shared ones (8) --zipf S          i-th prefix in proportion to i^-S (1)\n"
    "           --prefix-tok N      mean (1000)     --message-tok N   mean, each turn (400)\n"
    "           --output-tok N      mean (300)      --turns N         mean, of a conversation (3)\n"
    "           --think S           mean seconds from the answer, once read, to the next message (20)\n"
    "           --save-trace FILE   write it\n"
    "output:    --json OUT          all figures ('-': to standard output, in place of the table)\n"
    "           --csv OUT           the same rows\n"
    "           --html OUT          a page with table and plots\n"
    "           --plot OUT          the plots as SVG\n";

static const struct {
    const char *name;
    int32_t n_layer, n_head_kv, head_dim;
} shapes[] = {
    {"qwen2.5-7b", 28, 4, 128},  {"qwen2.5-0.5b", 24, 2, 64},  {"qwen2.5-32b", 64, 8, 128},
    {"llama3.1-8b", 32, 8, 128}, {"llama3.1-70b", 80, 8, 128}, {"smollm2-135m", 30, 3, 64},
};

enum { CACHES_MAX = 16, BUDGETS_MAX = 64, CHECKPOINT_STRIDE = 1024 };

/* FP16 has neither sinks nor a ring: everything is exact. */
static const tq_preset f16 = {.name = "f16", .k_format = TQ_FORMAT_F16, .v_format = TQ_FORMAT_F16};

typedef struct options {
    simulate_server server;
    simulate_workload workload;
    simulate_output output;
    const tq_preset *caches[CACHES_MAX];
    double budgets[BUDGETS_MAX];
    int64_t n_caches, n_budgets, n_layer, n_head_kv, page_size, checkpoint_stride;
    const char *trace, *save_trace;
} options;

static bool parse_shape(options *o, const char *text)
{
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        if (strcmp(text, shapes[i].name) != 0) continue;
        o->n_layer = shapes[i].n_layer;
        o->n_head_kv = shapes[i].n_head_kv;
        o->server.cache.head_dim = shapes[i].head_dim;
        return true;
    }
    tool_error(EXIT_USAGE, "unknown shape '%s'; see 'tq cache simulate --help'", text);
    return false;
}

static bool parse_presets(options *o, char *text)
{
    o->n_caches = 0;
    o->caches[o->n_caches++] = &f16;
    for (char *name = strtok(text, ","); name; name = strtok(NULL, ",")) {
        const tq_preset *preset = tq_preset_find(name);
        if (strcmp(name, f16.name) == 0) continue;
        if (!preset) return tool_error(EXIT_USAGE, "unknown preset '%s'; see 'tq presets'", name) == 0;
        if (o->n_caches == CACHES_MAX) return tool_error(EXIT_USAGE, "too many presets") == 0;
        o->caches[o->n_caches++] = preset;
    }
    return true;
}

static bool parse_budgets(options *o, char *text)
{
    o->n_budgets = 0;
    for (char *part = strtok(text, ","); part; part = strtok(NULL, ",")) {
        if (o->n_budgets == BUDGETS_MAX) return tool_error(EXIT_USAGE, "too many budgets") == 0;
        if (!tool_parse_double(&o->budgets[o->n_budgets++], "--budgets", part, 1e-6, 65536)) return false;
    }
    return o->n_budgets > 0 || tool_error(EXIT_USAGE, "--budgets takes one budget or more") == 0;
}

/* Options that are a number or a word each; those of other kinds are in parse_other. */
static options given = {
    .server = {.prefill_rate = 10000, .decode_rate = 25},
    .workload = {.seed = 1,
                 .n_requests = 2000,
                 .n_prefixes = 8,
                 .context = 32768,
                 .rate = 4,
                 .zipf = 1,
                 .prefix_tok = 1000,
                 .message_tok = 400,
                 .output_tok = 300,
                 .turns = 3,
                 .think = 20},
    .budgets = {1, 2, 4, 8, 16},
    .n_budgets = 5,
    .n_layer = 28,
    .n_head_kv = 4,
    .page_size = 64,
    .checkpoint_stride = -1,
};

// clang-format off
static const struct {
    const char *name;
    int64_t *whole, low, high;
} whole_numbers[] = {
    {"n-layer",     &given.n_layer,             1, 65536},
    {"n-head-kv",   &given.n_head_kv,           1, 65536},
    {"page-size",   &given.page_size,           16, 256},
    {"checkpoint-stride", &given.checkpoint_stride, 0, 1 << 24},
    {"max-running", &given.server.max_running,  0, 1 << 24},
    {"requests",    &given.workload.n_requests, 1, 1 << 24},
    {"seed",        &given.workload.seed,       0, INT64_MAX},
    {"context",     &given.workload.context,    2, 1 << 24},
    {"prefixes",    &given.workload.n_prefixes, 0, 1 << 20},
};

static const struct {
    const char *name;
    double *real, low, high;
} real_numbers[] = {
    {"prefill-rate", &given.server.prefill_rate,    1e-3, 1e9},
    {"decode-rate",  &given.server.decode_rate,     1e-3, 1e9},
    {"rate",         &given.workload.rate,          1e-6, 1e6},
    {"zipf",         &given.workload.zipf,          0, 10},
    {"prefix-tok",   &given.workload.prefix_tok,    1, 1e6},
    {"message-tok",  &given.workload.message_tok,   1, 1e6},
    {"output-tok",   &given.workload.output_tok,    1, 1e6},
    {"turns",        &given.workload.turns,         1, 1e4},
    {"think",        &given.workload.think,         0, 1e6},
};

static const struct {
    const char *name, **word;
} words[] = {
    {"trace",      &given.trace},
    {"save-trace", &given.save_trace},
    {"json",       &given.output.json},
    {"csv",        &given.output.csv},
    {"html",       &given.output.html},
    {"plot",       &given.output.plot},
};
// clang-format on

enum {
    N_WHOLE = sizeof whole_numbers / sizeof whole_numbers[0],
    N_REAL = sizeof real_numbers / sizeof real_numbers[0],
    N_WORD = sizeof words / sizeof words[0],
    FIRST = 256, /* codes of options; those of the tables follow each other from here */
    SHAPE = 'S',
    HEAD_DIM = 'd',
    PRESETS = 'p',
    BUDGETS = 'b',
    HELP = 'h',
};

static bool parse_listed(int option, const char *text)
{
    char name[32];
    int i = option - FIRST;
    if (i < N_WHOLE) {
        snprintf(name, sizeof name, "--%s", whole_numbers[i].name);
        return tool_parse_int(whole_numbers[i].whole, name, text, whole_numbers[i].low, whole_numbers[i].high);
    }
    i -= N_WHOLE;
    if (i < N_REAL) {
        snprintf(name, sizeof name, "--%s", real_numbers[i].name);
        return tool_parse_double(real_numbers[i].real, name, text, real_numbers[i].low, real_numbers[i].high);
    }
    *words[i - N_REAL].word = text;
    return true;
}

/* The exit code, or -1 to go on. */
static int parse(int argc, char **argv)
{
    struct option list[N_WHOLE + N_REAL + N_WORD + 6] = {{"shape", required_argument, NULL, SHAPE},
                                                         {"head-dim", required_argument, NULL, HEAD_DIM},
                                                         {"presets", required_argument, NULL, PRESETS},
                                                         {"budgets", required_argument, NULL, BUDGETS},
                                                         {"help", no_argument, NULL, HELP}};
    for (int i = 0; i < N_WHOLE + N_REAL + N_WORD; i++) {
        const char *name = i < N_WHOLE            ? whole_numbers[i].name
                           : i < N_WHOLE + N_REAL ? real_numbers[i - N_WHOLE].name
                                                  : words[i - N_WHOLE - N_REAL].name;
        list[5 + i] = (struct option){name, required_argument, NULL, FIRST + i};
    }
    int option;
    while ((option = getopt_long(argc, argv, "h", list, NULL)) != -1) {
        bool good = option >= FIRST && parse_listed(option, optarg);
        if (option == SHAPE) good = parse_shape(&given, optarg);
        if (option == PRESETS) good = parse_presets(&given, optarg);
        if (option == BUDGETS) good = parse_budgets(&given, optarg);
        if (option == HEAD_DIM) {
            if (!tool_parse_head_dim(&given.server.cache.head_dim, optarg)) return 1;
            good = true;
        }
        if (option == HELP) {
            fputs(help, stdout);
            return 0;
        }
        if (!good) return EXIT_USAGE;
    }
    if (optind < argc) return tool_error(EXIT_USAGE, "unexpected argument '%s'; see 'tq cache simulate --help'", argv[optind]);
    return -1;
}

/* A line on a terminal, twice a second. */
typedef struct progress_line {
    const char *cache;
    double budget;
    time_t shown;
    bool is_terminal;
} progress_line;

static void show_progress(void *context, double part)
{
    progress_line *line = context;
    time_t now = time(NULL);
    if (!line->is_terminal || now == line->shown) return;
    line->shown = now;
    fprintf(stderr, "\r%s, %g GiB: %3.0f %% ", line->cache, line->budget, 100 * part);
}

static tq_status replay_all(const options *o, const simulate_trace *trace, cJSON *rows)
{
    progress_line line = {.is_terminal = isatty(STDERR_FILENO) == 1, .shown = time(NULL)};
    time_t started = line.shown;
    for (int64_t i = 0; i < o->n_budgets * o->n_caches; i++) {
        const tq_preset *preset = o->caches[i % o->n_caches];
        simulate_server server = o->server;
        tq_cache_params_set_preset(&server.cache, preset);
        line.cache = preset->name;
        line.budget = o->budgets[i / o->n_caches];
        server.cache.budget_bytes = (size_t)(line.budget * 1073741824.0);
        simulate_result result;
        tq_status status = simulate_replay(&result, trace, &server, show_progress, &line);
        if (status == TQ_OK && !cJSON_AddItemToArray(rows, simulate_row(preset->name, line.budget, &result)))
            status = TQ_ERR_MEMORY;
        if (status != TQ_OK) {
            tool_error(1, "%s with %g GiB: %s", preset->name, line.budget, tq_status_string(status));
            return status;
        }
    }
    if (line.is_terminal && line.shown != started) fprintf(stderr, "\r%40s\r", "");
    return TQ_OK;
}

static void add_numbers(cJSON *object, const simulate_trace *trace)
{
    const options *o = &given;
    cJSON *server = cJSON_AddObjectToObject(object, "server"), *requests = cJSON_AddObjectToObject(object, "trace");
    cJSON_AddNumberToObject(server, "n_layer", (double)o->n_layer);
    cJSON_AddNumberToObject(server, "n_head_kv", (double)o->n_head_kv);
    cJSON_AddNumberToObject(server, "head_dim", o->server.cache.head_dim);
    cJSON_AddNumberToObject(server, "page_size", (double)o->page_size);
    cJSON_AddNumberToObject(server, "checkpoint_stride", (double)o->checkpoint_stride);
    cJSON_AddNumberToObject(server, "prefill_rate", o->server.prefill_rate);
    cJSON_AddNumberToObject(server, "decode_rate", o->server.decode_rate);
    cJSON_AddNumberToObject(server, "max_running", (double)o->server.max_running);
    double prompt_tok = 0, output_tok = 0;
    for (int64_t i = 0; i < trace->n; i++) {
        prompt_tok += (double)trace->requests[i].prompt_tok;
        output_tok += (double)trace->requests[i].output_tok;
    }
    cJSON_AddStringToObject(requests, "file", o->trace ? o->trace : "");
    cJSON_AddNumberToObject(requests, "n_requests", (double)trace->n);
    cJSON_AddNumberToObject(requests, "n_prompt_tok", prompt_tok);
    cJSON_AddNumberToObject(requests, "n_output_tok", output_tok);
    cJSON_AddNumberToObject(requests, "longest_tok", (double)trace->longest);
    cJSON_AddNumberToObject(requests, "seconds", trace->requests[trace->n - 1].arrival - trace->requests[0].arrival);
}

static char *join_words(int argc, char **argv)
{
    size_t bytes = sizeof "tq cache simulate";
    for (int i = 1; i < argc; i++) bytes += strlen(argv[i]) + 1;
    char *text = malloc(bytes), *end = text;
    if (!text) return NULL;
    end += sprintf(end, "tq cache simulate");
    for (int i = 1; i < argc; i++) end += sprintf(end, " %s", argv[i]);
    return text;
}

static int simulate(const char *command)
{
    options *o = &given;
    simulate_trace trace = {0};
    if (o->checkpoint_stride < 0) o->checkpoint_stride = CHECKPOINT_STRIDE / o->page_size * o->page_size;
    if (o->checkpoint_stride % o->page_size != 0) {
        return tool_error(EXIT_USAGE, "--checkpoint-stride is %lld; give a multiple of --page-size, which is %lld",
                          (long long)o->checkpoint_stride, (long long)o->page_size);
    }
    if (!simulate_check_output(&o->output)) return 1;
    o->server.cache.n_layer = (int32_t)o->n_layer;
    o->server.cache.n_head_kv = (int32_t)o->n_head_kv;
    o->server.cache.page_size = (int32_t)o->page_size;
    o->server.cache.checkpoint_stride = (int32_t)o->checkpoint_stride;
    o->server.cache.n_pages = 0;
    o->server.cache.dry_run = true;
    bool good = o->trace ? simulate_trace_read(&trace, o->trace) : simulate_generate(&trace, &o->workload);
    if (good && o->save_trace) good = simulate_trace_write(&trace, o->save_trace);
    cJSON *report = cJSON_CreateObject(), *rows = NULL;
    if (good) {
        cJSON_AddStringToObject(report, "command", command);
        add_numbers(report, &trace);
        rows = cJSON_AddArrayToObject(report, "rows");
        good = rows ? replay_all(o, &trace, rows) == TQ_OK : tool_error(1, "out of memory") == 0;
    }
    if (good) {
        if (!o->output.json || strcmp(o->output.json, "-") != 0) simulate_print_table(rows);
        good = simulate_write(report, &o->output);
    }
    cJSON_Delete(report);
    simulate_trace_free(&trace);
    return good ? 0 : 1;
}

int cmd_cache_simulate(int argc, char **argv)
{
    char presets[] = "TQ4,TQ2";
    given.server.cache = (tq_cache_params){
        .struct_size = sizeof given.server.cache, .n_layer = 1, .n_head_kv = 1, .head_dim = 128, .page_size = 128};
    char *command = join_words(argc, argv); /* before lists are cut up, and words change places */
    if (!command) return tool_error(1, "out of memory");
    int code = parse_presets(&given, presets) ? parse(argc, argv) : 1;
    if (code < 0) code = simulate(command);
    free(command);
    return code;
}
