/* SPDX-License-Identifier: MIT */
/*
 * What the bytes mean. A codec is one format at one head_dim with its rotation; everything here is plain C and is the
 * specification that docs/formats.md puts in words. Kernels implement the same arithmetic faster.
 *
 * A vector is stored as n_scales FP16 scales and code_bytes bytes of codes. A *block* holds many vectors of one head: codes
 * and scales in two planes, so that the codes of a page are contiguous.
 *
 * Attention works in the codec's *working basis*, `width` floats a vector: the rotated basis for rotated formats
 * (width = head_dim), the plain one for F16 and BF16, and rotated value plus sketch for the product formats (width = 2 *
 * head_dim). For a query q and a stored vector x: dot(q, decode(x)) = dot(prepare(q), expand(x)), and for weights p: sum p *
 * decode(x) = finish(sum p * expand(x)).
 */
#ifndef TQ_CODEC_CODEC_H
#define TQ_CODEC_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "turboquant.h"

/*
 * Encoding is bit-exact everywhere, so no compiler may fuse a multiplication with an addition on its own account. The build
 * passes -ffp-contract=off; this is for whoever compiles the files with default flags.
 */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#define TQ_HEAD_DIM_MAX 576
#define TQ_WIDTH_MAX (2 * TQ_HEAD_DIM_MAX)
#define TQ_ROUNDS_MAX 3
#define TQ_SCALES_MAX 2
#define TQ_CODE_BYTES_MAX (2 * TQ_HEAD_DIM_MAX)

/*
 * Orthonormal rotation, in rounds: each flips signs and applies (A_m kron H_2^k) / sqrt(2^k), head_dim = m * 2^k, where A_m is
 * the orthonormal Hartley matrix (symmetric, its own inverse) and H the Walsh-Hadamard matrix in natural order. Element
 * index = i_m * 2^k + i_2k. head_dims below 128 take two rounds, the others one.
 */
typedef struct tq_rotation {
    int32_t head_dim, m, pow2;                   /* head_dim = m * pow2, m odd */
    int32_t n_rounds;                            /* 1 to 3 */
    const float *hartley;                        /* [m, m], NULL for m = 1 */
    float scale;                                 /* 1 / sqrt(pow2), rounded once */
    float signs[TQ_ROUNDS_MAX][TQ_HEAD_DIM_MAX]; /* +1 or -1 */
} tq_rotation;

typedef enum tq_family { TQ_FAMILY_EXACT, TQ_FAMILY_UNIFORM, TQ_FAMILY_LLOYD, TQ_FAMILY_PROD, TQ_FAMILY_TRELLIS } tq_family;

/* The static part of a format: one row of the table in format.c. */
typedef struct tq_format_traits {
    tq_format format;
    const char *name, *description;
    tq_family family;
    int32_t bits;                       /* nominal; of a product format, sketch included */
    int32_t code_bits;                  /* bits of the codebook's codes: bits, or bits - 1 for product formats */
    int32_t n_scales;                   /* FP16 scales a vector: 0, 1, or 2 for product formats (norm, residual norm) */
    const float *codebook, *boundaries; /* 2^code_bits centroids and 2^code_bits - 1 midpoints, ascending; NULL if none */
    double lloyd_max;
    const int8_t *windows; /* trellis formats: the 256 windows' values, and 3 bytes that may be read; else NULL */
} tq_format_traits;

struct tq_codec {
    const tq_format_traits *traits;
    int32_t head_dim;
    int32_t width;     /* floats of the working basis */
    size_t code_bytes; /* of one vector */
    uint64_t seed;
    tq_rotation rotation; /* unused by EXACT */
    /* LLOYD: codes whose centroids' sum of squares lies in this range need no settling (lloyd.c, docs/formats.md). */
    float settled_min, settled_max;
    float *sketch; /* [head_dim, head_dim] of product formats, transposed: S[i][j] at j * head_dim + i; else NULL */
    const struct tq_kernels *kernels; /* what tq_codec_create's dispatch chose; set by src/api and the owners of codecs */
};

/* NULL if out of range. */
const tq_format_traits *tq_format_traits_get(tq_format format);

