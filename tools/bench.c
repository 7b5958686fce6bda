/* SPDX-License-Identifier: MIT */
/* tq bench: how fast attention and encoding are on this machine, beside those of an unpatched ggml. */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_cases.h"

static const char help[] =
    "usage: tq bench attention|prefill|encode [OPTIONS]\n\n"
    "Time one layer's attention of one new token (attention) or of a batch of tokens (prefill) over a cache of N tokens, or "
    "the\n"
    "encoding of vectors, with our formats and, through the unpatched ggml of llama.cpp, with its cache types. All run in "
    "turns\n"
    "on the same random data, each time on another layer's copy, so that nothing is in a CPU cache.\n\n"
    "  --n-head H --n-head-kv K --head-dim D   (40, 8, 128)\n"
    "  --context N           tokens in the cache (8192)\n"
    "  --n-query N           tokens of a batch, the last ones of the context (prefill: 512)\n"
    "  --threads T           (all; encode: 1)\n"
    "  --formats A,B,...     formats (sq4), two for keys and values (tt4/tt3), presets (TQ4)\n"
    "  --baselines A,B,...   cache types of ggml (f16,q8_0,q4_0); 'none' for none\n"
    "  --repeats N           (15; prefill: 5)\n"
    "  --llama-bin DIR       where llama.cpp's programs are\n"
    "  --json                an object: cpu, threads, shape, read_gb_per_s, rows\n\n"
    "A row has the median, least and largest time in microseconds, the bytes of the cache and how fast they were read, as a "
    "share\n"
    "of the speed at which this machine reads memory, the ratio to the time with f16 (above 1: faster), and the relative error "
    "of\n"
    "the output against f16's. For encode the times are those of one vector, the ratio is to ggml's q8_0.\n"
    "TQ_CPU=avx2 (or scalar) limits ours to that instruction set.\n";

typedef struct row {
    const char *name;
    double median, least, most; /* seconds */
    size_t bytes;
    double error; /* relative, of the output against the first baseline; negative: not known */
} row;

typedef struct request {
    const char *what, *llama_bin;
    char *formats, *baselines;
    bench_shape shape;
    bool json;
} request;

static double relative_error(const float *x, const float *expected, size_t n)
{
    double error = 0, square = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)x[i] - (double)expected[i];
        error += d * d;
        square += (double)expected[i] * (double)expected[i];
    }
    return square > 0 ? sqrt(error / square) : 0;
}

static double ratio_of(const row *rows, const row *r, const char *to)
{
    for (int i = 0; i < BENCH_CASES_MAX && rows[i].name; i++) {
        if (strcmp(rows[i].name, to) == 0) return rows[i].median / r->median;
    }
    return -1;
}

static void add_number(cJSON *object, const char *name, double value, bool is_known)
{
    if (is_known)
        cJSON_AddNumberToObject(object, name, value);
    else
        cJSON_AddNullToObject(object, name);
}

static int print_json(const request *r, const row *rows, double bandwidth, const char *ratio_to, const char *ratio_name)
{
    cJSON *object = cJSON_CreateObject(), *array = cJSON_CreateArray();
    cJSON_AddStringToObject(object, "bench", r->what);
    cJSON_AddStringToObject(object, "cpu", tq_cpu_name());
    cJSON_AddNumberToObject(object, "threads", (double)r->shape.n_threads);
    cJSON_AddNumberToObject(object, "n_head", (double)r->shape.n_head);
    cJSON_AddNumberToObject(object, "n_head_kv", (double)r->shape.n_head_kv);
    cJSON_AddNumberToObject(object, "head_dim", r->shape.head_dim);
    cJSON_AddNumberToObject(object, "context", (double)r->shape.n_ctx);
    cJSON_AddNumberToObject(object, "n_query", (double)r->shape.n_query);
    cJSON_AddNumberToObject(object, "repeats", (double)r->shape.repeats);
    add_number(object, "read_gb_per_s", bandwidth * 1e-9, bandwidth > 0);
    cJSON_AddItemToObject(object, "rows", array);
    for (const row *w = rows; w < rows + BENCH_CASES_MAX && w->name; w++) {
        cJSON *item = cJSON_CreateObject();
        double speed = (double)w->bytes / w->median, ratio = ratio_of(rows, w, ratio_to);
        cJSON_AddStringToObject(item, "name", w->name);
        cJSON_AddNumberToObject(item, "us_median", w->median * 1e6);
        cJSON_AddNumberToObject(item, "us_min", w->least * 1e6);
        cJSON_AddNumberToObject(item, "us_max", w->most * 1e6);
        cJSON_AddNumberToObject(item, "bytes", (double)w->bytes);
        cJSON_AddNumberToObject(item, "gb_per_s", speed * 1e-9);
        add_number(item, "bandwidth_share", speed / bandwidth, bandwidth > 0);
        add_number(item, ratio_name, ratio, ratio > 0);
        add_number(item, "error", w->error, w->error >= 0);
        cJSON_AddItemToArray(array, item);
    }
    return tool_print_json(object);
}

