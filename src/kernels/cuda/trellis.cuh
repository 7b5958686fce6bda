/* SPDX-License-Identifier: MIT */
/*
 * The trellis encoder: Viterbi's search of src/codec/trellis.c by one warp a vector, in the same 16-bit arithmetic, so the
 * codes are the same. Lane l owns windows 8 l to 8 l + 7 of the 256: their metrics of one step are one store of 16 bytes, and
 * the least of the metrics that lead to a rest is found where those windows are owned. What is kept of each step is the oldest
 * code of each rest's best window, a byte each. Expected bound: arithmetic, some 100 instructions a step and warp.
 */
#ifndef TQ_KERNELS_CUDA_TRELLIS_CUH
#define TQ_KERNELS_CUDA_TRELLIS_CUH

#include "kernels/cuda/references.cuh"

constexpr int trellis_warps = 4;

template <int D, int BITS> struct trellis_shared {
    static constexpr int n_rest = 256 >> BITS;
    __align__(16) uint16_t metric[256];
    uint8_t oldest[D][n_rest];
    int16_t z[D];
    uint8_t codes[D];   /* a code each */
    uint8_t circle[D * BITS / 8];
};

template <int BITS> struct lane_windows {
    int target[8]; /* values of the lane's windows, as the scaled z is */
    uint32_t oldest; /* the oldest code of all of them */
};

__device__ __forceinline__ uint32_t warp_min(uint32_t x)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    return __reduce_min_sync(~0u, x);
#else
#pragma unroll
    for (int width = 16; width > 0; width /= 2) x = min(x, __shfl_xor_sync(~0u, x, width));
    return x;
#endif
}

/* Steps for values z[n - 1] ... z[0]; oldest [n, n_rest] gets the choices. */
template <int BITS, typename T>
__device__ __forceinline__ void run_steps(T &shared, const lane_windows<BITS> &windows, const int16_t *z, int n, int lane)
{
    constexpr uint32_t mask = (1u << BITS) - 1u;
    constexpr int n_rest = 256 >> BITS, cost_scale = BITS > 2 ? 4 : 2;
    uint32_t base = 0;
    for (int i = n - 1; i >= 0; i--) {
        uint32_t least[2];
        if (BITS == 3) {
            least[0] = shared.metric[lane];
#pragma unroll
            for (int o = 1; o < 8; o++) least[0] = min(least[0], (uint32_t)shared.metric[lane + n_rest * o]);
            shared.oldest[i][lane] = (uint8_t)(least[0] & mask);
        } else if (BITS == 2) {
            least[0] = least[1] = 0xffffu;
#pragma unroll
            for (int o = 0; o < 4; o++) {
                uint32_t two = reinterpret_cast<const uint32_t *>(shared.metric)[lane + n_rest / 2 * o];
                least[0] = min(least[0], two & 0xffffu), least[1] = min(least[1], two >> 16);
            }
            *reinterpret_cast<uint16_t *>(&shared.oldest[i][2 * lane]) = (uint16_t)((least[0] & mask) | (least[1] & mask) << 8);
        } else {
            const uint16_t *from = shared.metric + lane / 2 + n_rest * 8 * (lane & 1);
            least[0] = from[0];
#pragma unroll
            for (int o = 1; o < 8; o++) least[0] = min(least[0], (uint32_t)from[n_rest * o]);
            least[0] = min(least[0], __shfl_xor_sync(~0u, least[0], 1));
            if ((lane & 1) == 0) shared.oldest[i][lane / 2] = (uint8_t)(least[0] & mask);
        }
        if (BITS != 2) least[1] = least[0];
        least[0] -= base, least[1] -= base;
        base = warp_min(min(least[0], least[1])) & ~mask;

        int scaled = z[i] * cost_scale;
        uint32_t metric[8];
#pragma unroll
        for (int c = 0; c < 8; c++) {
            uint32_t distance = min((uint32_t)abs(scaled - windows.target[c]), 0xffffu);
            uint32_t sum = min(least[c / 4] + (distance * distance >> 16), 0xffffu);
            metric[c] = (sum & ~mask) | windows.oldest;
        }
        __syncwarp(); /* all have read */
        uint4 packed = make_uint4(metric[0] | metric[1] << 16, metric[2] | metric[3] << 16, metric[4] | metric[5] << 16,
                                  metric[6] | metric[7] << 16);
        reinterpret_cast<uint4 *>(shared.metric)[lane] = packed;
        __syncwarp();
    }
}

