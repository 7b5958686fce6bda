/* SPDX-License-Identifier: MIT */
/*
 * The driver of checkkern: the table of operations with their tolerances, the walk over instruction sets and shapes, the
 * comparison, the benchmark. `checkkern --help` lists the options; docs/adding-a-kernel.md says how to add an operation.
 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cpu.h"
#include "checkkern.h"

#define FORMAT_OP(member) offsetof(tq_format_kernels, member), true
#define PLAIN_OP(member) offsetof(tq_kernels, member), false

// clang-format off
/* name, pointer, depends on n_row, tolerances (see op.bound) */
static const op ops[] = {
    {"encode",          FORMAT_OP(encode),         false, 0,    0,    setup_encode, NULL, run_encode},
    {"expand",          FORMAT_OP(expand),         false, 0,    0,    setup_expand, NULL, run_expand},
    {"prepare",         FORMAT_OP(prepare),        false, 0,    0,    setup_prepare, NULL, run_prepare},
    {"finish",          FORMAT_OP(finish),         false, 1e-6, 1e-6, setup_finish, NULL, run_finish},
    {"score",           FORMAT_OP(score),          true,  1e-6, 2e-5, setup_score, NULL, run_score},
    {"accumulate",      FORMAT_OP(accumulate),     true,  2e-6, 3e-4, setup_accumulate, reset_accumulate, run_accumulate},
    {"score_f32",       PLAIN_OP(score_f32),       true,  1e-6, 1e-6, setup_score, NULL, run_score_f32},
    {"accumulate_f32",  PLAIN_OP(accumulate_f32),  true,  2e-6, 2e-6, setup_accumulate, reset_accumulate, run_accumulate_f32},
    {"row_max",         PLAIN_OP(row_max),         false, 0,    0,    setup_row_max, NULL, run_row_max},
    {"row_exp",         PLAIN_OP(row_exp),         false, 2e-6, 2e-6, setup_row_exp, reset_row, run_row_exp},
    {"row_softcap",     PLAIN_OP(row_softcap),     false, 2e-6, 2e-6, setup_row_softcap, reset_row, run_row_softcap},
    {"row_mask_f16",    PLAIN_OP(row_mask_f16),    false, 1e-6, 1e-6, setup_row_mask, reset_row, run_row_mask},
    {"half_from_float", PLAIN_OP(half_from_float), false, 0,    0,    setup_half, NULL, run_half},
    {"transform_key",   PLAIN_OP(transform_key),   true,  0,    0,    setup_transform_key, NULL, run_transform_key},
    {"transform_query", PLAIN_OP(transform_query), true,  1e-5, 1e-5, setup_transform_query, NULL, run_transform_query},
    {"all_finite",      PLAIN_OP(all_finite),      false, 0,    0,    setup_all_finite, NULL, run_all_finite},
    {"whole_scale",     PLAIN_OP(whole_scale),     false, 0,    0,    setup_whole_scale, NULL, run_whole_scale},
};
// clang-format on
enum { N_OPS = sizeof(ops) / sizeof(ops[0]) };

static const int64_t lengths[] = {0, 1, 2, 3, 7, 16, 33, 133};
static const int64_t row_counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 64};
enum { N_LENGTHS = sizeof(lengths) / sizeof(lengths[0]), N_ROW_COUNTS = sizeof(row_counts) / sizeof(row_counts[0]) };
enum { HEAD_DIMS_MAX = 16 };

typedef struct options {
    uint64_t seed;
    const char *op, *isa;
    bool list, bench, csv, quick;
} options;

static env state;
static options opt = {1, NULL, NULL, false, false, false, false};
static tq_codec codecs[TQ_FORMAT_COUNT][HEAD_DIMS_MAX];
static int32_t head_dims[HEAD_DIMS_MAX]; /* those that instruction sets have kernels for */
static int32_t n_head_dims;
static int n_passed, n_failed;

static const char *format_name(tq_format format)
{
    return tq_format_traits_get(format)->name;
}

