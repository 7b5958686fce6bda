/* SPDX-License-Identifier: MIT */
/*
 * The environment variable TQ_GGML: a list of key=value, separated by commas; a comma or backslash of a value may have a
 * backslash before it. docs/llama-cpp.md explains it to users.
 */
#ifndef TQ_GGML_OPTIONS_H
#define TQ_GGML_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "turboquant.h"

#define TQ_GGML_LAYERS_MAX 1024
#define TQ_GGML_PATH_MAX 4096
#define TQ_GGML_SEQUENCES_MAX 256 /* llama.cpp's limit */

/* What happens to a layer whose keys the format can't hold well enough, by its weights. */
typedef enum tq_ggml_guard { TQ_GGML_GUARD_RAISE, TQ_GGML_GUARD_WARN, TQ_GGML_GUARD_REFUSE, TQ_GGML_GUARD_OFF } tq_ggml_guard;

typedef struct tq_ggml_options {
    bool has_k_format, has_v_format, has_n_sink, has_n_recent, has_ref_block; /* else the preset's */
    bool has_factors, has_guard, has_n_sequences;
    tq_format k_format, v_format;
    int32_t n_sink, n_recent;
    int32_t ref_block;
    int32_t n_sequences; /* that share a stream and whose first tokens stay exact, and one more at its first cells */
    bool factors;        /* of keys' channels, from the weights */
    int32_t head_dim;    /* 0: not given */
    tq_log_level log_level;
    tq_ggml_guard guard;
    char calibration[TQ_GGML_PATH_MAX];           /* of `tq calibrate`, or "" */
    char observe[TQ_GGML_PATH_MAX];               /* what `tq calibrate` reads, or "" */
    uint8_t exact_layers[TQ_GGML_LAYERS_MAX / 8]; /* bit set: keys and values stay FP16 */
    int32_t max_exact_layer;                      /* -1: none */
    bool capture;                                 /* steps of decoding as CUDA graphs */
    char inner[64];                               /* the device behind ours, or "": all of CUDA */
} tq_ggml_options;

/*
 * Parse text; NULL and "" give the defaults. On failure returns false, *out is untouched and error gets one line that names the
 * option and what it may be. An option that others leave without effect is such a failure.
 */
bool tq_ggml_options_parse(tq_ggml_options *out, const char *text, char *error, size_t error_bytes);

/* The places for first tokens of sequences that share a stream: n_sink for each, of as many as the library has room for. */
int32_t tq_ggml_options_n_keep(const tq_ggml_options *options, int32_t n_sink, int32_t n_recent);

static inline bool tq_ggml_options_is_exact(const tq_ggml_options *options, int32_t layer)
{
    return layer >= 0 && layer < TQ_GGML_LAYERS_MAX && (options->exact_layers[layer / 8] >> (layer % 8) & 1) != 0;
}

#endif
