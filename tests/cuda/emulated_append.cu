/* SPDX-License-Identifier: MIT */
/*
 * Appends (src/kernels/cuda) on an emulated device next to the same appends to the CPU's cache: tokens of several sequences in
 * random batches, in one call or in halves. What is exported of pages must be the bytes that tq_cache_seq_export gives, codes,
 * scales and references, and the exact vectors must be the same. tests/cuda/check_emulated.py compiles and runs it.
 */
#include "emulated_launch.h"
#include "emulated_spec.h"

enum { N_HEAD_KV = 2, N_SEQ = 3, PAGES_OF_SEQ = 4, N_PAGES = N_SEQ * PAGES_OF_SEQ + 1, PADDING = 2 };
static const int32_t exact_slots[N_SEQ] = {2, 0, 1};

struct test_setup {
    tq_format formats[2];
    int32_t head_dim, head_dim_v, page, n_sink, n_recent, k_ref_block;
    int32_t n_take_back; /* n_ring is as many more than n_recent */
    size_t page_gap, exact_gap; /* between pages, and exact slots; in bytes, and in numbers */
    tq_dtype dtype;
    bool many, outliers, descending, factors; /* many: the encoders of large batches */
    bool transforms;                          /* in place of factors */
    int32_t lens[N_SEQ];
    int32_t dim(int side) const
    {
        return side ? head_dim_v : head_dim;
    }
};

struct test_data {
    test_setup s;
    tq_codec *codec[2];
    tq_cache *cache;
    tq_calibration *calibration;
    int32_t seqs[N_SEQ];
    tq_device_store store;
    std::vector<uint8_t> pages;
    std::vector<uint16_t> exact;
    alignas(8) int8_t factors[N_HEAD_KV * TQ_DEVICE_HEAD_DIM_MAX];
    int32_t page_table[N_SEQ * PAGES_OF_SEQ];
    std::vector<float> rows[2]; /* of the next batch, as FP16 and as the batch's type hold them */
};

static void must(tq_status status, int line)
{
    if (status == TQ_OK) return;
    printf("line %d: %s\n", line, tq_status_string(status));
    exit(1);
}
#define MUST(call) must(call, __LINE__)

static void append_at(const test_data &d, const tq_paged_append_params &p, int32_t n_tokens)
{
    const append_how how = {d.s.many, d.s.descending, n_tokens};
    if (d.store.is_plain) return append_plain(d.store, p, how);
#define TQ_APPEND_PAIR(D, DV) \
    if (d.s.head_dim == D && d.s.head_dim_v == DV) return append<D, DV>(d.store, p, how);
    TQ_HEAD_DIM_PAIRS(TQ_APPEND_PAIR)
    switch (d.s.head_dim) {
    case 64:
        return append<64>(d.store, p, how);
    case 96:
        return append<96>(d.store, p, how);
    case 128:
        return append<128>(d.store, p, how);
    case 192:
        return append<192>(d.store, p, how);
    default:
        return append<256>(d.store, p, how);
    }
}

