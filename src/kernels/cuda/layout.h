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
 * 4-bit octets are a word each. Two 2-bit octets share a word: the second is in the upper half of each nibble. Four 3-bit
 * octets share three words: the fourth lends its bit b to the top of word b's nibbles. 8-bit octets are two words of bytes. A
 * token's codes have bytes of their own everywhere, so tokens can be written at the same time.
 *
 * In a trellis plane a string is a row of *chunks*, bits of the circle in order: keys, for each j, the chunk of dimensions
 * t * head_dim / 4 on of the token above; values, for each i < 8, dimensions g * head_dim / 8 on of token 8 t + i.
 *
 * Codes are the format's codes (docs/formats.md): a device page is a private copy that converts bit for bit.
 */
#ifndef TQ_KERNELS_CUDA_LAYOUT_H
#define TQ_KERNELS_CUDA_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define TQ_HD __host__ __device__ __forceinline__
#else
#define TQ_HD static inline
#endif

#define TQ_RECORD_TOKENS 32
#define TQ_RECORD_SCALE_BYTES (2 * TQ_RECORD_TOKENS)

/* The codes of one side (keys or values) of a record. */
typedef struct tq_plane {
    int32_t bits, head_dim;
    bool is_value, is_trellis;
} tq_plane;

/* Is there a layout for it? Where four octets share words, they must be one token's. */
TQ_HD bool tq_plane_exists(tq_plane plane)
{
    if (plane.head_dim % 32 != 0) return false;
    if (plane.is_trellis) return plane.head_dim % 64 == 0;
    return plane.head_dim % (plane.bits == 3 ? 128 : plane.bits == 2 ? 64 : 32) == 0;
}

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
    tq_code_place place;
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

/* Bit `bit` of that code: which bit of the lane's string. */
TQ_HD int32_t tq_code_bit(tq_plane plane, tq_code_place place, int32_t bit)
{
    int32_t octet = place.octet, nibble = place.nibble;
    switch (plane.bits) {
    case 8:
        return 64 * octet + 8 * nibble + bit;
    case 4:
        return 32 * octet + 4 * nibble + bit;
    case 3:
        if (octet % 4 < 3) return 32 * (3 * (octet / 4) + octet % 4) + 4 * nibble + bit;
        return 32 * (3 * (octet / 4) + bit) + 4 * nibble + 3;
    default:
        return 32 * (octet / 2) + 4 * nibble + 2 * (octet % 2) + bit;
    }
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

/* The bytes of a record, a multiple of 128. */
TQ_HD int32_t tq_record_bytes(tq_plane key, tq_plane value)
{
    return tq_plane_bytes(key) + tq_plane_bytes(value) + 2 * TQ_RECORD_SCALE_BYTES;
}

#endif
