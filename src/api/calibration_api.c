/* SPDX-License-Identifier: MIT */
/* tq_calibration_*: argument checks in front of cache/calibration.c. */
#include "cache/calibration.h"

#include <string.h>

#include "codec/transform.h"

tq_status tq_calibration_load(tq_calibration **out, const char *path)
{
    return out && path ? tq_calibration_read(out, path) : TQ_ERR_ARGUMENT;
}

tq_status tq_calibration_take_layer(tq_calibration **out, const tq_calibration *calibration, int32_t layer)
{
    return out && calibration ? tq_calibration_of_layer(out, calibration, layer) : TQ_ERR_ARGUMENT;
}

tq_status tq_calibration_describe(tq_calibration_info *out, const tq_calibration *calibration)
{
    if (!out || !calibration) return TQ_ERR_ARGUMENT;
    *out = (tq_calibration_info){.n_layer = calibration->n_layer, .bytes = calibration->bytes};
    memcpy(out->model, calibration->model, sizeof out->model);
    return TQ_OK;
}

void tq_calibration_free(tq_calibration *calibration)
{
    tq_calibration_close(calibration);
}

const uint16_t *tq_calibration_transforms(const tq_calibration *calibration, int32_t layer, size_t *bytes)
{
    if (bytes) *bytes = 0;
    if (!calibration || !bytes || layer < 0 || layer >= calibration->n_layer) return NULL;
    const tq_calibration_layer *found = &calibration->layers[layer];
    *bytes = sizeof(uint16_t) * (size_t)found->n_head_kv * tq_transform_row(found->head_dim);
    return *bytes > 0 ? calibration->values + found->first : NULL;
}
