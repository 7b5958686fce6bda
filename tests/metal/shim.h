// SPDX-License-Identifier: MIT
/*
 * Enough of the Metal Shading Language for g++ and clang++ to compile src/kernels/metal, and a device that runs it: the threads
 * of a threadgroup are coroutines. One runs until it comes to a barrier or an operation of its SIMD group; when all that take
 * part have come, they go on. The order in which they run between such points is the caller's choice, so a missing barrier
 * shows as a result that depends on the order. It is an error if threads wait at different places, or for one that has ended.
 *
 * Threadgroup memory is filled with NaNs before each threadgroup. Arithmetic is the host's, compiled without contraction.
 */
#ifndef TQ_TESTS_METAL_SHIM_H
#define TQ_TESTS_METAL_SHIM_H

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef unsigned char uchar;
typedef uint16_t ushort_;
#define ushort ushort_
#define uint uint32_t
#define ulong uint64_t

#define device
#define constant static const
#define thread
#define threadgroup

struct uint3 {
    uint x, y, z;
};

template <typename To, typename From> inline To as_type(From from)
{
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    To to;
    memcpy((void *)&to, (const void *)&from, sizeof(to));
    return to;
}

/* binary16, conversions to the nearest, ties to even. */
struct half {
    uint16_t bits;
    half() = default;
    explicit half(float x)
    {
        uint u = as_type<uint>(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
        if (magnitude >= 0x477ff000u) { /* what would round to 65536, and NaN */
            bits = uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
        } else if (magnitude >= 0x38800000u) {
            bits = uint16_t(sign | (((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10)));
        } else {
            bits = uint16_t(sign | uint(nearbyintf(fabsf(x) * 0x1p24f)));
        }
    }
    operator float() const
    {
        uint exponent = bits >> 10 & 31u, mantissa = bits & 0x3ffu;
        float sign = bits & 0x8000u ? -1.0f : 1.0f;
        if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
        return sign * (exponent ? ldexpf(float(mantissa | 0x400u), int(exponent) - 25) : ldexpf(float(mantissa), -24));
    }
};
typedef half float16_t;

struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float x)
    {
        uint u = as_type<uint>(x);
        bits = uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
    }
    operator float() const
    {
        return as_type<float>(uint(bits) << 16);
    }
};

namespace precise
{
inline float sqrt(float x)
{
    return sqrtf(x);
}
inline float divide(float x, float y)
{
    return x / y;
}
} // namespace precise

inline int min(int a, int b)
{
    return a < b ? a : b;
}
inline int max(int a, int b)
{
    return a > b ? a : b;
}
inline uint min(uint a, uint b)
{
    return a < b ? a : b;
}

/* ---- the device ---- */