/* ---- comparison --------------------------------------------------------------------------------------------------- */

static sigjmp_buf crash_jump;
static volatile sig_atomic_t crash_armed;

static void on_crash(int number)
{
    if (crash_armed) siglongjmp(crash_jump, number);
    signal(number, SIG_DFL);
    raise(number);
}

static void catch_crashes(void)
{
    const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction action = {.sa_handler = on_crash};
    for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++) sigaction(signals[i], &action, NULL);
}

/* Run the kernel under test; 0, or the signal that it died of. */
static int run_guarded(const op *o, const tq_kernels *kernels)
{
    int number = sigsetjmp(crash_jump, 1);
    if (number == 0) {
        crash_armed = 1;
        o->run(&state, kernels, 1);
    }
    crash_armed = 0;
    return number;
}

static double bound_of(const op *o)
{
    if (!state.codec) return o->bound;
    tq_family family = state.codec->traits->family;
    return family == TQ_FAMILY_UNIFORM || family == TQ_FAMILY_TRELLIS ? o->bytes_bound : o->bound;
}

/* NULL, or what is wrong with output i. */
static const char *compare_output(const op *o, int i, char *text, size_t text_bytes)
{
    const arena *want = &state.out[0][i], *got = &state.out[1][i];
    if (!arena_intact(got)) return "wrote outside of its output";
    if (o->bound == 0.0) return memcmp(want->data, got->data, want->bytes) == 0 ? NULL : "differs from the specification";
    for (size_t k = 0; k < want->bytes / sizeof(float); k++) {
        float w, g;
        memcpy(&w, want->data + k * sizeof(float), sizeof(float));
        memcpy(&g, got->data + k * sizeof(float), sizeof(float));
        if (w == g || (isnan(w) && isnan(g))) continue;
        double norm = state.has_norms ? state.norm[k] : fabs((double)w), error = fabs((double)g - (double)w);
        if (error <= bound_of(o) * norm && isfinite(norm)) continue;
        if (state.has_norms && error <= 1e-37) continue; /* subnormal products */
        snprintf(text, text_bytes, "element %zu is %.9g, should be %.9g: error %.3g of the norm", k, (double)g, (double)w,
                 error / norm);
        return text;
    }
    return NULL;
}

static void start_shape(const op *o, const shape *s, int i_head_dim)
{
    for (int i = 0; i < N_OUTPUTS; i++) {
        for (int which = 0; which < 2; which++) arena_take(&state.out[which][i], 0, 1, PLACE_ODD);
    }
    state.shape = *s;
    state.codec = o->has_format ? &codecs[s->format][i_head_dim] : NULL;
    state.has_norms = false;
    o->setup(&state);
    for (int which = 0; which < 2; which++) {
        if (o->reset) o->reset(&state, which);
    }
}

/* One case; false, with a message, if the kernel fails it. */
static bool check_shape(const char *isa, const op *o, const tq_kernels *reference, const tq_kernels *kernels, const shape *s,
                        int i_head_dim)
{
    static const char *const places[] = {"start", "end", "odd"};
    static const char *const generators[] = {"zero", "tiny", "huge", "normal", "outlier"};
    char text[160];
    start_shape(o, s, i_head_dim);
    o->run(&state, reference, 0);
    const bool has_tiles = strcmp(isa, "amx") == 0;
    if (has_tiles) tiles_configure();
    int number = run_guarded(o, kernels);
    const char *problem = NULL;
    if (number != 0) {
        snprintf(text, sizeof(text), "died of signal %d (%s)", number, number == SIGILL ? "illegal instruction" : "bad access");
        problem = text;
    } else if (has_tiles && !tiles_kept()) {
        problem = "left other tiles configured than it found";
    }
    for (int i = 0; problem == NULL && i < N_OUTPUTS; i++) problem = compare_output(o, i, text, sizeof(text));
    if (problem == NULL) return true;
    printf("%s %s %s: head_dim %d, n %lld, n_row %lld, gap %lld, inputs %s, buffers %s, seed %llu: %s\n", isa, o->name,
           o->has_format ? format_name(s->format) : "-", s->head_dim, (long long)s->n, (long long)s->n_row, (long long)s->gap,
           generators[s->generator], places[s->placement], (unsigned long long)opt.seed, problem);
    return false;
}

