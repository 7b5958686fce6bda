/* SPDX-License-Identifier: MIT */
/*
 * A kernel that begins while the one before it in the stream still runs (programmatic dependent launch, sm_90 on): the launch
 * must allow it, the first kernel says from where on, and the second waits before it reads what the first writes. Elsewhere
 * both are nothing.
 */
#ifndef TQ_KERNELS_CUDA_OVERLAP_CUH
#define TQ_KERNELS_CUDA_OVERLAP_CUH

/* When all blocks have come here, the next kernel may begin. */
__device__ __forceinline__ void let_next_kernel_begin()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Behind it, the kernel before has ended and all that it wrote is there. */
__device__ __forceinline__ void wait_for_kernel_before()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
