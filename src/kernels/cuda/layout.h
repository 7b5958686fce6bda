/* SPDX-License-Identifier: MIT */
/*
 * Where a code lies in device memory. C and CUDA share this file, and the host's unit test proves that the map is one to one.
 *
 * A page of the device holds, for each KV head, page_size / 32 records of 32 tokens. A record is one contiguous run of bytes,
 * so that one bulk copy brings a warp all that it needs:
 *
 *     [plane of the keys' codes] [plane of the values' codes] [32 FP16 key scales] [32 FP16 value scales]
 *
 * A plane is 32 *strings*, one a lane, head_dim * bits / 8 bytes each: what that lane feeds to its tensor-core operands.
 * Strings are interleaved in vectors of 16, 8 or 4 bytes, so that a warp's loads have no bank conflicts: byte y of a string
 * stands at (y / vector) * 32 * vector + lane * vector + y % vector.
 *
 * Lane 4 g + t. In a scalar plane a string is a row of *octets*, 8 codes each, in nibbles where codes have 4 bits or fewer:
 *     keys     octet j * (head_dim / 32) + k, nibble n: token 8 (g / 2) + 2 j + g % 2, dimension t * head_dim / 4 + 8 k + n
 *     values   octet i * (head_dim / 32) + k, nibble n: token 8 t + 2 i + (n / 2) % 2,
 *                                                       dimension g * head_dim / 8 + 4 k + n % 2 + 2 (n / 4)
 * 8-bit octets are two words of bytes. Narrower ones form *groups* of octets of one token (keys) or pair (values), as large as
 * divides head_dim / 32:
 *     4 bits   1 octet: its word
 *     3 bits   4 octets: 3 words, the nibbles of the first three. The last lends its bit b to the top of word b's nibbles
 *              2 octets (head_dim 64, 192): the first's word with the last's bit 2 on top, and a tail of 2 bits a code
 *              3 octets (head_dim 96): the first two's words with the last's bits 1 and 2 on top, and a tail of 1 bit a code
 *     2 bits   2 octets: 1 word, the second in the upper half of each nibble
 *              3 octets (head_dim 96): the same word, and a tail of the third, 2 bits a code
 * A string has the words of all groups first, then their tails. A tail of 2 bits is 16: nibble m has codes m and, above it,
 * m + 4. A tail of 1 bit is 8: bit 4 (n % 2) + 2 (n / 4) + n / 2 % 2 is nibble n's, so that two steps put four tails to the
 * nibbles of a word. With values, n / 2 % 2 is the token's: there lanes 4 g + t of g = 2 i and 2 i + 1 exchange bits, and the
 * one with g % 2 = token % 2 holds both lanes' (a lane alone has but half a byte of a token here).
 * A token's codes have bytes of their own everywhere, so tokens can be written at the same time.
 *
 * In a trellis plane a string is a row of *chunks*, bits of the circle in order: keys, for each j, the chunk of dimensions
 * t * head_dim / 4 on of the token above; values, for each i < 8, dimensions g * head_dim / 8 on of token 8 t + i.
 *
 * A *plain* plane has no strings: 32 rows, a token's codes each, as the format packs them. Stores have such planes where
 * pairs.h says so: at head_dims that strings do not suit, or that no kernels are compiled for.
 *
 * With references (docs/formats.md), a block of 64 tokens has one, for its two records, and stands between them, so that one
 * copy of contiguous bytes brings it with either:
 *
 *     [record 2 b] [reference of block b] [record 2 b + 1]
 *
 * A reference is its codes of 8 bits in the order of dimensions, an FP16 scale, and zeros or anything up to a multiple of 16.
 *
 * Codes are the format's codes (docs/formats.md): a device page is a private copy that converts bit for bit.
 */
#ifndef TQ_KERNELS_CUDA_LAYOUT_H
#define TQ_KERNELS_CUDA_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define TQ_HD __host__ __device__ __forceinline__ constexpr
#else
#define TQ_HD static inline
#endif

#define TQ_RECORD_TOKENS 32
#define TQ_RECORD_SCALE_BYTES (2 * TQ_RECORD_TOKENS)
/* The tokens that share a reference. */
#define TQ_REF_BLOCK (2 * TQ_RECORD_TOKENS)

/* The codes of one side (keys or values) of a record. */
typedef struct tq_plane {
    int32_t bits, head_dim;
    bool is_value, is_trellis, is_plain;
} tq_plane;

/* Can it have strings? Where octets share words, they must be one token's. */
TQ_HD bool tq_plane_has_strings(tq_plane plane)
{
    int32_t n_octets = plane.head_dim / 32; /* of a token or pair */
    if (plane.head_dim % 32 != 0) return false;
    if (plane.is_trellis) return n_octets % 2 == 0;
    return plane.bits >= 4 || n_octets % 2 == 0 || n_octets % 3 == 0;
}

/* Of a string; or of a token's row in a plain plane. */
TQ_HD int32_t tq_plane_string_bytes(tq_plane plane)
{
    return plane.head_dim * plane.bits / 8;
}

TQ_HD int32_t tq_plane_bytes(tq_plane plane)
{
    return 32 * tq_plane_string_bytes(plane);
}

TQ_HD int32_t tq_plane_vector_bytes(tq_plane plane)
{
    int32_t bytes = tq_plane_string_bytes(plane);
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : 4;
}

/* Byte y of a lane's string, from the start of the plane. */
TQ_HD int32_t tq_plane_offset(tq_plane plane, int32_t lane, int32_t y)
{
    int32_t vector = tq_plane_vector_bytes(plane);
    return y / vector * 32 * vector + lane * vector + y % vector;
}

