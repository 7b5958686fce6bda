/* SPDX-License-Identifier: MIT */
/* One kernel of each kind, for tests/cuda/check_compile.py: that they compile for an architecture is all that is asked. */
#include "kernels/cuda/decode_instances.cuh"
#include "kernels/cuda/encode_many.cuh"
#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/prefill_hopper.cuh"

template cudaError_t launch_decode<scalar_codes<4>, scalar_codes<3>, 128>(const attend_args &, uint32_t, cudaStream_t);
template cudaError_t launch_decode<trellis_codes<3>, trellis_codes<3>, 64>(const attend_args &, uint32_t, cudaStream_t);
template cudaError_t launch_any<64>(const attend_args &, uint32_t, cudaStream_t);
template __global__ void prefill_kernel<scalar_codes<8>, scalar_codes<2>, 64>(const __grid_constant__ attend_args);
template __global__ void prefill_hopper_kernel<scalar_codes<8>, scalar_codes<2>, 64>(const __grid_constant__ attend_args);
template __global__ void encode_many_kernel<64, 2, true>(const __grid_constant__ tq_device_store,
                                                         const __grid_constant__ tq_cuda_append_params);
