/* SPDX-License-Identifier: MIT */
/*
 * What a store learns from its first tokens: the factors of its channels, once (unless a calibration has transforms, which do
 * more), and the reference vector of each block, when the first slot of the block is encoded. Both are functions of the order
 * of writes alone, not of how they were batched.
 *
 * Tokens that repeat themselves say little of others. While the ring holds few different ones the store has no factors, and
 * looks again each time the ring has been replaced; if factors then bring something, all that is encoded is recoded once.
 */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/threads.h"
#include "cache/store.h"
#include "codec/transform.h"

/*
 * Factors must promise to lower the error of the logits by this much in energy; else they cost more than they bring. Of few
 * different keys the promise is too good, so it must be as much higher as there are fewer: text promises up to 3.3 in SmolLM2,
 * loops of 30 words and base64 4.8.
 */
#define GAIN_MIN 4.0
/* Without queries: a channel may have this times the typical magnitude. */
#define OUTLIER_RATIO 2.0
#define STEPS_PER_OCTAVE 4
#define STEP_MAX 100
/*
 * A channel that did not vary among the first tokens may do so later, as slow RoPE pairs do when one token was repeated. So it
 * counts as varying by this much of its own square, and by this much of the mean of all channels.
 */
#define FLOOR_OF_SQUARE 0.01
#define FLOOR_OF_MEAN 1e-4
/*
 * Two keys are of different tokens if their signatures' squared distance is this much of a signature's square. Text has some 45
 * different ones among 64 in the first layer, and nearly 64 in others; loops of two to ten tokens have at most 25.
 */
#define DIFFERENT 0.01
/* Of fewer keys than these the energies of channels say little. */
#define KEYS_MIN 16
#define SIGNATURES_MAX 64
#define SIGNATURE_MAX 64
/* For recoding: columns of a piece of work where no reference ties them, and the most threads. */
#define BLOCK_WITHOUT_REFERENCE 64
#define THREADS_MAX 64

