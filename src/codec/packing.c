/* SPDX-License-Identifier: MIT */
/* Codes to bytes and back. No code straddles a byte: 3-bit codes are split into a plane of 2 bits and one of 1 bit. */
#include "codec/codec.h"

#include <string.h>

size_t tq_packed_bytes(int32_t bits, int32_t n)
{
    return (size_t)n * (size_t)bits / 8;
}

/* Bits [first, first + bits) of each code; bits is 1, 2 or 4. */
static void pack_plane(const uint8_t *code, int32_t n, int32_t first, int32_t bits, uint8_t *bytes)
{
    int32_t per_byte = 8 / bits;
    unsigned mask = (1u << bits) - 1u;
    for (int32_t i = 0; i < n; i += per_byte) {
        unsigned byte = 0;
        for (int32_t j = 0; j < per_byte; j++) byte |= ((unsigned)code[i + j] >> first & mask) << (bits * j);
        bytes[i / per_byte] = (uint8_t)byte;
    }
}

/* Set bits from `first` on of codes whose lower bits are in place. */
static void unpack_plane(const uint8_t *bytes, int32_t n, int32_t first, int32_t bits, uint8_t *code)
{
    int32_t per_byte = 8 / bits;
    unsigned mask = (1u << bits) - 1u;
    for (int32_t i = 0; i < n; i++) {
        unsigned value = (unsigned)bytes[i / per_byte] >> (bits * (i % per_byte)) & mask;
        unsigned lower = code[i] & ((1u << first) - 1u);
        code[i] = (uint8_t)(lower | value << first);
    }
}

void tq_pack(const uint8_t *code, int32_t n, int32_t bits, uint8_t *bytes)
{
    if (bits == 8) {
        memcpy(bytes, code, (size_t)n);
    } else if (bits == 3) {
        pack_plane(code, n, 0, 2, bytes);
        pack_plane(code, n, 2, 1, bytes + tq_packed_bytes(2, n));
    } else {
        pack_plane(code, n, 0, bits, bytes);
    }
}

void tq_unpack(const uint8_t *bytes, int32_t n, int32_t bits, uint8_t *code)
{
    if (bits == 8) {
        memcpy(code, bytes, (size_t)n);
    } else if (bits == 3) {
        unpack_plane(bytes, n, 0, 2, code);
        unpack_plane(bytes + tq_packed_bytes(2, n), n, 2, 1, code);
    } else {
        unpack_plane(bytes, n, 0, bits, code);
    }
}