namespace shim
{

enum { SIMD = 32, THREADS_MAX = 1024, STACK_BYTES = 1 << 16 };
enum wait_kind { RUNS, WAITS_FOR_SIMD, WAITS_FOR_GROUP, ENDED };

struct coroutine {
    jmp_buf at;
    ucontext_t start;
    bool has_started;
    wait_kind state;
    int line;          /* of the call at which it waits */
    uint n_operations; /* of the SIMD group */
};

struct machine {
    coroutine threads[THREADS_MAX];
    ucontext_t caller;
    jmp_buf scheduler;
    uint64_t slots[THREADS_MAX][2]; /* what each lane gives to an operation; two, since a lane may be one ahead */
    uint n_threads, current;
    uint3 group, groups;
    uint64_t random;
    void (*body)(void *);
    void *argument;
    uint fresh; /* counts threadgroups, so that their memory is poisoned once */
};

inline machine *&the()
{
    static machine *m;
    return m;
}

[[noreturn]] inline void fail(const char *what, int line)
{
    fprintf(stderr, "metal shim: %s (thread %u of threadgroup %u %u %u, line %d)\n", what, the()->current, the()->group.x,
            the()->group.y, the()->group.z, line);
    abort();
}

/* Not inlined, like resume: what a caller holds in registers must survive the jumps. */
__attribute__((noinline)) inline void wait(wait_kind kind, int line)
{
    coroutine &self = the()->threads[the()->current];
    self.state = kind;
    self.line = line;
    if (_setjmp(self.at) == 0) _longjmp(the()->scheduler, 1);
}

inline void run_thread()
{
    for (;;) { /* a coroutine serves one threadgroup after the other */
        the()->body(the()->argument);
        wait(ENDED, 0);
    }
}

__attribute__((noinline)) inline void resume(uint i)
{
    machine &m = *the();
    m.current = i;
    if (_setjmp(m.scheduler)) return;
    if (m.threads[i].has_started) _longjmp(m.threads[i].at, 1);
    m.threads[i].has_started = true;
    setcontext(&m.threads[i].start);
}

/* Threads [begin, end) go on if all wait in the same place for `kind`. */
inline bool release(uint begin, uint end, wait_kind kind)
{
    machine &m = *the();
    uint n_waiting = 0;
    for (uint i = begin; i < end; i++) n_waiting += m.threads[i].state == kind;
    if (n_waiting < end - begin) return false;
    for (uint i = begin; i < end; i++) {
        m.current = i;
        if (m.threads[i].line != m.threads[begin].line) fail("threads wait at different places", m.threads[i].line);
        m.threads[i].state = RUNS;
    }
    return true;
}

/* How threads take turns: all as far as their next wait, or one SIMD group as far as the next barrier of all. More are seeds.
 */
enum order { ASCENDING, DESCENDING, AHEAD_ASCENDING, AHEAD_DESCENDING };

/* Run the threads of sequence[begin, end) that can; returns how many ended. */
inline uint run_some(const uint *sequence, uint begin, uint end)
{
    machine &m = *the();
    uint n_ended = 0;
    for (uint i = begin; i < end; i++) {
        if (m.threads[sequence[i]].state != RUNS) continue;
        resume(sequence[i]);
        n_ended += m.threads[sequence[i]].state == ENDED;
    }
    return n_ended;
}

inline void shuffle(uint *sequence)
{
    machine &m = *the();
    for (uint i = m.n_threads - 1; i > 0; i--) {
        m.random = m.random * 6364136223846793005u + 1442695040888963407u;
        uint j = uint(m.random >> 33) % (i + 1), other = sequence[j];
        sequence[j] = sequence[i];
        sequence[i] = other;
    }
}

inline void run_threadgroup(int order)
{
    machine &m = *the();
    uint sequence[THREADS_MAX], n_ended = 0;
    bool is_ahead = order == AHEAD_ASCENDING || order == AHEAD_DESCENDING;
    for (uint i = 0; i < m.n_threads; i++) {
        m.threads[i].state = RUNS;
        m.threads[i].n_operations = 0;
        sequence[i] = order == DESCENDING || order == AHEAD_DESCENDING ? m.n_threads - 1 - i : i;
    }
    m.fresh++;
    while (n_ended < m.n_threads) {
        if (order > AHEAD_DESCENDING) shuffle(sequence);
        bool moved = false;
        for (uint i = 0; i < m.n_threads; i += SIMD) {
            uint first = sequence[i] / SIMD * SIMD; /* of the SIMD group, where the sequence is not shuffled */
            do {
                n_ended += run_some(sequence, i, i + SIMD);
            } while (is_ahead && release(first, first + SIMD, WAITS_FOR_SIMD));
        }
        for (uint i = 0; i < m.n_threads; i += SIMD) moved |= release(i, i + SIMD, WAITS_FOR_SIMD);
        moved |= release(0, m.n_threads, WAITS_FOR_GROUP);
        if (!moved && n_ended < m.n_threads) fail("threads wait for others that do not come", m.threads[m.current].line);
    }
}

/* Run body(argument) in grid / group threadgroups; the grid is a multiple, as all of ours are. */
inline void run(void (*body)(void *), void *argument, const int *grid, const int *group, int order)
{
    static char *stacks;
    if (!the()) {
        the() = (machine *)calloc(1, sizeof(machine));
        stacks = (char *)malloc((size_t)THREADS_MAX * STACK_BYTES);
    }
    machine &m = *the();
    m.body = body;
    m.argument = argument;
    m.n_threads = uint(group[0] * group[1] * group[2]);
    m.random = uint64_t(order);
    m.groups = {uint(grid[0] / group[0]), uint(grid[1] / group[1]), uint(grid[2] / group[2])};
    for (uint i = 0; i < m.n_threads; i++) {
        m.threads[i].has_started = false;
        getcontext(&m.threads[i].start);
        m.threads[i].start.uc_stack.ss_sp = stacks + (size_t)i * STACK_BYTES;
        m.threads[i].start.uc_stack.ss_size = STACK_BYTES;
        m.threads[i].start.uc_link = nullptr;
        makecontext(&m.threads[i].start, run_thread, 0);
    }
    for (uint z = 0; z < m.groups.z; z++) {
        for (uint y = 0; y < m.groups.y; y++) {
            for (uint x = 0; x < m.groups.x; x++) {
                m.group = {x, y, z};
                run_threadgroup(order);
            }
        }
    }
}

/* Threadgroup memory holds NaNs when the first thread comes to its declaration. */
inline void poison(void *memory, size_t n_bytes, uint &seen)
{
    if (seen == the()->fresh) return;
    seen = the()->fresh;
    memset(memory, 0xff, n_bytes);
}

/* Give `x` to the SIMD group, wait for all, take what lane `from` gave. */
template <typename T> struct exchange {
    uint parity, first;
    exchange(T x, int line)
    {
        coroutine &self = the()->threads[the()->current];
        parity = self.n_operations++ & 1u;
        first = the()->current / SIMD * SIMD;
        memcpy(&the()->slots[the()->current][parity], &x, sizeof(x));
        wait(WAITS_FOR_SIMD, line);
    }
    T operator[](uint lane) const
    {
        T x;
        memcpy(&x, &the()->slots[first + lane % SIMD][parity], sizeof(x));
        return x;
    }
};

} // namespace shim