static void open_data(test_data &d)
{
    const test_setup &s = d.s;
    for (int side = 0; side < 2; side++) MUST(tq_codec_create(&d.codec[side], s.formats[side], s.dim(side), TQ_SEED_DEFAULT));
    d.store.key = emulated_format(d.codec[0]), d.store.value = emulated_format(d.codec[1]);
    d.store.rotation = emulated_rotation(d.codec[0]->rotation);
    d.store.value_rotation = emulated_rotation(d.codec[1]->rotation);
    d.store.head_dim = s.head_dim, d.store.head_dim_v = s.head_dim_v;
    d.store.n_head_kv = N_HEAD_KV, d.store.page_size = s.page;
    d.store.is_plain = tq_is_plain(plane_of(d.store, false), plane_of(d.store, true));
    d.store.n_sink = s.n_sink, d.store.n_recent = s.n_recent, d.store.k_ref_block = s.k_ref_block;
    d.store.n_ring = s.n_recent + s.n_take_back;
    d.store.n_pages = N_PAGES, d.store.n_exact_slots = N_SEQ;
    d.store.page_stride = (int64_t)(head_page_bytes_of(d.store) * N_HEAD_KV + s.page_gap);
    d.store.exact_stride = (int64_t)(N_HEAD_KV * (s.n_sink + d.store.n_ring) * (s.head_dim + s.head_dim_v) + s.exact_gap);
    d.pages.assign((size_t)d.store.page_stride * N_PAGES + 16, 0x3b); /* numbers, as references that are kept must be */
    d.exact.assign((size_t)d.store.exact_stride * N_SEQ + 8, 0xffff);
    d.store.pages = d.pages.data() + (16 - (uintptr_t)d.pages.data() % 16) % 16;
    d.store.exact = d.exact.data() + (16 - (uintptr_t)d.exact.data() % 16) % 16 / 2;
    for (int32_t i = 0; i < N_SEQ * PAGES_OF_SEQ; i++) d.page_table[i] = i * 5 % N_PAGES;
    tq_cache_params params = {};
    params.struct_size = sizeof params, params.n_layer = 1, params.n_pages = 64;
    params.k_format = s.formats[0], params.v_format = s.formats[1], params.head_dim = s.head_dim, params.n_head_kv = N_HEAD_KV;
    params.page_size = s.page, params.n_sink = s.n_sink, params.n_recent = s.n_recent, params.k_ref_block = s.k_ref_block;
    params.n_take_back = s.n_take_back, params.head_dim_v = s.head_dim_v;
    if (s.transforms) {
        size_t bytes;
        params.calibration = d.calibration = emulated_calibration(17, N_HEAD_KV, s.head_dim);
        d.store.k_transforms = tq_calibration_transforms(d.calibration, 0, &bytes);
    }
    MUST(tq_cache_create(&d.cache, &params));
    for (int32_t i = 0; i < N_HEAD_KV * s.head_dim; i++) d.factors[i] = (int8_t)(i * 37 % 65 - 32);
    if (s.factors) {
        d.store.k_factors = d.factors;
        MUST(tq_cache_set_key_factors(d.cache, 0, d.factors));
    }
    for (int32_t i = 0; i < N_SEQ; i++) MUST(tq_cache_seq_create(d.cache, &d.seqs[i]));
}

/* All pages of all sequences after the first half of an append, which then is undone. */
static std::vector<uint8_t> encoded(test_data &d, const tq_paged_append_params &p, int32_t n_tokens, size_t page_bytes)
{
    const std::vector<uint8_t> before = d.pages;
    std::vector<uint8_t> bytes(N_SEQ * PAGES_OF_SEQ * page_bytes);
    append_at(d, p, n_tokens);
    export_pages(d.store, d.page_table, N_SEQ * PAGES_OF_SEQ, bytes.data(), d.s.descending);
    std::copy(before.begin(), before.end(), d.pages.begin());
    return bytes;
}

/* What is pushed out of positions before encode_from stays, and the reference of a block that such begins; the rest is coded.
 */
static void check_encode_from(test_data &d, tq_paged_append_params p, const int32_t *done, const int32_t *counts,
                              int32_t n_tokens, int64_t from)
{
    const test_setup &s = d.s;
    const size_t n_refs = s.k_ref_block ? s.page / 64 : 0, code_bytes[2] = {d.codec[0]->code_bytes, d.codec[1]->code_bytes};
    const size_t heads[2] = {s.page * (code_bytes[0] + 2) + n_refs * (s.head_dim + 2), s.page * (code_bytes[1] + 2)};
    p.half = TQ_APPEND_ENCODE, p.encode_from = from;
    const std::vector<uint8_t> found = encoded(d, p, n_tokens, N_HEAD_KV * (heads[0] + heads[1]));
    p.encode_from = 0;
    const std::vector<uint8_t> all = encoded(d, p, n_tokens, N_HEAD_KV * (heads[0] + heads[1]));
    p.keep_references = true;
    const std::vector<uint8_t> kept = encoded(d, p, n_tokens, N_HEAD_KV * (heads[0] + heads[1]));
    p.n_tok = 0;
    const std::vector<uint8_t> before = encoded(d, p, n_tokens, N_HEAD_KV * (heads[0] + heads[1]));
    for (int32_t i = 0; i < N_SEQ * s.page * PAGES_OF_SEQ; i++) {
        const int32_t seq = i / (s.page * PAGES_OF_SEQ), position = i % (s.page * PAGES_OF_SEQ), block = position / 64 * 64;
        const int32_t least = done[seq] - s.n_recent, end = least + counts[seq], begin = least > s.n_sink ? least : s.n_sink;
        const int32_t first = block > s.n_sink ? block : s.n_sink; /* of its block */
        const bool is_coded = position >= begin && position < end && position >= from;
        const bool is_new = first >= begin && first < end && first >= from && n_refs > 0;
        const bool is_known = !is_coded || is_new || !n_refs || first < begin; /* a block may never have had a reference */
        const std::vector<uint8_t> &wanted = !is_coded ? before : is_new || !n_refs ? all : kept;
        const std::vector<uint8_t> &reference = is_new ? all : before;
        for (int32_t list = 0; list < 2 * N_HEAD_KV; list++) {
            const int side = list % 2;
            const size_t at = ((size_t)(i / s.page) * N_HEAD_KV + list / 2) * (heads[0] + heads[1]) + side * heads[0];
            const size_t slot = (size_t)(position % s.page), codes = at + slot * code_bytes[side];
            const size_t scale = at + s.page * code_bytes[side] + 2 * slot;
            const bool is_same =
                memcmp(&found[codes], &wanted[codes], code_bytes[side]) == 0 && memcmp(&found[scale], &wanted[scale], 2) == 0;
            if ((is_known || side) && !is_same) emulation::fail("encode_from: another code of a position", position);
            if (side || !n_refs || position < s.n_sink) continue;
            const size_t references = at + s.page * (code_bytes[0] + 2) + slot / 64 * s.head_dim;
            if (memcmp(&found[references], &reference[references], (size_t)s.head_dim) != 0)
                emulation::fail("encode_from: another reference of a position", position);
            if (memcmp(&kept[references], &before[references], (size_t)s.head_dim) != 0)
                emulation::fail("keep_references: another reference of a position", position);
        }
    }
}