void tq_store_learn_queries(tq_store *store, const tq_attend_params *queries, int64_t first, int64_t n)
{
    tq_store_header *header = tq_store_header_of(store);
    bool is_open = header->channels == TQ_CHANNELS_OPEN || header->channels == TQ_CHANNELS_WAITING;
    if (!store->layout.balance || !is_open) return;
    int32_t head_dim = store->codec.head_dim, group = queries->n_head / store->n_head_kv;
    _Alignas(64) float transformed[TQ_HEAD_DIM_MAX];
    int32_t wanted = store->layout.n_sink + store->layout.n_recent;
    for (int64_t i = first; i < first + n && header->n_queries < wanted; i++, header->n_queries++) {
        for (int32_t head = 0; head < queries->n_head; head++) {
            const float *q = queries->q + i * queries->q_token_stride + head * queries->q_head_stride;
            /* Queries are not checked: of one that is not finite only its own answer may be worth nothing. */
            if (!store->kernels->all_finite(q, head_dim)) continue;
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

/* Per channel the energy around the mean, at least a part of that around zero. */
static void window_energy(const tq_window *window, int32_t head, int32_t head_dim, double *energy)
{
    float mean[TQ_HEAD_DIM_MAX], x[TQ_HEAD_DIM_MAX];
    tq_window_mean(window, head, head_dim, mean);
    for (int32_t j = 0; j < head_dim; j++) energy[j] = 0;
    for (int32_t i = 0; i < window->n; i++) {
        window->read(window->context, i, head, x);
        for (int32_t j = 0; j < head_dim; j++) energy[j] += (double)(x[j] - mean[j]) * (double)(x[j] - mean[j]);
    }
    for (int32_t j = 0; j < head_dim; j++) {
        double square = energy[j] + window->n * (double)mean[j] * (double)mean[j];
        energy[j] = fmax(energy[j], FLOOR_OF_SQUARE * square);
    }
}

/* False if there is no energy at all. */
static bool raise_to_floor(double *energy, int32_t n)
{
    double sum = 0;
    for (int32_t j = 0; j < n; j++) sum += energy[j];
    for (int32_t j = 0; j < n; j++) energy[j] = fmax(energy[j], FLOOR_OF_MEAN * sum / n);
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
static bool balance_with_queries(const double *key, const double *query, int32_t n, double gain_min, int8_t *steps)
{
    double keys = 0, queries = 0, balanced = 0, mean_log = 0;
    for (int32_t j = 0; j < n; j++) {
        keys += key[j];
        queries += query[j];
        balanced += sqrt(key[j] * query[j]);
        mean_log += log2(query[j] / key[j]) / (4 * n);
    }
    if (keys * queries < gain_min * balanced * balanced) return false;
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

static bool balance_head(const tq_store *store, int32_t head, const tq_window *window, double gain_min, int8_t *steps)
{
    int32_t n = store->codec.head_dim;
    double key[TQ_HEAD_DIM_MAX], query[TQ_HEAD_DIM_MAX];
    window_energy(window, head, n, key);
    if (!raise_to_floor(key, n)) return false;
    for (int32_t j = 0; j < n; j++) query[j] = tq_store_energies(store)[(size_t)head * (size_t)n + (size_t)j];
    if (!raise_to_floor(query, n)) return balance_keys_alone(key, n, steps);
    return balance_with_queries(key, query, n, gain_min, steps);
}

/*
 * What RoPE leaves as it is: the magnitudes of groups of four channels that hold both channels of their pairs, whether these
 * are neighbours or half a head apart. Returns the number of groups.
 */
static int32_t read_signature(const tq_store *store, const tq_window *window, int32_t i, float *signature)
{
    int32_t head_dim = store->codec.head_dim, half = head_dim / 2, n = 0;
    float x[TQ_HEAD_DIM_MAX];
    for (int32_t head = 0; head < store->n_head_kv && n < SIGNATURE_MAX; head++) {
        window->read(window->context, i, head, x);
        for (int32_t j = 0; j + 1 < half && n < SIGNATURE_MAX; j += 2) {
            const float *y = x + half + j;
            signature[n++] = sqrtf(x[j] * x[j] + x[j + 1] * x[j + 1] + y[0] * y[0] + y[1] * y[1]);
        }
    }
    return n;
}

static bool is_same(const float *one, const float *other, int32_t n)
{
    double distance = 0, square = 0;
    for (int32_t j = 0; j < n; j++) {
        double difference = (double)one[j] - (double)other[j];
        distance += difference * difference;
        square += (double)one[j] * (double)one[j];
    }
    return distance <= DIFFERENT * square;
}

/*
 * The part of the window's keys that are different from all before them. 0, which is too little to learn from, if they are
 * fewer than five of eight, or one of them is most of the window.
 */
static double variety(const tq_store *store, const tq_window *window)
{
    float known[SIGNATURES_MAX][SIGNATURE_MAX], signature[SIGNATURE_MAX];
    int32_t count[SIGNATURES_MAX], n_known = 0, n = window->n < SIGNATURES_MAX ? window->n : SIGNATURES_MAX;
    for (int32_t i = 0; i < n; i++) {
        int32_t n_groups = read_signature(store, window, (int32_t)((int64_t)i * window->n / n), signature), k = 0;
        while (k < n_known && !is_same(signature, known[k], n_groups)) k++;
        if (k == n_known) {
            memcpy(known[k], signature, (size_t)n_groups * sizeof *signature);
            count[k] = 0;
            n_known++;
        }
        count[k]++;
    }
    int64_t squares = 0;
    for (int32_t k = 0; k < n_known; k++) squares += count[k] * count[k];
    /* n * n / squares is the number of keys if all were equally frequent. */
    return n >= KEYS_MIN && 8 * n_known >= 5 * n && 4 * n >= squares ? (double)n_known / n : 0;
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

/* ---- factors for what was coded without ---- */

typedef struct recode_task {
    const tq_store *store;
    const int8_t *steps;
    int64_t block, n_blocks; /* columns that share a reference, if there are any */
    atomic_llong next;       /* block */
} recode_task;

static void decode(const tq_store *store, const tq_codec *codec, tq_block block, float *x)
{
    const tq_format_kernels *format = &store->kernels->format[codec->traits->format];
    _Alignas(64) float working[TQ_WIDTH_MAX];
    format->expand(codec, block, 1, working);
    format->finish(codec, working, 1, x);
}

static void encode(const tq_store *store, const tq_codec *codec, const float *x, tq_block block)
{
    store->kernels->format[codec->traits->format].encode(codec, x, codec->head_dim, 1, block);
}

/* Put factors on a block's reference. before, after: what it decodes to, zeros if the store has none. */
static void recode_reference(const recode_task *task, const tq_page_view *pages, int32_t head, int64_t first, float *before,
                             float *after)
{
    const tq_store *store = task->store;
    size_t head_dim = (size_t)store->codec.head_dim;
    memset(before, 0, head_dim * sizeof *before);
    memset(after, 0, head_dim * sizeof *after);
    if (!pages->ref_codec) return;
    tq_block reference = tq_page_view_refs(pages, &store->codec, head, first);
    if (reference.scales[0] == 0 || reference.scales[0] & TQ_REFERENCE_LEFT) return; /* unset, left, or zero */
    decode(store, pages->ref_codec, reference, before);
    memcpy(after, before, head_dim * sizeof *after);
    tq_scale_channels(task->steps + (size_t)head * head_dim, 1, store->codec.head_dim, after);
    encode(store, pages->ref_codec, after, reference);
    decode(store, pages->ref_codec, reference, after);
}

static bool was_encoded(const tq_codec *codec, tq_block block)
{
    for (int32_t i = 0; i < codec->traits->n_scales; i++) {
        if (block.scales[i] != 0) return true;
    }
    return false;
}

static void recode_block(const recode_task *task, const tq_page_view *pages, int32_t head, int64_t first)
{
    const tq_store *store = task->store;
    const tq_codec *codec = &store->codec;
    int32_t head_dim = codec->head_dim;
    _Alignas(64) float before[TQ_HEAD_DIM_MAX], after[TQ_HEAD_DIM_MAX], x[TQ_HEAD_DIM_MAX];
    recode_reference(task, pages, head, first, before, after);
    int64_t end = first + task->block < store->n_slots ? first + task->block : store->n_slots;
    for (int64_t column = first; column < end; column++) {
        tq_block block = tq_page_view_block(pages, codec, head, column);
        if (!was_encoded(codec, block)) continue;
        decode(store, codec, block, x);
        for (int32_t j = 0; j < head_dim; j++) x[j] += before[j];
        tq_scale_channels(task->steps + (size_t)head * (size_t)head_dim, 1, head_dim, x);
        for (int32_t j = 0; j < head_dim; j++) x[j] -= after[j];
        encode(store, codec, x, block);
    }
}

static void recode_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    (void)i_thread;
    (void)n_threads;
    recode_task *task = arg;
    tq_page_view pages = tq_store_view(task->store, NULL, 0).pages;
    for (int64_t i; (i = atomic_fetch_add_explicit(&task->next, 1, memory_order_relaxed)) < task->n_blocks;) {
        for (int32_t head = 0; head < task->store->n_head_kv; head++) recode_block(task, &pages, head, i * task->block);
    }
}

static void recode(const tq_store *store, const tq_executor *executor)
{
    int32_t block = store->layout.ref_block > 0 ? store->layout.ref_block : BLOCK_WITHOUT_REFERENCE;
    recode_task task = {
        .store = store, .steps = tq_store_steps(store), .block = block, .n_blocks = (store->n_slots + block - 1) / block};
    tq_run(executor, (int32_t)(task.n_blocks < THREADS_MAX ? task.n_blocks : THREADS_MAX), recode_body, &task);
}

static void decide(tq_store *store, const tq_window *window)
{
    tq_store_header *header = tq_store_header_of(store);
    bool may_learn = store->layout.balance && store->layout.n_recent > 0 && !store->transforms;
    header->channels = may_learn ? TQ_CHANNELS_WAITING : TQ_CHANNELS_PLAIN;
    double part = may_learn && window->n > 0 ? variety(store, window) : 0;
    if (part > 0) {
        header->channels = TQ_CHANNELS_PLAIN;
        for (int32_t head = 0; head < store->n_head_kv; head++) {
            int8_t *steps = tq_store_steps(store) + (size_t)head * (size_t)store->codec.head_dim;
            if (balance_head(store, head, window, GAIN_MIN / part, steps)) header->channels = TQ_CHANNELS_BALANCED;
        }
    }
}

bool tq_store_must_decide(const tq_store *store)
{
    const tq_store_header *header = tq_store_header_of(store);
    return header->channels == TQ_CHANNELS_OPEN ||
           (header->channels == TQ_CHANNELS_WAITING && store->layout.balance && header->n_left >= store->layout.n_recent);
}

void tq_store_decide_channels(tq_store *store, const tq_window *window, const tq_executor *executor)
{
    tq_store_header *header = tq_store_header_of(store);
    bool is_first = header->channels == TQ_CHANNELS_OPEN;
    if (is_first) header->bias_hash = store->bias ? store->bias->hash : 0;
    header->n_left = 0;
    decide(store, window);
    if (!is_first && header->channels == TQ_CHANNELS_BALANCED) recode(store, executor);
    /* Errors that were not there at first would come too late: a guard can act only while all is held exactly. */
    if (store->layout.balance && window->n > 0 && (is_first || header->has_errors)) estimate_errors(store, window);
    if (header->channels != TQ_CHANNELS_WAITING) return;
    /* The next window has queries of its own. */
    header->n_queries = 0;
    memset(tq_store_energies(store), 0, (size_t)store->n_head_kv * (size_t)store->codec.head_dim * sizeof(float));
}

static bool is_set(tq_block reference)
{
    uint16_t scale = reference.scales[0];
    return scale == TQ_REFERENCE_OF_ZERO || (scale != 0 && !(scale & TQ_REFERENCE_LEFT));
}

typedef struct reference_task {
    const tq_store *store;
    const tq_rows_in *in;
    int64_t slot;
    const tq_window *window;
    bool is_new;
    int32_t n_decoded;
} reference_task;

static void reference_body(void *arg, int32_t i_thread, int32_t n_threads)
{
    const reference_task *task = arg;
    const tq_rows_in *in = task->in;
    for (int32_t head = i_thread; head < task->store->n_head_kv; head += n_threads) {
        tq_block reference = tq_page_view_refs(&in->pages, in->codec, head, task->slot);
        if (is_set(reference) && !task->is_new) continue;
        bool is_found = task->n_decoded > 0 && tq_rows_recover_reference(in, head, task->slot, task->window, task->n_decoded);
        if (!is_found && task->window->n > 0) tq_rows_set_reference(in, head, task->slot, task->window);
        if (!is_set(reference)) reference.scales[0] = TQ_REFERENCE_OF_ZERO;
    }
}

void tq_store_set_reference(const tq_store *store, const tq_rows_in *in, int64_t slot, const tq_window *window, bool is_new,
                            int32_t n_decoded, const tq_executor *executor)
{
    reference_task task = {store, in, slot, window, is_new, n_decoded};
    /* A mean is not worth a thread, a search is. */
    bool is_search = n_decoded > 0 && (is_new || !is_set(tq_page_view_refs(&in->pages, in->codec, 0, slot)));
    tq_run(is_search ? executor : NULL, store->n_head_kv, reference_body, &task);
}
