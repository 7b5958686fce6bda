/* SPDX-License-Identifier: MIT */
/* One kernel of each kind, for tests/cuda/check_compile.py: that they compile for an architecture is all that is asked. */
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/encode_many.cuh"
#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/prefill_hopper.cuh"

template __global__ void decode_kernel<known_formats<sq4, sq3, 128, 2>, 128, 12>(const __grid_constant__ attend_args);
template __global__ void decode_kernel<known_formats<tt3, tt3, 64, 1>, 64, 8>(const __grid_constant__ attend_args);
template __global__ void decode_kernel<any_formats<64, 16>, 64, 8>(const __grid_constant__ attend_args);
template __global__ void prefill_kernel<64>(const __grid_constant__ attend_args);
template __global__ void prefill_hopper_kernel<known_pair<sq8, tt4, 64, 32>, 64>(const __grid_constant__ attend_args);
template __global__ void prefill_hopper_kernel<any_pair<64, 16>, 64>(const __grid_constant__ attend_args);
template __global__ void encode_many_kernel<64, 2, true>(const __grid_constant__ tq_device_store,
                                                         const __grid_constant__ tq_paged_append_params);