/* So many tokens more of each sequence, to both. */
static void append_batch(test_data &d, tq_random *random, const int32_t *done, const int32_t *counts)
{
    const test_setup &s = d.s;
    const size_t widths[2] = {(size_t)N_HEAD_KV * s.head_dim, (size_t)N_HEAD_KV * s.head_dim_v};
    std::vector<int64_t> slots, positions;
    std::vector<int32_t> seq_ids;
    int32_t longest = 0;
    for (std::vector<float> &rows : d.rows) rows.clear();
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        for (int32_t i = 0; i < counts[seq]; i++) {
            const int64_t position = done[seq] + i;
            slots.push_back((int64_t)d.page_table[seq * PAGES_OF_SEQ + position / s.page] * s.page + position % s.page);
            positions.push_back(position), seq_ids.push_back(seq);
        }
        const size_t first[2] = {d.rows[0].size(), d.rows[1].size()};
        for (int side = 0; side < 2; side++) {
            std::vector<float> &rows = d.rows[side];
            rows.resize(first[side] + counts[seq] * widths[side]);
            for (size_t i = first[side]; i < rows.size(); i += s.dim(side)) {
                const vector_kind kind = s.outliers ? (vector_kind)(tq_random_next(random) % VECTOR_KINDS) : VECTOR_GAUSSIAN;
                random_vector(random, kind, 1.3f, &rows[i], s.dim(side));
                for (int32_t k = 0; k < s.dim(side); k++) {
                    float x = rows[i + k] + (side || s.outliers ? 0.0f : (float)(k % 7) - 2.0f); /* keys have means */
                    if (s.dtype == TQ_DTYPE_BF16) x = tq_bfloat_to_float(tq_bfloat_from_float(x));
                    rows[i + k] = tq_half_to_float(tq_half_from_float(x));
                    if (s.dtype == TQ_DTYPE_F32) rows[i + k] += 1e-5f * rows[i + k]; /* less than FP16 can tell */
                }
            }
        }
        if (counts[seq] > longest) longest = counts[seq];
        if (counts[seq] == 0) continue;
        MUST(tq_cache_append(d.cache, d.seqs[seq], 0, counts[seq], &d.rows[0][first[0]], &d.rows[1][first[1]], NULL));
    }
    for (int i = 0; i < PADDING; i++) { /* as a captured batch has */
        slots.push_back(-1), positions.push_back(-1), seq_ids.push_back(-1);
        for (int side = 0; side < 2; side++) d.rows[side].resize(d.rows[side].size() + widths[side], NAN);
    }
    const std::vector<uint8_t> k = typed(d.rows[0], s.dtype), v = typed(d.rows[1], s.dtype);
    int32_t n_not_finite = 0;
    tq_paged_append_params p = {};
    p.n_tok = (int64_t)slots.size(), p.dtype = s.dtype, p.k = k.data(), p.v = v.data();
    p.row_stride = (int64_t)widths[0], p.v_row_stride = (int64_t)widths[1];
    p.slot_mapping = slots.data(), p.positions = positions.data(), p.seq_ids = seq_ids.data();
    p.page_table = d.page_table, p.page_table_stride = PAGES_OF_SEQ, p.exact_slots = exact_slots;
    p.n_not_finite = &n_not_finite;
    const int32_t n_tokens = tq_random_next(random) % 2 ? 1 : 1 + (int32_t)(tq_random_next(random) % reference_tokens_max);
    if (s.n_recent > 0 && tq_random_next(random) % 4 == 0)
        check_encode_from(d, p, done, counts, n_tokens, (int64_t)(tq_random_next(random) % 300));
    if (s.n_recent > 0 && tq_random_next(random) % 2) { /* in halves */
        tq_paged_append_params half = p;
        half.half = TQ_APPEND_ENCODE;
        if (longest <= (s.k_ref_block ? 1 : s.n_recent) && tq_random_next(random) % 2) half.k = half.v = nullptr;
        append_at(d, half, n_tokens);
        p.half = TQ_APPEND_STORE;
    }
    append_at(d, p, n_tokens);
    if (n_not_finite) emulation::fail("numbers that are not finite", n_not_finite);
}