/* Is there a rotation for this head_dim? */
bool tq_head_dim_supported(int32_t head_dim);
/* What tq_head_dim_list returns. */
const int32_t *tq_supported_head_dims(int32_t *n_out);
/* Is there such a format at such a head_dim? If not, the reason goes to the log. Errors: FORMAT, HEAD_DIM. */
tq_status tq_codec_check(tq_format format, int32_t head_dim);
/* The bytes of a vector: codes without scales, and with them. */
size_t tq_format_code_bytes(const tq_format_traits *traits, int32_t head_dim);
size_t tq_format_vector_bytes(const tq_format_traits *traits, int32_t head_dim);
/* head_dim must be supported. */
void tq_rotation_init(tq_rotation *rotation, int32_t head_dim, uint64_t seed);
/* y = R x and x = R^T y, one vector; may alias. The order of additions is the specification. */
void tq_rotation_forward(const tq_rotation *rotation, const float *x, float *y);
void tq_rotation_inverse(const tq_rotation *rotation, const float *y, float *x);

/* Initialise a codec in place (kernels stays NULL). Errors: FORMAT, HEAD_DIM (both with a log message), MEMORY. */
tq_status tq_codec_init(tq_codec *codec, tq_format format, int32_t head_dim, uint64_t seed);
void tq_codec_deinit(tq_codec *codec);

/* The bytes of a vector: codes and scales. */
static inline size_t tq_codec_vector_bytes(const tq_codec *codec)
{
    return codec->code_bytes + 2 * (size_t)codec->traits->n_scales;
}

/* The specification, one vector at a time. Little-endian throughout. */
/* Raw x [head_dim], all finite, to codes and scales. */
void tq_vector_encode(const tq_codec *codec, const float *x, uint8_t *codes, uint16_t *scales);
/* Codes and scales to the working basis y [width]. */
void tq_vector_expand(const tq_codec *codec, const uint8_t *codes, const uint16_t *scales, float *y);
/* A raw query q [head_dim] to the working basis [width]. */
void tq_vector_prepare(const tq_codec *codec, const float *q, float *y);
/* A sum in the working basis [width] to raw values [head_dim]. */
void tq_vector_finish(const tq_codec *codec, const float *acc, float *x);

/*
 * Sum of squares in the order that makes encoding bit-exact everywhere: 16 running sums, element i into sum i % 16, no fused
 * multiply-add; then sums j and j + 8 are added, j + 4, j + 2, j + 1.
 */
float tq_sum_squares(const float *x, int32_t n);

/*
 * The factor that brings a vector of sum of squares ss to mean square 1: sqrtf(head_dim) / sqrtf(ss). 0 if ss is below
 * 0x1p-126f: such a vector is a zero vector.
 */
float tq_unit_factor(float ss, int32_t head_dim);
/*
 * A scale (>= 0) as FP16 bits. It keeps 10 significant bits, one fewer than FP16 has, round to nearest even: the values that it
 * multiplies may be rounded to FP16 and encoded again, and the error of that stays below half a step of the scale, so the
 * second encoding finds the same one. At most 65472, the largest such number.
 */
uint16_t tq_scale_from_float(float scale);

/* The factor 2^(step / 4) of a channel; |step| <= 127. */
float tq_channel_factor(int8_t step);
/* x [n, head_dim]: channel j of each vector times the factor of sign * steps[j], sign 1 or -1. */
void tq_scale_channels(const int8_t *steps, int32_t sign, int32_t head_dim, int64_t n, float *x);

/* Codes in order, little-endian: code i of b = 1, 2, 4 bits stands at bits [b * i, b * i + b) of the stream; 8 bits is a byte.
 * 3 bits are two planes: the low 2 bits of all codes, then the high bit of all codes. n is a multiple of 8. */
size_t tq_packed_bytes(int32_t bits, int32_t n);
void tq_pack(const uint8_t *code, int32_t n, int32_t bits, uint8_t *bytes);
void tq_unpack(const uint8_t *bytes, int32_t n, int32_t bits, uint8_t *code);

#endif
