/* SPDX-License-Identifier: MIT */
/*
 * Enough of CUDA for g++ to compile kernels of src/kernels/cuda, and a device that runs them: the threads of a block are
 * coroutines. One runs until it comes to a barrier or an operation of its warp (or of those lanes of it that the mask names);
 * when all that take part have come, they go on. Between such points they run in ascending or descending order, so that a
 * missing barrier shows as a result that depends on the order. Shared memory is NaNs before each block.
 *
 * kernels/cuda/mma.cuh and hopper.cuh, next to this file, are in place of those with the instructions.
 */
#ifndef TQ_TESTS_CUDA_EMULATION_H
#define TQ_TESTS_CUDA_EMULATION_H

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

extern "C" {
#include "base/half.h"
}

#define __CUDACC__ 1
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct int2 {
    int x, y;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct dim3 {
    uint32_t x, y, z;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y)
{
    return {x, y};
}
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return {x, y, z, w};
}
static inline float2 make_float2(float x, float y)
{
    return {x, y};
}

static inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}

/* ---- the device ---- */

namespace emulation
{

enum { WARP = 32, IDLE_TURNS = 1000, THREADS_MAX = 512, STACK_BYTES = 1 << 18, SLOT_BYTES = 32 };
enum wait_kind { RUNS, WAITS_FOR_WARP, WAITS_FOR_BLOCK, LOOKS_AGAIN, ENDED };

struct coroutine {
    jmp_buf at;
    ucontext_t start;
    bool has_started;
    wait_kind state;
    uint32_t mask; /* of the lanes that it waits for */
    int line;      /* of the call at which it waits */
    uint32_t n_operations;
    uint32_t slot; /* where the operation that it was last released from has what it gave */
    dim3 index;
};

struct machine {
    coroutine threads[THREADS_MAX];
    jmp_buf scheduler;
    uint8_t slots[THREADS_MAX][2][SLOT_BYTES]; /* what each lane gives; two, since a lane may be one operation ahead */
    uint32_t n_threads, current;
    dim3 block, grid, block_shape;
    void (*body)(const void *);
    const void *argument;
    bool any; /* of __syncthreads_or */
};

inline machine &the()
{
    static machine *m = (machine *)calloc(1, sizeof(machine));
    return *m;
}

[[noreturn]] inline void fail(const char *what, int line)
{
    fprintf(stderr, "emulated device: %s (thread %u of block %u %u %u, line %d)\n", what, the().current, the().block.x,
            the().block.y, the().block.z, line);
    abort();
}

/* Not inlined, like resume: what a caller holds in registers must survive the jumps. */
__attribute__((noinline)) inline void wait(wait_kind kind, uint32_t mask, int line)
{
    coroutine &self = the().threads[the().current];
    self.state = kind, self.mask = mask, self.line = line;
    if (_setjmp(self.at) == 0) _longjmp(the().scheduler, 1);
}

/* Where a thread waits for what others do to memory: they run, and then it does. */
inline void look_again()
{
    wait(LOOKS_AGAIN, 0, 0);
    asm volatile("" ::: "memory"); /* what was read before may be another now */
}

inline void run_thread()
{
    for (;;) { /* a coroutine serves one block after the other */
        the().body(the().argument);
        wait(ENDED, 0, 0);
    }
}

__attribute__((noinline)) inline void resume(uint32_t i)
{
    machine &m = the();
    m.current = i;
    if (_setjmp(m.scheduler)) return;
    if (m.threads[i].has_started) _longjmp(m.threads[i].at, 1);
    m.threads[i].has_started = true;
    setcontext(&m.threads[i].start);
}

/* The lanes of a warp that wait for each other go on if all have come. */
inline bool release_warp(uint32_t first)
{
    machine &m = the();
    bool released = false;
    for (uint32_t i = first; i < first + WARP; i++) {
        const uint32_t mask = m.threads[i].mask;
        if (m.threads[i].state != WAITS_FOR_WARP) continue;
        bool all = true;
        for (uint32_t lane = 0; lane < WARP; lane++) {
            const coroutine &other = m.threads[first + lane];
            if (mask >> lane & 1u) all = all && other.state == WAITS_FOR_WARP && other.mask == mask;
        }
        for (uint32_t lane = 0; all && lane < WARP; lane++) {
            coroutine &other = m.threads[first + lane];
            if (!(mask >> lane & 1u)) continue;
            if (other.line != m.threads[i].line) fail("lanes wait at different places", other.line);
            other.state = RUNS;
            other.slot = (other.n_operations - 1) & 1u;
        }
        released |= all;
    }
    return released;
}

inline bool release_block()
{
    machine &m = the();
    for (uint32_t i = 0; i < m.n_threads; i++) {
        if (m.threads[i].state != WAITS_FOR_BLOCK) return false;
        if (m.threads[i].line != m.threads[0].line) fail("threads wait at different places", m.threads[i].line);
    }
    for (uint32_t i = 0; i < m.n_threads; i++) m.threads[i].state = RUNS;
    return true;
}

inline void run_block(bool descending)
{
    machine &m = the();
    uint32_t n_ended = 0, n_idle = 0; /* turns in which threads only looked again, which may have found something */
    for (uint32_t i = 0; i < m.n_threads; i++) m.threads[i].state = RUNS, m.threads[i].n_operations = 0;
    while (n_ended < m.n_threads) {
        bool moved = false;
        for (uint32_t i = 0; i < m.n_threads; i++) {
            if (m.threads[i].state == LOOKS_AGAIN) m.threads[i].state = RUNS;
        }
        for (uint32_t w = 0; w < m.n_threads / WARP; w++) { /* a warp as far as it comes */
            const uint32_t first = (descending ? m.n_threads / WARP - 1 - w : w) * WARP;
            do {
                for (uint32_t k = 0; k < WARP; k++) {
                    const uint32_t i = first + (descending ? WARP - 1 - k : k);
                    if (m.threads[i].state != RUNS) continue;
                    resume(i);
                    n_ended += m.threads[i].state == ENDED;
                    moved |= m.threads[i].state != LOOKS_AGAIN;
                }
            } while (release_warp(first));
        }
        moved |= release_block();
        n_idle = moved ? 0 : n_idle + 1;
        if (n_idle > IDLE_TURNS) fail("threads wait for others that do not come", m.threads[m.current].line);
    }
}

/* Run body(argument) in each thread of each block. */
inline void run(void (*body)(const void *), const void *argument, dim3 grid, uint32_t n_threads, bool descending,
                void *shared_memory, size_t shared_bytes)
{
    static char *stacks = (char *)malloc((size_t)THREADS_MAX * STACK_BYTES);
    machine &m = the();
    m.body = body, m.argument = argument, m.n_threads = n_threads, m.grid = grid, m.block_shape = {n_threads, 1, 1};
    for (uint32_t i = 0; i < n_threads; i++) {
        m.threads[i].has_started = false;
        m.threads[i].index = {i, 0, 0};
        getcontext(&m.threads[i].start);
        m.threads[i].start.uc_stack.ss_sp = stacks + (size_t)i * STACK_BYTES;
        m.threads[i].start.uc_stack.ss_size = STACK_BYTES;
        m.threads[i].start.uc_link = nullptr;
        makecontext(&m.threads[i].start, run_thread, 0);
    }
    for (uint32_t z = 0; z < grid.z; z++) {
        for (uint32_t y = 0; y < grid.y; y++) {
            for (uint32_t x = 0; x < grid.x; x++) {
                m.block = {x, y, z};
                memset(shared_memory, 0xff, shared_bytes);
                run_block(descending);
            }
        }
    }
}

/* Give x to the lanes of the mask, wait for all, take what one of them gave. One half of a warp may have done more operations
 * than the other, so lanes need not use the same one of their slots. */
template <typename T> struct exchange {
    uint32_t first;
    exchange(const T &x, uint32_t mask, int line)
    {
        static_assert(sizeof(T) <= SLOT_BYTES, "a slot holds it");
        coroutine &self = the().threads[the().current];
        first = the().current / WARP * WARP;
        memcpy(the().slots[the().current][self.n_operations++ & 1u], &x, sizeof x);
        wait(WAITS_FOR_WARP, mask, line);
    }
    T operator[](uint32_t lane) const
    {
        T x;
        const uint32_t thread = first + lane % WARP;
        memcpy(&x, the().slots[thread][the().threads[thread].slot], sizeof x);
        return x;
    }
};

inline uint32_t lane()
{
    return the().current % WARP;
}

} // namespace emulation