static int64_t pick(const int64_t *list, size_t n)
{
    return list[random_bits(&state) % n];
}

/* All cases of one entry of the table. Sets *n_cases. */
static bool check_entry(const char *isa, const op *o, const tq_kernels *reference, const tq_kernels *kernels, tq_format format,
                        int *n_cases)
{
    bool needs_head_dim = o->has_format || o->has_rows;
    const tq_format_traits *traits = tq_format_traits_get(format);
    state.random = opt.seed;
    *n_cases = 0;
    for (int i = 0; i < (needs_head_dim ? n_head_dims : 4); i++) {
        if (opt.quick && o->has_format && (i + (int)format) % 2) continue;
        int32_t head_dim = head_dims[needs_head_dim ? i : 0];
        if (!o->has_format && o->has_rows && i % 2) head_dim *= 2; /* the width of a product format */
        int n_sizes = N_LENGTHS + (o->has_rows ? N_ROW_COUNTS : 0);
        for (int size = 0; size < n_sizes; size++) {
            for (int variant = 0; variant < GEN_COUNT * PLACE_COUNT; variant++) {
                /* Every size in every placement; the generators of large cases take turns. */
                if (o->has_rows && (variant / PLACE_COUNT + size + i) % GEN_COUNT != 0) continue;
                if (opt.quick && variant % 4 != (size + i) % 4) continue;
                shape s = {format, head_dim, 0, 1, 0, (generator)(variant / PLACE_COUNT), (placement)(variant % PLACE_COUNT)};
                s.n = size < N_LENGTHS ? lengths[size] : pick(lengths, N_LENGTHS);
                if (o->has_rows) s.n_row = size < N_LENGTHS ? pick(row_counts, 8) : row_counts[size - N_LENGTHS];
                if (!needs_head_dim) s.n = s.n * (i + 1) + (int64_t)(random_bits(&state) % 16) * (s.n > 0);
                /* The specification's search takes some 50 us a vector. */
                if (o->setup == setup_encode && traits->family == TQ_FAMILY_TRELLIS) s.n %= 4;
                s.gap = random_bits(&state) % 2 ? 3 : 0;
                (*n_cases)++;
                if (!check_shape(isa, o, reference, kernels, &s, i)) return false;
            }
        }
    }
    return true;
}

/* ---- benchmark ---------------------------------------------------------------------------------------------------- */

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct timing {
    double min, median; /* ns per vector, or per element of a row */
} timing;

static timing measure(const op *o, const tq_kernels *kernels, int64_t n)
{
    enum { SAMPLES = 25 };
    const double sample_seconds = 1e-4;
    double samples[SAMPLES];
    int repeat = 1;
    for (;; repeat *= 2) { /* also warms up */
        double begin = seconds();
        for (int k = 0; k < repeat; k++) o->run(&state, kernels, 1);
        if (seconds() - begin >= sample_seconds) break;
    }
    for (int i = 0; i < SAMPLES; i++) {
        if (o->reset) o->reset(&state, 1);
        double begin = seconds();
        for (int k = 0; k < repeat; k++) o->run(&state, kernels, 1);
        samples[i] = (seconds() - begin) * 1e9 / (double)repeat / (double)n;
    }
    qsort(samples, SAMPLES, sizeof(samples[0]), by_size);
    return (timing){samples[0], samples[SAMPLES / 2]};
}