/* The number of vectors, references among them, of a sequence that are not the cache's; and how many there are. */
static int compare(test_data &d, int32_t seq, int32_t length, int *n_compared)
{
    const test_setup &s = d.s;
    const int32_t coded_end = length - s.n_recent > s.n_sink ? length - s.n_recent : s.n_sink;
    const int32_t n_pages = coded_end > s.n_sink ? (int32_t)blocks_of(coded_end, s.page) : 0;
    const size_t code_bytes[2] = {d.codec[0]->code_bytes, d.codec[1]->code_bytes}, n_refs = s.k_ref_block ? s.page / 64 : 0;
    const size_t heads[2] = {s.page * (code_bytes[0] + 2) + n_refs * (s.head_dim + 2), s.page * (code_bytes[1] + 2)};
    const size_t strides[2] = {(heads[0] + 63) / 64 * 64, (heads[1] + 63) / 64 * 64};
    tq_cache_stats stats;
    MUST(tq_cache_get_stats(d.cache, &stats));
    if (stats.page_bytes != N_HEAD_KV * (strides[0] + strides[1])) emulation::fail("the cache's pages have other sizes", 0);
    std::vector<uint8_t> wanted(n_pages * stats.page_bytes + 1), found(n_pages * N_HEAD_KV * (heads[0] + heads[1]) + 1);
    const size_t n_entries = (size_t)(s.n_sink + d.store.n_ring);
    const size_t exact_bytes = N_HEAD_KV * n_entries * (s.head_dim + s.head_dim_v) * sizeof(uint16_t);
    std::vector<uint16_t> exact(exact_bytes / 2 + 1);
    MUST(tq_cache_seq_export(d.cache, d.seqs[seq], 0, n_pages, wanted.data(), exact.data(), exact_bytes));
    const int32_t *table = d.page_table + seq * PAGES_OF_SEQ;
    if (n_pages > 0) export_pages(d.store, table, n_pages, found.data(), s.descending);
    int n_wrong = 0;
    for (int32_t page = 0; page < n_pages; page++) {
        for (int32_t head = 0; head < N_HEAD_KV; head++) {
            for (int side = 0; side < 2; side++) {
                const uint8_t *mine = &found[(page * N_HEAD_KV + head) * (heads[0] + heads[1]) + side * heads[0]];
                const uint8_t *other = &wanted[page * stats.page_bytes + side * N_HEAD_KV * strides[0] + head * strides[side]];
                const size_t codes = code_bytes[side], scales = s.page * codes, references = scales + s.page * 2;
                for (int32_t i = 0; i < s.page; i++) {
                    const int32_t position = page * s.page + i, d_ref = s.head_dim;
                    if (position < s.n_sink || position >= coded_end) continue;
                    n_wrong += memcmp(mine + i * codes, other + i * codes, codes) != 0 ||
                               memcmp(mine + scales + 2 * i, other + scales + 2 * i, 2) != 0;
                    ++*n_compared;
                    if (side || !n_refs) continue;
                    const size_t at = references + i / 64 * d_ref, scale = references + n_refs * d_ref + i / 64 * 2;
                    n_wrong += memcmp(mine + at, other + at, d_ref) != 0 || memcmp(mine + scale, other + scale, 2) != 0;
                }
            }
        }
    }
    for (int32_t position = 0; position < length; position++) {
        if (position >= s.n_sink && position < length - d.store.n_ring) continue;
        const int32_t entry = position < s.n_sink ? position : s.n_sink + position % d.store.n_ring;
        for (int32_t list = 0; list < 2 * N_HEAD_KV; list++) {
            const int side = list / N_HEAD_KV;
            const size_t vector = list % N_HEAD_KV * n_entries + entry, of_keys = N_HEAD_KV * n_entries * s.head_dim;
            const size_t at = (side ? of_keys : 0) + vector * s.dim(side);
            const uint16_t *mine = d.store.exact + exact_slots[seq] * d.store.exact_stride + at;
            n_wrong += memcmp(mine, &exact[at], 2 * (size_t)s.dim(side)) != 0;
            ++*n_compared;
        }
    }
    return n_wrong;
}

