/* SPDX-License-Identifier: MIT */
/*
 * One vector's codes to and from its places in a record, by the 16 lanes of a half warp. In between they stand in shared
 * memory, a byte each: scalar codes in the order of dimensions, or the bytes of a trellis circle.
 */
#ifndef TQ_KERNELS_CUDA_ROWS_CUH
#define TQ_KERNELS_CUDA_ROWS_CUH

#include <cuda_fp16.h>

#include "kernels/cuda/device.h"
#include "kernels/cuda/layout.h"

/* Where a slot's vector lies: its record, and the token in it. */
struct slot_place {
    uint8_t *record;
    int32_t token;
};

TQ_HD int32_t head_dim_of(const tq_device_store &store, bool is_value)
{
    return is_value ? store.head_dim_v : store.head_dim;
}

TQ_HD tq_plane plane_of(const tq_device_store &store, bool is_value)
{
    const tq_device_format &format = is_value ? store.value : store.key;
    return {format.bits, head_dim_of(store, is_value), is_value, format.is_trellis, store.is_plain};
}

TQ_HD int32_t record_bytes_of(const tq_device_store &store)
{
    return tq_record_bytes(plane_of(store, false), plane_of(store, true));
}

TQ_HD int32_t reference_bytes_of(const tq_device_store &store)
{
    return store.k_ref_block ? tq_reference_bytes(store.head_dim) : 0;
}

/* The bytes of one KV head's part of a page, keys and values. */
TQ_HD int32_t head_page_bytes_of(const tq_device_store &store)
{
    return tq_device_head_page_bytes(record_bytes_of(store), reference_bytes_of(store), store.page_size / TQ_RECORD_TOKENS);
}

__device__ __forceinline__ uint8_t *head_page_of(const tq_device_store &store, int64_t page, int32_t head)
{
    return store.pages + page * store.page_stride + (int64_t)head * head_page_bytes_of(store);
}

__device__ __forceinline__ slot_place place_of_slot(const tq_device_store &store, int64_t page, int32_t offset, int32_t head)
{
    const int32_t reference = reference_bytes_of(store), i = offset / TQ_RECORD_TOKENS;
    const int32_t begin = tq_record_begin(record_bytes_of(store), reference, i) + tq_record_within(reference, i);
    return {head_page_of(store, page, head) + begin, offset % TQ_RECORD_TOKENS};
}

/* The same slot of another KV head, from head 0's. */
__device__ __forceinline__ slot_place place_of_head(const tq_device_store &store, const slot_place &first, int32_t head)
{
    return {first.record + (int64_t)head * head_page_bytes_of(store), first.token};
}

/* The reference of a slot's block: head_dim codes, then its scale. */
__device__ __forceinline__ uint8_t *reference_of_slot(const tq_device_store &store, int64_t page, int32_t offset, int32_t head)
{
    const int32_t record = record_bytes_of(store), i = offset / TQ_RECORD_TOKENS;
    return head_page_of(store, page, head) + tq_record_begin(record, reference_bytes_of(store), i) +
           tq_reference_within(record, i);
}

__device__ __forceinline__ uint8_t *codes_of(const tq_device_store &store, const slot_place &place, bool is_value)
{
    return place.record + (is_value ? tq_plane_bytes(plane_of(store, false)) : 0);
}

__device__ __forceinline__ __half *scale_of(const tq_device_store &store, const slot_place &place, bool is_value)
{
    int32_t codes = tq_plane_bytes(plane_of(store, false)) + tq_plane_bytes(plane_of(store, true));
    return reinterpret_cast<__half *>(place.record + codes + (is_value ? TQ_RECORD_SCALE_BYTES : 0)) + place.token;
}

/* Nibble of a word of codes of 4 bits or fewer. octets: the codes of octet 0 of the word's group, `stride` codes from one octet
 * to the next; word: which of the group's words. */
template <int BITS>
__device__ __forceinline__ uint32_t nibble_of(const uint8_t *octets, int stride, int word, tq_octet_group group)
{
    if (BITS == 4) return octets[0];
    if (BITS == 2) return octets[0] | octets[stride] << 2;
    return octets[word * stride] | (octets[(group.octets - 1) * stride] >> (group.tail_bits + word) & 1u) << 3;
}