#define threadIdx (emulation::the().threads[emulation::the().current].index)
#define blockIdx (emulation::the().block)
#define blockDim (emulation::the().block_shape)
#define gridDim (emulation::the().grid)

static inline void __syncthreads(int line = __builtin_LINE())
{
    emulation::wait(emulation::WAITS_FOR_BLOCK, 0, line);
}
static inline void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE())
{
    emulation::wait(emulation::WAITS_FOR_WARP, mask, line);
}
template <typename T> static inline T __shfl_sync(uint32_t mask, T x, int lane, int line = __builtin_LINE())
{
    return emulation::exchange<T>(x, mask, line)[(uint32_t)lane];
}
template <typename T> static inline T __shfl_xor_sync(uint32_t mask, T x, int bits, int width = 32, int line = __builtin_LINE())
{
    (void)width; /* all that come here stay within it */
    uint32_t lane = emulation::lane();
    return emulation::exchange<T>(x, mask, line)[lane ^ (uint32_t)bits];
}
static inline bool __any_sync(uint32_t mask, bool x, int line = __builtin_LINE())
{
    emulation::exchange<bool> all(x, mask, line);
    bool any = false;
    for (uint32_t i = 0; i < 32; i++) any |= mask >> i & 1u && all[i];
    return any;
}

