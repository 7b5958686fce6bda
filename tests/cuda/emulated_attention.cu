/* SPDX-License-Identifier: MIT */
/*
 * Decode and prefill (src/kernels/cuda) on an emulated device, against attention in double precision over what the codec
 * decodes: the kernels for any pair with every pair of formats at every head_dim (Hopper's prefill with some), and those of a
 * pair's own. tests/cuda/check_emulated.py compiles and runs it.
 */
#include <algorithm>

#include "emulated_launch.h"
#include "emulated_spec.h"

enum { N_HEAD_KV = 2, GROUP = 3, N_HEAD = N_HEAD_KV * GROUP, N_SEQ = 2, SPLITS = 3 };
enum { PAGES_OF_SEQ = 27, N_PAGES = 56 };
static int32_t lens[N_SEQ]; /* of the running test */

struct test_setup {
    const char *kernel;
    tq_format formats[2];
    int32_t head_dim, head_dim_v, page, n_query, n_sink, n_recent, n_ring, window, splits;
    size_t page_gap, exact_gap; /* between pages, and exact slots; in bytes, and in numbers */
    float softcap;
    bool references, factors, sinks, deterministic, descending;
    tq_dtype dtype;
    bool transforms; /* in place of factors */
    bool is_plain;   /* the store */
    bool new_rows; /* of the queries' own tokens, which the ring has not yet */
    bool ragged;   /* sequences have different numbers of queries */
    bias_kind bias;
    int32_t out_dim;
    int32_t dim(bool side) const
    {
        return side ? head_dim_v : head_dim;
    }
    int32_t n_query_of(int32_t seq) const
    {
        return ragged && seq > 0 ? (n_query > 2 ? n_query / 2 : 0) : n_query;
    }
    int32_t first_query(int32_t seq) const
    {
        return seq == 0 ? 0 : first_query(seq - 1) + n_query_of(seq - 1);
    }
    /* Positions from here on are new rows. */
    int32_t stored_end(int32_t seq) const
    {
        return lens[seq] - (new_rows ? n_query_of(seq) : 0);
    }
};

struct test_data {
    test_setup s;
    tq_codec *codec[2], *ref_codec;
    tq_calibration *calibration;
    const uint16_t *transforms; /* or NULL */
    std::vector<float> exact_rows[2], coded_rows[2]; /* [seq, position, KV head, dim]: FP16, and decoded */
    std::vector<uint8_t> pages;
    std::vector<__half> exact;
    std::vector<float> q, transformed_q, lse, partials;
    std::vector<uint8_t> typed_q, out, new_rows[2];
    int32_t query_starts[N_SEQ + 1];
    std::vector<uint32_t> counters;
    float sinks[N_HEAD];
    spec_bias bias; /* of the queries */
    int8_t factors[N_HEAD_KV * TQ_DEVICE_HEAD_DIM_MAX];
    int32_t page_table[N_SEQ * PAGES_OF_SEQ];

    size_t row(bool side, int32_t seq, int32_t position, int32_t head) const
    {
        return (((size_t)seq * lens[0] + position) * N_HEAD_KV + head) * s.dim(side);
    }
    tq_plane plane(bool is_value) const
    {
        const tq_format_traits *traits = codec[is_value]->traits;
        return {traits->bits, s.dim(is_value), is_value, traits->family == TQ_FAMILY_TRELLIS, s.is_plain};
    }
    int32_t record_bytes() const
    {
        return tq_record_bytes(plane(false), plane(true));
    }
    int32_t reference_bytes() const
    {
        return s.references ? tq_reference_bytes(s.head_dim) : 0;
    }
    size_t page_bytes() const
    {
        return (size_t)tq_device_head_page_bytes(record_bytes(), reference_bytes(), s.page / TQ_RECORD_TOKENS) * N_HEAD_KV;
    }
    size_t page_stride() const
    {
        return page_bytes() + s.page_gap;
    }
    size_t exact_stride() const
    {
        return (size_t)N_HEAD_KV * (s.n_sink + s.n_ring) * (s.head_dim + s.head_dim_v) + s.exact_gap;
    }
    /* The bytes that bring a position's record, and its reference. */
    uint8_t *stage(int32_t seq, int32_t position, int32_t head)
    {
        const size_t page = (size_t)page_table[seq * PAGES_OF_SEQ + position / s.page] * page_stride();
        const int32_t i = position % s.page / TQ_RECORD_TOKENS;
        return &pages[page + head * (page_bytes() / N_HEAD_KV) + tq_record_begin(record_bytes(), reference_bytes(), i)];
    }
};

