/* SPDX-License-Identifier: MIT */
/* tq cache bench: one layer's decode attention on pages, next to a contiguous store and for many sequences. */
#define _XOPEN_SOURCE 700 /* sync */

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench_cases.h"

static const char help[] =
    "usage: tq cache bench [--context N] [--batch N] [--page-size N] [--formats F] [--threads T] [--rounds N]\n"
    "                      [--offload FOLDER]\n\n"
    "Decode attention of one layer (40 query heads, 8 KV heads, head_dim 128, preset TQ4, pages of 128 tokens by default),\n"
    "interleaved, as CSV. F is a preset, a format or two for keys and values (tt4/tt3).\n"
    "  store       one sequence of N tokens (32768) in a contiguous store\n"
    "  paged       the same in a cache\n"
    "  ragged      N sequences (64) of different lengths, together as many tokens as that one, one after the other\n"
    "  offloaded   with --offload: the long one with memory for a quarter of its pages and a file for the others\n"
    "  from_disk   its first call, after the system's cache of files was dropped (as root)\n\n"
    "Columns: name, us_median, us_min, us_max, bytes (of codes, scales and exact tokens that are read), gb_per_s, ratio (of\n"
    "medians, to paged).\n";

enum { N_HEAD = 40, N_HEAD_KV = 8, HEAD_DIM = 128, ROW = N_HEAD_KV * HEAD_DIM, CHUNK = 256, CASES = 4, ROUNDS_MAX = 1000 };
static const char *const names[CASES] = {"store", "paged", "ragged", "offloaded"};

typedef struct bench {
    int64_t context, n_seq, page_size, n_threads, n_rounds;
    tq_preset formats;
    tq_executor executor;
    tq_cache *cache, *offloaded;
    const char *offload_folder;
    tq_store *stores[2]; /* keys and values */
    void *memory[2];
    int32_t long_seq, offloaded_seq, *seqs;
    float *rows, *q, *out;
    double us[CASES][ROUNDS_MAX];
} bench;

static tq_status fill_sequence(bench *b, tq_cache *cache, int32_t *seq, int64_t n)
{
    tq_status status = tq_cache_seq_create(cache, seq);
    for (int64_t i = 0; i < n && status == TQ_OK; i += CHUNK)
        status = tq_cache_append(cache, *seq, 0, n - i < CHUNK ? n - i : CHUNK, b->rows, b->rows, &b->executor);
    return status;
}

static tq_status fill_store(bench *b, int side)
{
    tq_store_params keys, values, p;
    bench_store_params(&keys, &values, &b->formats);
    p = side == 0 ? keys : values;
    p.head_dim = HEAD_DIM;
    p.n_head_kv = N_HEAD_KV;
    p.n_slots = b->context;
    size_t bytes;
    tq_status status = tq_store_bytes(&bytes, &p);
    if (status != TQ_OK) return status;
    b->memory[side] = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!b->memory[side]) return TQ_ERR_MEMORY;
    memset(b->memory[side], 0, bytes);
    status = tq_store_open(&b->stores[side], &p, b->memory[side], bytes);
    int64_t slots[CHUNK];
    for (int64_t i = 0; i < b->context && status == TQ_OK; i += CHUNK) {
        int64_t n = b->context - i < CHUNK ? b->context - i : CHUNK;
        for (int64_t j = 0; j < n; j++) slots[j] = i + j;
        status = tq_store_write(b->stores[side], slots, n, b->rows, ROW, &b->executor);
    }
    return status;
}

/* Lengths from 1/4 to 7/4 of the mean, in an order that is neither rising nor falling. */
static tq_status fill_ragged(bench *b)
{
    tq_status status = TQ_OK;
    for (int64_t i = 0; i < b->n_seq && status == TQ_OK; i++) {
        int64_t mean = b->context / b->n_seq, step = i * 29 % b->n_seq;
        status =
            fill_sequence(b, b->cache, &b->seqs[i], mean / 4 + (b->n_seq > 1 ? mean * 3 / 2 * step / (b->n_seq - 1) : 0) + 1);
    }
    return status;
}

