/* SPDX-License-Identifier: MIT */
/* A store of 1000 slots that is given keys with their queries, as an engine does. */
#ifndef TQ_TESTS_STORE_FIXTURE_H
#define TQ_TESTS_STORE_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kv_test.h"

typedef struct store_fixture {
    tq_store_params params;
    tq_store *store;
    void *memory;
    size_t bytes;
} store_fixture;

enum { FIXTURE_ROW = 128, FIXTURE_DIM = 64, FIXTURE_HEADS = 2 };

static inline void fixture_init(store_fixture *l, tq_format format, int32_t n_sink, int32_t n_recent, int32_t ref_block,
                                const int8_t *factors)
{
    l->params = kv_store_params(format, FIXTURE_DIM, FIXTURE_HEADS, 1000);
    l->params.label = "layer 3 keys";
    l->params.n_sink = n_sink;
    l->params.n_recent = n_recent;
    l->params.ref_block = ref_block;
    l->params.factors = factors;
    assert_int_equal(tq_store_bytes(&l->bytes, &l->params), TQ_OK);
    l->memory = kv_aligned(l->bytes);
    assert_int_equal(tq_store_open(&l->store, &l->params, l->memory, l->bytes), TQ_OK);
}

static inline void fixture_deinit(store_fixture *l)
{
    tq_store_close(l->store);
    free(l->memory);
}

static inline tq_attend_params fixture_queries(const float *q, int64_t n, float *out)
{
    tq_attend_params p = {.struct_size = sizeof p, .softmax_scale = 1.0f};
    p.n_query = n;
    p.n_head = 2 * FIXTURE_HEADS;
    p.q = q;
    p.out = out;
    p.q_head_stride = p.out_head_stride = FIXTURE_DIM;
    p.q_token_stride = p.out_token_stride = 2 * FIXTURE_ROW;
    p.softmax_scale = 0.125f;
    return p;
}

/* Stage, settle and attend rows [first, first + n), whose slots and queries stand at the same places. */
static inline void fixture_step(store_fixture *l, tq_stage *stage, const int64_t *slots, const float *rows, const float *q,
                                int64_t first, int64_t n, float *out)
{
    tq_attend_params p = fixture_queries(q + first * 2 * FIXTURE_ROW, n, out + first * 2 * FIXTURE_ROW);
    assert_int_equal(tq_store_stage(l->store, stage, slots + first, n, rows + first * FIXTURE_ROW, FIXTURE_ROW), TQ_OK);
    assert_int_equal(tq_stage_n_rows(stage), n);
    assert_int_equal(tq_store_settle(l->store, stage, NULL), TQ_OK);
    /* Only slots that were written by then, as a mask would have it: rows go to ascending slots here. */
    p.causal = true;
    p.first_pos = first;
    assert_int_equal(tq_store_attend(l->store, l->store, first + n, &p, stage, stage, NULL), TQ_OK);
}

/* Mean squared error per value of slots [first, end). */
static inline double error_of(const tq_store *store, const float *rows, const float *weight, int64_t first, int64_t end)
{
    float row[FIXTURE_ROW];
    double error = 0;
    for (int64_t i = first; i < end; i++) {
        assert_int_equal(tq_store_read(store, i, 1, row, FIXTURE_ROW), TQ_OK);
        for (int32_t j = 0; j < FIXTURE_ROW; j++) {
            double e = (double)(row[j] - rows[i * FIXTURE_ROW + j]) * (double)weight[j % FIXTURE_DIM];
            error += e * e;
        }
    }
    return error / (double)((end - first) * FIXTURE_ROW);
}

#endif
