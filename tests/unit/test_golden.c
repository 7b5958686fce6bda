/* SPDX-License-Identifier: MIT */
/*
 * Golden files: what version 1 of each format stores for fixed inputs. Every later version must read them back, and
 * write the same bytes unless the encoder was changed on purpose. tests/golden/codec_<format>.txt is a line of header, then
 * lines of head_dim, input number and the record in hexadecimal.
 *
 * `test_golden --write` makes the files that are missing (for a new format) and never changes one that exists.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/cpu.h"
#include "base/random.h"
#include "codec/codec.h"
#include "kernels/kernels.h"

#define GOLDEN_DIR "tests/golden" /* tests run in the root of the source tree */

enum { D = TQ_HEAD_DIM_MAX, BYTES_MAX = 2 * D + 4, FORMAT_VERSION = 1 };

static const int32_t head_dims[] = {64, 96, 128, 576};
enum { N_HEAD_DIMS = sizeof(head_dims) / sizeof(head_dims[0]) };

enum { INPUT_ZERO, INPUT_NORMAL, INPUT_OUTLIER, INPUT_TINY, INPUT_LARGE, INPUT_ONE_HOT, INPUT_FLAT, N_INPUTS };

/* Integers and powers of two alone, so that the inputs are the same everywhere. */
static void golden_input(int input, int32_t head_dim, float *x)
{
    tq_random random = tq_random_stream(UINT64_C(0x676f6c64656e), (uint64_t)head_dim << 8 | (uint64_t)input);
    int32_t channel = (int32_t)(tq_random_next(&random) % (uint64_t)head_dim);
    for (int32_t i = 0; i < head_dim; i++) {
        int32_t sum = 0; /* nearly normal */
        for (int draw = 0; draw < 3; draw++) {
            uint64_t bits = tq_random_next(&random);
            for (int part = 0; part < 4; part++) sum += (int32_t)(bits >> (16 * part) & 0xffffu);
        }
        float normal = (float)(sum - 6 * 65535) * 0x1p-16f;
        switch (input) {
        case INPUT_NORMAL:
            x[i] = normal;
            break;
        case INPUT_OUTLIER:
            x[i] = i == channel ? normal * 128.0f : normal;
            break;
        case INPUT_TINY:
            x[i] = normal * 0x1p-12f;
            break;
        case INPUT_LARGE:
            x[i] = normal * 0x1p+12f;
            break;
        case INPUT_ONE_HOT:
            x[i] = i == channel ? 0.75f : 0.0f;
            break;
        case INPUT_FLAT:
            x[i] = normal < 0.0f ? -1.25f : 1.25f;
            break;
        default:
            x[i] = 0.0f;
            break;
        }
    }
}

static tq_kernels kernels; /* those under test */

static tq_codec *make_codec(tq_format format, int32_t head_dim)
{
    tq_codec *codec = NULL;
    assert_int_equal(tq_codec_create(&codec, format, head_dim, TQ_SEED_DEFAULT), TQ_OK);
    codec->kernels = &kernels;
    return codec;
}

/*
 * How often a format's encoder has been changed to give other codes: from then on there is one more file, and the older ones,
 * which lie about in snapshots and caches, are still read.
 */
static int n_encoders(tq_format format)
{
    return tq_format_traits_get(format)->family == TQ_FAMILY_TRELLIS ? 2 : 1;
}

static void golden_path(const char *name, int encoder, char path[128])
{
    char suffix[16] = "";
    if (encoder > 1) snprintf(suffix, sizeof suffix, "_%d", encoder);
    snprintf(path, 128, GOLDEN_DIR "/codec_%s%s.txt", name, suffix);
}

static void golden_header(const char *name, char header[128])
{
    snprintf(header, 128, "turboquant codec golden file: format %s, version %d\n", name, FORMAT_VERSION);
}

static int write_format(tq_format format)
{
    const char *name = tq_format_traits_get(format)->name;
    char path[128], header[128];
    golden_path(name, n_encoders(format), path);
    golden_header(name, header);
    FILE *file = fopen(path, "wx"); /* fails if it exists */
    if (file == NULL) {
        printf("%s: kept (it exists, or the folder can't be written)\n", path);
        return 0;
    }
    fputs(header, file);
    for (int d = 0; d < N_HEAD_DIMS; d++) {
        tq_codec *codec = make_codec(format, head_dims[d]);
        for (int input = 0; input < N_INPUTS; input++) {
            float x[D];
            uint8_t bytes[BYTES_MAX];
            golden_input(input, head_dims[d], x);
            assert_int_equal(tq_codec_encode(codec, x, 1, bytes), TQ_OK);
            fprintf(file, "%d %d ", head_dims[d], input);
            for (size_t i = 0; i < tq_codec_vector_bytes(codec); i++) fprintf(file, "%02x", bytes[i]);
            fputc('\n', file);
        }
        tq_codec_free(codec);
    }
    printf("%s: written\n", path);
    return fclose(file);
}

