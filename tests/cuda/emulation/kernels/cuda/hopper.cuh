/* SPDX-License-Identifier: MIT */
/*
 * The instructions of src/kernels/cuda/hopper.cuh on the emulated device. Products and copies are done when they are asked for,
 * so what is missing between them and a wait does not show; barriers and what waits for them are as on a device.
 */
#ifndef TQ_KERNELS_CUDA_HOPPER_CUH
#define TQ_KERNELS_CUDA_HOPPER_CUH

#include "kernels/cuda/mma.cuh"

#define TQ_HOPPER 1

static inline uint64_t operand_in(uint32_t address)
{
    if (address % 1024 != 0) emulation::fail("an operand's panel is not aligned", (int)address);
    return address;
}

static inline uint64_t operand_at(uint64_t operand, int n_bytes)
{
    return operand + (uint32_t)n_bytes;
}

/* Number k of 16 of row r of an operand: chunks of 16 bytes change places by the row's number. */
static inline float operand_number(uint64_t operand, uint32_t r, uint32_t k)
{
    static float *floats;
    if (!floats) {
        floats = (float *)malloc(65536 * sizeof *floats);
        for (uint32_t i = 0; i < 65536; i++) floats[i] = tq_half_to_float((uint16_t)i);
    }
    const uint32_t address = (uint32_t)operand + r * 128 + 2 * k;
    uint16_t bits;
    memcpy(&bits, memory + (address ^ (address >> 7 & 7u) << 4), sizeof bits);
    return floats[bits];
}

template <int N> static inline void group_multiply(float (*d)[4], uint64_t a, uint64_t b, bool add)
{
    const uint32_t warp = threadIdx.x / 32 % 4, g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (uint32_t i = 0; i < N / 8 * 4; i++) {
        const uint32_t row = 16 * warp + g + i % 4 / 2 * 8, column = 8 * (i / 4) + 2 * t + i % 2;
        float sum = add ? d[i / 4][i % 4] : 0.0f;
        for (uint32_t k = 0; k < 16; k++) sum += operand_number(a, row, k) * operand_number(b, column, k);
        d[i / 4][i % 4] = sum;
    }
}

template <int N>
static inline void group_multiply(float (*d)[4], const uint32_t (&a)[4], uint64_t b, int line = __builtin_LINE())
{
    struct operand {
        uint32_t a[4];
    };
    const uint32_t g = emulation::lane() / 4, t = emulation::lane() % 4;
    emulation::exchange<operand> all({{a[0], a[1], a[2], a[3]}}, ~0u, line);
    for (uint32_t k = 0; k < 16; k += 2) {
        const operand of_row = all[4 * g + k % 8 / 2];
        const float2 low = __half22float2(as_half2(of_row.a[2 * (k / 8)]));
        const float2 high = __half22float2(as_half2(of_row.a[2 * (k / 8) + 1]));
        for (uint32_t i = 0; i < N / 8 * 2; i++) {
            const uint32_t column = 8 * (i / 2) + 2 * t + i % 2;
            const float x = operand_number(b, column, k), y = operand_number(b, column, k + 1);
            d[i / 2][i % 2] += low.x * x + low.y * y;
            d[i / 2][2 + i % 2] += high.x * x + high.y * y;
        }
    }
}

static inline void products_begin()
{
}
static inline void products_commit()
{
}
template <int PENDING> static inline void products_wait()
{
}
template <int N> static inline void keep_sums(float (&)[N][4])
{
}
template <int N> static inline void take_registers()
{
}
template <int N> static inline void leave_registers()
{
}
static inline void show_to_products()
{
}

static inline void sync_some(int id, int n_threads)
{
    static volatile int n_arrived[16], n_ended[16];
    const int before = n_ended[id];
    n_arrived[id] = n_arrived[id] + 1;
    if (n_arrived[id] == n_threads) {
        n_arrived[id] = 0, n_ended[id] = before + 1;
        return;
    }
    while (n_ended[id] == before) emulation::look_again();
}

/* What a barrier's 8 bytes are here. */
struct phase_barrier {
    uint8_t n_arrivals, n_missing, parity, unused;
    int32_t n_bytes; /* that have yet to come */
};
static_assert(sizeof(phase_barrier) == sizeof(uint64_t), "");

static inline void barrier_change(uint64_t *barrier, int n_arrived, int32_t n_bytes)
{
    phase_barrier b;
    memcpy(&b, barrier, sizeof b);
    if (b.n_missing < n_arrived) emulation::fail("more arrivals than a barrier waits for", b.n_arrivals);
    b.n_missing = (uint8_t)(b.n_missing - n_arrived), b.n_bytes += n_bytes;
    if (b.n_missing == 0 && b.n_bytes == 0) b.n_missing = b.n_arrivals, b.parity ^= 1;
    memcpy(barrier, &b, sizeof b);
}

static inline void barrier_open(uint64_t *barrier, int n_arrivals)
{
    const phase_barrier b = {(uint8_t)n_arrivals, (uint8_t)n_arrivals, 0, 0, 0};
    memcpy(barrier, &b, sizeof b);
}
static inline void barriers_opened()
{
}
static inline void barrier_arrive(uint64_t *barrier)
{
    barrier_change(barrier, 1, 0);
}
static inline void barrier_expect(uint64_t *barrier, uint32_t n_bytes)
{
    barrier_change(barrier, 1, (int32_t)n_bytes);
}
static inline void barrier_wait(uint64_t *barrier, uint32_t parity)
{
    for (;;) {
        phase_barrier b;
        memcpy(&b, barrier, sizeof b);
        if (b.parity != parity) return;
        emulation::look_again();
    }
}

static inline void copy_bulk(void *to, const void *from, uint32_t n_bytes, uint64_t *barrier)
{
    if ((uintptr_t)from % 16 || (uintptr_t)to % 16 || n_bytes % 16) emulation::fail("a bulk copy is not aligned", (int)n_bytes);
    memcpy(to, from, n_bytes);
    barrier_change(barrier, 0, -(int32_t)n_bytes);
}

#endif