/* A key to the basis that is coded, and back. */
static void key_to_basis(const test_data &d, int32_t head, float *x)
{
    tq_scale_channels(d.factors + head * d.s.head_dim, -1, d.s.head_dim, 1, x);
    if (!d.transforms) return;
    const std::vector<float> plain(x, x + d.s.head_dim);
    tq_transform_key(tq_transform_of_head(d.transforms, head, d.s.head_dim), d.s.head_dim, plain.data(), x);
}

static void key_from_basis(const test_data &d, int32_t head, float *x)
{
    tq_scale_channels(d.factors + head * d.s.head_dim, 1, d.s.head_dim, 1, x);
    if (d.transforms) tq_transform_inverse(tq_transform_of_head(d.transforms, head, d.s.head_dim), d.s.head_dim, x);
}

/* Codes of a vector as the format packs them (src/codec/packing.c), to their places by layout.h's definitions. */
static void store_codes(uint8_t *plane, tq_plane shape, int32_t token, const uint8_t *bytes)
{
    if (shape.is_plain) {
        const int32_t n_bytes = tq_plane_string_bytes(shape);
        memcpy(plane + token * n_bytes, bytes, (size_t)n_bytes);
        return;
    }
    if (shape.is_trellis) {
        for (int32_t i = 0; i < shape.head_dim * shape.bits / 8; i++) plane[tq_circle_offset(shape, token, i)] = bytes[i];
        return;
    }
    const int32_t low_bits = shape.bits == 3 ? 2 : shape.bits;
    for (int32_t dim = 0; dim < shape.head_dim; dim++) {
        uint32_t code = bytes[dim * low_bits / 8] >> dim * low_bits % 8 & ((1u << low_bits) - 1u);
        if (shape.bits == 3) code |= (bytes[shape.head_dim / 4 + dim / 8] >> dim % 8 & 1u) << 2;
        for (int32_t b = 0; b < shape.bits; b++) {
            int32_t bit = tq_code_bit(shape, token, dim, b);
            plane[bit / 8] = (uint8_t)((plane[bit / 8] & ~(1u << bit % 8)) | (code >> b & 1u) << bit % 8);
        }
    }
}

/* A reference for all blocks that hold something, to their places and to `to` [seq, block, KV head, head_dim]. */
static void fill_references(test_data &d, tq_random *random, std::vector<float> &to)
{
    const test_setup &s = d.s;
    const int32_t n_blocks = tq_ceil_div(lens[0], TQ_REF_BLOCK), n = s.head_dim;
    to.assign((size_t)N_SEQ * n_blocks * N_HEAD_KV * n, 0.0f);
    for (int32_t i = 0; s.references && i < N_SEQ * n_blocks * N_HEAD_KV; i++) {
        const int32_t seq = i / N_HEAD_KV / n_blocks, first = i / N_HEAD_KV % n_blocks * TQ_REF_BLOCK;
        if (first + TQ_REF_BLOCK <= s.n_sink || first >= lens[seq] - s.n_recent) continue;
        float *x = &to[(size_t)i * n];
        uint8_t bytes[2 + TQ_CODE_BYTES_MAX];
        for (int32_t k = 0; k < n; k++) x[k] = (float)random_gaussian(random) * 3.0f;
        if (tq_codec_encode(d.ref_codec, x, 1, bytes) != TQ_OK || tq_codec_decode(d.ref_codec, bytes, 1, x) != TQ_OK) abort();
        uint8_t *reference = d.stage(seq, first, i % N_HEAD_KV) + tq_reference_within(d.record_bytes(), 0);
        memcpy(reference, bytes + 2, (size_t)n), memcpy(reference + n, bytes, 2);
    }
}

