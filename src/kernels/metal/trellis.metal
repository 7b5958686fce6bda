// SPDX-License-Identifier: MIT
/*
 * The trellis encoder: Viterbi's search of src/codec/trellis.c by one SIMD group a vector, in the same integers, so the codes
 * are the same. Lane l owns windows 8 l to 8 l + 7 of the 256. What is kept of each step is the oldest code of each rest's best
 * window. Expected bound: arithmetic and the latency of some 1.3 D steps.
 */
namespace tq
{

constexpr uint worst_metric()
{
    return 0xffffu;
}

/* Of a step: a byte a rest; at 2 bits, where rests are many, a byte has those of four. */
constexpr int oldest_bytes(int bits)
{
    return bits == 2 ? 16 : 256 >> bits;
}

template <int D, int BITS> struct trellis_memory {
    ushort metric[256];
    uchar oldest[D * oldest_bytes(BITS)];
    short z[padded(D)];
    uchar code[D];
};

template <int BITS> inline int window_value(int window)
{
    return BITS == 4 ? trellis4_values[window] : BITS == 3 ? trellis3_values[window] : trellis2_values[window];
}

/* The least metrics that lead to this lane's rests (two at 2 bits, else one); a rest's first lane notes the oldest code. */
template <int BITS>
inline void best_of_rests(thread uint (&least)[2], threadgroup const ushort *metric, threadgroup uchar *oldest, int lane)
{
    constexpr int n_rest = 256 >> BITS, mask = (1 << BITS) - 1;
    if (BITS == 2) {
        for (int c = 0; c < 2; c++) {
            least[c] = metric[2 * lane + c];
            for (int o = 1; o < 4; o++) least[c] = min(least[c], uint(metric[2 * lane + c + n_rest * o]));
        }
        uint two = (least[0] & mask) | (least[1] & mask) << 2, next = simd_shuffle_xor(two, ushort(1));
        if ((lane & 1) == 0) oldest[lane / 2] = uchar(two | next << 4);
        return;
    }
    /* At 4 bits two lanes share a rest and look at 8 of its 16 windows each. */
    int rest = BITS == 4 ? lane / 2 : lane, first = BITS == 4 ? rest + n_rest * 8 * (lane & 1) : rest;
    least[0] = metric[first];
    for (int o = 1; o < 8; o++) least[0] = min(least[0], uint(metric[first + n_rest * o]));
    if (BITS == 4) least[0] = min(least[0], simd_shuffle_xor(least[0], ushort(1)));
    if (BITS == 3 || (lane & 1) == 0) oldest[rest] = uchar(least[0] & mask);
    least[1] = least[0];
}

/* Steps for values z[n - 1] ... z[0]; oldest [n, n_rest] gets the choices. target: the lane's windows as scaled z is. */
template <int BITS>
inline void run_steps(threadgroup ushort *metric, threadgroup uchar *oldest, threadgroup const short *z, int n,
                      thread const int (&target)[8], int lane)
{
    constexpr int cost_scale = BITS > 2 ? 4 : 2;
    constexpr uint mask = (1u << BITS) - 1u;
    uint base = 0, own_oldest = uint(8 * lane) >> (8 - BITS);
    for (int i = n - 1; i >= 0; i--) {
        uint least[2];
        best_of_rests<BITS>(least, metric, oldest + i * oldest_bytes(BITS), lane);
        least[0] -= base;
        least[1] -= base;
        base = simd_min(min(least[0], least[1])) & ~mask;
        int scaled = z[i] * cost_scale;
        simdgroup_barrier(mem_flags::mem_threadgroup); /* all have read: simd_min waits, this orders memory */
        for (int c = 0; c < 8; c++) {
            uint distance = min(uint(abs(scaled - target[c])), worst_metric());
            uint sum = min(least[c / 4] + (distance * distance >> 16), worst_metric());
            metric[8 * lane + c] = ushort((sum & ~mask) | own_oldest);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
}

/* Metrics of 0 where a window's lower bits are `closing` (everywhere if that is negative), else of the worst. */
template <int BITS> inline void set_metrics(threadgroup ushort *metric, int closing, int lane)
{
    constexpr int n_rest = 256 >> BITS;
    constexpr uint mask = (1u << BITS) - 1u;
    for (int s = lane; s < 256; s += 32) {
        uint error = closing < 0 || (s & (n_rest - 1)) == closing ? 0 : worst_metric();
        metric[s] = ushort((error & ~mask) | uint(s) >> (8 - BITS));
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
}

/* The window of least metric among first, first + step, ..., the lowest among equals. */
inline int best_window(threadgroup const ushort *metric, int first, int step, int lane)
{
    uint best = 0xffffffffu;
    for (int s = first + step * lane; s < 256; s += 32 * step) best = min(best, uint(metric[s]) << 8 | uint(s));
    return int(simd_min(best) & 255u);
}

template <int BITS> inline int next_window(int window, threadgroup const uchar *oldest)
{
    int rest = window >> BITS, found = BITS == 2 ? oldest[rest / 4] >> rest % 4 * 2 & 3 : oldest[rest];
    return rest + (found << (8 - BITS));
}

/* The codes of least error for x * factor in shared.code; returns their energy and the error as trellis.c does. */
template <int D, int BITS>
inline float search(threadgroup trellis_memory<D, BITS> &shared, thread const float (&x)[lane_elements(D)], float factor,
                    thread const int (&target)[8], thread float &error, int lane)
{
    constexpr int n_rest = 256 >> BITS, warm_up = 8 + 48 / BITS, mask = (1 << BITS) - 1;
    simdgroup_barrier(mem_flags::mem_threadgroup); /* the search before has been measured */
    for (int k = 0; k < lane_elements(D); k++) {
        float fine = x[k] * factor * 256.0f;
        fine = fmin(fmax(fine, -32767.0f), 32767.0f);
        shared.z[32 * k + lane] = short(fine + copysign(0.5f, fine));
    }
    set_metrics<BITS>(shared.metric, -1, lane);
    run_steps<BITS>(shared.metric, shared.oldest, shared.z, warm_up, target, lane);
    run_steps<BITS>(shared.metric, shared.oldest, shared.z + (D - warm_up), warm_up, target, lane);
    int window = best_window(shared.metric, 0, 1, lane);
    for (int i = 0; i < warm_up; i++) window = next_window<BITS>(window, shared.oldest + i * oldest_bytes(BITS));
    int closing = window & (n_rest - 1);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    set_metrics<BITS>(shared.metric, closing, lane);
    run_steps<BITS>(shared.metric, shared.oldest, shared.z, D, target, lane);
    window = best_window(shared.metric, closing, n_rest, lane);
    for (int i = 0; i < D; i++) { /* all lanes go the same way */
        if (lane == i % 32) shared.code[i] = uchar(window & mask);
        window = next_window<BITS>(window, shared.oldest + i * oldest_bytes(BITS));
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    uint energy = 0;
    ulong squares = 0;
    for (int i = lane; i < D; i += 32) {
        int bits = 0;
        for (int c = 0; BITS * c < 8; c++) bits |= int(shared.code[(i + c) % D]) << (BITS * c);
        int value = window_value<BITS>(bits & 255);
        uint distance = uint(abs(shared.z[i] - value * 256)); /* below 65536, so its square fits */
        energy += uint(value * value);
        squares += distance * distance;
    }
    /* No sums of 64 bits over lanes: in two parts, of 24 bits and the rest. */
    ulong low = simd_sum(uint(squares & 0xffffffu)), high = simd_sum(uint(squares >> 24));
    error = precise::divide(float(low + (high << 24)), 65536.0f);
    return float(simd_sum(energy));
}

/* One threadgroup of 32 threads a vector: grid [32, n_encoded, n_heads]. */
template <int D, int FORMAT, int HAS_REF, int HAS_FACTORS>
inline void encode_trellis(encode_task task, threadgroup trellis_memory<D, bits_of(FORMAT)> &shared, uint3 group, int lane)
{
    constexpr int bits = bits_of(FORMAT);
    int head = int(group.z), i = int(group.y), target[8];
    for (int c = 0; c < 8; c++) target[c] = window_value<bits>(8 * lane + c) * 256 * (bits > 2 ? 4 : 2);
    float x[lane_elements(D)];
    load_vector<D, HAS_REF, HAS_FACTORS>(x, task, head, i, lane);
    float ss = sum_squares<D>(x), factor = unit_factor(ss, D) * 36.0f, energy = 0.0f, error = 0.0f;
    const float least_share = 0.3f / float(1 << 2 * bits);
    for (int round = 0; round < 3; round++) {
        float last = energy;
        energy = search<D, bits>(shared, x, factor, target, error, lane);
        if (energy == last || error > least_share * energy) break;
        factor = precise::divide(precise::sqrt(energy), precise::sqrt(ss));
    }
    ulong vector = ulong(head) * task.params.n_encoded + i;
    store_codes<D, FORMAT>(task.codes + vector * words_of(FORMAT, D), shared.code, lane);
    if (lane == 0) {
        float scale = precise::divide(precise::sqrt(ss), precise::sqrt(energy));
        task.scales[vector] = energy == 0.0f ? half(0.0f) : scale_from_float(scale);
    }
}

} // namespace tq