static void bench_entry(const char *isa, const op *o, const tq_kernels *reference, const tq_kernels *kernels, tq_format format)
{
    enum { BENCH_HEAD_DIM = 128, BENCH_VECTORS = 64, BENCH_ELEMENTS = 1024 };
    const int64_t bench_rows[] = {1, 4, 8, 64};
    int i_head_dim = 0;
    while (head_dims[i_head_dim] != BENCH_HEAD_DIM) i_head_dim++;
    int64_t n = o->has_format || o->has_rows ? BENCH_VECTORS : BENCH_ELEMENTS;
    for (int i = 0; i < (o->has_rows ? 4 : 1); i++) {
        shape s = {format, BENCH_HEAD_DIM, n, bench_rows[i], 0, GEN_NORMAL, PLACE_START};
        state.random = opt.seed;
        start_shape(o, &s, i_head_dim);
        timing scalar = measure(o, reference, state.shape.n), t = measure(o, kernels, state.shape.n);
        printf(opt.csv ? "%s,%s,%s,%d,%lld,%.3f,%.3f,%.2f\n"
                       : "%-8s %-16s %-5s head_dim %d  n_row %2lld  min %9.3f  median %9.3f ns  %7.2f x scalar\n",
               isa, o->name, o->has_format ? format_name(format) : "-", BENCH_HEAD_DIM, (long long)s.n_row, t.min, t.median,
               scalar.min / t.min);
    }
}

/* ---- the walk ------------------------------------------------------------------------------------------------------ */

static const void *entry_pointer(const tq_kernels *kernels, const op *o, tq_format format)
{
    const char *table = o->has_format ? (const char *)&kernels->format[format] : (const char *)kernels;
    return table + o->offset;
}

static bool entries_differ(const tq_kernels *a, const tq_kernels *b, const op *o, tq_format format)
{
    return memcmp(entry_pointer(a, o, format), entry_pointer(b, o, format), sizeof(void (*)(void))) != 0;
}

static void visit_entry(const char *isa, const op *o, const tq_kernels *reference, const tq_kernels *kernels, tq_format format)
{
    const char *name = o->has_format ? format_name(format) : "-";
    if (opt.list) {
        printf("%-8s %-16s %s\n", isa, o->name, name);
    } else if (opt.bench) {
        bench_entry(isa, o, reference, kernels, format);
    } else {
        int n_cases;
        bool ok = check_entry(isa, o, reference, kernels, format, &n_cases);
        printf("%-8s %-16s %-5s %s (%d cases)\n", isa, o->name, name, ok ? "ok" : "FAILED", n_cases);
        *(ok ? &n_passed : &n_failed) += 1;
    }
    fflush(stdout);
}

/* All entries that are not what a lower instruction set has. */
static void visit_level(const char *isa, const tq_kernels *reference, const tq_kernels *below, const tq_kernels *kernels)
{
    for (int i = 0; i < N_OPS; i++) {
        if (opt.op && strcmp(opt.op, ops[i].name) != 0) continue;
        for (int format = 0; format < (ops[i].has_format ? TQ_FORMAT_COUNT : 1); format++) {
            if (!entries_differ(below, kernels, &ops[i], (tq_format)format)) continue;
            visit_entry(isa, &ops[i], reference, kernels, (tq_format)format);
        }
    }
}

static void visit_levels(void)
{
    tq_kernels reference, below, kernels;
    int n_levels;
    const tq_cpu_level *levels = tq_cpu_levels(&n_levels);
    tq_kernels_init(&reference, 0);
    below = reference;
    for (int i = 0; i < n_levels; i++, below = kernels) {
        tq_kernels_init(&kernels, levels[i].flags); /* filling a table needs no instruction set */
        if ((levels[i].flags & ~tq_cpu_detect()) != 0) {
            printf("%-8s not on this machine\n", levels[i].name);
            continue;
        }
        if (opt.isa && strcmp(opt.isa, levels[i].name) != 0) continue;
        visit_level(levels[i].name, &reference, &below, &kernels);
    }
}

/* ---- options ------------------------------------------------------------------------------------------------------- */