static int n_passed, n_failed;

static void test(const test_setup &s, uint64_t seed)
{
    test_data d = {};
    d.s = s;
    open_data(d);
    tq_random random = tq_random_stream(seed, 7);
    int32_t done[N_SEQ] = {}, longest[N_SEQ] = {}, left = 0;
    for (int32_t n : s.lens) left += n;
    int n_wrong = 0, n_compared = 0, n_calls = 0;
    while (left > 0) {
        int32_t counts[N_SEQ];
        const int32_t kind = (int32_t)(tq_random_next(&random) % 4);
        const int32_t most = kind == 0 ? 1 : kind == 1 ? 6 : kind == 2 ? s.n_recent : 150;
        for (int32_t seq = 0; seq < N_SEQ; seq++) {
            const int32_t rest = s.lens[seq] - done[seq];
            counts[seq] = kind == 0 ? 1 : (int32_t)(tq_random_next(&random) % (uint64_t)(most + 1));
            if (counts[seq] > rest) counts[seq] = rest;
            left -= counts[seq];
        }
        append_batch(d, &random, done, counts);
        for (int32_t seq = 0; seq < N_SEQ; seq++) done[seq] += counts[seq];
        for (int32_t seq = 0; s.n_take_back > 0 && left > 0 && seq < N_SEQ; seq++) { /* drafts */
            longest[seq] = done[seq] > longest[seq] ? done[seq] : longest[seq];
            const int32_t least = longest[seq] > s.n_take_back ? longest[seq] - s.n_take_back : 0;
            const int32_t n = (int32_t)(tq_random_next(&random) % (uint64_t)(done[seq] - least + 1));
            done[seq] -= n, left += n;
            MUST(tq_cache_trim(d.cache, d.seqs[seq], done[seq]));
        }
        if (++n_calls % 8 != 0 && left > 0) continue;
        for (int32_t seq = 0; seq < N_SEQ; seq++) n_wrong += compare(d, seq, done[seq], &n_compared);
    }
    const bool good = n_wrong == 0;
    printf("%s append %s/%s, head_dims %d/%d, page %d, sinks %d, ring %d, references %d, factors %d, transforms %d, ",
           good ? "ok    " : "FAILED", d.codec[0]->traits->name, d.codec[1]->traits->name, s.head_dim, s.head_dim_v, s.page,
           s.n_sink, s.n_recent, s.k_ref_block, s.factors, s.transforms);
    printf("take back %d, gaps %d, dtype %d, many %d, outliers %d: %d calls, %d of %d vectors differ\n", s.n_take_back,
           s.page_gap > 0, (int)s.dtype, s.many, s.outliers, n_calls,
           n_wrong, n_compared);
    fflush(stdout);
    for (tq_codec *codec : d.codec) tq_codec_free(codec);
    tq_cache_free(d.cache);
    tq_calibration_free(d.calibration);
    if (good) n_passed++;
    else n_failed++;
}

/* Formats of keys and values at their head_dims. */
struct test_pair {
    tq_format k, v;
    int32_t head_dim, head_dim_v; /* 0: the same */
};