/* Metrics of 0 where a window's lower bits are `closing` (or everywhere, if that is negative), else of the worst. */
template <int BITS, typename T> __device__ __forceinline__ void set_metrics(T &shared, int closing, int lane)
{
    constexpr int n_rest = 256 >> BITS;
    for (int s = lane; s < 256; s += 32) {
        uint32_t error = closing < 0 || (s & (n_rest - 1)) == closing ? 0 : 0xffffu;
        shared.metric[s] = (uint16_t)((error & ~((1u << BITS) - 1u)) | s >> (8 - BITS));
    }
    __syncwarp();
}

/* The window of least metric among first, first + step, ..., the lowest among equals. */
template <typename T> __device__ __forceinline__ int best_window(const T &shared, int first, int step, int lane)
{
    uint32_t best = 0xffffffffu;
    for (int s = first + step * lane; s < 256; s += 32 * step) best = min(best, (uint32_t)shared.metric[s] << 8 | (uint32_t)s);
    return (int)(warp_min(best) & 255u);
}

/* Follow the choices from `window` for n values; codes, if not NULL, gets them. All lanes go the same way. */
template <int BITS, typename T> __device__ __forceinline__ int follow(const T &shared, int window, int n, uint8_t *codes)
{
    for (int i = 0; i < n; i++) {
        if (codes) codes[i] = (uint8_t)(window & ((1 << BITS) - 1));
        int rest = window >> BITS;
        window = rest + (shared.oldest[i][rest] << (8 - BITS));
    }
    return window;
}

/* What the search takes for x. */
__device__ __forceinline__ int16_t trellis_target(float x, float factor)
{
    float fine = __fmul_rn(__fmul_rn(x, factor), 256.0f);
    fine = fminf(fmaxf(fine, -32767.0f), 32767.0f);
    return (int16_t)__fadd_rn(fine, copysignf(0.5f, fine));
}

/* The codes of least error for x * factor in shared.codes; returns their energy and the error as trellis.c does. set_targets
 * puts trellis_target of all elements to shared.z. */
template <int BITS, typename T, typename F>
__device__ __forceinline__ float search(T &shared, const lane_windows<BITS> &windows, const int8_t *values, int head_dim,
                                        const F &set_targets, float factor, float *error, int lane)
{
    constexpr int n_rest = 256 >> BITS, warm_up = 8 + 48 / BITS;
    __syncwarp(); /* the search before has been measured */
    set_targets(factor);
    set_metrics<BITS>(shared, -1, lane);
    run_steps<BITS>(shared, windows, shared.z, warm_up, lane);
    run_steps<BITS>(shared, windows, shared.z + head_dim - warm_up, warm_up, lane);
    int closing = follow<BITS>(shared, best_window(shared, 0, 1, lane), warm_up, nullptr) & (n_rest - 1);
    __syncwarp();
    set_metrics<BITS>(shared, closing, lane);
    run_steps<BITS>(shared, windows, shared.z, head_dim, lane);
    int first = best_window(shared, closing, n_rest, lane);
    __syncwarp();
    if (lane == 0) follow<BITS>(shared, first, head_dim, shared.codes);
    __syncwarp();

    int32_t energy = 0;
    int64_t squares = 0;
    for (int i = lane; i < head_dim; i += 32) {
        int window = 0;
#pragma unroll
        for (int c = 0; BITS * c < 8; c++) window |= shared.codes[(i + c) % head_dim] << BITS * c;
        int value = values[window & 255], distance = shared.z[i] - value * 256;
        energy += value * value;
        squares += (int64_t)distance * distance;
    }
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
        energy += __shfl_xor_sync(~0u, energy, width);
        squares += __shfl_xor_sync(~0u, squares, width);
    }
    *error = __fdiv_rn((float)squares, 65536.0f);
    return (float)energy;
}