static void fill_data(test_data &d, uint64_t seed)
{
    const test_setup &s = d.s;
    tq_random random = tq_random_stream(seed, 1);
    for (int side = 0; side < 2; side++) {
        if (tq_codec_create(&d.codec[side], s.formats[side], s.dim(side), TQ_SEED_DEFAULT) != TQ_OK) abort();
    }
    if (tq_codec_create(&d.ref_codec, TQ_FORMAT_SQ8, s.head_dim, TQ_SEED_DEFAULT) != TQ_OK) abort();
    const tq_plane key = d.plane(false), value = d.plane(true);
    /* NaN in scales, the largest codes; or scales that take values beyond FP16. */
    const uint8_t poison = s.n_query_of(0) % 2 && s.descending ? 0x7b : 0xff;
    d.pages.assign(d.page_stride() * N_PAGES, poison);
    d.exact.assign(N_SEQ * d.exact_stride() + 1, {(uint16_t)(poison << 8 | poison)});
    for (int32_t i = 0; i < N_SEQ * PAGES_OF_SEQ; i++) d.page_table[i] = (3 + i * 5) % N_PAGES;
    std::vector<float> references;
    fill_references(d, &random, references);
    for (int32_t i = 0; i < N_HEAD_KV * s.head_dim; i++) d.factors[i] = (int8_t)(s.factors ? i * 37 % 17 - 8 : 0);
    if (s.transforms) {
        size_t bytes;
        d.calibration = emulated_calibration(seed + 1, N_HEAD_KV, s.head_dim);
        d.transforms = tq_calibration_transforms(d.calibration, 0, &bytes);
    }
    for (int32_t seq = 0; seq <= N_SEQ; seq++) d.query_starts[seq] = s.first_query(seq);
    const size_t n_queries = (size_t)d.query_starts[N_SEQ];
    for (int side = 0; side < 2; side++) {
        const int32_t n = s.dim(side);
        std::vector<float> new_rows(n_queries * N_HEAD_KV * n, NAN);
        d.exact_rows[side].assign((size_t)N_SEQ * lens[0] * N_HEAD_KV * n, NAN);
        d.coded_rows[side] = d.exact_rows[side];
        for (int32_t seq = 0; seq < N_SEQ; seq++) {
            for (int32_t i = 0; i < lens[seq] * N_HEAD_KV; i++) {
                const int32_t position = i / N_HEAD_KV, head = i % N_HEAD_KV;
                float *x = &d.exact_rows[side][d.row(side, seq, position, head)];
                const int32_t i_block = seq * tq_ceil_div(lens[0], TQ_REF_BLOCK) + position / TQ_REF_BLOCK;
                const float *reference = &references[((size_t)i_block * N_HEAD_KV + head) * s.head_dim];
                auto draw = [&](float *to) {
                    for (int32_t k = 0; k < n; k++) {
                        to[k] = (float)random_gaussian(&random) * (side ? 0.7f : 1.3f);
                        if (!side) to[k] += reference[k];
                    }
                    if (!side) key_from_basis(d, head, to);
                    for (int32_t k = 0; k < n; k++) to[k] = as_type(to[k], s.dtype);
                };
                draw(x);
                const bool is_hidden = s.bias.hides(position); /* from all: nothing is written */
                if (is_hidden) std::fill(x, x + n, NAN);
                if (position >= s.stored_end(seq)) {
                    const size_t row = (size_t)(s.first_query(seq) + position - s.stored_end(seq)) * N_HEAD_KV + head;
                    memcpy(&new_rows[row * n], x, n * sizeof *x);
                }
                for (int32_t k = 0; k < n; k++) x[k] = __half2float(__float2half_rn(x[k]));
                const bool in_ring = position >= s.stored_end(seq) - s.n_ring && position < s.stored_end(seq);
                if (in_ring || position < s.n_sink) {
                    const int32_t entry = position < s.n_sink ? position : s.n_sink + position % s.n_ring;
                    const size_t n_entries = s.n_sink + s.n_ring, keys = N_HEAD_KV * n_entries * s.head_dim;
                    __half *to = &d.exact[seq * d.exact_stride() + side * keys + (head * n_entries + entry) * n];
                    const bool is_stored = position < s.stored_end(seq) && !is_hidden;
                    for (int32_t k = 0; k < n && is_stored; k++) to[k] = __float2half_rn(x[k]);
                }
                if (position < s.n_sink || position >= lens[seq] - s.n_recent || is_hidden) continue;
                uint8_t bytes[2 + TQ_CODE_BYTES_MAX];
                float *coded = &d.coded_rows[side][d.row(side, seq, position, head)];
                draw(coded); /* another vector, so that it shows which of both a query sees */
                if (!side) key_to_basis(d, head, coded);
                for (int32_t k = 0; !side && k < s.head_dim; k++) coded[k] -= reference[k];
                if (tq_codec_encode(d.codec[side], coded, 1, bytes) != TQ_OK) abort();
                if (tq_codec_decode(d.codec[side], bytes, 1, coded) != TQ_OK) abort();
                for (int32_t k = 0; !side && k < s.head_dim; k++) coded[k] += reference[k];
                if (!side) key_from_basis(d, head, coded);
                const int32_t i_record = position % s.page / TQ_RECORD_TOKENS;
                uint8_t *to = d.stage(seq, position, head) + tq_record_within(d.reference_bytes(), i_record);
                const int32_t token = position % TQ_RECORD_TOKENS, codes = tq_plane_bytes(key) + tq_plane_bytes(value);
                store_codes(to + (side ? tq_plane_bytes(key) : 0), side ? value : key, token, bytes + 2);
                memcpy(to + codes + (side ? TQ_RECORD_SCALE_BYTES : 0) + 2 * token, bytes, 2);
            }
        }
        d.new_rows[side] = typed(new_rows, s.dtype);
    }
    d.q.resize(n_queries * N_HEAD * s.head_dim);
    for (size_t i = 0; i < d.q.size(); i++) {
        const int32_t head = (int32_t)(i / s.head_dim % N_HEAD) / GROUP;
        const float factor = tq_channel_factor((int8_t)-d.factors[head * s.head_dim + i % s.head_dim]);
        d.q[i] = as_type(__half2float(__float2half_rn((float)random_gaussian(&random) * 1.5f * factor)), s.dtype);
    }
    d.typed_q = typed(d.q, s.dtype), d.lse.assign(n_queries * N_HEAD, NAN);
    d.out.assign(n_queries * N_HEAD * s.head_dim_v * 4 + 16, 0xff);
    for (int32_t i = 0; i < N_HEAD; i++) d.sinks[i] = (float)(i % 5) - 1.0f;
    std::vector<int32_t> positions;
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        for (int32_t i = 0; i < s.n_query_of(seq); i++) positions.push_back(lens[seq] - s.n_query_of(seq) + i);
    }
    d.bias.draw(s.bias, N_HEAD, lens[0], positions, &random);
}