static tq_status run_case(bench *b, int i_case)
{
    tq_attend_params p = {.struct_size = sizeof p, .n_query = 1, .n_head = N_HEAD, .q = b->q, .out = b->out};
    p.q_head_stride = p.out_head_stride = HEAD_DIM;
    p.q_token_stride = p.out_token_stride = N_HEAD * HEAD_DIM;
    if (i_case == 0) return tq_store_attend(b->stores[0], b->stores[1], b->context, &p, NULL, NULL, &b->executor);
    if (i_case == 1) return tq_cache_attend(b->cache, b->long_seq, 0, &p, &b->executor);
    if (i_case == 3) return tq_cache_attend(b->offloaded, b->offloaded_seq, 0, &p, &b->executor);
    /* What a pass of tq_batch_* does on the CPU for so many sequences, without its appends: all threads for each in turn. */
    tq_status status = TQ_OK;
    for (int64_t i = 0; i < b->n_seq && status == TQ_OK; i++) {
        status = tq_cache_attend(b->cache, b->seqs[i], 0, &p, &b->executor);
        p.q += p.q_token_stride;
        p.out += p.out_token_stride;
    }
    return status;
}

/* What attention reads of a sequence: codes and scales, and what is exact. References are not counted. */
static double sequence_bytes(const bench *b, int64_t n)
{
    double bytes = 0;
    for (int side = 0; side < 2; side++) {
        tq_format_info info;
        tq_format format = side == 0 ? b->formats.k_format : b->formats.v_format;
        if (tq_format_describe(&info, format, HEAD_DIM) != TQ_OK) return 0;
        int64_t n_exact = format <= TQ_FORMAT_BF16 ? 0 : b->formats.n_sink + b->formats.n_recent;
        if (n_exact > n) n_exact = n;
        bytes += N_HEAD_KV * ((double)(n - n_exact) * (double)info.bytes_per_vector + (double)n_exact * 2 * HEAD_DIM);
    }
    return bytes;
}

static double case_bytes(const bench *b, int i_case)
{
    if (i_case != 2) return sequence_bytes(b, b->context);
    double bytes = 0;
    for (int64_t i = 0; i < b->n_seq; i++) bytes += sequence_bytes(b, tq_cache_length(b->cache, b->seqs[i], 0));
    return bytes;
}

static void print_row(const bench *b, int i_case, const char *name, const double us[3], double paged)
{
    double bytes = case_bytes(b, i_case);
    printf("%s,%.1f,%.1f,%.1f,%.0f,%.2f,%.3f\n", name, us[0], us[1], us[2], bytes, bytes / us[0] / 1e3, us[0] / paged);
}

/* Linux, root. */
static bool drop_file_cache(void)
{
    sync();
    FILE *file = fopen("/proc/sys/vm/drop_caches", "w");
    bool done = file && fputs("1", file) >= 0;
    if (file && fclose(file) != 0) done = false;
    return done;
}

/* Memory for a quarter of the pages. */
static tq_status fill_offloaded(bench *b, const tq_cache_params *shape)
{
    tq_cache_params p = *shape;
    tq_cache_stats stats;
    tq_status status = tq_cache_get_stats(b->cache, &stats);
    if (status != TQ_OK) return status;
    p.n_pages = 0;
    p.budget_bytes = (size_t)(b->context / b->page_size / 4 + 8) * stats.page_bytes + ((size_t)8 << 20);
    p.offload_folder = b->offload_folder;
    p.offload_bytes = (size_t)(b->context / b->page_size + 8) * (stats.page_bytes + 16384);
    status = tq_cache_create(&b->offloaded, &p);
    return status == TQ_OK ? fill_sequence(b, b->offloaded, &b->offloaded_seq, b->context) : status;
}

