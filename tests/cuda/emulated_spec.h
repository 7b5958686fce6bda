/* SPDX-License-Identifier: MIT */
/* What the tests on an emulated device compare attention with: double precision, and everything rounded to BF16 on the way. */
#ifndef TQ_TESTS_EMULATED_SPEC_H
#define TQ_TESTS_EMULATED_SPEC_H

#include <math.h>
#include <string.h>
#include <vector>

extern "C" {
#include "base/half.h"
}
#include "turboquant.h"

static inline float bf16(float x)
{
    return tq_bfloat_to_float(tq_bfloat_from_float(x));
}

/* The nearest number that a type holds. */
static inline float as_type(float x, tq_dtype dtype)
{
    return dtype == TQ_DTYPE_F32 ? x : dtype == TQ_DTYPE_F16 ? tq_half_to_float(tq_half_from_float(x)) : bf16(x);
}

/* Numbers in their type; and back. */
static inline std::vector<uint8_t> typed(const std::vector<float> &numbers, tq_dtype dtype)
{
    std::vector<uint8_t> bytes(numbers.size() * 4 + 16);
    for (size_t i = 0; i < numbers.size(); i++) {
        const uint16_t half = dtype == TQ_DTYPE_F16 ? tq_half_from_float(numbers[i]) : tq_bfloat_from_float(numbers[i]);
        if (dtype == TQ_DTYPE_F32)
            memcpy(&bytes[4 * i], &numbers[i], 4);
        else
            memcpy(&bytes[2 * i], &half, 2);
    }
    return bytes;
}

static inline float number_at(const std::vector<uint8_t> &bytes, tq_dtype dtype, size_t i)
{
    float x;
    uint16_t half;
    memcpy(&x, &bytes[dtype == TQ_DTYPE_F32 ? 4 * i : 0], 4);
    memcpy(&half, &bytes[2 * i], 2);
    return dtype == TQ_DTYPE_F32 ? x : dtype == TQ_DTYPE_F16 ? tq_half_to_float(half) : tq_bfloat_to_float(half);
}

/* What a query may do. */
struct spec_options {
    int32_t head_dim, head_dim_v, window;
    float softcap;
    const float *sink; /* its head's, or NULL */
};

/* One query row at `position`: vector(is_value, column) is what it sees there. narrow: all is rounded to BF16. Returns lse. */
template <typename Vector>
static double attend_spec(const spec_options &s, const float *q, int32_t position, bool narrow, const Vector &vector,
                          double *out)
{
    const int32_t n = s.head_dim, n_v = s.head_dim_v,
                  begin = s.window > 0 && position + 1 > s.window ? position + 1 - s.window : 0;
    double max = s.sink ? *s.sink : -INFINITY, sum = 0;
    std::vector<double> logits(position + 1);
    for (int32_t c = begin; c <= position; c++) {
        const float *key = vector(false, c);
        double dot = 0;
        for (int32_t i = 0; i < n; i++) dot += (double)(narrow ? bf16(q[i]) : q[i]) * (narrow ? bf16(key[i]) : key[i]);
        dot /= sqrt((double)n);
        logits[c] = s.softcap > 0 ? s.softcap * tanh(dot / s.softcap) : dot;
        max = fmax(max, logits[c]);
    }
    for (int32_t i = 0; i < n_v; i++) out[i] = 0;
    for (int32_t c = begin; c <= position; c++) {
        const float *value = vector(true, c);
        double p = exp(logits[c] - max);
        sum += p;
        if (narrow) p = bf16((float)p);
        for (int32_t i = 0; i < n_v; i++) out[i] += p * (narrow ? bf16(value[i]) : value[i]);
    }
    if (s.sink) sum += exp(*s.sink - max);
    for (int32_t i = 0; i < n_v; i++) out[i] = narrow ? bf16((float)(out[i] / sum)) : out[i] / sum;
    return max + log(sum);
}

/* Errors of many rows next to those of BF16. The bounds are tests/cuda/device_model.c's. */
struct spec_errors {
    double error = 0, error_narrow = 0, size = 0, lse_error = 0, lse_narrow = 0;
    /* A row: found, and what attend_spec says with both precisions. */
    template <typename Found>
    void add(int32_t head_dim, const Found &found, const double *wanted, const double *narrow, double lse_found, double lse,
             double lse_of_narrow)
    {
        lse_error = fmax(lse_error, fabs(lse_found - lse)), lse_narrow = fmax(lse_narrow, fabs(lse_of_narrow - lse));
        for (int32_t i = 0; i < head_dim; i++) {
            const double x = found(i);
            error += isfinite(x) ? (x - wanted[i]) * (x - wanted[i]) : INFINITY;
            error_narrow += (narrow[i] - wanted[i]) * (narrow[i] - wanted[i]);
            size += wanted[i] * wanted[i];
        }
    }
    bool good() const
    {
        return sqrt(error) <= 2 * sqrt(error_narrow) && lse_error <= 4 * lse_narrow + 1e-3;
    }
    void print() const
    {
        printf("error %.2e (BF16 %.2e), lse %.1e (%.1e)\n", sqrt(error / size), sqrt(error_narrow / size), lse_error,
               lse_narrow);
    }
};

#endif