static attend_args args_of(test_data &d)
{
    const test_setup &s = d.s;
    const float log2_e = 1.4426950408889634f;
    attend_args args = {};
    args.pages = d.pages.data(), args.exact = d.exact.data();
    args.n_pages = N_PAGES, args.n_head_kv = N_HEAD_KV, args.n_sink = s.n_sink, args.n_recent = s.n_recent;
    args.n_ring = s.n_ring, args.page_stride = (int64_t)d.page_stride(), args.exact_stride = (int64_t)d.exact_stride();
    args.key_kind = codes_kind(d.plane(false).bits, d.plane(false).is_trellis);
    args.value_kind = codes_kind(d.plane(true).bits, d.plane(true).is_trellis);
    args.records_per_page = s.page / TQ_RECORD_TOKENS;
    args.reference_bytes = d.reference_bytes(), args.head_dim = s.head_dim, args.head_dim_v = s.head_dim_v;
    args.page_magic = (uint32_t)(((uint64_t)1 << 32) / args.records_per_page + 1);
    args.rotation = emulated_rotation(d.codec[0]->rotation), args.value_rotation = emulated_rotation(d.codec[1]->rotation);
    args.key_factors = s.factors ? d.factors : nullptr, args.key_transforms = d.transforms;
    for (int side = 0; side < 2; side++) {
        const int8_t *windows = d.codec[side]->traits->windows;
        if (windows) memcpy(args.windows[side], windows, sizeof args.windows[side]);
    }
    args.q = d.typed_q.data(), args.out = d.out.data(), args.lse = d.lse.data(), args.dtype = s.dtype;
    if (s.ragged) args.query_starts = d.query_starts;
    if (s.new_rows) args.new_k = d.new_rows[0].data(), args.new_v = d.new_rows[1].data();
    args.new_k_stride = (int64_t)N_HEAD_KV * s.head_dim, args.new_v_stride = (int64_t)N_HEAD_KV * s.head_dim_v;
    args.q_token_stride = (int64_t)N_HEAD * s.head_dim, args.q_head_stride = s.head_dim;
    args.out_token_stride = (int64_t)N_HEAD * s.head_dim_v, args.out_head_stride = s.head_dim_v;
    args.page_table = d.page_table, args.page_table_stride = PAGES_OF_SEQ, args.seq_lens = lens;
    args.n_query = s.n_query, args.n_head = N_HEAD, args.group = GROUP;
    args.splits_allowed = s.splits, args.split_records_min = 1;
    args.n_row_tiles = (uint32_t)tq_ceil_div(s.n_query * GROUP, TQ_TILE_ROWS), args.deterministic = s.deterministic;
    const size_t n_tiles = (size_t)N_SEQ * N_HEAD_KV * args.n_row_tiles;
    d.counters.assign(n_tiles * TQ_COUNTER_STRIDE, 0);
    d.partials.assign(n_tiles * (SPLITS + 1) * TQ_PLAIN_TILE_ROWS * (s.head_dim_v + 2), NAN);
    args.counters = d.counters.data(), args.partials = d.partials.data();
    args.scale_log2 = log2_e / sqrtf((float)s.head_dim);
    args.cap_log2 = s.softcap * log2_e, args.cap_inverse = s.softcap > 0 ? 1.0f / args.cap_log2 : 0.0f;
    args.window = s.window, args.sinks = s.sinks ? d.sinks : nullptr, args.out_dim = s.out_dim;
    d.bias.set(args, d.bias.typed_mask.data());
    return args;
}

