// SPDX-License-Identifier: MIT
/*
 * What decode and prefill share: who sees what, and the online softmax of a few query rows, in base 2.
 *
 * A row is one query token of one query head; the rows of a KV head are numbered token by token. Query token i stands at
 * position length - n_query + i. It sees the first n_sink tokens exact, tokens up to its coded_end encoded, and the rest up to
 * its own position exact: at least the last n_recent, and fewer than n_batch more, since n_batch tokens are encoded at a time.
 */
namespace tq
{

struct attend_params {
    int n_query; /* tokens */
    int group;   /* query heads of a KV head */
    int length;  /* tokens of a sequence, the queries' own included */
    int n_sink;
    int n_recent;
    int n_batch;        /* tokens that are encoded at a time */
    int coded;          /* tokens below this were encoded before this call, as far as they are no sinks */
    int capacity;       /* tokens of a head that codes have room for, a multiple of block_tokens() */
    int first_exact;    /* position of the exact vector that follows the sinks */
    int n_exact;        /* exact vectors of a head, sinks first */
    int exact_capacity; /* vectors of a head that the exact arrays have room for */
    int n_splits;       /* of the encoded part; the exact vectors are one more */
    int split_blocks;   /* blocks of a split */
    float scale_log2;   /* softmax scale times log2(e) */
    int n_head_kv;      /* of a sequence */
};

/* The same, as they come: 15 words. */
inline attend_params attend_params_of(const device int *x)
{
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], as_type<float>(x[13]), x[14]};
}

/* The arrays of a layer; [n_heads] is sequences times KV heads. */
struct kv_arrays {
    const device uint *k_codes;  /* [n_heads, capacity, words] */
    const device half *k_scales; /* [n_heads, capacity] */
    const device uint *refs;     /* [n_heads, capacity / block, reference_words] */
    const device uint *v_codes;  /* [n_heads, capacity, words] */
    const device half *v_scales; /* [n_heads, capacity] */
    const device half *k_exact;  /* [n_heads, exact_capacity, D] */
    const device half *v_exact;
    const device int8_t *factors; /* [n_head_kv, D] of keys' channels */
    const device uint *signs;
};

/* What rows see: encoded tokens behind the sinks and before coded_end, exact ones from there to position, and the sinks. */
template <int ROWS> struct row_limits {
    int coded_end[ROWS], position[ROWS];
};

template <int ROWS> inline row_limits<ROWS> limits_of(thread const attend_params &p, int first_row)
{
    row_limits<ROWS> limits;
    for (int r = 0; r < ROWS; r++) {
        int position = p.length - p.n_query + (first_row + r) / p.group, behind = max(position + 1 - p.n_recent, 0);
        limits.position[r] = position;
        limits.coded_end[r] = max(max(p.coded, behind / p.n_batch * p.n_batch), p.n_sink);
    }
    return limits;
}

template <int ROWS> inline bool sees_exact(thread const row_limits<ROWS> &limits, int r, int n_sink, int position)
{
    return position <= limits.position[r] && (position < n_sink || position >= limits.coded_end[r]);
}

/* The position of an exact vector. */
inline int exact_position(thread const attend_params &p, int index)
{
    return index < p.n_sink ? index : p.first_exact + index - p.n_sink;
}

/* The reference of the block that `position` lies in. */
inline const device uint *reference_of(thread const attend_params &p, thread const kv_arrays &kv, int head, int position,
                                       int head_dim)
{
    ulong block = ulong(head) * (p.capacity / block_tokens()) + position / block_tokens();
    return kv.refs + block * reference_words(head_dim);
}

/* Where a row's query or output begins: arrays are [n_batch, n_head, n_query, D]. head counts sequences times KV heads. */
inline ulong row_offset(thread const attend_params &p, int head, int row, int head_dim)
{
    ulong query_head = ulong(head) * p.group + row % p.group;
    return (query_head * p.n_query + row / p.group) * head_dim;
}

/* A query, strided, to the basis of encoded keys. */
template <int D, int HAS_FACTORS>
inline void to_coded_basis(thread float (&x)[lane_elements(D)], thread const attend_params &p, thread const kv_arrays &kv,
                           int head, int lane)
{
    if (HAS_FACTORS) scale_channels<D>(x, kv.factors, p.n_head_kv, head, 1, lane);
    rotate<D>(x, kv.signs, lane);
}

/* ROWS rows of one SIMD group; elements consecutive. */
template <int D, int ROWS> struct row_state {
    float q[ROWS][lane_elements(D)]; /* times softmax scale and log2(e) */
    float acc[ROWS][lane_elements(D)];
    float max[ROWS], sum[ROWS]; /* the sum is of this lane's tokens alone */
};

/* A row's partial result: the sum of weighted values [D], the largest score, the sum of weights. */
constexpr int partial_floats(int head_dim)
{
    return head_dim + 2;
}

constexpr float lowest_score()
{
    return -1e30f; /* not infinity: differences of two of these are 0 */
}

template <int D, int ROWS> inline void clear_rows(thread row_state<D, ROWS> &state)
{
    for (int r = 0; r < ROWS; r++) {
        state.max[r] = lowest_score();
        state.sum[r] = 0.0f;
        for (int k = 0; k < lane_elements(D); k++) state.acc[r][k] = 0.0f;
    }
}

/*
 * Take the scores of up to 32 tokens, one a lane, into a row's softmax, if the row sees them; returns the weight of the lane's
 * token. So exponentials and maxima cost once for 32 tokens.
 */
template <int D, int ROWS> inline float weigh(thread row_state<D, ROWS> &state, int r, float score, bool sees)
{
    float largest = simd_max(sees ? score : lowest_score());
    if (largest > state.max[r]) {
        float factor = exp2(state.max[r] - largest);
        state.max[r] = largest;
        state.sum[r] *= factor;
        for (int k = 0; k < lane_elements(D); k++) state.acc[r][k] *= factor;
    }
    float weight = sees ? exp2(score - state.max[r]) : 0.0f;
    state.sum[r] += weight;
    return weight;
}

template <int D, int ROWS>
inline void add_value(thread row_state<D, ROWS> &state, int r, float weight, thread const float (&v)[lane_elements(D)])
{
    for (int k = 0; k < lane_elements(D); k++) state.acc[r][k] += weight * v[k];
}

} // namespace tq
