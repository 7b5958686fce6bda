/* SPDX-License-Identifier: MIT */
/* FP16 and BF16 conversion on bit patterns. IEEE 754 binary16; subnormals, infinities and NaN included. */
#include "base/half.h"

#include <string.h>

static uint32_t float_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    return u;
}

static float bits_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof(x));
    return x;
}

/* u / 2^shift, round to nearest even; 1 <= shift <= 31. */
static uint32_t shift_round_even(uint32_t u, uint32_t shift)
{
    uint32_t odd = (u >> shift) & 1u;
    return (u + ((1u << (shift - 1)) - 1u) + odd) >> shift;
}

uint16_t tq_half_from_float(float x)
{
    uint32_t u = float_bits(x);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) { /* NaN: quiet, the payload's upper bits kept, as F16C and AArch64 do */
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    }
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* 65536 and above */
    if (magnitude >= 0x38800000u) {                                  /* a normal half; a carry into the exponent is right */
        return (uint16_t)(sign | (shift_round_even(magnitude, 13) - (112u << 10)));
    }
    if (magnitude < 0x33000000u) return (uint16_t)sign; /* below half of the smallest subnormal */
    uint32_t exponent = magnitude >> 23;                /* 102 .. 112: the result counts units of 2^-24 */
    uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    return (uint16_t)(sign | shift_round_even(mantissa, 126u - exponent));
}

float tq_half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1fu;
    uint32_t mantissa = h & 0x3ffu;
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24, exact in float */
        return bits_float(sign | float_bits((float)mantissa * 0x1p-24f));
    }
    if (exponent == 31) {
        if (mantissa != 0) mantissa |= 0x200u; /* hardware quiets a NaN */
        return bits_float(sign | 0x7f800000u | (mantissa << 13));
    }
    return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

uint16_t tq_bfloat_from_float(float x)
{
    uint32_t u = float_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u); /* NaN stays NaN */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float tq_bfloat_to_float(uint16_t h)
{
    return bits_float((uint32_t)h << 16);
}

void tq_floats_read(tq_dtype dtype, const void *from, int64_t at, int64_t n, float *x)
{
    if (dtype == TQ_DTYPE_F32) {
        memcpy(x, (const float *)from + at, (size_t)n * sizeof *x);
        return;
    }
    const uint16_t *half = (const uint16_t *)from + at;
    for (int64_t i = 0; dtype == TQ_DTYPE_F16 && i < n; i++) x[i] = tq_half_to_float(half[i]);
    for (int64_t i = 0; dtype == TQ_DTYPE_BF16 && i < n; i++) x[i] = tq_bfloat_to_float(half[i]);
}

void tq_floats_write(tq_dtype dtype, void *to, int64_t at, int64_t n, const float *x)
{
    if (dtype == TQ_DTYPE_F32) {
        memcpy((float *)to + at, x, (size_t)n * sizeof *x);
        return;
    }
    uint16_t *half = (uint16_t *)to + at;
    for (int64_t i = 0; dtype == TQ_DTYPE_F16 && i < n; i++) half[i] = tq_half_from_float(x[i]);
    for (int64_t i = 0; dtype == TQ_DTYPE_BF16 && i < n; i++) half[i] = tq_bfloat_from_float(x[i]);
}
