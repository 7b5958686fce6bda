/* SPDX-License-Identifier: MIT */
/*
 * What sm_90a alone has: products of a warp group (wgmma) on operands in shared memory, barriers that copies arrive at, and
 * registers that move from one warp group to another. Elsewhere none of it may be called.
 */
#ifndef TQ_KERNELS_CUDA_HOPPER_CUH
#define TQ_KERNELS_CUDA_HOPPER_CUH

#include "kernels/cuda/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TQ_HOPPER 1

/*
 * An operand in shared memory: rows of 64 FP16 numbers, 128 bytes each, in panels of any number of rows; the 16-byte chunks of
 * a row change places with the row's number (chunk c of row r stands at c ^ r % 8), which keeps rows apart in the banks. Panels
 * are aligned to 1024 bytes. A product's 16 numbers of depth are 32 bytes within the row.
 */
__device__ __forceinline__ uint64_t operand_in(uint32_t address)
{
    constexpr uint64_t swizzle_128 = (uint64_t)1 << 62, eight_rows = (uint64_t)(1024 >> 4) << 32;
    return swizzle_128 | eight_rows | (uint64_t)1 << 16 | (address & 0x3ffff) >> 4;
}

/* The operand some bytes, a multiple of 16, further on. */
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, int n_bytes)
{
    return operand + (uint32_t)(n_bytes / 16);
}

#define TQ_F4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TQ_F32(d)                                                                                                            \
    TQ_F4(d, 0), TQ_F4(d, 1), TQ_F4(d, 2), TQ_F4(d, 3), TQ_F4(d, 4), TQ_F4(d, 5), TQ_F4(d, 6), TQ_F4(d, 7)
#define TQ_F64(d)                                                                                                            \
    TQ_F32(d), TQ_F4(d, 8), TQ_F4(d, 9), TQ_F4(d, 10), TQ_F4(d, 11), TQ_F4(d, 12), TQ_F4(d, 13), TQ_F4(d, 14), TQ_F4(d, 15)
#define TQ_LIST32                                                                                                            \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define TQ_LIST64                                                                                                            \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60"   \
    ",%61,%62,%63}"

/* d = a b^T, or d += a b^T: a 64 rows in shared memory, b N rows there, 16 deep. Rows of d as mma.sync has them, 16 a warp. */
template <int N> __device__ __forceinline__ void group_multiply(float (*d)[4], uint64_t a, uint64_t b, bool add)
{
    static_assert(N == 64 || N == 128, "there is an instruction for it");
    if constexpr (N == 128) {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " TQ_LIST64 ", %64, %65, add, 1, 1, 0, 0;\n}"
                     : TQ_F64(d)
                     : "l"(a), "l"(b), "r"((int)add));
    } else {
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " TQ_LIST32 ", %32, %33, add, 1, 1, 0, 0;\n}"
                     : TQ_F32(d)
                     : "l"(a), "l"(b), "r"((int)add));
    }
}

/* d += a b^T with a in registers, as mma.sync has it. */
template <int N> __device__ __forceinline__ void group_multiply(float (*d)[4], const uint32_t (&a)[4], uint64_t b)
{
    static_assert(N == 64 || N == 128, "there is an instruction for it");
    if constexpr (N == 128) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " TQ_LIST64
                     ", {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                     : TQ_F64(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " TQ_LIST32
                     ", {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                     : TQ_F32(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
}

/* Registers written so far may be read by products from here on. */
__device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until at most PENDING committed groups of products are on their way. */
template <int PENDING> __device__ __forceinline__ void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Keeps the compiler from reading or moving sums across a wait. */
template <int N> __device__ __forceinline__ void keep_sums(float (&d)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : TQ_F4(d, i)::"memory");
}

template <int N> __device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ __forceinline__ void leave_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* What this thread wrote into shared memory can be an operand of products after the next barrier. */
__device__ __forceinline__ void show_to_products()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* A barrier of some of the block's threads; id 1 to 15. */
__device__ __forceinline__ void sync_some(int id, int n_threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

/* A barrier in shared memory with phases. */
__device__ __forceinline__ void barrier_open(uint64_t *barrier, int n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory");
}

__device__ __forceinline__ void barriers_opened()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* Arrive, and let the phase end when so many bytes have been copied, too. */
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
}

/* Until the phase of this parity (0 for the first, then 1, 0, ...) has ended. */
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred ready;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 ready, [%0], %1;\n"
                 "@!ready bra again;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* Copy from global into shared memory, multiples of 16 bytes, arriving at a barrier. */
__device__ __forceinline__ void copy_bulk(void *to, const void *from, uint32_t n_bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(n_bytes), "r"(shared_address(barrier))
                 : "memory");
}

#endif
#endif
