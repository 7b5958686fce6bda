// SPDX-License-Identifier: MIT
/*
 * Prefill attention: causal, on the same arrays. A threadgroup of 8 SIMD groups has 32 rows of one KV head, 4 a SIMD group, and
 * walks over all tokens that they see, a tile at a time: the SIMD groups expand a tile of keys and values into threadgroup
 * memory together, then each attends with its rows. Encoded tokens come first, with rotated queries; then the accumulators are
 * rotated back, and the exact tokens follow with the queries as they came. Expected bound: arithmetic. Apple's matrix units are
 * not used yet.
 */
namespace tq
{

constexpr int prefill_rows()
{
    return 4; /* of a SIMD group */
}

/* Tokens of a tile: what 32 KB of threadgroup memory hold. Divides a block, and is half as many as there are SIMD groups or
 * more. */
constexpr int tile_tokens(int head_dim)
{
    return head_dim <= 128 ? 16 : head_dim <= 320 ? 8 : 4;
}

template <int D> struct prefill_memory {
    level_table k_levels, v_levels;
    float rows[2 * tile_tokens(D)][padded(D)]; /* the tile's keys, then its values; or a row of each SIMD group's own */
};

template <int D> inline threadgroup float *key_row(threadgroup prefill_memory<D> &shared, int token)
{
    return shared.rows[token];
}

template <int D> inline threadgroup float *value_row(threadgroup prefill_memory<D> &shared, int token)
{
    return shared.rows[tile_tokens(D) + token];
}

/* The queries of a SIMD group, consecutive; for encoded keys, or as they came. */
template <int D, int HAS_FACTORS, typename T>
inline void load_queries(thread row_state<D, 4> &state, const device T *q, thread const attend_params &p,
                         thread const kv_arrays &kv, bool is_coded, int head, int first_row, threadgroup float *scratch,
                         int lane)
{
    for (int r = 0; r < prefill_rows(); r++) {
        load_strided<D>(state.q[r], q + row_offset(p, head, min(first_row + r, p.n_query * p.group - 1), D), lane);
        if (is_coded) to_coded_basis<D, HAS_FACTORS>(state.q[r], p, kv, head, lane);
        for (int k = 0; k < lane_elements(D); k++) state.q[r][k] *= p.scale_log2;
        to_consecutive<D>(state.q[r], scratch, lane);
    }
}

/* Expand tokens [begin, begin + tile) to the tile, those that exist; a barrier must follow. */
template <int D, int KF, int VF, int HAS_REF>
inline void fill_coded_tile(threadgroup prefill_memory<D> &shared, thread const attend_params &p, thread const kv_arrays &kv,
                            int head, int begin, int simd, int lane)
{
    constexpr int n = lane_elements(D);
    float x[n], reference[n];
    for (int k = 0; k < n; k++) reference[k] = 0.0f;
    if (HAS_REF) {
        const device uint *from = reference_of(p, kv, head, begin, D);
        expand<D, SQ8>(reference, from, shared.k_levels, lane);
        for (int k = 0; k < n; k++) reference[k] *= reference_scale(from, D);
    }
    for (int t = simd; t < tile_tokens(D); t += 8) {
        ulong at = ulong(head) * p.capacity + begin + t; /* within the capacity: it is a multiple of a block */
        float scale = float(kv.k_scales[at]);
        expand<D, KF>(x, kv.k_codes + at * words_of(KF, D), shared.k_levels, lane);
        for (int k = 0; k < n; k++) key_row(shared, t)[n * lane + k] = scale * x[k] + reference[k];
        scale = float(kv.v_scales[at]);
        expand<D, VF>(x, kv.v_codes + at * words_of(VF, D), shared.v_levels, lane);
        for (int k = 0; k < n; k++) value_row(shared, t)[n * lane + k] = scale * x[k];
    }
}

template <int D>
inline void fill_exact_tile(threadgroup prefill_memory<D> &shared, thread const attend_params &p, thread const kv_arrays &kv,
                            int head, int begin, int simd, int lane)
{
    for (int t = simd; t < tile_tokens(D) && begin + t < p.n_exact; t += 8) {
        ulong at = (ulong(head) * p.exact_capacity + begin + t) * D;
        for (int k = 0; k < lane_elements(D); k++) {
            int i = 32 * k + lane;
            key_row(shared, t)[i] = exists<D>(i) ? float(kv.k_exact[at + i]) : 0.0f;
            value_row(shared, t)[i] = exists<D>(i) ? float(kv.v_exact[at + i]) : 0.0f;
        }
    }
}

/* Attend with all rows of the SIMD group to the first n tokens of the tile; bit r of `sees`: row r sees the lane's token. */
template <int D>
inline void attend_tile(thread row_state<D, 4> &state, threadgroup prefill_memory<D> &shared, int n, uint sees, int lane)
{
    constexpr int n_lane = lane_elements(D);
    float x[n_lane], score[prefill_rows()];
    if (simd_max(sees) == 0) return;
    for (int r = 0; r < prefill_rows(); r++) score[r] = 0.0f;
    for (int t = 0; t < n; t++) {
        for (int k = 0; k < n_lane; k++) x[k] = key_row(shared, t)[n_lane * lane + k];
        for (int r = 0; r < prefill_rows(); r++) {
            float sum = dot_lanes<D>(state.q[r], x);
            score[r] = lane == t ? sum : score[r];
        }
    }
    for (int r = 0; r < prefill_rows(); r++) score[r] = weigh(state, r, score[r], (sees >> r & 1u) != 0);
    for (int t = 0; t < n; t++) {
        for (int k = 0; k < n_lane; k++) x[k] = value_row(shared, t)[n_lane * lane + k];
        for (int r = 0; r < prefill_rows(); r++) add_value(state, r, simd_shuffle(score[r], ushort(t)), x);
    }
}

/* Grid [256, row tiles, n_heads], threadgroups of 256. q and out: [n_batch, n_head, n_query, D]. */
template <int D, int KF, int VF, int HAS_REF, int HAS_FACTORS, typename T>
inline void prefill(const device T *q, kv_arrays kv, const device float *sinks, attend_params p, device T *out,
                    threadgroup prefill_memory<D> &shared, uint3 group, int simd, int lane)
{
    constexpr int n = lane_elements(D), rows = prefill_rows(), tile = tile_tokens(D);
    int head = int(group.z), first_of_group = int(group.y) * 8 * rows, first_row = first_of_group + simd * rows;
    int n_rows = p.n_query * p.group, last_row = min(first_of_group + 8 * rows, n_rows) - 1;
    fill_levels<KF>(shared.k_levels, 32 * simd + lane, 256);
    fill_levels<VF>(shared.v_levels, 32 * simd + lane, 256);
    row_state<D, rows> state;
    clear_rows(state);
    load_queries<D, HAS_FACTORS>(state, q, p, kv, true, head, first_row, shared.rows[simd], lane);

    row_limits<rows> limits = limits_of<rows>(p, first_row);
    row_limits<1> of_last = limits_of<1>(p, last_row);
    int end = of_last.coded_end[0];
    for (int begin = p.n_sink / tile * tile; begin < end; begin += tile) {
        threadgroup_barrier(mem_flags::mem_threadgroup); /* nobody needs the tile before; at first, the tables are there */
        fill_coded_tile<D, KF, VF, HAS_REF>(shared, p, kv, head, begin, simd, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint sees = 0;
        int position = begin + lane, n_tokens = min(tile, end - begin);
        for (int r = 0; r < rows; r++) {
            sees |= uint(lane < n_tokens && position >= p.n_sink && position < limits.coded_end[r]) << r;
        }
        attend_tile(state, shared, n_tokens, sees, lane);
    }

    threadgroup_barrier(mem_flags::mem_threadgroup); /* nobody needs the last tile */
    for (int r = 0; r < rows; r++) {
        to_strided<D>(state.acc[r], shared.rows[simd], lane);
        rotate_back<D>(state.acc[r], kv.signs, lane);
        to_consecutive<D>(state.acc[r], shared.rows[simd], lane);
    }
    load_queries<D, HAS_FACTORS>(state, q, p, kv, false, head, first_row, shared.rows[simd], lane);
    for (int begin = 0; begin < p.n_exact; begin += tile) {
        if (exact_position(p, begin) > of_last.position[0]) break; /* so are all that follow */
        threadgroup_barrier(mem_flags::mem_threadgroup);
        fill_exact_tile(shared, p, kv, head, begin, simd, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint sees = 0;
        int position = exact_position(p, begin + lane), n_tokens = min(tile, p.n_exact - begin);
        for (int r = 0; r < rows; r++) {
            sees |= uint(lane < n_tokens && sees_exact(limits, r, p.n_sink, position)) << r;
        }
        attend_tile(state, shared, n_tokens, sees, lane);
    }
    for (int r = 0; r < rows; r++) {
        float sum = simd_sum(state.sum[r]);
        if (first_row + r >= n_rows) break;
        sum += exp2(sinks[head * p.group + (first_row + r) % p.group] - state.max[r]);
        device T *to = out + row_offset(p, head, first_row + r, D) + n * lane;
        for (int k = 0; k < n; k++) {
            if (exists<D>(n * lane + k)) to[k] = T(state.acc[r][k] / sum);
        }
    }
}

} // namespace tq