/* What one query row should give; narrow: everything rounded to BF16 on the way. Returns lse. */
static double attend_row(const test_data &d, int32_t seq, int32_t i_query, int32_t head, bool narrow, double *out)
{
    const test_setup &s = d.s;
    const int32_t position = lens[seq] - s.n_query_of(seq) + i_query;
    const size_t i_row = (size_t)(s.first_query(seq) + i_query);
    const float *q = &d.q[(i_row * N_HEAD + head) * s.head_dim];
    const int32_t oldest = s.stored_end(seq) - s.n_ring, own = position - s.n_recent + 1, recent = own > oldest ? own : oldest;
    auto vector = [&](bool side, int32_t column) {
        const bool is_exact = column < s.n_sink || column >= recent;
        return &(is_exact ? d.exact_rows : d.coded_rows)[side][d.row(side, seq, column, head / GROUP)];
    };
    const spec_options options = {s.head_dim, s.head_dim_v, s.window, s.softcap, s.sinks ? &d.sinks[head] : nullptr,
                                  d.bias.of(i_row, head, position)};
    return attend_spec(options, q, position, narrow, vector, out);
}

/* Is what stands behind out_dim values as it was before? */
static bool is_kept(const test_data &d, size_t row)
{
    const size_t element = d.s.dtype == TQ_DTYPE_F32 ? 4 : 2;
    bool kept = true;
    for (size_t i = (row * d.s.head_dim_v + d.s.out_dim) * element; i < (row + 1) * d.s.head_dim_v * element; i++) {
        kept = kept && d.out[i] == 0xff;
    }
    return kept;
}

static bool check(const test_setup &s, runner run, uint64_t seed)
{
    test_data d = {};
    d.s = s;
    fill_data(d, seed);
    attend_args args = args_of(d);
    transform_queries(args, d.transformed_q, {N_SEQ, s.descending}, d.query_starts[N_SEQ], s.head_dim);
    run(args, {N_SEQ, s.descending});
    spec_errors errors;
    bool kept = true, counters_are_zero = true; /* as the next call wants them */
    for (uint32_t counter : d.counters) counters_are_zero = counters_are_zero && counter == 0;
    double wanted[TQ_DEVICE_HEAD_DIM_MAX], narrow[TQ_DEVICE_HEAD_DIM_MAX];
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        for (int32_t i = 0; i < s.n_query_of(seq) * N_HEAD; i++) {
            const size_t row = (size_t)s.first_query(seq) * N_HEAD + i;
            const double lse = attend_row(d, seq, i / N_HEAD, i % N_HEAD, false, wanted);
            const double lse_narrow = attend_row(d, seq, i / N_HEAD, i % N_HEAD, true, narrow);
            kept = kept && is_kept(d, row);
            errors.add(s.out_dim, [&](int32_t k) { return number_at(d.out, s.dtype, row * s.head_dim_v + k); }, wanted, narrow,
                       d.lse[row], lse, lse_narrow);
        }
    }
    const bool good = errors.good() && kept && counters_are_zero;
    printf("%s %s %s/%s, head_dims %d/%d, page %d, sinks %d, ring %d, references %d, factors %d, transforms %d, ",
           good ? "ok    " : "FAILED", s.kernel, d.codec[0]->traits->name, d.codec[1]->traits->name, s.head_dim, s.head_dim_v,
           s.page, s.n_sink, s.n_recent, s.references, s.factors, s.transforms);
    printf("window %d, softcap %g, learned sinks %d, queries %d and %d, ring of %d, new rows %d, dtype %d, ", s.window,
           (double)s.softcap, s.sinks, s.n_query_of(0), s.n_query_of(1), s.n_ring, s.new_rows, (int)s.dtype);
    s.bias.print();
    printf("out_dim %d%s%s: ", s.out_dim, kept ? "" : " (more was written)", counters_are_zero ? "" : " (counters are left)");
    errors.print();
    for (tq_codec *codec : d.codec) tq_codec_free(codec);
    tq_codec_free(d.ref_codec);
    tq_calibration_free(d.calibration);
    return good;
}

