// SPDX-License-Identifier: MIT
/*
 * The splits of a row to its output: encoded ones are summed in the rotated basis and rotated back once, then the exact one is
 * added. One SIMD group a row: grid [32, n_rows, n_heads]. Expected bound: latency.
 */
namespace tq
{

template <int D, typename T>
inline void combine(const device float *partial, const device uint *signs, const device float *sinks, attend_params p,
                    device T *out, uint3 group, int lane)
{
    int row = int(group.y), head = int(group.z), n_rows = p.n_query * p.group, n = p.n_splits;
    partial += (ulong(head) * (n + 1) * n_rows + row) * partial_floats(D);
    ulong stride = ulong(n_rows) * partial_floats(D); /* of a split */
    float largest = lowest_score(), sum = 0.0f, y[lane_elements(D)];
    for (int s = 0; s <= n; s++) largest = fmax(largest, partial[s * stride + D]);
    for (int k = 0; k < lane_elements(D); k++) y[k] = 0.0f;
    for (int s = 0; s <= n; s++) {
        const device float *from = partial + s * stride;
        float factor = exp2(from[D] - largest);
        sum += factor * from[D + 1];
        if (s == n) rotate_back<D>(y, signs, lane);
        for (int k = 0; k < lane_elements(D); k++) y[k] += exists<D>(32 * k + lane) ? factor * from[32 * k + lane] : 0.0f;
    }
    sum += exp2(sinks[head * p.group + row % p.group] - largest);
    ulong to = row_offset(p, head, row, D);
    for (int k = 0; k < lane_elements(D); k++) {
        if (exists<D>(32 * k + lane)) out[to + 32 * k + lane] = T(y[k] / sum);
    }
}

} // namespace tq
