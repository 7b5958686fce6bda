/* SPDX-License-Identifier: MIT */
/* The instructions of src/kernels/cuda/mma.cuh on the emulated device; those that the emulated kernels use. */
#ifndef TQ_KERNELS_CUDA_MMA_CUH
#define TQ_KERNELS_CUDA_MMA_CUH

#include <cuda_fp16.h>

static inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors)
{
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t selector = selectors >> 4 * i, byte = (uint32_t)(bytes >> 8 * (selector & 7u)) & 0xffu;
        if (selector & 8u) byte = byte & 0x80u ? 0xffu : 0;
        d |= byte << 8 * i;
    }
    return d;
}

static inline float exp2_approx(float x)
{
    return exp2f(x);
}

static inline float log2_approx(float x)
{
    return log2f(x);
}

static inline float tanh_approx(float x)
{
    return tanhf(x);
}

static inline uint32_t as_bits(__half2 x)
{
    return x.x.bits | (uint32_t)x.y.bits << 16;
}

static inline __half2 as_half2(uint32_t x)
{
    return {{(uint16_t)x}, {(uint16_t)(x >> 16)}};
}

/* c += a b, a [16, 16] and b [16, 8] FP16: lane 4 g + t has columns 2 t, 2 t + 1 and 8 further of rows g (a0, a2) and g + 8
 * (a1, a3), the same rows of column g (b0, b1), and columns 2 t, 2 t + 1 of rows g and g + 8 of c. */
static inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                            int line = __builtin_LINE())
{
    struct operands {
        uint32_t a[4], b[2];
    };
    const uint32_t lane = emulation::lane(), g = lane / 4, t = lane % 4;
    emulation::exchange<operands> all({{a0, a1, a2, a3}, {b0, b1}}, ~0u, line);
    for (uint32_t k = 0; k < 8; k++) { /* pairs of depth: those of lane k % 4 of each four */
        const operands a = all[4 * g + k % 4];
        const float2 low = __half22float2(as_half2(a.a[2 * (k / 4)])), high = __half22float2(as_half2(a.a[2 * (k / 4) + 1]));
        for (uint32_t n = 0; n < 2; n++) {
            const float2 b = __half22float2(as_half2(all[4 * (2 * t + n) + k % 4].b[k / 4]));
            c[n] += low.x * b.x + low.y * b.y;
            c[2 + n] += high.x * b.x + high.y * b.y;
        }
    }
}

/* c += a b, a [16, 32] and b [32, 8] bytes: as above, with 4 bytes where there are 2 numbers. */
template <typename A, typename B>
static inline void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line)
{
    struct operands {
        uint32_t a[4], b[2];
    };
    const uint32_t lane = emulation::lane(), g = lane / 4, t = lane % 4;
    emulation::exchange<operands> all({{a[0], a[1], a[2], a[3]}, {b0, b1}}, ~0u, line);
    for (uint32_t k = 0; k < 32; k++) {
        const operands row = all[4 * g + k % 16 / 4];
        for (uint32_t n = 0; n < 2; n++) {
            const B b = (B)(all[4 * (2 * t + n) + k % 16 / 4].b[k / 16] >> 8 * (k % 4));
            c[n] += (A)(row.a[2 * (k / 16)] >> 8 * (k % 4)) * b;
            c[2 + n] += (A)(row.a[2 * (k / 16) + 1] >> 8 * (k % 4)) * b;
        }
    }
}

static inline void mma_s8_u8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE())
{
    mma_bytes<int8_t, uint8_t>(c, a, b0, b1, line);
}

static inline void mma_u8_u8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE())
{
    mma_bytes<uint8_t, uint8_t>(c, a, b0, b1, line);
}

static inline void mma_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE())
{
    mma_bytes<uint8_t, int8_t>(c, a, b0, b1, line);
}

/* Of the dynamic shared memory, which a test calls so. */
extern uint8_t memory[];
static inline uint32_t shared_address(const void *p)
{
    return (uint32_t)((const uint8_t *)p - memory);
}
static inline uint32_t shared_word(uint32_t address)
{
    uint32_t x;
    memcpy(&x, memory + address, sizeof x);
    return x;
}

/* Row r of matrix i begins where lane 8 i + r says. */
static inline void load_matrices(uint32_t (&m)[4], const void *row, int line = __builtin_LINE())
{
    const uint32_t lane = emulation::lane();
    emulation::exchange<const uint32_t *> rows((const uint32_t *)row, ~0u, line);
    for (uint32_t i = 0; i < 4; i++) m[i] = rows[8 * i + lane / 4][lane % 4];
}

static inline void load_matrices_transposed(uint32_t (&m)[4], const void *row, int line = __builtin_LINE())
{
    const uint32_t lane = emulation::lane(), g = lane / 4, t = lane % 4;
    emulation::exchange<const uint16_t *> rows((const uint16_t *)row, ~0u, line);
    for (uint32_t i = 0; i < 4; i++) m[i] = rows[8 * i + 2 * t][g] | (uint32_t)rows[8 * i + 2 * t + 1][g] << 16;
}

/* Copies arrive when a thread waits for them, so that one who does not reads NaNs. */
struct pending_copies {
    enum { MOST = 64 };
    int n;
    struct {
        uint8_t *to;
        const uint8_t *from;
    } copies[MOST];
};

static inline pending_copies &copies_of_thread()
{
    static pending_copies *all = (pending_copies *)calloc(emulation::THREADS_MAX, sizeof(pending_copies));
    return all[emulation::the().current];
}

static inline void copy_async(uint8_t *to, const uint8_t *from)
{
    pending_copies &mine = copies_of_thread();
    if (mine.n == pending_copies::MOST) emulation::fail("too many copies on their way", 0);
    mine.copies[mine.n++] = {to, from};
}

static inline void copies_wait()
{
    pending_copies &mine = copies_of_thread();
    for (int i = 0; i < mine.n; i++) memcpy(mine.copies[i].to, mine.copies[i].from, 16);
    mine.n = 0;
}

/* Copies are made when somebody waits for them. */
static inline void order_copies()
{
}

static inline int take_next(int *number)
{
    return (*number)++;
}

static inline void prefetch(const void *)
{
}

/* Blocks run one after the other. */
static inline uint32_t arrive(uint32_t *counter)
{
    return (*counter)++;
}

/* A warp's queue of records; each lane copies a part when it waits. */
template <int N_STAGE> struct warp_queue {
    uint8_t *stages;
    int n_bytes;
    const uint8_t *from[N_STAGE] = {};

    void open(uint8_t *stage_memory, uint64_t *, int record_bytes, int)
    {
        stages = stage_memory, n_bytes = record_bytes;
    }
    void fill(int stage, const uint8_t *record, int)
    {
        from[stage] = record;
    }
    void skip()
    {
    }
    void wait(int stage, uint32_t)
    {
        uint8_t *to = stages + stage * n_bytes;
        for (int i = (int)emulation::lane() * 16; i < n_bytes; i += 512) memcpy(to + i, from[stage] + i, 16);
        __syncwarp();
    }
};

#endif
