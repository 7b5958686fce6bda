/* SPDX-License-Identifier: MIT */
/*
 * tq distortion: the error of a format on Gaussian vectors, beside what theory says. Two figures, because they answer two
 * questions: `mse` is the codebook's own error, which theory knows; `mse_vector` is that of whole vectors through the codec,
 * which is what a cache returns.
 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tq.h"

static const char help[] =
    "usage: tq distortion --format F --head-dim D [--n N] [--seed S] [--json]\n\n"
    "Measure the relative squared error of a format on N random vectors of D independent N(0,1) values.\n\n"
    "  --format F     as 'tq formats' lists them\n"
    "  --head-dim D\n"
    "  --n N          vectors (16384)\n"
    "  --seed S       of the random vectors (1)\n"
    "  --json         an object: format, head_dim, n, seed, mse, mse_vector, lloyd_max, shannon\n\n"
    "mse         of the codebook only: each value to its nearest centroid, sum of squared errors by sum of squares.\n"
    "            (The rotation leaves such vectors as they are distributed, so it has no part in this figure.)\n"
    "            A format without a codebook has no such figure; mse is then mse_vector.\n"
    "mse_vector  of whole vectors through encode and decode: rotation, norm, its correction and its rounding to FP16\n"
    "            included. This is what a cache returns.\n"
    "lloyd_max   the theory's value of mse for this codebook; null for a format without one\n"
    "shannon     4^-bits, below which no format of so many bits can be\n";

enum { VECTORS_AT_ONCE = 64 };

typedef struct measurement {
    double error_codebook, error_vector, power;
} measurement;

/* splitmix64 (Steele, Lea, Flood 2014), enough for test data. */
static uint64_t random_next(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* Box and Muller's pairs. n is even, as every head_dim is. */
static void random_normal(uint64_t *state, float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += 2) {
        double u = ((double)(random_next(state) >> 11) + 1) * 0x1p-53, v = (double)(random_next(state) >> 11) * 0x1p-53;
        double radius = sqrt(-2 * log(u)), angle = 2 * 3.14159265358979323846 * v;
        x[i] = (float)(radius * cos(angle));
        x[i + 1] = (float)(radius * sin(angle));
    }
}

static double nearest_error(const tq_format_info *info, float x)
{
    double best = INFINITY;
    for (int32_t i = 0; i < info->n_codebook; i++) {
        double d = (double)x - (double)info->codebook[i];
        if (d * d < best) best = d * d;
    }
    return best;
}

static tq_status measure(measurement *out, const tq_codec *codec, const tq_format_info *info, int64_t n, uint64_t seed)
{
    size_t n_values = (size_t)VECTORS_AT_ONCE * (size_t)info->head_dim;
    float *x = malloc(n_values * sizeof *x), *y = malloc(n_values * sizeof *y);
    void *bytes = malloc(VECTORS_AT_ONCE * info->bytes_per_vector);
    tq_status status = x && y && bytes ? TQ_OK : TQ_ERR_MEMORY;
    measurement m = {0};
    for (int64_t first = 0; first < n && status == TQ_OK; first += VECTORS_AT_ONCE) {
        int64_t n_now = n - first < VECTORS_AT_ONCE ? n - first : VECTORS_AT_ONCE;
        random_normal(&seed, x, n_now * info->head_dim);
        status = tq_codec_encode(codec, x, n_now, bytes);
        if (status == TQ_OK) status = tq_codec_decode(codec, bytes, n_now, y);
        if (status != TQ_OK) break;
        for (int64_t i = 0; i < n_now * info->head_dim; i++) {
            double d = (double)x[i] - (double)y[i];
            m.power += (double)x[i] * (double)x[i];
            m.error_vector += d * d;
            if (info->codebook) m.error_codebook += nearest_error(info, x[i]);
        }
    }
    free(bytes);
    free(y);
    free(x);
    if (status == TQ_OK) *out = m;
    return status;
}

static int print_result(const tq_format_info *info, const measurement *m, int64_t n, int64_t seed, bool json)
{
    double mse_vector = m->error_vector / m->power;
    double mse = info->codebook ? m->error_codebook / m->power : mse_vector;
    double shannon = pow(4, -info->bits);
    if (!json) {
        printf("format       %s, head_dim %d, %.3f bits per value\n", info->name, info->head_dim, info->bits_per_value);
        printf("mse          %.6g\n", mse);
        printf("mse_vector   %.6g\n", mse_vector);
        if (info->codebook) printf("lloyd_max    %.6g\n", info->lloyd_max);
        printf("shannon      %.6g\n", shannon);
        return 0;
    }
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "format", info->name);
    cJSON_AddNumberToObject(object, "head_dim", info->head_dim);
    cJSON_AddNumberToObject(object, "n", (double)n);
    cJSON_AddNumberToObject(object, "seed", (double)seed);
    cJSON_AddNumberToObject(object, "mse", mse);
    cJSON_AddNumberToObject(object, "mse_vector", mse_vector);
    if (info->codebook)
        cJSON_AddNumberToObject(object, "lloyd_max", info->lloyd_max);
    else
        cJSON_AddNullToObject(object, "lloyd_max");
    cJSON_AddNumberToObject(object, "shannon", shannon);
    return tool_print_json(object);
}

static int run(const char *name, int32_t head_dim, int64_t n, int64_t seed, bool json)
{
    tq_format format;
    tq_format_info info;
    if (tq_format_from_name(&format, name) != TQ_OK) {
        return tool_error(1, "unknown format '%s'; 'tq formats' lists them", name);
    }
    tq_codec *codec = NULL;
    measurement m;
    tq_status status = tq_format_describe(&info, format, head_dim);
    if (status == TQ_OK) status = tq_codec_create(&codec, format, head_dim, TQ_SEED_DEFAULT);
    if (status == TQ_OK) status = measure(&m, codec, &info, n, (uint64_t)seed);
    tq_codec_free(codec);
    if (status != TQ_OK) return tool_error(1, "%s at head_dim %d: %s", name, head_dim, tq_status_string(status));
    return print_result(&info, &m, n, seed, json);
}

int cmd_distortion(int argc, char **argv)
{
    static const struct option options[] = {{"format", required_argument, NULL, 'f'},
                                            {"head-dim", required_argument, NULL, 'd'},
                                            {"n", required_argument, NULL, 'n'},
                                            {"seed", required_argument, NULL, 's'},
                                            {"json", no_argument, NULL, 'j'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    const char *format = NULL;
    int32_t head_dim = 0;
    int64_t n = 16384, seed = 1;
    bool json = false;
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case 'f':
            format = optarg;
            break;
        case 'd':
            if (!tool_parse_head_dim(&head_dim, optarg)) return 1;
            break;
        case 'n':
            if (!tool_parse_int(&n, "--n", optarg, 1, 1 << 28)) return EXIT_USAGE;
            break;
        case 's':
            if (!tool_parse_int(&seed, "--seed", optarg, 0, INT32_MAX)) return EXIT_USAGE;
            break;
        case 'j':
            json = true;
            break;
        case 'h':
            fputs(help, stdout);
            return 0;
        default:
            return EXIT_USAGE;
        }
    }
    if (optind < argc) return tool_error(EXIT_USAGE, "unexpected argument '%s'; see 'tq distortion --help'", argv[optind]);
    if (!format || !head_dim) return tool_error(EXIT_USAGE, "--format and --head-dim are needed; see 'tq distortion --help'");
    return run(format, head_dim, n, seed, json);
}