/* The library's head_dims that have plain planes with all formats, and some pairs of them. */
static void add_plain_pairs(std::vector<test_pair> &pairs)
{
    static const tq_format scalar[] = {TQ_FORMAT_SQ8, TQ_FORMAT_SQ4, TQ_FORMAT_SQ3, TQ_FORMAT_SQ2},
                           trellis[] = {TQ_FORMAT_TT4, TQ_FORMAT_TT3, TQ_FORMAT_TT2};
    int32_t n;
    const int32_t *head_dims = tq_head_dim_list(&n);
    for (int32_t i = 0; i < n; i++) {
        const int32_t d = head_dims[i];
        if (tq_has_kernels_at(d)) continue;
        pairs.push_back({scalar[i % 4], scalar[(i + 1 + i / 4) % 4], d, 0});
        pairs.push_back({trellis[i % 3], i % 2 ? trellis[(i + 1) % 3] : scalar[i / 2 % 4], d, 0});
    }
    for (tq_format format : trellis) pairs.push_back({format, format, 512, 0});
    for (tq_format format : scalar) pairs.push_back({format, format, 512, 0});
    pairs.push_back({TQ_FORMAT_SQ4, TQ_FORMAT_TT3, 96, 0}), pairs.push_back({TQ_FORMAT_TT4, TQ_FORMAT_SQ3, 128, 192});
    pairs.push_back({TQ_FORMAT_SQ3, TQ_FORMAT_TT2, 40, 64}), pairs.push_back({TQ_FORMAT_SQ2, TQ_FORMAT_SQ8, 320, 72});
}

int main()
{
    /* The presets, and scalar formats, at head_dims of one chunk and three, of one round and two. */
    std::vector<test_pair> pairs = {
        {TQ_FORMAT_SQ8, TQ_FORMAT_TT4, 64},  {TQ_FORMAT_TT4, TQ_FORMAT_TT4, 64},  {TQ_FORMAT_TT3, TQ_FORMAT_TT3, 64},
        {TQ_FORMAT_TT3, TQ_FORMAT_TT2, 64},  {TQ_FORMAT_SQ8, TQ_FORMAT_TT4, 128}, {TQ_FORMAT_TT4, TQ_FORMAT_TT4, 128},
        {TQ_FORMAT_SQ4, TQ_FORMAT_SQ3, 64},  {TQ_FORMAT_SQ3, TQ_FORMAT_SQ4, 96},  {TQ_FORMAT_SQ8, TQ_FORMAT_SQ2, 96},
        {TQ_FORMAT_SQ4, TQ_FORMAT_SQ8, 128}, {TQ_FORMAT_SQ2, TQ_FORMAT_SQ3, 128}, {TQ_FORMAT_SQ4, TQ_FORMAT_SQ2, 192},
        {TQ_FORMAT_SQ3, TQ_FORMAT_SQ3, 256}, {TQ_FORMAT_SQ8, TQ_FORMAT_SQ4, 256},
#define TQ_TEST_PAIR(D, DV) \
    {TQ_FORMAT_TT4, TQ_FORMAT_TT4, D, DV}, {TQ_FORMAT_SQ3, TQ_FORMAT_SQ2, D, DV}, {TQ_FORMAT_SQ8, TQ_FORMAT_TT3, D, DV},
        TQ_HEAD_DIM_PAIRS(TQ_TEST_PAIR)};
    add_plain_pairs(pairs);
    static const int32_t sinks[] = {4, 0, 64, 30}, rings[] = {17, 64, 1, 40};
    uint64_t seed = 1;
    for (size_t i = 0; i < pairs.size(); i++) {
        for (int32_t k = 0; k < 4; k++, seed++) {
            const bool is_trellis = pairs[i].k >= TQ_FORMAT_TT4 || pairs[i].v >= TQ_FORMAT_TT4;
            if (is_trellis && k > 1) continue; /* whose search takes long here */
            test_setup s = {};
            s.formats[0] = pairs[i].k, s.formats[1] = pairs[i].v, s.head_dim = pairs[i].head_dim;
            s.head_dim_v = pairs[i].head_dim_v ? pairs[i].head_dim_v : s.head_dim;
            s.page = k % 2 ? 128 : 64, s.n_sink = sinks[(i + k) % 4], s.n_recent = rings[(i + 2 * k) % 4];
            s.k_ref_block = k == 3 ? 0 : 64, s.dtype = (tq_dtype)((i + k) % 3), s.outliers = (i + k) % 3 == 2;
            s.factors = (i + k / 2) % 2, s.transforms = !s.factors && i % 4 < 2;
            s.many = pairs[i].head_dim <= 128 && k % 2, s.descending = (i + k) % 2;
            if (k % 2) s.n_take_back = 1 + (int32_t)i % 6 * 7, s.page_gap = 16 * (i % 3 + 1), s.exact_gap = 8 * (i % 4);
            const int32_t lens[N_SEQ] = {is_trellis ? 135 : 230, 70 + s.n_recent, 5};
            memcpy(s.lens, lens, sizeof lens);
            test(s, seed);
        }
    }
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
