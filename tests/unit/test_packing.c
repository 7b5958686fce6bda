/* SPDX-License-Identifier: MIT */
/* Packing: the order of codes in bytes as docs/formats.md draws it, round trips, and no byte touched beyond the end. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/random.h"
#include "codec/codec.h"

static const int32_t all_bits[] = {1, 2, 3, 4, 8};
enum { N_BITS = sizeof(all_bits) / sizeof(all_bits[0]), GUARD = 8, GUARD_BYTE = 0xa5 };

static void test_sizes(void **state)
{
    (void)state;
    assert_int_equal(tq_packed_bytes(1, 64), 8);
    assert_int_equal(tq_packed_bytes(2, 64), 16);
    assert_int_equal(tq_packed_bytes(3, 80), 30);
    assert_int_equal(tq_packed_bytes(4, 576), 288);
    assert_int_equal(tq_packed_bytes(8, 16), 16);
}

static void test_order(void **state)
{
    (void)state;
    uint8_t code[16], bytes[16];
    for (uint8_t i = 0; i < 16; i++) code[i] = i;
    tq_pack(code, 16, 4, bytes);
    const uint8_t expected4[] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe};
    assert_memory_equal(bytes, expected4, sizeof(expected4));

    for (uint8_t i = 0; i < 16; i++) code[i] = i % 8;
    tq_pack(code, 16, 3, bytes);
    const uint8_t expected3[] = {0xe4, 0xe4, 0xe4, 0xe4, 0xf0, 0xf0}; /* 0 1 2 3 in 2 bits; then the high bits 00001111 */
    assert_memory_equal(bytes, expected3, sizeof(expected3));

    for (uint8_t i = 0; i < 16; i++) code[i] = i % 4;
    tq_pack(code, 16, 2, bytes);
    const uint8_t expected2[] = {0xe4, 0xe4, 0xe4, 0xe4};
    assert_memory_equal(bytes, expected2, sizeof(expected2));

    for (uint8_t i = 0; i < 16; i++) code[i] = i == 0 || i == 9;
    tq_pack(code, 16, 1, bytes);
    const uint8_t expected1[] = {0x01, 0x02};
    assert_memory_equal(bytes, expected1, sizeof(expected1));
}

static void test_round_trip(void **state)
{
    (void)state;
    tq_random random = tq_random_stream(1, 0);
    const int32_t sizes[] = {16, 64, 80, 96, 112, 576};
    for (int b = 0; b < N_BITS; b++) {
        for (int s = 0; s < 6; s++) {
            int32_t bits = all_bits[b], n = sizes[s];
            uint8_t code[576 + GUARD], back[576 + GUARD], bytes[576 + GUARD];
            for (int32_t i = 0; i < n; i++) code[i] = (uint8_t)(tq_random_next(&random) & ((1u << bits) - 1u));
            memset(bytes, GUARD_BYTE, sizeof(bytes));
            memset(back, GUARD_BYTE, sizeof(back)); /* whatever stood there must not leak into the codes */
            tq_pack(code, n, bits, bytes);
            tq_unpack(bytes, n, bits, back);
            assert_memory_equal(code, back, (size_t)n);
            for (int i = 0; i < GUARD; i++) {
                assert_int_equal(bytes[tq_packed_bytes(bits, n) + (size_t)i], GUARD_BYTE);
                assert_int_equal(back[n + i], GUARD_BYTE);
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_round_trip),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
