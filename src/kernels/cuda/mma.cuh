/* SPDX-License-Identifier: MIT */
/* The instructions that the kernels are built from: tensor-core products, byte permutation, copies into shared memory. */
#ifndef TQ_KERNELS_CUDA_MMA_CUH
#define TQ_KERNELS_CUDA_MMA_CUH

#include <cuda_fp16.h>
#include <stdint.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define TQ_BULK_COPY 1
#endif

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors)
{
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selectors));
    return d;
}

__device__ __forceinline__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float tanh_approx(float x)
{
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t as_bits(__half2 x)
{
    return *reinterpret_cast<uint32_t *>(&x);
}

__device__ __forceinline__ __half2 as_half2(uint32_t x)
{
    return *reinterpret_cast<__half2 *>(&x);
}

/* c += a b, a [16, 32] and b [32, 8] bytes, signed (s8) or not (u8). Before sm_80 as four products of [8, 16] by [16, 8]. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TQ_MMA_BYTES(types, c, a, b0, b1)                                                                         \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." types ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
#define TQ_MMA_8X16(types, c0, c1, a, b)                                                     \
    asm("mma.sync.aligned.m8n8k16.row.col.s32." types ".s32 {%0,%1}, {%2}, {%3}, {%0,%1};" \
        : "+r"(c0), "+r"(c1)                                                                 \
        : "r"(a), "r"(b))
#define TQ_MMA_BYTES(types, c, a, b0, b1)         \
    do {                                          \
        TQ_MMA_8X16(types, c[0], c[1], a[0], b0); \
        TQ_MMA_8X16(types, c[0], c[1], a[2], b1); \
        TQ_MMA_8X16(types, c[2], c[3], a[1], b0); \
        TQ_MMA_8X16(types, c[2], c[3], a[3], b1); \
    } while (0)
#endif

__device__ __forceinline__ void mma_s8_u8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    TQ_MMA_BYTES("s8.u8", c, a, b0, b1);
}

__device__ __forceinline__ void mma_u8_u8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    TQ_MMA_BYTES("u8.u8", c, a, b0, b1);
}

__device__ __forceinline__ void mma_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    TQ_MMA_BYTES("u8.s8", c, a, b0, b1);
}

/* c += a b, a [16, 16] and b [16, 8] FP16. */
__device__ __forceinline__ void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
#define TQ_MMA_16X8(a, b, d)                                                                                        \
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                 : "r"(a), "r"(b), "r"(d))
    TQ_MMA_16X8(a0, a1, b0);
    TQ_MMA_16X8(a2, a3, b1);
#undef TQ_MMA_16X8
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* What stands at an address of shared memory that nobody writes meanwhile. */
__device__ __forceinline__ uint32_t shared_word(uint32_t address)
{
    uint32_t x;
    asm("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

/* Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8. */
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* Four matrices in columns. */
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* 16 bytes from global to shared memory, there for this thread after copies_wait. Before sm_80 a plain copy. */
__device__ __forceinline__ void copy_async(uint8_t *to, const uint8_t *from)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
    *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(from);
#endif
}

__device__ __forceinline__ void copies_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/* Copies into shared memory that this thread asks for from here on come behind what others, before a barrier, did there. */
__device__ __forceinline__ void order_copies()
{
#ifdef TQ_BULK_COPY
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* Add one to a number in shared memory, of which this is what was there; by one thread. */
__device__ __forceinline__ int take_next(int *number)
{
    int before;
    /* Not an addition, which compilers take for one of many threads. */
    asm volatile("atom.shared.inc.u32 %0, [%1], 0x7fffffff;" : "=r"(before) : "r"(shared_address(number)) : "memory");
    return before;
}

/* Bring what stands there nearer, where an architecture can. */
__device__ __forceinline__ void prefetch(const void *p)
{
    asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

/* Count this block in; what the others that were counted before have written can then be read. */
__device__ __forceinline__ uint32_t arrive(uint32_t *counter)
{
    uint32_t before;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
#endif
    return before;
}

/*
 * A warp's queue of records on their way into shared memory, N_STAGE of n_bytes bytes. Every lane calls; stages are filled and
 * waited for in order, and `skip` stands for a record when there is none left. With sm_90 one instruction copies a record, with
 * sm_80 each lane copies 16 bytes at a time; before that the copy is a plain one.
 */
template <int N_STAGE> struct warp_queue {
    uint8_t *stages;
    uint32_t barriers; /* N_STAGE of 8 bytes */
    int n_bytes;

    __device__ __forceinline__ void open(uint8_t *stage_memory, uint64_t *barrier_memory, int record_bytes, int lane)
    {
        stages = stage_memory;
        n_bytes = record_bytes;
        barriers = shared_address(barrier_memory);
#ifdef TQ_BULK_COPY
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < N_STAGE; i++) {
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * i) : "memory");
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncwarp();
#endif
    }

    __device__ __forceinline__ void fill(int stage, const uint8_t *from, int lane)
    {
#ifdef TQ_BULK_COPY
        if (lane == 0) {
            uint32_t barrier = barriers + 8 * stage;
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_bytes) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             shared_address(stages + stage * n_bytes)),
                         "l"(from), "r"(n_bytes), "r"(barrier)
                         : "memory");
        }
#else
        for (int i = lane * 16; i < n_bytes; i += 512) copy_async(stages + stage * n_bytes + i, from + i);
        skip();
#endif
    }

    __device__ __forceinline__ void skip()
    {
#if !defined(TQ_BULK_COPY) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    /* Until the stage holds its record; phase is 0 for its first record, then 1, 0, ... */
    __device__ __forceinline__ void wait(int stage, uint32_t phase)
    {
#ifdef TQ_BULK_COPY
        asm volatile("{\n"
                     ".reg .pred ready;\n"
                     "again: mbarrier.try_wait.parity.shared::cta.b64 ready, [%0], %1;\n"
                     "@!ready bra again;\n"
                     "}" ::"r"(barriers + 8 * stage),
                     "r"(phase)
                     : "memory");
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_group %0;" ::"n"(N_STAGE - 1) : "memory");
#endif
        __syncwarp();
#endif
    }
};

#endif
