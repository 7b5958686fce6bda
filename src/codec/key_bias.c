/* SPDX-License-Identifier: MIT */
/* See key_bias.h. */
#include "codec/key_bias.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"
#include "base/hash.h"

/* The part of the bias' energy that may stay in what is coded. */
#define LEFT_OUT_MAX 1e-4
#define PAIRS_STEP 8
#define TWO_PI 6.283185307179586

typedef struct pair {
    double energy, turns;
    float b0, b1;
    int32_t first, second;
} pair;

/* Pair i of a head's head_dim / 2. What RoPE leaves alone follows in pairs of neighbours. */
static pair pair_of(const tq_key_bias_params *params, const float *bias, int32_t i)
{
    int32_t half = params->n_rope / 2;
    pair p = {.first = 2 * i, .second = 2 * i + 1};
    if (i < half) {
        p.turns = remainder(params->angles[i], TWO_PI) / TWO_PI; /* positions are whole numbers */
        if (!params->interleaved) {
            p.first = i;
            p.second = i + half;
        }
    }
    p.b0 = bias[p.first];
    p.b1 = bias[p.second];
    p.energy = (double)p.b0 * (double)p.b0 + (double)p.b1 * (double)p.b1;
    return p;
}

/* The largest first; equal ones in their order. */
static int compare_pairs(const void *a, const void *b)
{
    const pair *x = a, *y = b;
    if (x->energy != y->energy) return x->energy > y->energy ? -1 : 1;
    return x->first < y->first ? -1 : x->first > y->first;
}

static void sort_head(const tq_key_bias_params *params, int32_t head_dim, int32_t head, pair *pairs)
{
    const float *bias = params->bias + (size_t)head * (size_t)head_dim;
    for (int32_t i = 0; i < head_dim / 2; i++) pairs[i] = pair_of(params, bias, i);
    qsort(pairs, (size_t)head_dim / 2, sizeof *pairs, compare_pairs);
}

/* So many pairs of each head that little is left out of all. */
static int32_t count_pairs(const tq_key_bias_params *params, int32_t n_head_kv, int32_t head_dim)
{
    pair pairs[TQ_HEAD_DIM_MAX / 2];
    double steps[TQ_HEAD_DIM_MAX / 2 / PAIRS_STEP + 1] = {0}, total = 0; /* what each step of pairs holds */
    for (int32_t head = 0; head < n_head_kv; head++) {
        sort_head(params, head_dim, head, pairs);
        for (int32_t i = 0; i < head_dim / 2; i++) {
            steps[i / PAIRS_STEP] += pairs[i].energy;
            total += pairs[i].energy;
        }
    }
    int32_t n = (head_dim / 2 + PAIRS_STEP - 1) / PAIRS_STEP;
    double left_out = 0;
    while (n > 1 && left_out + steps[n - 1] <= LEFT_OUT_MAX * total) left_out += steps[--n];
    return n * PAIRS_STEP;
}

static size_t take(size_t *total, size_t n, size_t item_bytes)
{
    size_t offset = *total;
    *total += (n * item_bytes + 63) / 64 * 64;
    return offset;
}

/* One block of memory for all. */
static tq_key_bias *allocate(int32_t n_head_kv, int32_t head_dim, int32_t n_pairs)
{
    size_t n = (size_t)n_head_kv * (size_t)n_pairs, total = 0;
    size_t self = take(&total, 1, sizeof(tq_key_bias)), first = take(&total, n, sizeof(int32_t));
    size_t second = take(&total, n, sizeof(int32_t)), b0 = take(&total, n, sizeof(float));
    size_t b1 = take(&total, n, sizeof(float)), turns = take(&total, n, sizeof(double));
    size_t table = take(&total, 2 * n * (TQ_TURNS + 1), sizeof(float));
    uint8_t *memory = tq_alloc_zero(total);
    if (!memory) return NULL;
    tq_key_bias *bias = (tq_key_bias *)(void *)(memory + self);
    *bias = (tq_key_bias){.n_head_kv = n_head_kv,
                          .head_dim = head_dim,
                          .n_pairs = n_pairs,
                          .first = (int32_t *)(void *)(memory + first),
                          .second = (int32_t *)(void *)(memory + second),
                          .b0 = (float *)(void *)(memory + b0),
                          .b1 = (float *)(void *)(memory + b1),
                          .turns = (double *)(void *)(memory + turns),
                          .table = (float *)(void *)(memory + table),
                          .bytes = total};
    return bias;
}

static uint64_t hash_of(const tq_key_bias *bias)
{
    size_t n = (size_t)bias->n_head_kv * (size_t)bias->n_pairs;
    uint64_t hash = tq_hash(bias->first, n * sizeof *bias->first, (uint64_t)bias->n_pairs);
    hash = tq_hash(bias->second, n * sizeof *bias->second, hash);
    hash = tq_hash(bias->b0, n * sizeof *bias->b0, hash);
    hash = tq_hash(bias->b1, n * sizeof *bias->b1, hash);
    hash = tq_hash(bias->turns, n * sizeof *bias->turns, hash);
    return hash ? hash : 1;
}

/* Reduced in double: a float has no digits left for the angle of a far position. */
static void turn(double turns, int32_t position, float *cosine, float *sine)
{
    double n = (double)position * turns;
    float reduced = (float)((n - (double)(int64_t)n) * TWO_PI);
    *cosine = cosf(reduced);
    *sine = sinf(reduced);
}

/* The turns of one head and position. */
static void turn_all(const tq_key_bias *bias, int32_t head, int32_t position, float *to)
{
    int32_t n = bias->n_pairs;
    for (int32_t j = 0; j < n; j++) turn(bias->turns[head * n + j], position, &to[j], &to[n + j]);
}

