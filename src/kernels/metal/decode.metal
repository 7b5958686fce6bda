// SPDX-License-Identifier: MIT
/*
 * Decode attention. A threadgroup of 8 SIMD groups has up to 8 rows of one KV head (all query heads of a group, and the tokens
 * of a speculative step) and one split of its tokens; its SIMD groups take blocks of 64 tokens in turns and expand each vector
 * once for all rows. Keys are never rotated back: queries are rotated, values are summed in the rotated basis, and combine
 * rotates the sum. The last split is the exact vectors, in the plain basis. Expected bound: device memory, and the sums over
 * lanes where there are many rows.
 */
namespace tq
{

constexpr int decode_simdgroups()
{
    return 8;
}

template <int D, int ROWS> struct decode_memory {
    level_table k_levels, v_levels;
    float rows[ROWS][padded(D)]; /* queries first, then the sum of the SIMD groups' accumulators */
    float max[8][ROWS], sum[8][ROWS];
};

/* Up to 32 encoded tokens from `first` on, all in one block. ref_score: what the block's reference adds to each row's scores.
 */
template <int D, int KF, int VF, int ROWS>
inline void attend_tokens(thread row_state<D, ROWS> &state, thread const attend_params &p, thread const kv_arrays &kv, int head,
                          int first, int n, thread const row_limits<ROWS> &limits, thread const float (&ref_score)[ROWS],
                          threadgroup const decode_memory<D, ROWS> &shared, int lane)
{
    float x[lane_elements(D)], score[ROWS];
    ulong at = ulong(head) * p.capacity + first;
    const device uint *codes = kv.k_codes + at * words_of(KF, D);
    for (int r = 0; r < ROWS; r++) score[r] = 0.0f;
    for (int t = 0; t < n; t++, codes += words_of(KF, D)) {
        expand<D, KF>(x, codes, shared.k_levels, lane);
        for (int r = 0; r < ROWS; r++) {
            float sum = dot_lanes<D>(state.q[r], x);
            score[r] = lane == t ? sum : score[r];
        }
    }
    float k_scale = lane < n ? float(kv.k_scales[at + lane]) : 0.0f, v_scale = lane < n ? float(kv.v_scales[at + lane]) : 0.0f;
    for (int r = 0; r < ROWS; r++) {
        bool sees = lane < n && first + lane < limits.coded_end[r];
        score[r] = weigh(state, r, k_scale * score[r] + ref_score[r], sees) * v_scale; /* a weight from here on */
    }
    codes = kv.v_codes + at * words_of(VF, D);
    for (int t = 0; t < n; t++, codes += words_of(VF, D)) {
        expand<D, VF>(x, codes, shared.v_levels, lane);
        for (int r = 0; r < ROWS; r++) add_value(state, r, simd_shuffle(score[r], ushort(t)), x);
    }
}

/* One block of encoded tokens, as far as it lies before `end` and rows see it. */
template <int D, int KF, int VF, int HAS_REF, int ROWS>
inline void attend_block(thread row_state<D, ROWS> &state, thread const attend_params &p, thread const kv_arrays &kv, int head,
                         int block, thread const row_limits<ROWS> &limits, int end,
                         threadgroup const decode_memory<D, ROWS> &shared, int lane)
{
    float ref_score[ROWS];
    for (int r = 0; r < ROWS; r++) ref_score[r] = 0.0f;
    if (HAS_REF) {
        float x[lane_elements(D)];
        const device uint *reference = reference_of(p, kv, head, block * block_tokens(), D);
        expand<D, SQ8>(x, reference, shared.k_levels, lane);
        float scale = reference_scale(reference, D);
        for (int r = 0; r < ROWS; r++) ref_score[r] = scale * dot_lanes<D>(state.q[r], x);
    }
    int last = min((block + 1) * block_tokens(), end);
    for (int first = max(block * block_tokens(), p.n_sink); first < last; first += 32) {
        attend_tokens<D, KF, VF>(state, p, kv, head, first, min(last - first, 32), limits, ref_score, shared, lane);
    }
}

/* The exact vectors, in runs of up to 32 that the SIMD groups take in turns. */
template <int D, int ROWS>
inline void attend_exact(thread row_state<D, ROWS> &state, thread const attend_params &p, thread const kv_arrays &kv, int head,
                         thread const row_limits<ROWS> &limits, int simd, int lane)
{
    int run = min((p.n_exact + decode_simdgroups() - 1) / decode_simdgroups(), 32);
    for (int first = simd * run; first < p.n_exact; first += decode_simdgroups() * run) {
        float x[lane_elements(D)], score[ROWS];
        int n = min(run, p.n_exact - first), position = exact_position(p, first + lane);
        ulong at = (ulong(head) * p.exact_capacity + first) * D;
        for (int r = 0; r < ROWS; r++) score[r] = 0.0f;
        for (int t = 0; t < n; t++) {
            load_consecutive<D>(x, kv.k_exact + at + t * D, lane);
            for (int r = 0; r < ROWS; r++) {
                float sum = dot_lanes<D>(state.q[r], x);
                score[r] = lane == t ? sum : score[r];
            }
        }
        for (int r = 0; r < ROWS; r++) {
            score[r] = weigh(state, r, score[r], lane < n && sees_exact(limits, r, p.n_sink, position));
        }
        for (int t = 0; t < n; t++) {
            load_consecutive<D>(x, kv.v_exact + at + t * D, lane);
            for (int r = 0; r < ROWS; r++) add_value(state, r, simd_shuffle(score[r], ushort(t)), x);
        }
    }
}

/* The SIMD groups' states to one, and to device memory; `out` is this split's first row. */
template <int D, int ROWS>
inline void merge_simdgroups(thread row_state<D, ROWS> &state, threadgroup decode_memory<D, ROWS> &shared, int n_rows,
                             device float *out, int simd, int lane)
{
    for (int r = 0; r < ROWS; r++) {
        float sum = simd_sum(state.sum[r]);
        if (lane == 0) {
            shared.max[simd][r] = state.max[r];
            shared.sum[simd][r] = sum;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup); /* and the queries are not needed any more */
    float largest[ROWS];
    for (int r = 0; r < ROWS; r++) {
        largest[r] = lowest_score();
        for (int s = 0; s < decode_simdgroups(); s++) largest[r] = fmax(largest[r], shared.max[s][r]);
    }
    for (int turn = 0; turn < decode_simdgroups(); turn++) {
        if (simd == turn) {
            for (int r = 0; r < ROWS; r++) {
                float factor = exp2(state.max[r] - largest[r]);
                for (int k = 0; k < lane_elements(D); k++) {
                    int at = lane_elements(D) * lane + k;
                    shared.rows[r][at] = (turn == 0 ? 0.0f : shared.rows[r][at]) + factor * state.acc[r][k];
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int r = simd; r < n_rows; r += decode_simdgroups()) {
        device float *to = out + r * partial_floats(D);
        for (int k = 0; k < lane_elements(D); k++) {
            if (exists<D>(32 * k + lane)) to[32 * k + lane] = shared.rows[r][32 * k + lane];
        }
        if (lane == 0) {
            float sum = 0.0f, of_all = lowest_score();
            for (int s = 0; s < decode_simdgroups(); s++) of_all = fmax(of_all, shared.max[s][r]);
            for (int s = 0; s < decode_simdgroups(); s++) sum += exp2(shared.max[s][r] - of_all) * shared.sum[s][r];
            to[D] = of_all;
            to[D + 1] = sum;
        }
    }
}

/*
 * Grid [256 * (n_splits + 1), row tiles, n_heads], threadgroups of 256. q: [n_batch, n_head, n_query, D], partial: [n_heads,
 * n_splits + 1, n_rows, partial_floats].
 */
template <int D, int KF, int VF, int HAS_REF, int HAS_FACTORS, int ROWS, typename T>
inline void decode(const device T *q, kv_arrays kv, attend_params p, device float *partial,
                   threadgroup decode_memory<D, ROWS> &shared, uint3 group, int simd, int lane)
{
    int split = int(group.x), first_row = int(group.y) * ROWS, head = int(group.z), all_rows = p.n_query * p.group;
    int n_rows = min(all_rows - first_row, ROWS);
    bool is_exact = split == p.n_splits;
    fill_levels<KF>(shared.k_levels, 32 * simd + lane, 32 * decode_simdgroups());
    fill_levels<VF>(shared.v_levels, 32 * simd + lane, 32 * decode_simdgroups());
    for (int r = simd; r < ROWS; r += decode_simdgroups()) { /* rows beyond the last are copies of it */
        float x[lane_elements(D)];
        load_strided<D>(x, q + row_offset(p, head, min(first_row + r, all_rows - 1), D), lane);
        if (!is_exact) to_coded_basis<D, HAS_FACTORS>(x, p, kv, head, lane);
        for (int k = 0; k < lane_elements(D); k++) shared.rows[r][32 * k + lane] = x[k] * p.scale_log2;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    row_state<D, ROWS> state;
    clear_rows(state);
    for (int r = 0; r < ROWS; r++) {
        for (int k = 0; k < lane_elements(D); k++) state.q[r][k] = shared.rows[r][lane_elements(D) * lane + k];
    }
    row_limits<ROWS> limits = limits_of<ROWS>(p, first_row);
    if (is_exact) {
        attend_exact(state, p, kv, head, limits, simd, lane);
    } else {
        int end = limits.coded_end[n_rows - 1];
        int stop = min((split + 1) * p.split_blocks, (end + block_tokens() - 1) / block_tokens());
        for (int block = split * p.split_blocks + simd; block < stop; block += decode_simdgroups()) {
            attend_block<D, KF, VF, HAS_REF>(state, p, kv, head, block, limits, end, shared, lane);
        }
    }
    ulong row = (ulong(head) * (p.n_splits + 1) + split) * all_rows + first_row;
    merge_simdgroups(state, shared, n_rows, partial + row * partial_floats(D), simd, lane);
}

} // namespace tq
