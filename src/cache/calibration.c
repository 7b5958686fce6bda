/* SPDX-License-Identifier: MIT */
#include "cache/calibration.h"

#include <math.h>
#include <string.h>

#include "base/alloc.h"
#include "base/file.h"
#include "base/half.h"
#include "base/hash.h"
#include "base/log.h"
#include "codec/codec.h"
#include "codec/transform.h"

#define VERSION 1

static const uint8_t magic[8] = {0x89, 'T', 'Q', 'C', 'A', 'L', '\r', '\n'};

typedef struct file_header {
    uint8_t magic[8];
    uint32_t version;
    int32_t n_layer;
    uint64_t hash; /* of all that follows it */
    int32_t n_sink, n_recent, ref_block, reserved;
    char model[64];
} file_header;
_Static_assert(sizeof(file_header) == 104, "the header has no gaps");
#define HASHED_FROM 24

/* A file in memory and how far it was read. */
typedef struct reader {
    const uint8_t *data;
    size_t bytes, at;
} reader;

static const void *take(reader *r, size_t bytes)
{
    if (bytes > r->bytes - r->at) return NULL;
    const void *from = r->data + r->at;
    r->at += bytes;
    return from;
}

static size_t values_of_file(int32_t head_dim)
{
    return (size_t)head_dim * (size_t)(head_dim + 1) / 2;
}

static tq_status read_header(reader *r, file_header *out)
{
    const void *from = take(r, sizeof *out);
    if (!from) return TQ_ERR_CORRUPT;
    memcpy(out, from, sizeof *out);
    if (memcmp(out->magic, magic, sizeof magic) != 0) return TQ_ERR_CORRUPT;
    if (out->version != VERSION) return TQ_ERR_MISMATCH;
    bool ok = out->hash == tq_hash(r->data + HASHED_FROM, r->bytes - HASHED_FROM, 0);
    return ok && out->n_layer > 0 && memchr(out->model, '\0', sizeof out->model) ? TQ_OK : TQ_ERR_CORRUPT;
}

/* The table of layers; *n_values gets the size of all matrices in memory. */
static tq_status read_layers(reader *r, tq_calibration *c, size_t *n_values)
{
    for (int32_t i = 0; i < c->n_layer; i++) {
        int32_t shape[2];
        const void *from = take(r, sizeof shape);
        if (!from) return TQ_ERR_CORRUPT;
        memcpy(shape, from, sizeof shape);
        c->layers[i] = (tq_calibration_layer){shape[0], shape[1], *n_values};
        if (shape[0] == 0 && shape[1] == 0) continue;
        /* No more heads than a file of this size can have. */
        if (shape[0] < 1 || !tq_head_dim_supported(shape[1]) || (size_t)shape[0] > r->bytes) return TQ_ERR_CORRUPT;
        *n_values += (size_t)shape[0] * tq_transform_row(shape[1]);
    }
    return TQ_OK;
}

/* One matrix into zeroed memory. */
static tq_status read_matrix(reader *r, int32_t head_dim, uint16_t *to)
{
    for (int32_t i = 0; i < head_dim; i++) {
        const void *from = take(r, (size_t)(i + 1) * sizeof *to);
        if (!from) return TQ_ERR_CORRUPT;
        uint16_t *row = to + tq_transform_row(i);
        memcpy(row, from, (size_t)(i + 1) * sizeof *to);
        for (int32_t j = 0; j <= i; j++) {
            if (!isfinite(tq_bfloat_to_float(row[j]))) return TQ_ERR_CORRUPT;
        }
        if (!(tq_bfloat_to_float(row[i]) >= 0x1p-64f)) return TQ_ERR_CORRUPT; /* its inverse must be finite, too */
    }
    return TQ_OK;
}

static tq_status read_values(reader *r, tq_calibration *c)
{
    for (int32_t i = 0; i < c->n_layer; i++) {
        const tq_calibration_layer *layer = &c->layers[i];
        for (int32_t head = 0; head < layer->n_head_kv; head++) {
            uint16_t *to = c->values + layer->first + (size_t)head * tq_transform_row(layer->head_dim);
            TQ_TRY(read_matrix(r, layer->head_dim, to));
        }
    }
    return TQ_OK;
}

/* Has the file as many bytes left as its table of layers says? Asked before memory of that size is. */
static bool has_all_bytes(const reader *r, const tq_calibration *c)
{
    size_t left = r->bytes - r->at;
    for (int32_t i = 0; i < c->n_layer; i++) {
        size_t bytes = sizeof(uint16_t) * values_of_file(c->layers[i].head_dim) * (size_t)c->layers[i].n_head_kv;
        if (bytes > left) return false;
        left -= bytes;
    }
    return left == 0;
}

