/* SPDX-License-Identifier: MIT */
/*
 * What `tq calibrate` learnt of a model, from its file (docs/calibrate.md has the bytes): transforms of keys, by layer and KV
 * head. Read once and never changed.
 */
#ifndef TQ_CACHE_CALIBRATION_H
#define TQ_CACHE_CALIBRATION_H

#include "turboquant.h"

typedef struct tq_calibration_layer {
    int32_t n_head_kv, head_dim; /* both 0: no transforms */
    size_t first;                /* of the layer's values */
} tq_calibration_layer;

struct tq_calibration {
    char model[64];
    uint64_t hash; /* of the file's content; of one layer also of its number */
    int32_t n_layer;
    size_t bytes;  /* of this and all that it holds or reads */
    bool borrowed; /* the arrays belong to the calibration that this is a layer of */
    tq_calibration_layer *layers;
    uint16_t *values; /* matrices as codec/transform.h has them, layer by layer, [n_head_kv] each */
};

/* Errors: IO, CORRUPT, MISMATCH (another version), MEMORY, all but the last logged. */
tq_status tq_calibration_read(tq_calibration **out, const char *path);
void tq_calibration_close(tq_calibration *calibration);
/* Errors: RANGE, logged, and MEMORY. */
tq_status tq_calibration_of_layer(tq_calibration **out, const tq_calibration *whole, int32_t layer);

/*
 * The transforms of a layer, NULL if it has none. Errors: SHAPE if the layer does not exist there or has another shape; `label`
 * names the layer in the message.
 */
tq_status tq_calibration_find(const tq_calibration *calibration, int32_t layer, int32_t n_head_kv, int32_t head_dim,
                              const char *label, const uint16_t **out);

#endif
