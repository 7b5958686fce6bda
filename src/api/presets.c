/* SPDX-License-Identifier: MIT */
/* Named choices of formats, and what they cost in all. */
#include "base/log.h"
#include "cache/cells.h"

/* docs/quality.md tells how they were chosen. */
// clang-format off
static const tq_preset presets[] = {
    {"TQ6", "keys sq8, values tt4; first 4 and last 64 tokens exact", TQ_FORMAT_SQ8, TQ_FORMAT_TT4, 4, 64, 64},
    {"TQ4", "keys tt4, values tt4; first 4 and last 64 tokens exact", TQ_FORMAT_TT4, TQ_FORMAT_TT4, 4, 64, 64},
    {"TQ3", "keys tt3, values tt3; first 4 and last 128 tokens exact", TQ_FORMAT_TT3, TQ_FORMAT_TT3, 4, 128, 64},
    {"TQ2", "keys tt3, values tt2; first 4 and last 64 tokens exact", TQ_FORMAT_TT3, TQ_FORMAT_TT2, 4, 64, 64},
};
// clang-format on
enum { N_PRESETS = sizeof(presets) / sizeof(presets[0]) };

const tq_preset *tq_preset_get(int32_t i)
{
    return i >= 0 && i < N_PRESETS ? &presets[i] : NULL;
}

static char to_upper(char c)
{
    return c >= 'a' && c <= 'z' ? (char)(c - 'a' + 'A') : c;
}

const tq_preset *tq_preset_find(const char *name)
{
    for (int32_t i = 0; name && i < N_PRESETS; i++) {
        size_t n = 0;
        while (name[n] && to_upper(name[n]) == presets[i].name[n]) n++;
        if (!name[n] && !presets[i].name[n]) return &presets[i];
    }
    return NULL;
}

tq_status tq_preset_bits_per_value(double *out, const tq_preset *preset, int32_t head_dim, int32_t n_head_kv, int64_t n_slots)
{
    if (out == NULL || preset == NULL || n_head_kv < 1 || n_slots < 1) return TQ_ERR_ARGUMENT;
    tq_store_params params = {.struct_size = sizeof params};
    params.head_dim = head_dim;
    params.n_head_kv = n_head_kv;
    params.n_slots = n_slots;
    params.n_sink = preset->n_sink;
    params.n_recent = preset->n_recent;
    size_t k_bytes, v_bytes;
    params.format = preset->k_format;
    params.ref_block = preset->k_ref_block;
    TQ_TRY(tq_store_bytes(&k_bytes, &params));
    params.ref_block = 0;
    params.format = preset->v_format;
    TQ_TRY(tq_store_bytes(&v_bytes, &params));
    double n_values = 2.0 * (double)n_slots * n_head_kv * head_dim;
    *out = 8.0 * ((double)k_bytes + (double)v_bytes) / n_values;
    return TQ_OK;
}