/* A byte of a tail of 2 bits (two codes and the two `high` further on) or 1 bit (the four `third` further on, too). */
__device__ __forceinline__ uint8_t tail_byte(const uint8_t *codes, int tail_bits, int high, int third)
{
    uint32_t byte = 0;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const uint8_t *code = codes + n / 2 + n % 2 * high;
        byte |= (tail_bits == 2 ? code[0] & 3u : (code[0] & 1u) | (code[third] & 1u) << 1) << 2 * n;
    }
    return (uint8_t)byte;
}

template <int BITS>
__device__ __forceinline__ void store_key_codes(uint8_t *plane, tq_plane shape, int32_t token, const uint8_t *codes, int lane16)
{
    shape.bits = BITS, shape.is_trellis = false, shape.is_value = false; /* known to the compiler */
    const tq_octet_group group = tq_octet_group_of(shape);
    const int lane_groups = shape.head_dim / 32 / group.octets, lane_words = lane_groups * group.words;
    const int g = 2 * (token / 8) + token % 2, j = token / 2 % 4;
    for (int i = lane16; i < 4 * lane_words; i += 16) {
        int t = i / lane_words, w = i % lane_words;
        uint32_t word = 0;
        if (BITS == 8) {
            word = reinterpret_cast<const uint32_t *>(codes)[i];
        } else {
            const uint8_t *first = codes + t * (shape.head_dim / 4) + w / group.words * group.octets * 8;
#pragma unroll
            for (int n = 0; n < 8; n++) word |= nibble_of<BITS>(first + n, 8, w % group.words, group) << 4 * n;
        }
        *reinterpret_cast<uint32_t *>(plane + tq_plane_offset(shape, 4 * g + t, 4 * (j * lane_words + w))) = word;
    }
    if (BITS == 8 || BITS == 4 || group.tail_bits == 0) return;
    const int lane_bytes = lane_groups * group.tail_bits;
    for (int i = lane16; i < 4 * lane_bytes; i += 16) {
        int t = i / lane_bytes, b = i % lane_bytes;
        const uint8_t *last = codes + t * (shape.head_dim / 4) + (b / group.tail_bits * group.octets + group.octets - 1) * 8;
        int y = 4 * tq_plane_words(shape) + j * lane_bytes + b;
        plane[tq_plane_offset(shape, 4 * g + t, y)] = tail_byte(last + b % group.tail_bits * 2, group.tail_bits, 4, 2);
    }
}

template <int BITS>
__device__ __forceinline__ void store_value_codes(uint8_t *plane, tq_plane shape, int32_t token, const uint8_t *codes,
                                                  int lane16)
{
    shape.bits = BITS, shape.is_trellis = false, shape.is_value = true;
    const tq_octet_group group = tq_octet_group_of(shape);
    const int lane_groups = shape.head_dim / 32 / group.octets, lane_words = lane_groups * group.words;
    const int t = token / 8, pair = token / 2 % 4, s = token % 2;
    for (int i = lane16; i < 8 * lane_words; i += 16) { /* words that hold some of the token's bytes */
        int g = i / lane_words, w = i % lane_words, y = 4 * (pair * lane_words + w);
        const uint8_t *dims = codes + g * (shape.head_dim / 8);
        if (BITS == 8) {
            uint8_t *to = plane + tq_plane_offset(shape, 4 * g + t, y) + 2 * s;
            to[0] = dims[2 * w], to[1] = dims[2 * w + 1];
        } else {
            const uint8_t *first = dims + w / group.words * group.octets * 4;
            uint32_t nibbles[4];
#pragma unroll
            for (int r = 0; r < 4; r++) nibbles[r] = nibble_of<BITS>(first + r, 4, w % group.words, group);
            uint8_t *to = plane + tq_plane_offset(shape, 4 * g + t, y) + s;
            to[0] = (uint8_t)(nibbles[0] | nibbles[1] << 4), to[2] = (uint8_t)(nibbles[2] | nibbles[3] << 4);
        }
    }
    if (BITS == 8 || BITS == 4 || group.tail_bits == 0) return;
    const int per_byte = group.tail_bits == 2 ? 1 : 2; /* lanes that have a byte together */
    for (int i = lane16; i < 8 / per_byte * lane_groups; i += 16) {
        int g = per_byte * (i / lane_groups), u = i % lane_groups;
        const uint8_t *last = codes + g * (shape.head_dim / 8) + (u * group.octets + group.octets - 1) * 4;
        int y = 4 * tq_plane_words(shape) + group.tail_bits * (pair * lane_groups + u);
        if (per_byte == 1) y += s;
        else g += s;
        plane[tq_plane_offset(shape, 4 * g + t, y)] = tail_byte(last, group.tail_bits, 2, shape.head_dim / 8);
    }
}