static int print_rows(const request *r, const row *rows, double bandwidth, const char *ratio_to)
{
    char name[32];
    if (r->json) {
        snprintf(name, sizeof name, "ratio_vs_%s", ratio_to);
        return print_json(r, rows, bandwidth, ratio_to, name);
    }
    snprintf(name, sizeof name, "x %s", ratio_to);
    printf("%s, %d threads", tq_cpu_name(), (int)r->shape.n_threads);
    if (bandwidth > 0) printf(" that read %.1f GB/s", bandwidth * 1e-9);
    printf("\n%-10s %12s %12s %12s %12s %9s %7s %8s %9s\n", "", "us median", "min", "max", "bytes", "GB/s", "share", name,
           "error");
    for (const row *w = rows; w < rows + BENCH_CASES_MAX && w->name; w++) {
        double speed = (double)w->bytes / w->median, ratio = ratio_of(rows, w, ratio_to);
        printf("%-10s %12.3f %12.3f %12.3f %12zu %9.2f", w->name, w->median * 1e6, w->least * 1e6, w->most * 1e6, w->bytes,
               speed * 1e-9);
        if (bandwidth > 0)
            printf(" %6.0f%%", 100 * speed / bandwidth);
        else
            printf(" %7s", "");
        if (ratio > 0)
            printf(" %8.2f", ratio);
        else
            printf(" %8s", "");
        if (w->error >= 0) printf(" %9.2g", w->error);
        putchar('\n');
    }
    return 0;
}