tq_status tq_key_bias_create(tq_key_bias **out, const tq_key_bias_params *params, int32_t n_head_kv, int32_t head_dim)
{
    tq_key_bias *bias = allocate(n_head_kv, head_dim, count_pairs(params, n_head_kv, head_dim));
    if (!bias) return TQ_ERR_MEMORY;
    for (int32_t head = 0; head < n_head_kv; head++) {
        pair pairs[TQ_HEAD_DIM_MAX / 2];
        sort_head(params, head_dim, head, pairs);
        for (int32_t j = 0; j < bias->n_pairs && j < head_dim / 2; j++) {
            int32_t at = head * bias->n_pairs + j;
            bias->first[at] = pairs[j].first;
            bias->second[at] = pairs[j].second;
            bias->b0[at] = pairs[j].b0;
            bias->b1[at] = pairs[j].b1;
            bias->turns[at] = pairs[j].turns;
        }
    }
    for (int32_t head = 0; head < n_head_kv; head++) {
        float *table = bias->table + (size_t)head * (TQ_TURNS + 1) * 2 * (size_t)bias->n_pairs;
        for (int32_t i = 0; i <= TQ_TURNS; i++) turn_all(bias, head, i, table + (size_t)i * 2 * (size_t)bias->n_pairs);
    }
    bias->hash = hash_of(bias);
    *out = bias;
    return TQ_OK;
}

void tq_key_bias_free(tq_key_bias *bias)
{
    tq_free(bias);
}

void tq_key_bias_add(const tq_key_bias *bias, int32_t head, int32_t mark, float sign, float *x)
{
    if (mark <= 0) return;
    for (int32_t j = head * bias->n_pairs; j < (head + 1) * bias->n_pairs; j++) {
        float cosine, sine, b0 = sign * bias->b0[j], b1 = sign * bias->b1[j];
        turn(bias->turns[j], mark - 1, &cosine, &sine);
        x[bias->first[j]] += b0 * cosine - b1 * sine;
        x[bias->second[j]] += b0 * sine + b1 * cosine;
    }
}

void tq_key_bias_query(const tq_key_bias *bias, int32_t head, const float *q, int64_t n_row, float *coefficients)
{
    int32_t n = bias->n_pairs;
    const int32_t *first = bias->first + head * n, *second = bias->second + head * n;
    const float *b0 = bias->b0 + head * n, *b1 = bias->b1 + head * n;
    for (int64_t row = 0; row < n_row; row++) {
        const float *from = q + row * bias->head_dim;
        float *to = coefficients + row * 2 * n;
        for (int32_t j = 0; j < n; j++) {
            to[j] = from[first[j]] * b0[j] + from[second[j]] * b1[j];
            to[n + j] = from[second[j]] * b0[j] - from[first[j]] * b1[j];
        }
    }
}

/* What two turns make together. */
static void add_turns(int32_t n, const float *a, const float *b, float *to)
{
    for (int32_t j = 0; j < n; j++) {
        float cosine = a[j] * b[j] - a[n + j] * b[n + j], sine = a[n + j] * b[j] + a[j] * b[n + j];
        to[j] = cosine;
        to[n + j] = sine;
    }
}

void tq_key_turns_move(tq_key_turns *turns, const tq_key_bias *bias, int32_t head, int32_t mark)
{
    int32_t n = bias->n_pairs;
    if (turns->mark > 0 && mark - TQ_TURNS == turns->mark)
        add_turns(n, turns->values, tq_key_bias_table(bias, head) + TQ_TURNS * 2 * n, turns->values);
    else if (turns->mark != mark)
        turn_all(bias, head, mark - 1, turns->values);
    turns->mark = mark;
}

bool tq_key_bias_is_run(const int32_t *marks, int32_t n)
{
    if (marks[0] <= 0 || marks[0] > INT32_MAX - n) return false;
    bool is_run = true;
    for (int32_t i = 0; i < n; i++) is_run &= marks[i] == marks[0] + i;
    return is_run;
}

void tq_key_bias_turn_query(const tq_key_bias *bias, const tq_key_turns *turns, const float *coefficients, int64_t n_row,
                            float *turned)
{
    int32_t n = bias->n_pairs;
    const float *cosine = turns->values, *sine = turns->values + n;
    for (int64_t row = 0; row < n_row; row++) {
        const float *a = coefficients + row * 2 * n, *b = a + n;
        float *to = turned + row * 2 * n;
        for (int32_t j = 0; j < n; j++) {
            to[j] = a[j] * cosine[j] + b[j] * sine[j];
            to[n + j] = b[j] * cosine[j] - a[j] * sine[j];
        }
    }
}

void tq_key_bias_turns(const tq_key_bias *bias, int32_t head, const int32_t *marks, int32_t n, float *turns)
{
    /* Where sequences share slots in turns, a few starts serve all of their columns. */
    enum { N_STARTS = 4 };
    tq_key_turns starts[N_STARTS];
    for (int32_t i = 0; i < N_STARTS; i++) starts[i].mark = 0;
    int32_t width = 2 * bias->n_pairs, oldest = 0;
    for (int32_t i = 0; i < n; i++) {
        float *to = turns + (size_t)i * (size_t)width;
        if (marks[i] <= 0) {
            memset(to, 0, (size_t)width * sizeof *to);
            continue;
        }
        int32_t rest = (marks[i] - 1) % TQ_TURNS, start = marks[i] - rest, found = 0;
        while (found < N_STARTS && starts[found].mark != start) found++;
        if (found == N_STARTS) {
            found = oldest;
            oldest = (oldest + 1) % N_STARTS;
            tq_key_turns_move(&starts[found], bias, head, start);
        }
        add_turns(bias->n_pairs, starts[found].values, tq_key_bias_table(bias, head) + rest * width, to);
    }
}