template <int BITS>
__device__ __forceinline__ void store_codes(uint8_t *plane, tq_plane shape, int32_t token, const uint8_t *codes, int lane16)
{
    if (shape.is_value) store_value_codes<BITS>(plane, shape, token, codes, lane16);
    else store_key_codes<BITS>(plane, shape, token, codes, lane16);
}

/* Scalar codes, a byte each, to the format's planes of bits (src/codec/packing.c). */
__device__ __forceinline__ void pack_bits(uint8_t *bytes, const uint8_t *codes, int head_dim, int first, int bits, int lane16)
{
    int per_byte = 8 / bits;
    uint32_t mask = (1u << bits) - 1u;
    for (int i = lane16; i < head_dim / per_byte; i += 16) {
        uint32_t byte = 0;
        for (int j = 0; j < per_byte; j++) byte |= ((uint32_t)codes[i * per_byte + j] >> first & mask) << bits * j;
        bytes[i] = (uint8_t)byte;
    }
}

__device__ __forceinline__ void pack_row(uint8_t *bytes, const uint8_t *codes, tq_plane shape, int lane16)
{
    if (shape.is_trellis || shape.bits == 8) {
        for (int i = lane16; i < shape.head_dim * shape.bits / 8; i += 16) bytes[i] = codes[i];
    } else if (shape.bits == 3) {
        pack_bits(bytes, codes, shape.head_dim, 0, 2, lane16);
        pack_bits(bytes + shape.head_dim / 4, codes, shape.head_dim, 2, 1, lane16);
    } else {
        pack_bits(bytes, codes, shape.head_dim, 0, shape.bits, lane16);
    }
}

__device__ __forceinline__ void unpack_row(uint8_t *codes, const uint8_t *bytes, tq_plane shape, int lane16)
{
    if (shape.is_trellis || shape.bits == 8) {
        for (int i = lane16; i < shape.head_dim * shape.bits / 8; i += 16) codes[i] = bytes[i];
        return;
    }
    int bits = shape.bits == 3 ? 2 : shape.bits;
    for (int i = lane16; i < shape.head_dim; i += 16) {
        uint32_t code = bytes[i * bits / 8] >> i * bits % 8 & ((1u << bits) - 1u);
        if (shape.bits == 3) code |= (bytes[shape.head_dim / 4 + i / 8] >> i % 8 & 1u) << 2;
        codes[i] = (uint8_t)code;
    }
}

/* Any scalar format, or a trellis circle. */
__device__ __forceinline__ void store_row(uint8_t *plane, tq_plane shape, int32_t token, const uint8_t *codes, int lane16)
{
    if (shape.is_plain) return pack_row(plane + token * tq_plane_string_bytes(shape), codes, shape, lane16);
    if (shape.is_trellis) {
        int n_bytes = shape.head_dim * shape.bits / 8;
        for (int i = lane16; i < n_bytes; i += 16) plane[tq_circle_offset(shape, token, i)] = codes[i];
        return;
    }
    switch (shape.bits) {
    case 8:
        store_codes<8>(plane, shape, token, codes, lane16);
        break;
    case 4:
        store_codes<4>(plane, shape, token, codes, lane16);
        break;
    case 3:
        store_codes<3>(plane, shape, token, codes, lane16);
        break;
    default:
        store_codes<2>(plane, shape, token, codes, lane16);
    }
}

/* The inverse, by layout.h's definition of a code's place. */
__device__ __forceinline__ void load_row(uint8_t *codes, const uint8_t *plane, tq_plane shape, int32_t token, int lane16)
{
    if (shape.is_plain) return unpack_row(codes, plane + token * tq_plane_string_bytes(shape), shape, lane16);
    if (shape.is_trellis) {
        int n_bytes = shape.head_dim * shape.bits / 8;
        for (int i = lane16; i < n_bytes; i += 16) codes[i] = plane[tq_circle_offset(shape, token, i)];
        return;
    }
    for (int dim = lane16; dim < shape.head_dim; dim += 16) {
        uint32_t code = 0;
        for (int b = 0; b < shape.bits; b++) {
            int32_t bit = tq_code_bit(shape, token, dim, b);
            code |= (plane[bit / 8] >> bit % 8 & 1u) << b;
        }
        codes[dim] = (uint8_t)code;
    }
}

#endif
