/* SPDX-License-Identifier: MIT */
/*
 * What a store learns from its first tokens: the factors of its channels, once (unless a calibration has transforms, which do
 * more), and the reference vector of each block, when the first slot of the block is encoded. Both are functions of the order
 * of writes alone, not of how they were batched.
 */
#include <math.h>

#include "cache/store.h"
#include "codec/transform.h"

/* Factors must promise to lower the error of the logits by this much in energy; else they cost more than they bring. */
#define GAIN_MIN 4.0
/* Without queries: a channel may have this times the typical magnitude. */
#define OUTLIER_RATIO 2.0
#define STEPS_PER_OCTAVE 4
#define STEP_MAX 100
/* Channels without any energy count as this much of the mean. */
#define ENERGY_FLOOR 1e-6

void tq_store_learn_queries(tq_store *store, const tq_attend_params *queries)
{
    tq_store_header *header = tq_store_header_of(store);
    if (!store->layout.balance || header->channels != TQ_CHANNELS_OPEN) return;
    int32_t head_dim = store->codec.head_dim, group = queries->n_head / store->n_head_kv;
    _Alignas(64) float transformed[TQ_HEAD_DIM_MAX];
    int32_t wanted = store->layout.n_sink + store->layout.n_recent;
    for (int64_t i = 0; i < queries->n_query && header->n_queries < wanted; i++, header->n_queries++) {
        for (int32_t head = 0; head < queries->n_head; head++) {
            const float *q = queries->q + i * queries->q_token_stride + head * queries->q_head_stride;
            float *energy = tq_store_energies(store) + (size_t)(head / group) * (size_t)head_dim;
            if (store->transforms) {
                const uint16_t *matrix = tq_transform_of_head(store->transforms, head / group, head_dim);
                store->kernels->transform_query(matrix, head_dim, q, 1, transformed);
                q = transformed;
            }
            for (int32_t j = 0; j < head_dim; j++) energy[j] += q[j] * q[j] / (float)group;
        }
    }
}

/* Per channel the energy around the mean, at least a little. */
static void window_energy(const tq_window *window, int32_t head, int32_t head_dim, double *energy)
{
    float mean[TQ_HEAD_DIM_MAX], x[TQ_HEAD_DIM_MAX];
    tq_window_mean(window, head, head_dim, mean);
    for (int32_t j = 0; j < head_dim; j++) energy[j] = 0;
    for (int32_t i = 0; i < window->n; i++) {
        window->read(window->context, i, head, x);
        for (int32_t j = 0; j < head_dim; j++) energy[j] += (double)(x[j] - mean[j]) * (double)(x[j] - mean[j]);
    }
}

/* False if there is no energy at all. */
static bool raise_to_floor(double *energy, int32_t n)
{
    double sum = 0;
    for (int32_t j = 0; j < n; j++) sum += energy[j];
    for (int32_t j = 0; j < n; j++) energy[j] = fmax(energy[j], ENERGY_FLOOR * sum / n);
    return sum > 0 && isfinite(sum);
}

static int8_t to_step(double log2_factor)
{
    double step = rint(STEPS_PER_OCTAVE * log2_factor);
    return (int8_t)fmin(fmax(step, -STEP_MAX), STEP_MAX);
}

/*
 * Coding spreads the error of a key evenly over its channels. With factors s_j the error of a logit is in energy proportional
 * to sum(s_j^2 k_j) * sum(q_j / s_j^2), for k_j and q_j the energies of keys and queries in channel j. The least is at s_j =
 * (q_j / k_j)^(1/4), and is sum(sqrt(k_j q_j))^2. Returns whether that is worth it.
 */
static bool balance_with_queries(const double *key, const double *query, int32_t n, int8_t *steps)
{
    double keys = 0, queries = 0, balanced = 0, mean_log = 0;
    for (int32_t j = 0; j < n; j++) {
        keys += key[j];
        queries += query[j];
        balanced += sqrt(key[j] * query[j]);
        mean_log += log2(query[j] / key[j]) / (4 * n);
    }
    if (keys * queries < GAIN_MIN * balanced * balanced) return false;
    for (int32_t j = 0; j < n; j++) steps[j] = to_step(log2(query[j] / key[j]) / 4 - mean_log);
    return true;
}

/* Where nothing is known of the queries: bring outliers down to a multiple of the typical channel. */
static bool balance_keys_alone(const double *key, int32_t n, int8_t *steps)
{
    double mean_log = 0;
    for (int32_t j = 0; j < n; j++) mean_log += log2(key[j]) / (2 * n);
    bool any = false;
    for (int32_t j = 0; j < n; j++) {
        double excess = log2(key[j]) / 2 - mean_log - log2(OUTLIER_RATIO);
        steps[j] = excess > 0 ? to_step(-excess) : 0;
        any |= steps[j] != 0;
    }
    return any;
}