static inline uint32_t __ballot_sync(uint32_t mask, bool x, int line = __builtin_LINE())
{
    emulation::exchange<bool> all(x, mask, line);
    uint32_t bits = 0;
    for (uint32_t i = 0; i < 32; i++) bits |= mask >> i & 1u && all[i] ? 1u << i : 0;
    return bits;
}
static inline bool __all_sync(uint32_t mask, bool x, int line = __builtin_LINE())
{
    return __ballot_sync(mask, x, line) == mask;
}
static inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t x, int line = __builtin_LINE())
{
    emulation::exchange<uint32_t> all(x, mask, line);
    for (uint32_t i = 0; i < 32; i++) x = mask >> i & 1u && all[i] < x ? all[i] : x;
    return x;
}
/* Between the barriers all have given what they have, have read what came of it, and have cleared it. */
static inline bool __syncthreads_or(bool x, int line = __builtin_LINE())
{
    emulation::the().any |= x;
    __syncthreads(line);
    const bool any = emulation::the().any;
    __syncthreads(-line);
    emulation::the().any = false;
    __syncthreads(line);
    return any;
}

/* ---- arithmetic ---- */

template <typename T> static inline T min(T a, T b)
{
    return b < a ? b : a;
}
template <typename T> static inline T max(T a, T b)
{
    return a < b ? b : a;
}
template <typename T> static inline T __ldg(const T *p)
{
    return *p;
}
template <typename T> static inline T __ldcg(const T *p)
{
    return *p;
}
template <typename T> static inline void __stcg(T *p, T x)
{
    *p = x;
}
static inline int atomicAdd(int *p, int n)
{
    *p += n;
    return *p - n;
}
static inline int atomicMax(int *p, int n)
{
    const int before = *p;
    *p = before < n ? n : before;
    return before;
}
static inline int __popc(uint32_t x)
{
    return __builtin_popcount(x);
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b)
{
    return (uint32_t)((uint64_t)a * b >> 32);
}
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int n)
{
    return (uint32_t)(((uint64_t)high << 32 | low) >> (n & 31));
}
static inline uint32_t __float_as_uint(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float __uint_as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline float __int_as_float(int32_t bits)
{
    return __uint_as_float((uint32_t)bits);
}
static inline int __float2int_rn(float x)
{
    return (int)nearbyintf(x);
}
static inline float __fadd_rn(float a, float b)
{
    return a + b;
}
static inline float __fsub_rn(float a, float b)
{
    return a - b;
}
static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
static inline float __fsqrt_rn(float x)
{
    return sqrtf(x);
}
static inline float __fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}
/* Rounded down. In doubles products of two floats are exact, and so are sums of numbers of like size. */
static inline float __fmaf_rd(float a, float b, float c)
{
    const double exact = (double)a * b + c;
    const float x = (float)exact;
    return x > exact ? nextafterf(x, -INFINITY) : x;
}

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};
static inline __half __float2half_rn(float x)
{
    return {tq_half_from_float(x)};
}
static inline float __half2float(__half x)
{
    return tq_half_to_float(x.bits);
}
static inline __half __int2half_rn(int x)
{
    return __float2half_rn((float)x);
}
static inline uint16_t __half_as_ushort(__half x)
{
    return x.bits;
}
static inline __half __ushort_as_half(uint16_t bits)
{
    return {bits};
}
static inline __half2 __floats2half2_rn(float x, float y)
{
    return {__float2half_rn(x), __float2half_rn(y)};
}
static inline __half2 __float2half2_rn(float x)
{
    return __floats2half2_rn(x, x);
}
static inline __half2 __half2half2(__half x)
{
    return {x, x};
}
static inline float2 __half22float2(__half2 x)
{
    return {__half2float(x.x), __half2float(x.y)};
}
static inline __half2 __hadd2(__half2 a, __half2 b)
{
    return __floats2half2_rn(__half2float(a.x) + __half2float(b.x), __half2float(a.y) + __half2float(b.y));
}
static inline float __fmul_ru(float a, float b)
{
    const double exact = (double)a * b;
    const float x = (float)exact;
    return x < exact ? nextafterf(x, INFINITY) : x;
}
static inline __half2 __hmax2(__half2 a, __half2 b)
{
    return __floats2half2_rn(fmaxf(__half2float(a.x), __half2float(b.x)), fmaxf(__half2float(a.y), __half2float(b.y)));
}
static inline __half2 __hsub2(__half2 a, __half2 b)
{
    return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}
static inline __half2 __hmul2(__half2 a, __half2 b)
{
    return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
/* A product of halves is exact in floats, and all but exact sums of such in doubles. */
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c)
{
    return __floats2half2_rn((float)((double)__half2float(a.x) * __half2float(b.x) + __half2float(c.x)),
                             (float)((double)__half2float(a.y) * __half2float(b.y) + __half2float(c.y)));
}

#endif
