/* SPDX-License-Identifier: MIT */
/* FP16 and BF16 conversion: every half, every midpoint between halves, and the machine's own instruction where it has one. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/cpu.h"
#include "base/half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static uint32_t to_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static int is_nan_half(uint16_t h)
{
    return (h & 0x7c00) == 0x7c00 && (h & 0x3ff) != 0;
}

static void test_every_half_round_trips(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = tq_half_to_float((uint16_t)h);
        if (is_nan_half((uint16_t)h)) {
            assert_true(isnan(x));
            assert_true(is_nan_half(tq_half_from_float(x)));
        } else {
            assert_int_equal(tq_half_from_float(x), h);
        }
    }
}

/* The values by the definition of binary16, not by bit tricks. */
static void test_half_values(void **state)
{
    (void)state;
    for (int h = 0; h < 0x7c00; h++) {
        int exponent = h >> 10, mantissa = h & 0x3ff;
        double x = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
        assert_true((double)tq_half_to_float((uint16_t)h) == x);
        assert_true((double)tq_half_to_float((uint16_t)(h | 0x8000)) == -x);
    }
    assert_true(isinf(tq_half_to_float(0x7c00)) && tq_half_to_float(0x7c00) > 0);
    assert_true(isinf(tq_half_to_float(0xfc00)) && tq_half_to_float(0xfc00) < 0);
}

/* A float halfway between two halves goes to the even one; its neighbours go to the nearer. */
static void test_half_ties(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        double low = (double)tq_half_to_float((uint16_t)h);
        double high = h == 0x7bff ? 65536.0 : (double)tq_half_to_float((uint16_t)(h + 1));
        float middle = (float)((low + high) / 2);
        uint32_t even = h % 2 == 0 ? h : h + 1;
        for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
            float direction = sign ? -1.0f : 1.0f;
            assert_int_equal(tq_half_from_float(direction * middle), sign | even);
            assert_int_equal(tq_half_from_float(direction * nextafterf(middle, 0.0f)), sign | h);
            assert_int_equal(tq_half_from_float(direction * nextafterf(middle, INFINITY)), sign | (h + 1));
        }
    }
}

static void test_half_extremes(void **state)
{
    (void)state;
    assert_int_equal(tq_half_from_float(0.0f), 0);
    assert_int_equal(tq_half_from_float(-0.0f), 0x8000);
    assert_int_equal(tq_half_from_float(INFINITY), 0x7c00);
    assert_int_equal(tq_half_from_float(-INFINITY), 0xfc00);
    assert_int_equal(tq_half_from_float(3.4e38f), 0x7c00);
    assert_int_equal(tq_half_from_float(1e-40f), 0);
    assert_int_equal(tq_half_from_float(-1e-40f), 0x8000);
    assert_true(is_nan_half(tq_half_from_float(NAN)));
    assert_true(is_nan_half(tq_half_from_float(from_bits(0x7f800001)))); /* the payload alone would be cut to infinity */
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) static uint16_t machine_half(float x)
{
    return (uint16_t)_cvtss_sh(x, 0);
}

__attribute__((target("f16c"))) static float machine_float(uint16_t h)
{
    return _cvtsh_ss(h);
}
#elif defined(__aarch64__)
static uint16_t machine_half(float x)
{
    __fp16 h = (__fp16)x;
    uint16_t bits;
    memcpy(&bits, &h, sizeof(bits));
    return bits;
}

static float machine_float(uint16_t bits)
{
    __fp16 h;
    memcpy(&h, &bits, sizeof(h));
    return (float)h;
}
#endif

static void test_half_as_the_machine(void **state)
{
    (void)state;
#if defined(__x86_64__) || defined(__aarch64__)
    if (tq_cpu_detect() == 0) skip();
    for (uint32_t h = 0; h < 65536; h++) {
        assert_int_equal(to_bits(tq_half_to_float((uint16_t)h)), to_bits(machine_float((uint16_t)h)));
    }
    for (uint64_t bits = 0; bits < UINT64_C(1) << 32; bits += 3079) { /* a prime: the low bits vary too */
        float x = from_bits((uint32_t)bits);
        if (tq_half_from_float(x) != machine_half(x)) fail_msg("%a", (double)x);
    }
#else
    skip();
#endif
}

static void test_bfloat(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = tq_bfloat_to_float((uint16_t)h);
        if (isnan(x)) {
            assert_true(isnan(tq_bfloat_to_float(tq_bfloat_from_float(x))));
            continue;
        }
        assert_int_equal(tq_bfloat_from_float(x), h);
        if (isinf(x) || (h & 0x7fff) == 0x7f7f) continue;
        uint32_t even = h % 2 == 0 ? h : h + 1;
        assert_int_equal(tq_bfloat_from_float(from_bits(h << 16 | 0x7fff)), h);
        assert_int_equal(tq_bfloat_from_float(from_bits(h << 16 | 0x8000)), even);
        assert_int_equal(tq_bfloat_from_float(from_bits(h << 16 | 0x8001)), h + 1);
    }
    assert_true(isinf(tq_bfloat_to_float(tq_bfloat_from_float(3.4028235e38f))));
    assert_true(isnan(tq_bfloat_to_float(tq_bfloat_from_float(from_bits(0x7f800001)))));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_half_round_trips),
        cmocka_unit_test(test_half_values),
        cmocka_unit_test(test_half_ties),
        cmocka_unit_test(test_half_extremes),
        cmocka_unit_test(test_half_as_the_machine),
        cmocka_unit_test(test_bfloat),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
