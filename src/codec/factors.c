/* SPDX-License-Identifier: MIT */
#include "codec/factors.h"

#include <math.h>
#include <string.h>

#include "codec/codec.h"

/* What a channel counts for at least, of the mean of all: one without any energy must not take a factor without bound. */
#define FLOOR 1e-4
/* An angle whose half has a smaller sine does not turn. */
#define STILL 1e-9

/*
 * The part of its energy that a constant keeps, which RoPE turns by `angle` from token to token, where the mean of each n_ref
 * tokens is taken away: one less the square of Dirichlet's kernel. 0: none is taken away.
 */
static double kept_of_constant(double angle, int32_t n_ref)
{
    if (n_ref == 0) return 1;
    double sine = sin(angle / 2);
    if (fabs(sine) < STILL) return 0;
    double mean = sin(n_ref * angle / 2) / (n_ref * sine);
    return 1 - mean * mean;
}

static int32_t partner_of(const tq_key_factors_params *params, int32_t j)
{
    return params->partners ? params->partners[j] : j;
}

/* The logarithm to base 2 of each channel's energy, its pair's, not below the floor. False: the energies are zero, or overflow.
 */
static bool to_logs(const tq_key_factors_params *params, const double *energy, double *logs)
{
    int32_t n = params->head_dim;
    double mean = 0;
    for (int32_t j = 0; j < n; j++) {
        logs[j] = energy[j] + energy[partner_of(params, j)];
        mean += logs[j] / n;
    }
    if (!(mean > 0) || !isfinite(mean)) return false;
    for (int32_t j = 0; j < n; j++) logs[j] = log2(fmax(logs[j], FLOOR * mean));
    return true;
}

static void read_energies(const tq_key_factors_params *params, int32_t head, double *keys, double *queries)
{
    int32_t n = params->head_dim, group = params->n_head / params->n_head_kv;
    for (int32_t j = 0; j < n; j++) {
        size_t at = (size_t)head * (size_t)n + (size_t)j;
        double mean = params->k_mean ? (double)params->k_mean[at] : 0, angle = params->angles ? params->angles[j] : 0;
        keys[j] = fmax((double)params->k_square[at] - mean * mean * (1 - kept_of_constant(angle, params->ref_block)), 0);
        queries[j] = 0;
        for (int32_t i = 0; i < group; i++)
            queries[j] += (double)params->q_square[((size_t)head * (size_t)group + (size_t)i) * (size_t)n + (size_t)j] / group;
    }
}

/* Returns the root mean square of a product: coding spreads a key's energy evenly over its channels. */
static double find_of_head(int8_t *out, const tq_key_factors_params *params, int32_t head)
{
    int32_t n = params->head_dim;
    double keys[TQ_HEAD_DIM_MAX], queries[TQ_HEAD_DIM_MAX], log_k[TQ_HEAD_DIM_MAX], log_q[TQ_HEAD_DIM_MAX], mean = 0;
    read_energies(params, head, keys, queries);
    memset(out, 0, (size_t)n);
    if (!to_logs(params, keys, log_k) || !to_logs(params, queries, log_q)) return 0;
    for (int32_t j = 0; j < n; j++) mean += (log_k[j] - log_q[j]) / (4 * n);
    for (int32_t j = 0; j < n; j++) {
        double quarters = rint(log_k[j] - log_q[j] - 4 * mean);
        out[j] = (int8_t)fmin(fmax(quarters, -TQ_FACTOR_MAX), TQ_FACTOR_MAX);
    }
    double key = 0, query = 0;
    for (int32_t j = 0; j < n; j++) {
        double factor = (double)tq_channel_factor(out[j]);
        key += keys[j] / (factor * factor);
        query += queries[j] * (factor * factor);
    }
    return sqrt(key * query / n);
}

void tq_factors_find(int8_t *out, float *spread, const tq_key_factors_params *params)
{
    double largest = 0;
    for (int32_t head = 0; head < params->n_head_kv; head++)
        largest = fmax(largest, find_of_head(out + (size_t)head * (size_t)params->head_dim, params, head));
    if (spread) *spread = (float)largest;
}

float tq_format_relative_error(tq_format format)
{
    static const float errors[TQ_FORMAT_COUNT] = {
        [TQ_FORMAT_SQ8] = 0.007f, [TQ_FORMAT_SQ4] = 0.097f, [TQ_FORMAT_SQ3] = 0.186f, [TQ_FORMAT_SQ2] = 0.343f,
        [TQ_FORMAT_TT4] = 0.072f, [TQ_FORMAT_TT3] = 0.139f, [TQ_FORMAT_TT2] = 0.273f};
    return errors[format];
}

#define ERROR_MAX 1.0f

tq_format tq_key_guard(tq_format wanted, float spread)
{
    static const tq_format ladder[] = {TQ_FORMAT_TT2, TQ_FORMAT_TT3, TQ_FORMAT_TT4, TQ_FORMAT_SQ8, TQ_FORMAT_F16};
    if (!tq_format_traits_get(wanted)) return wanted;
    float error = tq_format_relative_error(wanted);
    if (!(spread > 0) || !isfinite(spread) || error * spread <= ERROR_MAX) return wanted;
    size_t i = 0;
    while (tq_format_relative_error(ladder[i]) >= error || tq_format_relative_error(ladder[i]) * spread > ERROR_MAX) i++;
    return ladder[i];
}
