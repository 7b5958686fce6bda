/* SPDX-License-Identifier: MIT */
/* What happens to a logit between the dot product and the softmax: softcap, additive mask, ALiBi. */
#include "attention/plan.h"

#include <math.h>

#include "base/half.h"

#define HALF_MINUS_INFINITY 0xfc00u
/* Columns are cut off in steps of this many. */
#define TRIM_STEP 64

/* An OR over a whole run instead of an early exit, so that the compiler can vectorise it. */
static bool any_visible_f16(const uint16_t *mask, int64_t n)
{
    unsigned visible = 0;
    for (int64_t i = 0; i < n; i++) visible |= mask[i] ^ HALF_MINUS_INFINITY;
    return visible != 0;
}

static bool any_visible_f32(const float *mask, int64_t n)
{
    bool visible = false;
    for (int64_t i = 0; i < n; i++) visible |= mask[i] != -INFINITY;
    return visible;
}

static int64_t mask_offset(const tq_attend_params *params, int64_t token, int32_t head, int64_t column)
{
    return token * params->mask_token_stride + head * params->mask_head_stride + column;
}

static bool row_visible(const tq_attend_plan *plan, int32_t head_kv, int64_t row, int64_t c0, int64_t c1)
{
    const tq_attend_params *params = plan->params;
    int64_t offset = mask_offset(params, tq_row_token(plan, row), tq_row_head(plan, head_kv, row), c0);
    if (params->mask_is_f16) return any_visible_f16((const uint16_t *)params->mask + offset, c1 - c0);
    return any_visible_f32((const float *)params->mask + offset, c1 - c0);
}

/* Cut off the rows at either end that see nothing of columns [c0, c1); false if none sees anything. */
static bool trim_rows(const tq_attend_plan *plan, int32_t head_kv, int64_t c0, int64_t c1, int64_t *row_begin, int64_t *row_end)
{
    /* With one mask for all heads, the rows of a token need one look. */
    int64_t step = plan->params->mask_head_stride == 0 ? plan->group : 1;
    int64_t begin = *row_begin, end = *row_end;
    while (begin < end && !row_visible(plan, head_kv, begin, c0, c1)) begin += step - begin % step;
    while (begin < end && !row_visible(plan, head_kv, end - 1, c0, c1)) end -= (end - 1) % step + 1;
    *row_begin = begin;
    *row_end = end;
    return begin < end;
}

/* The last rows first: in a causal mask they see the most. */
static bool any_row_visible(const tq_attend_plan *plan, int32_t head_kv, int64_t c0, int64_t c1, int64_t begin, int64_t end)
{
    int64_t step = plan->params->mask_head_stride == 0 ? plan->group : 1;
    for (int64_t row = end - 1; row >= begin; row -= row % step + 1) {
        if (row_visible(plan, head_kv, row, c0, c1)) return true;
    }
    return false;
}

static bool column_visible(const tq_attend_params *params, int64_t offset)
{
    if (params->mask_is_f16) return ((const uint16_t *)params->mask)[offset] != HALF_MINUS_INFINITY;
    return ((const float *)params->mask)[offset] != -INFINITY;
}

/*
 * The end of what any row sees of columns [c0, c1). While a context is short its columns are all exact, and a step's rest that
 * nobody sees would be read from pages, with all that this needs.
 */
static int64_t visible_end(const tq_attend_plan *plan, int32_t head_kv, int64_t c0, int64_t c1, int64_t begin, int64_t end)
{
    int64_t step = plan->params->mask_head_stride == 0 ? plan->group : 1, last = c0;
    for (int64_t row = end - 1; row >= begin; row -= row % step + 1) {
        int64_t offset = mask_offset(plan->params, tq_row_token(plan, row), tq_row_head(plan, head_kv, row), 0), c = c1;
        while (c > last && !column_visible(plan->params, offset + c - 1)) c--;
        if (c > last) last = c;
    }
    return last;
}

bool tq_mask_trim(const tq_attend_plan *plan, int32_t head_kv, int64_t *c0, int64_t *c1, int64_t *row_begin, int64_t *row_end)
{
    int64_t begin = *c0, end = *c1;
    while (begin < end) {
        int64_t next = (begin / TRIM_STEP + 1) * TRIM_STEP;
        if (next > end) next = end;
        if (any_row_visible(plan, head_kv, begin, next, *row_begin, *row_end)) break;
        begin = next;
    }
    while (begin < end) {
        int64_t next = (end - 1) / TRIM_STEP * TRIM_STEP;
        if (next < begin) next = begin;
        if (any_row_visible(plan, head_kv, next, end, *row_begin, *row_end)) break;
        end = next;
    }
    if (begin < end) end = visible_end(plan, head_kv, begin, end, *row_begin, *row_end);
    *c0 = begin;
    *c1 = end;
    return begin < end && trim_rows(plan, head_kv, begin, end, row_begin, row_end);
}

/* For what the kernel leaves out: FP32 masks and slopes that are not positive. */
static void add_mask(const tq_attend_params *params, int64_t offset, float slope, int64_t n, float *s)
{
    const uint16_t *half = params->mask_is_f16 ? (const uint16_t *)params->mask + offset : NULL;
    const float *full = params->mask_is_f16 ? NULL : (const float *)params->mask + offset;
    for (int64_t i = 0; i < n; i++) {
        float m = half ? tq_half_to_float(half[i]) : full[i];
        s[i] = m == -INFINITY ? -INFINITY : s[i] + slope * m;
    }
}

void tq_bias_row(const tq_attend_plan *plan, int64_t token, int32_t head, int64_t c0, int64_t n, float *s)
{
    const tq_attend_params *params = plan->params;
    if (params->softcap > 0) plan->kernels->row_softcap(s, n, params->softcap);
    if (params->mask) {
        float slope = params->alibi_slopes ? params->alibi_slopes[head] : 1.0f;
        int64_t offset = mask_offset(params, token, head, c0);
        if (params->mask_is_f16 && slope > 0) {
            plan->kernels->row_mask_f16(s, n, 1.0f, (const uint16_t *)params->mask + offset, slope);
        } else {
            add_mask(params, offset, slope, n, s);
        }
    } else if (params->alibi_slopes) {
        float slope = params->alibi_slopes[head];
        int64_t distance = params->first_pos + token - c0;
        for (int64_t i = 0; i < n; i++) s[i] -= slope * (float)(distance - i);
    }
}
