/* SPDX-License-Identifier: MIT */
/* A calibration made of random matrices, well conditioned, without a file. */
#ifndef TQ_TESTS_MAKE_CALIBRATION_H
#define TQ_TESTS_MAKE_CALIBRATION_H

#include "base/alloc.h"
#include "cache/calibration.h"
#include "codec/transform.h"
#include "kv_test.h"

/* Freed by tq_calibration_free. */
static inline tq_calibration *make_calibration(kv_random *random, int32_t n_layer, int32_t n_head_kv, int32_t head_dim)
{
    size_t n_values = tq_transform_row(head_dim), per_layer = (size_t)n_head_kv * n_values;
    tq_calibration *c = tq_alloc_zero(sizeof *c);
    KV_CHECK(c);
    c->n_layer = n_layer;
    c->hash = kv_next(random);
    c->layers = tq_alloc_zero((size_t)n_layer * sizeof *c->layers);
    c->values = tq_alloc_zero((size_t)n_layer * per_layer * sizeof *c->values);
    KV_CHECK(c->layers && c->values);
    c->bytes = sizeof *c + (size_t)n_layer * (sizeof *c->layers + per_layer * sizeof *c->values);
    for (int32_t layer = 0; layer < n_layer; layer++) {
        c->layers[layer] = (tq_calibration_layer){n_head_kv, head_dim, (size_t)layer * per_layer};
        for (int32_t head = 0; head < n_head_kv; head++) {
            uint16_t *matrix = c->values + (size_t)layer * per_layer + (size_t)head * n_values;
            for (int32_t i = 0; i < head_dim; i++) {
                uint16_t *row = matrix + tq_transform_row(i);
                for (int32_t j = 0; j < i; j++)
                    row[j] = tq_bfloat_from_float((kv_uniform(random) - 0.5f) / sqrtf((float)head_dim));
                row[i] = tq_bfloat_from_float(0.5f + kv_uniform(random));
            }
        }
    }
    return c;
}

#endif