static tq_status read_file(reader *r, tq_calibration *c)
{
    file_header header;
    size_t n_values = 0;
    TQ_TRY(read_header(r, &header));
    c->n_layer = header.n_layer;
    c->hash = header.hash;
    memcpy(c->model, header.model, sizeof c->model);
    if ((size_t)c->n_layer > r->bytes / (2 * sizeof(int32_t))) return TQ_ERR_CORRUPT;
    c->layers = tq_alloc_zero((size_t)c->n_layer * sizeof *c->layers);
    if (!c->layers) return TQ_ERR_MEMORY;
    TQ_TRY(read_layers(r, c, &n_values));
    if (!has_all_bytes(r, c)) return TQ_ERR_CORRUPT;
    c->values = tq_alloc_zero(n_values * sizeof *c->values + 1); /* there may be none */
    if (!c->values) return TQ_ERR_MEMORY;
    c->bytes = sizeof *c + (size_t)c->n_layer * sizeof *c->layers + n_values * sizeof *c->values;
    return read_values(r, c);
}

tq_status tq_calibration_read(tq_calibration **out, const char *path)
{
    reader r = {0};
    TQ_TRY(tq_file_map(path, &r.data, &r.bytes));
    tq_calibration *calibration = tq_alloc_zero(sizeof *calibration);
    tq_status status = calibration ? read_file(&r, calibration) : TQ_ERR_MEMORY;
    tq_file_unmap(r.data, r.bytes);
    if (status == TQ_OK) {
        *out = calibration;
        return TQ_OK;
    }
    if (status == TQ_ERR_CORRUPT) {
        tq_log(TQ_LOG_ERROR, "%s is damaged, cut off, or not a calibration; make it again with tq calibrate", path);
    } else if (status == TQ_ERR_MISMATCH) {
        tq_log(TQ_LOG_ERROR, "%s is a calibration of another version; this library reads version %d", path, VERSION);
    }
    tq_calibration_close(calibration);
    return status;
}

void tq_calibration_close(tq_calibration *calibration)
{
    if (!calibration) return;
    if (!calibration->borrowed) {
        tq_free(calibration->layers);
        tq_free(calibration->values);
    }
    tq_free(calibration);
}

tq_status tq_calibration_of_layer(tq_calibration **out, const tq_calibration *whole, int32_t layer)
{
    if (layer < 0 || layer >= whole->n_layer) {
        tq_log(TQ_LOG_ERROR, "tq_calibration_take_layer: the calibration (of %s) has %d layers; layer %d does not exist",
               whole->model, (int)whole->n_layer, (int)layer);
        return TQ_ERR_RANGE;
    }
    tq_calibration *one = tq_alloc_zero(sizeof *one);
    if (!one) return TQ_ERR_MEMORY;
    *one = *whole;
    const uint64_t identity[2] = {whole->hash, (uint64_t)layer};
    one->hash = tq_hash(identity, sizeof identity, 0);
    one->n_layer = 1;
    one->layers = whole->layers + layer;
    const tq_calibration_layer *own = one->layers;
    one->bytes = sizeof *one + sizeof *own + (size_t)own->n_head_kv * tq_transform_row(own->head_dim) * sizeof *one->values;
    one->borrowed = true;
    *out = one;
    return TQ_OK;
}

tq_status tq_calibration_find(const tq_calibration *calibration, int32_t layer, int32_t n_head_kv, int32_t head_dim,
                              const char *label, const uint16_t **out)
{
    *out = NULL;
    if (layer < 0 || layer >= calibration->n_layer) {
        tq_log(TQ_LOG_ERROR, "%s: the calibration (of %s) has %d layers; layer %d does not exist: it is of another model",
               label, calibration->model, (int)calibration->n_layer, (int)layer);
        return TQ_ERR_SHAPE;
    }
    const tq_calibration_layer *found = &calibration->layers[layer];
    if (found->n_head_kv == 0) return TQ_OK;
    if (found->n_head_kv != n_head_kv || found->head_dim != head_dim) {
        tq_log(TQ_LOG_ERROR, "%s: the calibration (of %s) has %d KV heads of %d there, not %d of %d: it is of another model",
               label, calibration->model, (int)found->n_head_kv, (int)found->head_dim, (int)n_head_kv, (int)head_dim);
        return TQ_ERR_SHAPE;
    }
    *out = calibration->values + found->first;
    return TQ_OK;
}