static bool balance_head(const tq_store *store, int32_t head, const tq_window *window, int8_t *steps)
{
    int32_t n = store->codec.head_dim;
    double key[TQ_HEAD_DIM_MAX], query[TQ_HEAD_DIM_MAX];
    window_energy(window, head, n, key);
    if (!raise_to_floor(key, n)) return false;
    for (int32_t j = 0; j < n; j++) query[j] = tq_store_energies(store)[(size_t)head * (size_t)n + (size_t)j];
    if (!raise_to_floor(query, n)) return balance_keys_alone(key, n, steps);
    return balance_with_queries(key, query, n, steps);
}

/* The mean squared error of coding a head's window, in the scaled basis that is coded. */
static double window_error(const tq_store *store, int32_t head, const tq_window *window)
{
    const tq_codec *codec = &store->codec;
    const tq_format_kernels *format = &store->kernels->format[codec->traits->format];
    int32_t head_dim = codec->head_dim;
    tq_kv_view view = tq_store_view(store, NULL, 0);
    tq_rows_in in = {
        .kernels = store->kernels, .codec = codec, .channel_steps = view.channel_steps, .transforms = view.transforms};
    _Alignas(64) float mean[TQ_HEAD_DIM_MAX], x[TQ_HEAD_DIM_MAX], decoded[TQ_HEAD_DIM_MAX], working[TQ_WIDTH_MAX];
    uint8_t codes[TQ_CODE_BYTES_MAX];
    uint16_t scales[TQ_SCALES_MAX];
    tq_window_mean(window, head, head_dim, mean);
    double sum = 0;
    for (int32_t i = 0; i < window->n; i++) {
        window->read(window->context, i, head, x);
        if (store->layout.ref_block > 0) {
            for (int32_t j = 0; j < head_dim; j++) x[j] -= mean[j];
        }
        tq_rows_to_basis(&in, head, 1, x);
        format->encode(codec, x, head_dim, 1, (tq_block){.codes = codes, .scales = scales});
        format->expand(codec, (tq_block){.codes = codes, .scales = scales}, 1, working);
        format->finish(codec, working, 1, decoded);
        for (int32_t j = 0; j < head_dim; j++) sum += (double)(x[j] - decoded[j]) * (double)(x[j] - decoded[j]);
    }
    return sum / ((double)window->n * head_dim);
}

/* Coding spreads an error evenly over the channels, so a query's error is its length times that of a channel. */
static void estimate_errors(tq_store *store, const tq_window *window)
{
    tq_store_header *header = tq_store_header_of(store);
    if (header->n_queries == 0 || store->codec.traits->family == TQ_FAMILY_PROD) return;
    int32_t head_dim = store->codec.head_dim;
    const int8_t *steps = tq_store_view(store, NULL, 0).channel_steps;
    for (int32_t head = 0; head < store->n_head_kv; head++) {
        const float *energy = tq_store_energies(store) + (size_t)head * (size_t)head_dim;
        double query = 0;
        for (int32_t j = 0; j < head_dim; j++) {
            double factor = steps ? (double)tq_channel_factor(steps[head * head_dim + j]) : 1.0;
            query += (double)energy[j] / (factor * factor * header->n_queries);
        }
        tq_store_errors(store)[head] = (float)sqrt(query * window_error(store, head, window));
    }
    header->has_errors = true;
}

void tq_store_freeze_channels(tq_store *store, const tq_window *window)
{
    tq_store_header *header = tq_store_header_of(store);
    if (header->channels != TQ_CHANNELS_OPEN) return;
    header->channels = TQ_CHANNELS_PLAIN;
    header->bias_hash = store->bias ? store->bias->hash : 0;
    if (!store->layout.balance || window->n == 0) return;
    for (int32_t head = 0; head < store->n_head_kv && !store->transforms; head++) {
        int8_t *steps = tq_store_steps(store) + (size_t)head * (size_t)store->codec.head_dim;
        if (balance_head(store, head, window, steps)) header->channels = TQ_CHANNELS_BALANCED;
    }
    estimate_errors(store, window);
}

/* Is something coded in the block of a slot? Then its reference is in use. */
static bool block_in_use(const tq_page_view *pages, const tq_codec *codec, int32_t head, int64_t slot)
{
    int64_t first = slot - slot % pages->ref_block, end = first + pages->ref_block;
    if (end > pages->page_size) end = pages->page_size;
    const uint16_t *scales = tq_page_view_block(pages, codec, head, first).scales;
    for (int64_t i = 0; i < end - first; i++) {
        if (scales[i] != 0) return true;
    }
    return false;
}

void tq_store_set_reference(const tq_store *store, const tq_rows_in *in, int64_t slot, const tq_window *window)
{
    if (window->n == 0) return;
    for (int32_t head = 0; head < store->n_head_kv; head++) {
        tq_block reference = tq_page_view_refs(&in->pages, in->codec, head, slot);
        if (reference.scales[0] != 0 || block_in_use(&in->pages, in->codec, head, slot)) continue;
        tq_rows_set_reference(in, head, slot, window);
    }
}