#define TQ_SHARED(name, ...)                                                         \
    static_assert(sizeof(__VA_ARGS__) <= 32768, "threadgroup memory of Apple GPUs"); \
    static __VA_ARGS__ name;                                                         \
    static uint name##_seen;                                                         \
    shim::poison(&name, sizeof(name), name##_seen)

#define threadgroup_position_in_grid (shim::the()->group)
#define thread_index_in_simdgroup (shim::the()->current % shim::SIMD)
#define simdgroup_index_in_threadgroup (shim::the()->current / shim::SIMD)

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE())
{
    shim::wait(shim::WAITS_FOR_GROUP, line);
}
inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE())
{
    shim::wait(shim::WAITS_FOR_SIMD, line);
}
template <typename T> inline T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE())
{
    uint lane = thread_index_in_simdgroup;
    return shim::exchange<T>(x, line)[lane ^ mask];
}
template <typename T> inline T simd_shuffle(T x, ushort lane, int line = __builtin_LINE())
{
    return shim::exchange<T>(x, line)[lane];
}
template <typename T> inline T simd_sum(T x, int line = __builtin_LINE())
{
    shim::exchange<T> all(x, line);
    T sum = all[0];
    for (uint i = 1; i < shim::SIMD; i++) sum += all[i];
    return sum;
}
template <typename T> inline T simd_max(T x, int line = __builtin_LINE())
{
    shim::exchange<T> all(x, line);
    T largest = all[0];
    for (uint i = 1; i < shim::SIMD; i++) largest = all[i] > largest ? all[i] : largest;
    return largest;
}
template <typename T> inline T simd_min(T x, int line = __builtin_LINE())
{
    shim::exchange<T> all(x, line);
    T least = all[0];
    for (uint i = 1; i < shim::SIMD; i++) least = all[i] < least ? all[i] : least;
    return least;
}

#endif