static int n_passed, n_failed;

/* Options by a number, but for masks, ALiBi and out_dim, which are drawn; prefill wants many queries, and Hopper's more tokens,
 * since its tiles have up to 128. */
static void test(const char *kernel, runner run, tq_format k, tq_format v, int32_t head_dim, bool is_prefill, int i,
                 int32_t head_dim_v = 0)
{
    test_setup s = {};
    const bool is_hopper = strstr(kernel, "Hopper") != nullptr;
    lens[0] = is_hopper ? 450 : 115, lens[1] = is_hopper ? 150 : 39;
    s.kernel = kernel, s.formats[0] = k, s.formats[1] = v, s.head_dim = head_dim;
    s.head_dim_v = head_dim_v ? head_dim_v : head_dim, s.n_query = is_prefill ? 25 : 1 + i % 4, s.splits = SPLITS;
    s.n_sink = 4, s.n_recent = 21, s.descending = i % 2 == 1, s.deterministic = i % 2 == 1;
    if (i % 3 == 1) s.window = 60;
    if (i % 3 == 2) s.softcap = 3.0f, s.sinks = true;
    s.references = (i + i / 2) % 2 == 0, s.factors = i / 2 % 2, s.transforms = !s.factors && i % 3 != 1 && !is_hopper;
    s.page = i % 5 < 2 ? 128 : 64;
    if (i % 5 == 3 && !s.references) s.n_sink = s.n_recent = 0;
    if (i % 7 == 6) s.n_sink = 40; /* the first record is the second of its block */
    s.n_ring = s.n_recent;
    if (i % 4 > 1) s.page_gap = 16 * (i % 3), s.exact_gap = 8 * (i % 5);
    if (i % 4 > 1 && s.n_recent > 0) s.n_ring += i % 6 * 9;
    s.dtype = (tq_dtype)(i % 3), s.new_rows = s.n_recent > 0 && i % 2, s.ragged = i % 5 == 1 || i % 5 == 4;
    tq_random random = tq_random_stream(1000 * (uint64_t)head_dim + (uint64_t)i, 3);
    s.is_plain = strncmp(kernel, "plain", 5) == 0;
    if (strcmp(kernel, "own decode") != 0) s.bias = draw_kind(&random);
    s.out_dim = tq_random_next(&random) % 3 ? s.head_dim_v : 1 + (int32_t)(tq_random_next(&random) % (uint32_t)s.head_dim_v);
    if (check(s, run, 100 * (uint64_t)head_dim + (uint64_t)i)) n_passed++;
    else n_failed++;
}

/* A context of which each warp has more units than it adds up before it takes the bias off (settle): 8, and then some. */
static void test_long(const char *kernel, runner run, tq_format format, int32_t head_dim, uint64_t seed)
{
    test_setup s = {};
    lens[0] = 3400, lens[1] = 39;
    s.kernel = kernel, s.formats[0] = s.formats[1] = format, s.head_dim = s.head_dim_v = s.out_dim = head_dim, s.page = 128;
    s.n_query = s.splits = 1, s.n_sink = 4, s.n_recent = s.n_ring = 21, s.deterministic = true;
    if (check(s, run, seed)) n_passed++;
    else n_failed++;
}