static tq_status run(bench *b)
{
    tq_cache_params shape = {.struct_size = sizeof shape, .n_layer = 1};
    tq_cache_params_set_preset(&shape, &b->formats);
    shape.n_head_kv = N_HEAD_KV;
    shape.head_dim = HEAD_DIM;
    shape.page_size = (int32_t)b->page_size;
    shape.n_pages = (int32_t)(2 * b->context / shape.page_size + 2 * b->n_seq + 64);
    tq_status status = tq_cache_create(&b->cache, &shape);
    if (status == TQ_OK) status = fill_sequence(b, b->cache, &b->long_seq, b->context);
    if (status == TQ_OK && b->offload_folder) status = fill_offloaded(b, &shape);
    int n_cases = b->offload_folder ? CASES : CASES - 1;
    double from_disk = 0;
    if (status == TQ_OK && b->offload_folder && drop_file_cache()) {
        double started = bench_now();
        status = run_case(b, 3);
        from_disk = 1e6 * (bench_now() - started);
    }
    for (int side = 0; side < 2 && status == TQ_OK; side++) status = fill_store(b, side);
    if (status == TQ_OK) status = fill_ragged(b);
    for (int64_t round = -2; round < b->n_rounds && status == TQ_OK; round++) {
        for (int i = 0; i < n_cases && status == TQ_OK; i++) {
            double started = bench_now();
            status = run_case(b, i);
            if (round >= 0) b->us[i][round] = 1e6 * (bench_now() - started);
        }
    }
    if (status != TQ_OK) return status;
    double us[CASES][3];
    for (int i = 0; i < n_cases; i++) bench_summary(b->us[i], b->n_rounds, &us[i][0], &us[i][1], &us[i][2]);
    puts("name,us_median,us_min,us_max,bytes,gb_per_s,ratio");
    for (int i = 0; i < n_cases; i++) print_row(b, i, names[i], us[i], us[1][0]);
    if (from_disk > 0) print_row(b, 3, "from_disk", (double[3]){from_disk, from_disk, from_disk}, us[1][0]);
    return TQ_OK;
}

int cmd_cache_bench(int argc, char **argv)
{
    static const struct option options[] = {{"context", required_argument, NULL, 'c'},
                                            {"batch", required_argument, NULL, 'b'},
                                            {"page-size", required_argument, NULL, 'p'},
                                            {"formats", required_argument, NULL, 'f'},
                                            {"offload", required_argument, NULL, 'o'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"rounds", required_argument, NULL, 'r'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    static bench b = {.context = 32768, .n_seq = 64, .page_size = 128, .n_rounds = 101};
    b.n_threads = tool_n_cpus();
    b.formats = *tq_preset_get(TQ_PRESET_DEFAULT);
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        bool good = false;
        if (option == 'c') good = tool_parse_int(&b.context, "--context", optarg, 256, 1 << 20);
        if (option == 'b') good = tool_parse_int(&b.n_seq, "--batch", optarg, 1, 1024);
        if (option == 'p') good = tool_parse_int(&b.page_size, "--page-size", optarg, 16, 256);
        if (option == 'o') good = (b.offload_folder = optarg) != NULL;
        if (option == 'f') good = bench_parse_formats(&b.formats, optarg);
        if (option == 't') good = tool_parse_int(&b.n_threads, "--threads", optarg, 1, 256);
        if (option == 'r') good = tool_parse_int(&b.n_rounds, "--rounds", optarg, 1, ROUNDS_MAX);
        if (option == 'h') {
            fputs(help, stdout);
            return 0;
        }
        if (!good) return EXIT_USAGE;
    }
    if (optind < argc) return tool_error(EXIT_USAGE, "unexpected argument '%s'; see 'tq cache bench --help'", argv[optind]);
    tq_pool *pool = NULL;
    tq_status status = tq_pool_create(&pool, (int32_t)b.n_threads);
    size_t n_q = (size_t)b.n_seq * N_HEAD * HEAD_DIM;
    b.rows = malloc((size_t)CHUNK * ROW * sizeof *b.rows);
    b.q = malloc(n_q * sizeof *b.q);
    b.out = malloc(n_q * sizeof *b.out);
    b.seqs = calloc((size_t)b.n_seq, sizeof *b.seqs);
    if (status == TQ_OK && !(b.rows && b.q && b.out && b.seqs)) status = TQ_ERR_MEMORY;
    if (status == TQ_OK) {
        for (int i = 0; i < CHUNK * ROW; i++) b.rows[i] = (float)rand() / (float)RAND_MAX - 0.5f;
        for (size_t i = 0; i < n_q; i++) b.q[i] = (float)rand() / (float)RAND_MAX - 0.5f;
        b.executor = tq_pool_executor(pool);
        status = run(&b);
    }
    tq_cache_free(b.cache);
    tq_cache_free(b.offloaded);
    for (int side = 0; side < 2; side++) tq_store_close(b.stores[side]);
    tq_pool_free(pool);
    for (int side = 0; side < 2; side++) free(b.memory[side]);
    free(b.rows);
    free(b.q);
    free(b.out);
    free(b.seqs);
    return status == TQ_OK ? 0 : tool_error(1, "cache bench: %s", tq_status_string(status));
}
