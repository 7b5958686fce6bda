/* SPDX-License-Identifier: MIT */
/* The beginning of a forward pass: a block a row. Expected bound: the latency of one launch. */
#include "kernels/cuda/append.cuh"

static __global__ void begin_pass_kernel(tq_device_pass pass)
{
    const int row = (int)blockIdx.x;
    const int first = pass.starts[row], n = pass.starts[row + 1] - first, length = pass.lengths[row];
    const int32_t *table = pass.page_table + row * pass.page_table_stride;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        const int position = length + i, page = position / pass.page_size;
        pass.seq_ids[first + i] = row;
        pass.positions[first + i] = position;
        pass.slots[first + i] = (int64_t)table[page] * pass.page_size + (position - page * pass.page_size);
    }
    __syncthreads();
    if (threadIdx.x == 0) pass.lengths[row] = length + n;
}

cudaError_t begin_pass(const tq_device_pass &pass, cudaStream_t stream)
{
    begin_pass_kernel<<<(unsigned)pass.n_rows, 128, 0, stream>>>(pass);
    return cudaGetLastError();
}