static const struct {
    const char *name;
    tq_format format;
} formats[] = {{"sq8", TQ_FORMAT_SQ8}, {"sq4", TQ_FORMAT_SQ4}, {"sq3", TQ_FORMAT_SQ3}, {"sq2", TQ_FORMAT_SQ2},
               {"tt4", TQ_FORMAT_TT4}, {"tt3", TQ_FORMAT_TT3}, {"tt2", TQ_FORMAT_TT2}};

static tq_format format_of(const char *name)
{
    int i = 0;
    while (strcmp(formats[i].name, name) != 0) i++;
    return formats[i].format;
}

template <int D> static void test_head_dim()
{
    const int n = D % 64 == 0 ? 7 : 4; /* trellises have no layout at 96 */
    for (int i = 0; i < n * n; i++) {
        const tq_format k = formats[i / n].format, v = formats[i % n].format;
        test("prefill", run_prefill<D>, k, v, D, true, i);
        test("decode", run_decode<any_formats<D, 16>, D, 8>, k, v, D, false, i);
        if (i % 6 == D / 32 % 6) test("Hopper's prefill", run_hopper<any_pair<D, 16>, D>, k, v, D, true, i);
        if (i % 8 != 0) continue; /* prefill in place of decode, where decode has no room */
        test("prefill of few", run_prefill<D>, k, v, D, false, i);
    }
}

/* Values of another head_dim than keys: every second pair of formats. */
template <int D, int DV> static void test_head_dims()
{
    for (int i = 0; i < 49; i += 2) {
        const tq_format k = formats[i / 7].format, v = formats[i % 7].format;
        test("prefill", run_prefill<D, DV>, k, v, D, true, i, DV);
        test("decode", run_decode<any_formats<D, 16, DV>, D, 8>, k, v, D, false, i, DV);
    }
}

/* Plain planes: of 49 pairs of formats each `step`-th. */
static void test_plain(int32_t head_dim, int32_t head_dim_v, int step)
{
    for (int i = (head_dim / 8 + 2) % step; i < 49; i += step) {
        const tq_format k = formats[i / 7].format, v = formats[i % 7].format;
        test("plain decode", i % 2 ? run_plain<1, 1> : run_plain<2, 1>, k, v, head_dim, false, i, head_dim_v);
        test("plain prefill", i % 3 ? run_plain<2, 4> : run_plain<1, 2>, k, v, head_dim, true, i, head_dim_v);
    }
}

static void test_all_plain()
{
    int32_t n;
    const int32_t *head_dims = tq_head_dim_list(&n);
    for (int32_t i = 0; i < n; i++) {
        if (!tq_has_kernels_at(head_dims[i])) test_plain(head_dims[i], head_dims[i], head_dims[i] == 512 ? 1 : 5);
    }
    test_plain(96, 96, 5);
    test_plain(128, 192, 9), test_plain(40, 512, 9), test_plain(576, 72, 9), test_plain(64, 32, 9);
}

int main()
{
    test_all_plain();
#define TQ_TEST_HEAD_DIMS(D, DV) test_head_dims<D, DV>();
    TQ_HEAD_DIM_PAIRS(TQ_TEST_HEAD_DIMS)
    test_head_dim<64>(), test_head_dim<96>(), test_head_dim<128>(), test_head_dim<192>(), test_head_dim<256>();
    int i = 0;
#define TQ_TEST(D, K, V) /* with references and without */                             \
    test("own decode", run_own<K, V, D, 2>, format_of(#K), format_of(#V), D, false, i); \
    test("own decode", run_own<K, V, D, 1>, format_of(#K), format_of(#V), D, false, i++); \
    test("own decode", run_own<K, V, D, 2>, format_of(#K), format_of(#V), D, false, i++);
    TQ_PAIRS(TQ_TEST)
#define TQ_TEST_HOPPER(D, K, V) \
    test("own Hopper's prefill", run_hopper<hopper_pair<K, V, D>, D>, format_of(#K), format_of(#V), D, true, i++);
    TQ_PAIRS(TQ_TEST_HOPPER)
    using two_at_a_time = known_formats<sq4, sq4, 64, 2>; /* of 6 warps each has 9 units of 64 tokens */
    test_long("long own decode", run_decode<two_at_a_time, 64, two_at_a_time::fewer_warps>, TQ_FORMAT_SQ4, 64, 3);
    test_long("long decode", run_decode<any_formats<64, 16>, 64, 8>, TQ_FORMAT_SQ4, 64, 4);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
