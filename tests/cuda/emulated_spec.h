/* SPDX-License-Identifier: MIT */
/* What the tests on an emulated device compare attention with: double precision, and everything rounded to BF16 on the way. */
#ifndef TQ_TESTS_EMULATED_SPEC_H
#define TQ_TESTS_EMULATED_SPEC_H

#include <float.h>
#include <math.h>
#include <string.h>
#include <vector>

extern "C" {
#include "base/half.h"
#include "base/random.h"
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

/* A mask, ALiBi, both or neither. */
struct bias_kind {
    bool has_mask, is_f16, of_heads, has_slopes; /* of_heads: each has a mask of its own */
    /* What masks of all rows hide: tests leave it unwritten where they can. */
    bool hides(int32_t column) const
    {
        return has_mask && (column % 16 == 5 || (column >= 70 && column < 90));
    }
    void print() const
    {
        printf("%s%s, ALiBi %d, ", has_mask ? is_f16 ? "FP16 mask" : "FP32 mask" : "no mask", of_heads ? " of each head" : "",
               has_slopes);
    }
};

static inline bias_kind draw_kind(tq_random *random)
{
    const int mask = (int)(tq_random_next(random) % 4); /* half of all have none */
    return {mask > 1, mask == 2, mask > 1 && tq_random_next(random) % 2, tq_random_next(random) % 3 == 0};
}

/* The biases of query rows, each at a position of its own; what is behind a row's position is NaN. */
struct spec_bias {
    bias_kind kind;
    int32_t n_head, n_columns;
    std::vector<float> slopes, mask; /* of the mask: [row, heads, n_columns + 5], and 3 numbers behind each row's */
    std::vector<uint8_t> typed_mask;
    int64_t head_stride() const
    {
        return kind.of_heads ? n_columns + 5 : 0;
    }
    int64_t row_stride() const
    {
        return (kind.of_heads ? n_head : 1) * (n_columns + 5) + 3;
    }
    size_t row_bytes() const
    {
        return (size_t)row_stride() * (kind.is_f16 ? 2 : 4);
    }
    /* Some columns are hidden; others have numbers, some of FP32's lowest, and some rows no others; each seventh row is hidden
     * whole. */
    void draw(const bias_kind &wanted, int32_t heads, int32_t columns, const std::vector<int32_t> &positions, tq_random *random)
    {
        kind = wanted, n_head = heads, n_columns = columns;
        for (int32_t head = 0; head < heads; head++) slopes.push_back(head == 1 ? 0 : head == 4 ? -.05f : .5f / (1 + head));
        mask.assign(kind.has_mask ? positions.size() * (size_t)row_stride() : 0, NAN);
        for (size_t i = 0; i < mask.size(); i++) {
            const size_t row = i / (size_t)row_stride();
            const int32_t column = (int32_t)(i % (size_t)row_stride() % (size_t)(columns + 5));
            if (column > positions[row] || i % (size_t)row_stride() >= (size_t)row_stride() - 3) continue;
            const uint64_t drawn = tq_random_next(random) % 1000;
            const bool has_lowest = !kind.is_f16 && !kind.has_slopes && row % 7 == 5;
            if (row % 7 == 3 || kind.hides(column))
                mask[i] = -INFINITY;
            else if (has_lowest && row % 14 == 5)
                mask[i] = -FLT_MAX;
            else if (drawn < 250)
                mask[i] = has_lowest && column < positions[row] ? -FLT_MAX : -INFINITY;
            else
                mask[i] = as_type((float)drawn / 250 - 3, TQ_DTYPE_F16);
        }
        typed_mask = typed(mask, kind.is_f16 ? TQ_DTYPE_F16 : TQ_DTYPE_F32);
    }
    /* Of the columns up to a row's position. */
    std::vector<double> of(size_t row, int32_t head, int32_t position) const
    {
        std::vector<double> bias(position + 1, 0.0);
        for (int32_t c = 0; c <= position; c++) {
            const double x = kind.has_mask ? mask[row * row_stride() + head * head_stride() + c] : 0;
            if (kind.has_mask)
                bias[c] = isinf(x) ? x : kind.has_slopes ? slopes[head] * x : x;
            else if (kind.has_slopes)
                bias[c] = -slopes[head] * (double)(position - c);
        }
        return bias;
    }
    /* mask_rows: typed ones, those of the call. */
    template <class Args> void set(Args &args, const uint8_t *mask_rows) const
    {
        if (kind.has_mask) args.mask = mask_rows;
        args.mask_is_f16 = kind.is_f16, args.mask_token_stride = row_stride(), args.mask_head_stride = head_stride();
        if (kind.has_slopes) args.slopes = slopes.data();
    }
};

/* What a query may do. */
struct spec_options {
    int32_t head_dim, head_dim_v, window;
    float softcap;
    const float *sink;        /* its head's, or NULL */
    std::vector<double> bias; /* of the columns */
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
        logits[c] = -INFINITY;
        if (s.bias[c] == -INFINITY) continue;
        const float *key = vector(false, c);
        double dot = 0;
        for (int32_t i = 0; i < n; i++) dot += (double)(narrow ? bf16(q[i]) : q[i]) * (narrow ? bf16(key[i]) : key[i]);
        dot /= sqrt((double)n);
        logits[c] = (s.softcap > 0 ? s.softcap * tanh(dot / s.softcap) : dot) + s.bias[c];
        max = fmax(max, logits[c]);
    }
    for (int32_t i = 0; i < n_v; i++) out[i] = 0;
    for (int32_t c = begin; c <= position; c++) {
        if (logits[c] == -INFINITY) continue;
        const float *value = vector(true, c);
        double p = exp(logits[c] - max);
        sum += p;
        if (narrow) p = bf16((float)p);
        for (int32_t i = 0; i < n_v; i++) out[i] += p * (narrow ? bf16(value[i]) : value[i]);
    }
    if (s.sink) sum += exp(*s.sink - max);
    if (sum == 0) return -INFINITY;
    for (int32_t i = 0; i < n_v; i++) out[i] = narrow ? bf16((float)(out[i] / sum)) : out[i] / sum;
    return max + log(sum);
}

/* Infinite where one of both is not finite and the other is not the same; below -1e29 kernels keep no numbers apart. */
static inline double distance(double a, double b)
{
    const bool are_lowest = isfinite(a) && isfinite(b) && a < -1e29 && b < -1e29;
    return a == b || are_lowest ? 0 : isfinite(a) && isfinite(b) ? fabs(a - b) : INFINITY;
}

/* Errors of many rows next to those of BF16. The bounds are tests/cuda/device_model.c's. */
struct spec_errors {
    double error = 0, error_narrow = 0, size = 0, lse_error = 0, lse_narrow = 0;
    /* A row, of which out_dim values are written: found, and what attend_spec says with both precisions. */
    template <typename Found>
    void add(int32_t out_dim, const Found &found, const double *wanted, const double *narrow, double lse_found, double lse,
             double lse_of_narrow)
    {
        lse_error = fmax(lse_error, distance(lse_found, lse)), lse_narrow = fmax(lse_narrow, distance(lse_of_narrow, lse));
        for (int32_t i = 0; i < out_dim; i++) {
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