/* Open a case for each name of a comma-separated list; *n counts on. The list is cut in place. */
static int open_list(bench_case *cases, int *n, const bench_data *data, char *list, bool is_reference)
{
    for (char *save, *name = strtok_r(list, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
        if (*n == BENCH_CASES_MAX) return tool_error(EXIT_USAGE, "more than %d formats and baselines", BENCH_CASES_MAX);
        int code = bench_case_init(&cases[(*n)++], data, name, is_reference);
        if (code) return code;
    }
    return 0;
}

static int time_cases(row *rows, bench_case *cases, int n, bench_data *data)
{
    const bench_shape *s = &data->shape;
    size_t n_out = (size_t)(s->n_query * s->n_head) * (size_t)s->head_dim;
    double *times = calloc((size_t)(n * s->repeats), sizeof *times);
    float *expected = malloc(n_out * sizeof *expected);
    int code = times && expected ? 0 : tool_error(1, "out of memory");
    const float *out;
    for (int i = 0; i < n && !code; i++) {
        /* A first run each: it warms up threads and page tables, and tells how right the result is. */
        if (bench_case_run(&cases[i], data, &out) < 0) code = tool_error(1, "%s: attention failed", cases[i].name);
        if (code) break;
        rows[i] = (row){.name = cases[i].name, .bytes = cases[i].bytes, .error = -1};
        if (i == 0) memcpy(expected, out, n_out * sizeof *expected);
        if (cases[0].is_reference) rows[i].error = relative_error(out, expected, n_out);
    }
    for (int64_t round = 0; round < s->repeats && !code; round++) {
        for (int i = 0; i < n && !code; i++) {
            double seconds = bench_case_run(&cases[i], data, &out);
            if (seconds < 0) code = tool_error(1, "%s: attention failed", cases[i].name);
            times[i * s->repeats + round] = seconds;
        }
    }
    for (int i = 0; i < n && !code; i++)
        bench_summary(times + i * s->repeats, s->repeats, &rows[i].median, &rows[i].least, &rows[i].most);
    free(expected);
    free(times);
    return code;
}

static int run_attention(const request *r)
{
    static bench_case cases[BENCH_CASES_MAX];
    row rows[BENCH_CASES_MAX + 1] = {{0}};
    bench_data data;
    int n = 0, code = bench_data_init(&data, &r->shape, r->llama_bin);
    double bandwidth = code ? 0 : bench_read_bandwidth(&data);
    if (!code && !data.module && strcmp(r->baselines, "none") != 0)
        fprintf(stderr,
                "tq: ggml was not found, so there are no baselines; 'make deps' builds llama.cpp, or give --llama-bin\n");
    if (!code && data.module && strcmp(r->baselines, "none") != 0) code = open_list(cases, &n, &data, r->baselines, true);
    if (!code) code = open_list(cases, &n, &data, r->formats, false);
    if (!code) code = time_cases(rows, cases, n, &data);
    if (!code) code = print_rows(r, rows, bandwidth, "f16");
    for (int i = 0; i < n; i++) bench_case_free(&cases[i], &data);
    bench_data_free(&data);
    return code;
}

enum { ENCODE_VECTORS = 2048 };

static double time_encode(const bench_data *data, const tq_codec *codec, const char *type, void *to)
{
    double begin = bench_now();
    if (codec) {
        if (tq_codec_encode(codec, data->k, ENCODE_VECTORS, to) != TQ_OK) return -1;
    } else if (!data->module->encode(data->ggml_library, type, data->k, ENCODE_VECTORS, data->shape.head_dim, to)) {
        return -1;
    }
    return (bench_now() - begin) / ENCODE_VECTORS;
}

/* One row: all repeats at once, for a few milliseconds are not to be disturbed by the others. */
static int bench_encode_one(row *w, const bench_data *data, const char *name, bool is_reference)
{
    double times[1024];
    tq_codec *codec = NULL;
    tq_format format;
    tq_format_info info = {0};
    void *to = malloc((size_t)ENCODE_VECTORS * (size_t)data->shape.head_dim * sizeof(float));
    *w = (row){.name = name, .error = -1, .bytes = (size_t)data->shape.head_dim * sizeof(float)};
    int code = to ? 0 : tool_error(1, "out of memory");
    if (!code && !is_reference) {
        tq_status status = tq_format_from_name(&format, name);
        if (status == TQ_OK) status = tq_format_describe(&info, format, data->shape.head_dim);
        if (status == TQ_OK) status = tq_codec_create(&codec, format, data->shape.head_dim, TQ_SEED_DEFAULT);
        if (status != TQ_OK) code = tool_error(1, "%s: %s", name, tq_status_string(status));
    }
    for (int64_t i = -1; i < data->shape.repeats && !code; i++) {
        double seconds = time_encode(data, codec, name, to);
        if (seconds < 0) code = tool_error(1, "%s: encoding failed", name);
        if (i >= 0) times[i] = seconds;
    }
    if (!code) bench_summary(times, data->shape.repeats, &w->median, &w->least, &w->most);
    tq_codec_free(codec);
    free(to);
    return code;
}

static int run_encode(const request *r)
{
    row rows[BENCH_CASES_MAX + 1] = {{0}};
    bench_data data;
    int n = 0, code = bench_data_init(&data, &r->shape, r->llama_bin);
    char *lists[2] = {data.module ? r->baselines : NULL, r->formats};
    for (int i = 0; i < 2 && !code; i++) {
        if (!lists[i] || strcmp(lists[i], "none") == 0) continue;
        for (char *save, *name = strtok_r(lists[i], ",", &save); name && !code; name = strtok_r(NULL, ",", &save)) {
            if (n == BENCH_CASES_MAX) code = tool_error(EXIT_USAGE, "more than %d formats and baselines", BENCH_CASES_MAX);
            if (!code) code = bench_encode_one(&rows[n++], &data, name, i == 0);
        }
    }
    if (!code) code = print_rows(r, rows, 0, "q8_0");
    bench_data_free(&data);
    return code;
}

static int check(const request *r)
{
    if (r->shape.n_head % r->shape.n_head_kv) return tool_error(EXIT_USAGE, "--n-head is a multiple of --n-head-kv");
    if (r->shape.n_query > r->shape.n_ctx) return tool_error(EXIT_USAGE, "--n-query is at most --context");
    if (!tq_cpu_name()) return tool_error(1, "TQ_CPU names an instruction set that this machine does not have");
    return 0;
}

int cmd_bench(int argc, char **argv)
{
    static const struct option options[] = {{"n-head", required_argument, NULL, 'H'},
                                            {"n-head-kv", required_argument, NULL, 'K'},
                                            {"head-dim", required_argument, NULL, 'd'},
                                            {"context", required_argument, NULL, 'c'},
                                            {"n-query", required_argument, NULL, 'q'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"formats", required_argument, NULL, 'f'},
                                            {"baselines", required_argument, NULL, 'b'},
                                            {"repeats", required_argument, NULL, 'r'},
                                            {"llama-bin", required_argument, NULL, 'l'},
                                            {"json", no_argument, NULL, 'j'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    static char formats[] = "sq8,sq4,sq3,sq2,tt4,tt3,tt2,TQ6,TQ4,TQ3,TQ2", codecs[] = "sq8,sq4,sq3,sq2,tt4,tt3,tt2";
    static char baselines[] = "f16,q8_0,q4_0";
    request r = {.baselines = baselines, .shape = {.n_head = 40, .n_head_kv = 8, .head_dim = 128, .n_ctx = 8192}};
    if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        fputs(help, stdout);
        return 0;
    }
    bool is_prefill = argc > 1 && strcmp(argv[1], "prefill") == 0, is_encode = argc > 1 && strcmp(argv[1], "encode") == 0;
    if (!is_prefill && !is_encode && (argc < 2 || strcmp(argv[1], "attention") != 0))
        return tool_error(EXIT_USAGE, "tq bench attention, prefill or encode? See 'tq bench --help'");
    r.what = argv[1];
    r.formats = is_encode ? codecs : formats;
    r.shape.n_query = is_prefill ? 512 : 1;
    r.shape.repeats = is_prefill ? 5 : 15;
    r.shape.n_threads = is_encode ? 1 : tool_n_cpus();
    if (is_encode) r.shape.n_ctx = ENCODE_VECTORS;
    int option;
    bool ok = true;
    while ((option = getopt_long(argc - 1, argv + 1, "h", options, NULL)) != -1 && ok) {
        switch (option) {
        case 'H':
            ok = tool_parse_int(&r.shape.n_head, "--n-head", optarg, 1, 1024);
            break;
        case 'K':
            ok = tool_parse_int(&r.shape.n_head_kv, "--n-head-kv", optarg, 1, 1024);
            break;
        case 'd':
            if (!tool_parse_head_dim(&r.shape.head_dim, optarg)) return 1;
            break;
        case 'c':
            ok = tool_parse_int(&r.shape.n_ctx, "--context", optarg, 1, 1 << 24);
            break;
        case 'q':
            ok = tool_parse_int(&r.shape.n_query, "--n-query", optarg, 1, 1 << 16);
            break;
        case 't':
            ok = tool_parse_int(&r.shape.n_threads, "--threads", optarg, 1, 256);
            break;
        case 'f':
            r.formats = optarg;
            break;
        case 'b':
            r.baselines = optarg;
            break;
        case 'r':
            ok = tool_parse_int(&r.shape.repeats, "--repeats", optarg, 1, 1000);
            break;
        case 'l':
            r.llama_bin = optarg;
            break;
        case 'j':
            r.json = true;
            break;
        case 'h':
            fputs(help, stdout);
            return 0;
        default:
            ok = false;
        }
    }
    if (!ok) return EXIT_USAGE;
    if (optind + 1 < argc) return tool_error(EXIT_USAGE, "unexpected argument '%s'; see 'tq bench --help'", argv[optind + 1]);
    int code = check(&r);
    if (code) return code;
    return is_encode ? run_encode(&r) : run_attention(&r);
}
