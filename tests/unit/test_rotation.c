/* SPDX-License-Identifier: MIT */
/*
 * The rotation against a dense matrix built in double straight from the definition in docs/formats.md, and what it is for:
 * orthonormal, invertible, and making outlier vectors look Gaussian.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "codec/codec.h"
#include "vectors.h"

enum { D = TQ_HEAD_DIM_MAX };

/* Element (i, j) of one round without signs. */
static double dense_element(int32_t m, int32_t pow2, int32_t i, int32_t j)
{
    int32_t a = i / pow2, b = j / pow2;
    double angle = 2.0 * 3.14159265358979323846 * (a * b % m) / m;
    double hartley = (cos(angle) + sin(angle)) / sqrt(m);
    int parity = __builtin_popcount((unsigned)(i % pow2) & (unsigned)(j % pow2)) % 2;
    return hartley * (parity ? -1.0 : 1.0) / sqrt(pow2);
}

/* The sign of element i in a round, from scratch. */
static double dense_sign(uint64_t seed, int32_t head_dim, int32_t round, int32_t i)
{
    uint64_t z = 0, state = seed ^ ((uint64_t)head_dim << 32) ^ (uint64_t)round;
    for (int32_t output = -1; output <= i / 64; output++) {
        state = output == 0 ? z : state;
        state += UINT64_C(0x9e3779b97f4a7c15);
        z = (state ^ (state >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
        z ^= z >> 31;
    }
    return (z >> (i % 64) & 1u) ? -1.0 : 1.0;
}

static void dense_forward(int32_t n, uint64_t seed, const float *x, double *y)
{
    int32_t m = n;
    while (m % 2 == 0) m /= 2;
    double in[D];
    for (int32_t i = 0; i < n; i++) y[i] = (double)x[i];
    for (int32_t round = 0; round < (n < 64 ? 3 : n < 128 ? 2 : 1); round++) {
        for (int32_t i = 0; i < n; i++) in[i] = y[i] * dense_sign(seed, n, round, i);
        for (int32_t i = 0; i < n; i++) {
            y[i] = 0.0;
            for (int32_t j = 0; j < n; j++) y[i] += dense_element(m, n / m, i, j) * in[j];
        }
    }
}

typedef void (*each_fn)(const tq_rotation *rotation);

static void each_head_dim(uint64_t seed, each_fn check)
{
    int32_t n;
    const int32_t *head_dims = tq_supported_head_dims(&n);
    assert_int_equal(n, 17);
    for (int32_t i = 0; i < n; i++) {
        tq_rotation rotation;
        tq_rotation_init(&rotation, head_dims[i], seed);
        check(&rotation);
    }
}

static double norm(const float *x, int32_t n)
{
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

static void check_definition(const tq_rotation *rotation)
{
    int32_t n = rotation->head_dim;
    tq_random random = tq_random_stream(2, (uint64_t)n);
    float x[D], y[D];
    double expected[D];
    random_vector(&random, VECTOR_OUTLIER, 1.0f, x, n);
    dense_forward(n, 77, x, expected);
    tq_rotation_forward(rotation, x, y);
    for (int32_t i = 0; i < n; i++) assert_true(fabs((double)y[i] - expected[i]) < 1e-6 * norm(x, n));
}

static void test_definition(void **state)
{
    (void)state;
    each_head_dim(77, check_definition);
}

/* The images of the unit vectors are orthonormal. */
static void check_orthonormal(const tq_rotation *rotation)
{
    int32_t n = rotation->head_dim;
    float *images = calloc((size_t)n * (size_t)n, sizeof(float));
    assert_non_null(images);
    for (int32_t i = 0; i < n; i++) {
        images[i * n + i] = 1.0f;
        tq_rotation_forward(rotation, images + i * n, images + i * n);
    }
    for (int32_t i = 0; i < n; i++) {
        for (int32_t j = i; j < n; j++) {
            double dot = 0.0;
            for (int32_t k = 0; k < n; k++) dot += (double)images[i * n + k] * (double)images[j * n + k];
            if (fabs(dot - (i == j)) > 1e-6) fail_msg("head_dim %d: %d . %d = %g", n, i, j, dot);
        }
    }
    free(images);
}

static void test_orthonormal(void **state)
{
    (void)state;
    each_head_dim(TQ_SEED_DEFAULT, check_orthonormal);
}

static void check_inverse(const tq_rotation *rotation)
{
    int32_t n = rotation->head_dim;
    tq_random random = tq_random_stream(3, (uint64_t)n);
    for (int kind = 0; kind < VECTOR_KINDS; kind++) {
        float x[D], y[D], back[D], in_place[D];
        random_vector(&random, (vector_kind)kind, 10.0f, x, n);
        tq_rotation_forward(rotation, x, y);
        tq_rotation_inverse(rotation, y, back);
        for (int32_t i = 0; i < n; i++) assert_true(fabs((double)(back[i] - x[i])) <= 1e-6 * norm(x, n));
        memcpy(in_place, x, sizeof(x));
        tq_rotation_forward(rotation, in_place, in_place);
        assert_memory_equal(in_place, y, (size_t)n * sizeof(float));
        tq_rotation_inverse(rotation, in_place, in_place);
        assert_memory_equal(in_place, back, (size_t)n * sizeof(float));
    }
}

static void test_inverse(void **state)
{
    (void)state;
    each_head_dim(TQ_SEED_DEFAULT, check_inverse);
}

/* 3 for a Gaussian. A vector with one channel 50 times as large has about head_dim. */
static double kurtosis(const float *x, int32_t n)
{
    double second = 0.0, fourth = 0.0;
    for (int32_t i = 0; i < n; i++) {
        double square = (double)x[i] * (double)x[i];
        second += square;
        fourth += square * square;
    }
    return n * fourth / (second * second);
}

static void check_kurtosis(const tq_rotation *rotation)
{
    enum { N_VECTORS = 500 };
    int32_t n = rotation->head_dim;
    for (int kind = 0; kind < VECTOR_KINDS; kind++) {
        tq_random random = tq_random_stream(4, (uint64_t)n);
        double before = 0.0, after = 0.0;
        for (int i = 0; i < N_VECTORS; i++) {
            float x[D];
            random_vector(&random, (vector_kind)kind, 1.0f, x, n);
            before += kurtosis(x, n) / N_VECTORS;
            tq_rotation_forward(rotation, x, x);
            after += kurtosis(x, n) / N_VECTORS;
        }
        if (kind == VECTOR_OUTLIER || kind == VECTOR_SPIKE || kind == VECTOR_ONE_HOT) assert_true(before > 0.5 * n);
        if (after > 3.6) fail_msg("head_dim %d, kind %d: kurtosis %g", n, kind, after);
    }
}

static void test_kurtosis(void **state)
{
    (void)state;
    each_head_dim(TQ_SEED_DEFAULT, check_kurtosis);
}

static void test_seed_matters(void **state)
{
    (void)state;
    tq_rotation a, b;
    tq_rotation_init(&a, 128, 1);
    tq_rotation_init(&b, 128, 2);
    assert_memory_not_equal(a.signs[0], b.signs[0], 128 * sizeof(float));
    tq_rotation_init(&a, 64, 1);
    assert_memory_not_equal(a.signs[0], a.signs[1], 64 * sizeof(float));
}

static void test_unsupported(void **state)
{
    (void)state;
    const int32_t bad[] = {-64, 0, 1, 8, 16, 24, 56, 63, 65, 73, 127, 176, 384, 513, 577, 1024};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) assert_false(tq_head_dim_supported(bad[i]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition), cmocka_unit_test(test_orthonormal),  cmocka_unit_test(test_inverse),
        cmocka_unit_test(test_kurtosis),   cmocka_unit_test(test_seed_matters), cmocka_unit_test(test_unsupported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