/* One code of a scalar plane. */
typedef struct tq_code_place {
    int32_t lane, octet, nibble;
} tq_code_place;

TQ_HD tq_code_place tq_code_place_of(tq_plane plane, int32_t token, int32_t dim)
{
    tq_code_place place = {0, 0, 0};
    int32_t per_group = plane.head_dim / 32, pair = token / 2 % 4;
    if (plane.is_value) {
        int32_t g = dim / (plane.head_dim / 8), r = dim % 4;
        place.lane = 4 * g + token / 8;
        place.octet = pair * per_group + dim % (plane.head_dim / 8) / 4;
        place.nibble = r % 2 + 4 * (r / 2) + 2 * (token % 2);
    } else {
        int32_t g = 2 * (token / 8) + token % 2, t = dim / (plane.head_dim / 4);
        place.lane = 4 * g + t;
        place.octet = pair * per_group + dim % (plane.head_dim / 4) / 8;
        place.nibble = dim % 8;
    }
    return place;
}

/* Octets that share words, those words, and the bits of each code of the last octet that stand in a tail. */
typedef struct tq_octet_group {
    int32_t octets, words, tail_bits;
} tq_octet_group;

TQ_HD tq_octet_group tq_octet_group_of(tq_plane plane)
{
    tq_octet_group group = {1, 1, 0};
    int32_t n_octets = plane.head_dim / 32;
    if (plane.bits == 8) group.words = 2;
    if (plane.bits == 3) {
        group.octets = n_octets % 4 == 0 ? 4 : n_octets % 2 == 0 ? 2 : 3;
        group.words = group.octets - 1;
    }
    if (plane.bits == 2) group.octets = n_octets % 2 == 0 ? 2 : 3;
    group.tail_bits = group.octets * plane.bits - 4 * group.words;
    return group;
}

/* The words of groups in a lane's string; tails follow. */
TQ_HD int32_t tq_plane_words(tq_plane plane)
{
    tq_octet_group group = tq_octet_group_of(plane);
    return plane.head_dim / 8 / group.octets * group.words;
}

/* Bit `bit` of a code: which bit of the plane. */
TQ_HD int32_t tq_code_bit(tq_plane plane, int32_t token, int32_t dim, int32_t bit)
{
    tq_code_place place = tq_code_place_of(plane, token, dim);
    tq_octet_group group = tq_octet_group_of(plane);
    int32_t i_group = place.octet / group.octets, octet = place.octet % group.octets, n = place.nibble;
    int32_t at = 32 * group.words * i_group, tail = 32 * tq_plane_words(plane) + 8 * group.tail_bits * i_group;
    bool is_last = octet == group.octets - 1;
    if (plane.bits == 8) {
        at += 8 * n + bit;
    } else if (is_last && bit < group.tail_bits && group.tail_bits == 2) {
        at = tail + 4 * (n % 4) + 2 * (n / 4) + bit;
    } else if (is_last && bit < group.tail_bits) {
        int32_t third = n / 2 % 2, odd = place.lane / 4 % 2;
        if (plane.is_value) place.lane += 4 * (third - odd), third = odd;
        at = tail + 4 * (n % 2) + 2 * (n / 4) + third;
    } else if (is_last && plane.bits == 3) {
        at += 32 * (bit - group.tail_bits) + 4 * n + 3;
    } else {
        at += (plane.bits == 2 ? 2 : 32) * octet + 4 * n + bit;
    }
    return 8 * tq_plane_offset(plane, place.lane, at / 8) + at % 8;
}

/* Byte `byte` of a token's circle of trellis codes, from the start of the plane. */
TQ_HD int32_t tq_circle_offset(tq_plane plane, int32_t token, int32_t byte)
{
    if (plane.is_value) {
        int32_t chunk = tq_plane_string_bytes(plane) / 8;
        return tq_plane_offset(plane, 4 * (byte / chunk) + token / 8, token % 8 * chunk + byte % chunk);
    }
    int32_t chunk = tq_plane_string_bytes(plane) / 4, g = 2 * (token / 8) + token % 2;
    return tq_plane_offset(plane, 4 * g + byte / chunk, token / 2 % 4 * chunk + byte % chunk);
}

/* The bytes of a record, a multiple of 128, or of 32 where planes are plain. */
TQ_HD int32_t tq_record_bytes(tq_plane key, tq_plane value)
{
    return tq_plane_bytes(key) + tq_plane_bytes(value) + 2 * TQ_RECORD_SCALE_BYTES;
}

/* The bytes of a reference, a multiple of 16, as bulk copies want. */
TQ_HD int32_t tq_reference_bytes(int32_t head_dim)
{
    return (head_dim + 2 + 15) / 16 * 16;
}

/* Where the bytes of record i of a head's page begin, its reference's among them; reference_bytes 0: it has no references. */
TQ_HD int32_t tq_record_begin(int32_t record_bytes, int32_t reference_bytes, int32_t i)
{
    return i * record_bytes + (i >> 1) * reference_bytes;
}

/* The bytes of a head's page. */
TQ_HD int32_t tq_device_head_page_bytes(int32_t record_bytes, int32_t reference_bytes, int32_t n_records)
{
    return tq_record_begin(record_bytes, reference_bytes, n_records);
}

/* From those bytes to the record, which is the first or the second of its block; and to the reference. */
TQ_HD int32_t tq_record_within(int32_t reference_bytes, int32_t i)
{
    return (i & 1) * reference_bytes;
}
TQ_HD int32_t tq_reference_within(int32_t record_bytes, int32_t i)
{
    return i & 1 ? 0 : record_bytes;
}

#endif