static size_t parse_hex(const char *text, uint8_t *bytes)
{
    size_t n = 0;
    unsigned byte;
    while (n < BYTES_MAX && sscanf(text + 2 * n, "%2x", &byte) == 1) bytes[n++] = (uint8_t)byte;
    return n;
}

/* Relative squared error that decoding may show; it only has to tell a decoder that works from one that does not. */
static double error_limit(const tq_format_traits *traits)
{
    if (traits->family == TQ_FAMILY_TRELLIS) return 0.5 * pow(0.25, traits->bits - 1);
    if (traits->family == TQ_FAMILY_PROD) return 4.0 * traits->lloyd_max;
    return traits->codebook == NULL ? 2e-4 : 2.0 * traits->lloyd_max;
}

static void check_decoding(const tq_codec *codec, const uint8_t *bytes, const float *x)
{
    float decoded[D];
    assert_int_equal(tq_codec_decode(codec, bytes, 1, decoded), TQ_OK);
    double error = 0.0, square = 0.0;
    for (int32_t i = 0; i < codec->head_dim; i++) {
        error += pow((double)decoded[i] - (double)x[i], 2);
        square += pow((double)x[i], 2);
    }
    if (error > error_limit(codec->traits) * square) {
        fail_msg("%s at head_dim %d: relative squared error %g", codec->traits->name, codec->head_dim, error / square);
    }
}

static void check_line(tq_format format, bool is_current, char *line, int32_t head_dim, int input)
{
    int file_head_dim, file_input, hex_at;
    assert_int_equal(sscanf(line, "%d %d %n", &file_head_dim, &file_input, &hex_at), 2);
    assert_int_equal(file_head_dim, head_dim);
    assert_int_equal(file_input, input);
    tq_codec *codec = make_codec(format, head_dim);
    float x[D];
    uint8_t golden[BYTES_MAX], bytes[BYTES_MAX];
    golden_input(input, head_dim, x);
    assert_int_equal(parse_hex(line + hex_at, golden), tq_codec_vector_bytes(codec));
    assert_int_equal(tq_codec_encode(codec, x, 1, bytes), TQ_OK);
    if (is_current && memcmp(golden, bytes, tq_codec_vector_bytes(codec)) != 0) {
        fail_msg("%s at head_dim %d: input %d is encoded differently", codec->traits->name, head_dim, input);
    }
    check_decoding(codec, golden, x);
    tq_codec_free(codec);
}

static void check_file(tq_format format, int encoder)
{
    static char line[2 * BYTES_MAX + 64];
    char path[128], header[128];
    golden_path(tq_format_traits_get(format)->name, encoder, path);
    golden_header(tq_format_traits_get(format)->name, header);
    FILE *file = fopen(path, "r");
    if (file == NULL) fail_msg("%s is missing: run test_golden --write", path);
    assert_non_null(fgets(line, sizeof(line), file));
    assert_string_equal(line, header);
    for (int d = 0; d < N_HEAD_DIMS; d++) {
        for (int input = 0; input < N_INPUTS; input++) {
            assert_non_null(fgets(line, sizeof(line), file));
            check_line(format, encoder == n_encoders(format), line, head_dims[d], input);
        }
    }
    assert_null(fgets(line, sizeof(line), file));
    fclose(file);
}

static void check_files(void)
{
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        for (int encoder = 1; encoder <= n_encoders((tq_format)format); encoder++) check_file((tq_format)format, encoder);
    }
}

static void test_golden_on_every_instruction_set(void **state)
{
    (void)state;
    int n_levels;
    const tq_cpu_level *levels = tq_cpu_levels(&n_levels);
    for (int i = 0; i < n_levels; i++) {
        if ((levels[i].flags & ~tq_cpu_detect()) != 0) continue;
        print_message("%s\n", levels[i].name);
        tq_kernels_init(&kernels, levels[i].flags);
        check_files();
    }
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--write") == 0) {
        tq_kernels_init(&kernels, 0); /* the specification's */
        for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
            if (write_format((tq_format)format) != 0) return EXIT_FAILURE;
        }
        return EXIT_SUCCESS;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_golden_on_every_instruction_set)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