/* The circle of a vector whose sum of squares is ss, to shared.circle; returns its scale. */
template <int BITS, typename T, typename F>
__device__ __forceinline__ __half encode_circle(T &shared, const int8_t *values, int head_dim, float ss, const F &set_targets,
                                                int lane)
{
    lane_windows<BITS> windows;
    windows.oldest = (uint32_t)(8 * lane) >> (8 - BITS);
#pragma unroll
    for (int c = 0; c < 8; c++) windows.target[c] = values[8 * lane + c] * 256 * (BITS > 2 ? 4 : 2);
    float factor = __fmul_rn(unit_factor(ss, head_dim), 36.0f), energy = 0.0f, error;
    const float least_share = 0.3f / (float)(1 << 2 * BITS);
    for (int round = 0; round < 3; round++) {
        float last = energy;
        energy = search<BITS>(shared, windows, values, head_dim, set_targets, factor, &error, lane);
        if (energy == last || error > __fmul_rn(least_share, energy)) break;
        factor = __fdiv_rn(__fsqrt_rn(energy), __fsqrt_rn(ss));
    }
    for (int i = lane; i < head_dim * BITS / 8; i += 32) {
        uint32_t bits = 0;
        int first = 8 * i / BITS;
#pragma unroll
        for (int c = 0; c < 8 / BITS + 2; c++) {
            int at = BITS * (first + c) - 8 * i;
            if (first + c >= head_dim || at >= 8) continue;
            bits |= at < 0 ? (uint32_t)shared.codes[first + c] >> -at : (uint32_t)shared.codes[first + c] << at;
        }
        shared.circle[i] = (uint8_t)bits;
    }
    __syncwarp();
    return energy == 0.0f ? __float2half_rn(0.0f) : scale_from_float(__fdiv_rn(__fsqrt_rn(ss), __fsqrt_rn(energy)));
}

template <int D, int BITS>
__global__ void __launch_bounds__(32 * trellis_warps) encode_trellis_kernel(const __grid_constant__ tq_device_store store,
                                                                            const __grid_constant__ tq_paged_append_params p,
                                                                            int first_side)
{
    extern __shared__ __align__(16) uint8_t memory[];
    __shared__ int8_t values[256];
    const bool is_value = first_side + blockIdx.y;
    const tq_device_format &format = is_value ? store.value : store.key;
    for (int i = threadIdx.x; i < 256; i += blockDim.x) values[i] = format.windows[i];
    __syncthreads();

    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    auto &shared = reinterpret_cast<trellis_shared<D, BITS> *>(memory)[warp];
    int64_t item = (int64_t)blockIdx.x * trellis_warps + warp, token = item / store.n_head_kv;
    int32_t head = (int32_t)(item % store.n_head_kv);
    if (token >= p.n_tok) return;
    const encode_task task = encode_task_of(store, p, token);
    if (!task.exists) return;

    float x[D / 16]; /* both halves of the warp hold the vector */
    tq_paged_append_params quiet = p;
    if (lane >= 16) quiet.n_not_finite = nullptr;
    load_vector<D>(x, store, quiet, task, is_value, head, lane & 15);
    if (!is_value) key_to_coded<D>(x, store, task, head, lane & 15);
    rotate<D>(x, is_value ? store.value_rotation : store.rotation, lane & 15);
    auto set_targets = [&](float factor) {
        if (lane >= 16) return;
#pragma unroll
        for (int k = 0; k < D / 16; k++) shared.z[16 * k + lane] = trellis_target(x[k], factor);
    };
    const __half scale = encode_circle<BITS>(shared, values, D, sum_squares<D>(x), set_targets, lane);
    slot_place place = place_of_slot(store, task.page, task.offset, head);
    tq_plane shape = plane_of(store, is_value);
    shape.is_plain = false;
    if (lane < 16) store_row(codes_of(store, place, is_value), shape, place.token, shared.circle, lane);
    if (lane == 0) *scale_of(store, place, is_value) = scale;
}

#endif
