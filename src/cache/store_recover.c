/* SPDX-License-Identifier: MIT */
/*
 * References of rows that come back: what a block's rows were coded against when they were read. It was the mean of the ring as
 * it is now but for the errors of coding, so that a search against that mean finds the codes of one row; what it leaves of the
 * row is the reference, and others confirm it.
 */
#include "cache/store.h"
#include "codec/trellis.h"

#define ROWS_MAX 8      /* that are looked at */
#define STARTS_MAX 8    /* of them, searched */
#define CONFIRMED_MIN 2 /* the one that the reference was made for, and another */

typedef struct rotated_rows {
    const tq_codec *codec;
    int32_t n;
    float x[ROWS_MAX][TQ_HEAD_DIM_MAX], y[ROWS_MAX][TQ_HEAD_DIM_MAX]; /* in the basis that is coded, and rotated */
} rotated_rows;

/* What is left of a rotated row without the values that codes stand for. */
static void leave(const tq_codec *codec, const float *y, tq_block codes, float *rest)
{
    float values[TQ_HEAD_DIM_MAX];
    tq_vector_expand(codec, codes.codes, codes.scales, values);
    for (int32_t j = 0; j < codec->head_dim; j++) rest[j] = y[j] - values[j];
}

/*
 * The mean of what rows leave that are decoded vectors next to a rotated reference, the first `enough` of them. Returns their
 * number.
 */
static int32_t confirm(const rotated_rows *rows, const float *reference, int32_t enough, float *mean)
{
    int32_t head_dim = rows->codec->head_dim, n = 0;
    uint8_t codes[TQ_CODE_BYTES_MAX];
    uint16_t scale;
    float y[TQ_HEAD_DIM_MAX], rest[TQ_HEAD_DIM_MAX], sum[TQ_HEAD_DIM_MAX] = {0};
    for (int32_t i = 0; i < rows->n && n < enough; i++) {
        for (int32_t j = 0; j < head_dim; j++) y[j] = rows->y[i][j] - reference[j];
        if (!tq_trellis_recover(rows->codec, y, 1, rows->codec->kernels->whole_scale, codes, &scale)) continue;
        leave(rows->codec, rows->y[i], (tq_block){.codes = codes, .scales = &scale}, rest);
        for (int32_t j = 0; j < head_dim; j++) sum[j] += rest[j];
        n++;
    }
    for (int32_t j = 0; j < head_dim && n > 0; j++) mean[j] = sum[j] / (float)n;
    return n;
}

/* From something near the rotated reference to itself; false if that can't be. */
static bool approach(const rotated_rows *rows, float *near, float *reference)
{
    /* The nearer it is, the more rows' scales are right, which bring it nearer. */
    return confirm(rows, near, CONFIRMED_MIN, near) >= CONFIRMED_MIN && confirm(rows, near, rows->n, near) >= CONFIRMED_MIN &&
           confirm(rows, near, rows->n, reference) >= CONFIRMED_MIN;
}

/* The rotated reference; false if it is not found. */
static bool find(const rotated_rows *rows, const float *mean, float *reference)
{
    const tq_codec *codec = rows->codec;
    uint8_t codes[TQ_CODE_BYTES_MAX];
    uint16_t scale;
    float x[TQ_HEAD_DIM_MAX], rest[TQ_HEAD_DIM_MAX];
    for (int32_t start = 0; start < STARTS_MAX && start < rows->n; start++) {
        tq_block block = {.codes = codes, .scales = &scale};
        for (int32_t j = 0; j < codec->head_dim; j++) x[j] = rows->x[start][j] - mean[j];
        codec->kernels->format[codec->traits->format].encode(codec, x, codec->head_dim, 1, block);
        leave(codec, rows->y[start], block, rest);
        if (approach(rows, rest, reference)) return true;
    }
    return false;
}

bool tq_rows_recover_reference(const tq_rows_in *in, int32_t head, int64_t column, const tq_window *window, int32_t n_rows)
{
    const tq_codec *codec = in->codec, *ref_codec = in->pages.ref_codec;
    if (codec->traits->family != TQ_FAMILY_TRELLIS) return false;
    int32_t head_dim = codec->head_dim;
    rotated_rows rows = {.codec = codec, .n = n_rows < ROWS_MAX ? n_rows : ROWS_MAX};
    float mean[TQ_HEAD_DIM_MAX], reference[TQ_HEAD_DIM_MAX], x[TQ_HEAD_DIM_MAX];
    tq_window_mean(window, head, head_dim, mean);
    tq_rows_to_basis(in, head, 1, mean);
    for (int32_t i = 0; i < rows.n; i++) {
        window->read(window->context, i, head, rows.x[i]);
        tq_rows_to_basis(in, head, 1, rows.x[i]);
        in->kernels->format[codec->traits->format].prepare(codec, rows.x[i], head_dim, 1, rows.y[i]);
    }
    tq_block block = tq_page_view_refs(&in->pages, codec, head, column);
    /* The one that is left, first. References are rotated as vectors are. */
    uint16_t scale = (uint16_t)(block.scales[0] & ~TQ_REFERENCE_LEFT);
    tq_vector_expand(ref_codec, block.codes, &scale, reference);
    if (scale != 0 && confirm(&rows, reference, CONFIRMED_MIN, x) >= CONFIRMED_MIN) {
        block.scales[0] = scale;
        return true;
    }
    if (!find(&rows, mean, reference)) return false;
    tq_rotation_inverse(&codec->rotation, reference, x);
    in->kernels->format[ref_codec->traits->format].encode(ref_codec, x, head_dim, 1, block);
    return true;
}