static void usage(FILE *to)
{
    fputs("checkkern - compare every kernel with the scalar specification\n"
          "  --op NAME    one operation        --isa NAME   one instruction set\n"
          "  --seed N     of the inputs        --list       name what would be checked\n"
          "  --quick      a quarter of the cases, of a format at every other head_dim, for emulators\n"
          "  --bench      times: ns per vector (per element of a row), minimum and median, against scalar\n"
          "  --csv        times as CSV: isa,op,format,head_dim,n_row,min_ns,median_ns,speedup\n"
          "  --help       this text\n",
          to);
}

static int bad_option(const char *what, const char *name)
{
    fprintf(stderr, "checkkern: %s %s\n", what, name);
    usage(stderr);
    return 2;
}

static bool is_op(const char *name)
{
    for (int i = 0; i < N_OPS; i++) {
        if (strcmp(name, ops[i].name) == 0) return true;
    }
    return false;
}

static bool is_isa(const char *name)
{
    int n;
    const tq_cpu_level *levels = tq_cpu_levels(&n);
    for (int i = 0; i < n; i++) {
        if (strcmp(name, levels[i].name) == 0) return true;
    }
    return false;
}

/* 0, or the exit status plus 1. */
static int parse_options(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        bool takes_value = strcmp(argv[i], "--op") == 0 || strcmp(argv[i], "--isa") == 0 || strcmp(argv[i], "--seed") == 0;
        if (takes_value && value == NULL) return 1 + bad_option("a value is missing after", argv[i]);
        if (strcmp(argv[i], "--help") == 0) {
            usage(stdout);
            return 1;
        }
        if (strcmp(argv[i], "--op") == 0) {
            if (!is_op(value)) return 1 + bad_option("no operation", value);
            opt.op = value;
        } else if (strcmp(argv[i], "--isa") == 0) {
            if (!is_isa(value)) return 1 + bad_option("no instruction set", value);
            opt.isa = value;
        } else if (strcmp(argv[i], "--seed") == 0) {
            char *end;
            errno = 0;
            opt.seed = strtoull(value, &end, 0);
            if (errno != 0 || end == value || *end != '\0') return 1 + bad_option("not a seed:", value);
        } else if (strcmp(argv[i], "--list") == 0) {
            opt.list = true;
        } else if (strcmp(argv[i], "--quick") == 0) {
            opt.quick = true;
        } else if (strcmp(argv[i], "--bench") == 0) {
            opt.bench = true;
        } else if (strcmp(argv[i], "--csv") == 0) {
            opt.csv = true;
        } else {
            return 1 + bad_option("unknown option", argv[i]);
        }
        i += takes_value;
    }
    return opt.csv && !opt.bench ? 1 + bad_option("--csv needs", "--bench") : 0;
}

int main(int argc, char **argv)
{
    int stop = parse_options(argc, argv);
    if (stop != 0) return stop - 1;
    int32_t n_supported;
    const int32_t *supported = tq_supported_head_dims(&n_supported);
    for (int i = 0; i < n_supported; i++) {
        if (supported[i] % TQ_KERNELS_STEP == 0 && n_head_dims < HEAD_DIMS_MAX) head_dims[n_head_dims++] = supported[i];
    }
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        for (int i = 0; i < n_head_dims; i++) {
            if (tq_codec_init(&codecs[format][i], (tq_format)format, head_dims[i], TQ_SEED_DEFAULT) == TQ_OK) continue;
            fprintf(stderr, "checkkern: no codec %s at head_dim %d\n", format_name((tq_format)format), head_dims[i]);
            return 2;
        }
    }
    for (int i = 0; i < N_INPUTS; i++) arena_init(&state.in[i]);
    for (int i = 0; i < 2 * N_OUTPUTS; i++) arena_init(&state.out[i / N_OUTPUTS][i % N_OUTPUTS]);
    catch_crashes();
    visit_levels();
    for (int i = 0; i < TQ_FORMAT_COUNT * n_head_dims; i++) tq_codec_deinit(&codecs[i / n_head_dims][i % n_head_dims]);
    if (!opt.list && !opt.bench) printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
