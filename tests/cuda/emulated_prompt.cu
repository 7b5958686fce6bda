/* SPDX-License-Identifier: MIT */
/*
 * Prompts in chunks (src/kernels/cuda) on an emulated device: two sequences come in pieces of every size, each piece encoded,
 * attended with and stored. Whatever the size, each query must get what attention in double precision gives it when tokens come
 * one by one, and pages must have the codes of the CPU's cache. tests/cuda/check_emulated.py compiles and runs it.
 */
#include "emulated_launch.h"
#include "emulated_spec.h"

enum { N_HEAD_KV = 2, GROUP = 3, N_HEAD = N_HEAD_KV * GROUP, N_SEQ = 2, SPLITS = 3, PAGES_OF_SEQ = 4, N_PAGES = 11 };
static const int32_t lens[N_SEQ] = {155, 131}, slots[N_SEQ] = {1, 0};

struct test_setup {
    tq_format formats[2];
    int32_t head_dim, head_dim_v, page, n_sink, n_recent, n_ring, k_ref_block, window;
    tq_dtype dtype;
    bool factors, transforms, descending; /* of the first two one at most */
    bias_kind bias;
    int32_t out_dim;
    runner decode, prefill;
    void (*append)(const tq_device_store &store, const tq_paged_append_params &p, const append_how &how);
    size_t dim(int side) const
    {
        return side ? head_dim_v : head_dim;
    }
};

/* The prompts, and what is right for them. */
struct test_data {
    test_setup s;
    tq_codec *codec[2];
    tq_calibration *calibration;
    tq_device_store store;
    alignas(8) int8_t factors[N_HEAD_KV * TQ_DEVICE_HEAD_DIM_MAX];
    int32_t page_table[N_SEQ * PAGES_OF_SEQ];
    std::vector<float> rows[2][N_SEQ], exact[2][N_SEQ], coded[2][N_SEQ]; /* [position, KV head, dim(side)]: of dtype, of FP16 */
    std::vector<float> q[N_SEQ];                                         /* [position, head, head_dim] */
    std::vector<uint8_t> canonical[N_SEQ];                               /* the CPU's pages, in the order of exports */
    spec_bias bias[N_SEQ];                                               /* of all positions */
    std::vector<double> wanted[N_SEQ], narrow[N_SEQ];                    /* [position, head, head_dim_v + lse] */
};

static void must(tq_status status, int line)
{
    if (status == TQ_OK) return;
    printf("line %d: %s\n", line, tq_status_string(status));
    exit(1);
}
#define MUST(call) must(call, __LINE__)

static int32_t pages_of(const test_data &d, int32_t seq)
{
    return (int32_t)blocks_of(lens[seq] - d.s.n_recent, d.s.page);
}

/* Bytes of a head's page in the format's own arrangement. */
static size_t head_bytes(const test_data &d, int side)
{
    const size_t references = side || !d.s.k_ref_block ? 0 : d.s.page / 64 * (d.s.head_dim + 2);
    return d.s.page * (d.codec[side]->code_bytes + 2) + references;
}

static void read_cache(test_data &d, tq_cache *cache, int32_t seq, int32_t id)
{
    const test_setup &s = d.s;
    const int32_t n = lens[seq] - s.n_recent;
    for (int side = 0; side < 2; side++) d.coded[side][seq].assign(d.exact[side][seq].size(), NAN);
    MUST(tq_cache_read(cache, id, 0, 0, n, d.coded[0][seq].data(), d.coded[1][seq].data()));
    tq_cache_stats stats;
    MUST(tq_cache_get_stats(cache, &stats));
    const size_t bytes[2] = {head_bytes(d, 0), head_bytes(d, 1)}, of_exact = stats.exact_bytes / N_SEQ;
    std::vector<uint8_t> pages(pages_of(d, seq) * stats.page_bytes), unused(of_exact);
    MUST(tq_cache_seq_export(cache, id, 0, pages_of(d, seq), pages.data(), unused.data(), of_exact));
    d.canonical[seq].clear();
    for (int32_t page = 0; page < pages_of(d, seq); page++) {
        for (int32_t list = 0; list < 2 * N_HEAD_KV; list++) {
            const size_t stride[2] = {(bytes[0] + 63) / 64 * 64, (bytes[1] + 63) / 64 * 64}, side = list % 2;
            const uint8_t *from = &pages[page * stats.page_bytes + side * N_HEAD_KV * stride[0] + list / 2 * stride[side]];
            d.canonical[seq].insert(d.canonical[seq].end(), from, from + bytes[side]);
        }
    }
}

static void fill_rows(test_data &d, tq_random *random, int32_t seq)
{
    const test_setup &s = d.s;
    for (int side = 0; side < 2; side++) {
        const size_t n = lens[seq] * N_HEAD_KV * s.dim(side);
        d.rows[side][seq].resize(n), d.exact[side][seq].resize(n);
        for (size_t i = 0; i < n; i++) {
            const size_t channel = i % (N_HEAD_KV * s.dim(side));
            float x = (float)random_gaussian(random) * (side ? 0.7f : 1.3f) + (side ? 0.0f : (float)(channel % 7) - 2.0f);
            if (!side && s.factors) x *= tq_channel_factor(d.factors[channel]);
            x = as_type(x, s.dtype);
            d.rows[side][seq][i] = x, d.exact[side][seq][i] = as_type(x, TQ_DTYPE_F16);
        }
    }
    d.q[seq].resize((size_t)lens[seq] * N_HEAD * s.head_dim);
    for (size_t i = 0; i < d.q[seq].size(); i++) {
        const size_t head = i / s.head_dim % N_HEAD / GROUP, channel = head * s.head_dim + i % s.head_dim;
        const float factor = s.factors ? tq_channel_factor((int8_t)-d.factors[channel]) : 1.0f;
        d.q[seq][i] = as_type((float)random_gaussian(random) * 1.5f * factor, s.dtype);
    }
    std::vector<int32_t> positions(lens[seq]);
    for (int32_t i = 0; i < lens[seq]; i++) positions[i] = i;
    d.bias[seq].draw(s.bias, N_HEAD, lens[0], positions, random);
}

/* Attention of all tokens, as if each had come alone. */
static void fill_wanted(test_data &d, int32_t seq)
{
    const test_setup &s = d.s;
    const size_t width = (size_t)s.head_dim_v + 1;
    d.wanted[seq].resize(lens[seq] * N_HEAD * width), d.narrow[seq] = d.wanted[seq];
    for (int32_t row = 0; row < lens[seq] * N_HEAD; row++) {
        const int32_t position = row / N_HEAD, head = row % N_HEAD / GROUP;
        auto vector = [&](bool side, int32_t c) {
            const bool is_exact = c < s.n_sink || c > position - s.n_recent;
            return &(is_exact ? d.exact : d.coded)[side][seq][((size_t)c * N_HEAD_KV + head) * s.dim(side)];
        };
        const spec_options options = {
            s.head_dim, s.head_dim_v, s.window, 0.0f, nullptr, d.bias[seq].of(position, row % N_HEAD, position)};
        double *wanted = &d.wanted[seq][row * width], *narrow = &d.narrow[seq][row * width];
        const float *q = &d.q[seq][(size_t)row * s.head_dim];
        wanted[s.head_dim_v] = attend_spec(options, q, position, false, vector, wanted);
        narrow[s.head_dim_v] = attend_spec(options, q, position, true, vector, narrow);
    }
}

static void open_data(test_data &d, uint64_t seed)
{
    const test_setup &s = d.s;
    tq_random random = tq_random_stream(seed, 1);
    for (int side = 0; side < 2; side++) {
        MUST(tq_codec_create(&d.codec[side], s.formats[side], (int32_t)s.dim(side), TQ_SEED_DEFAULT));
    }
    d.store.key = emulated_format(d.codec[0]), d.store.value = emulated_format(d.codec[1]);
    d.store.rotation = emulated_rotation(d.codec[0]->rotation);
    d.store.value_rotation = emulated_rotation(d.codec[1]->rotation), d.store.head_dim_v = s.head_dim_v;
    d.store.head_dim = s.head_dim, d.store.n_head_kv = N_HEAD_KV, d.store.page_size = s.page, d.store.n_sink = s.n_sink;
    d.store.is_plain = tq_is_plain(plane_of(d.store, false), plane_of(d.store, true));
    d.store.n_recent = s.n_recent, d.store.n_ring = s.n_ring, d.store.k_ref_block = s.k_ref_block;
    d.store.n_pages = N_PAGES, d.store.n_exact_slots = N_SEQ;
    d.store.page_stride = (int64_t)head_page_bytes_of(d.store) * N_HEAD_KV + 32;
    d.store.exact_stride = N_HEAD_KV * (int64_t)(s.n_sink + s.n_ring) * (s.head_dim + s.head_dim_v) + 8;
    for (int32_t i = 0; i < N_SEQ * PAGES_OF_SEQ; i++) d.page_table[i] = (2 + i * 5) % N_PAGES;
    for (int32_t i = 0; i < N_HEAD_KV * s.head_dim; i++) d.factors[i] = (int8_t)(i * 37 % 17 - 8);
    d.store.k_factors = s.factors ? d.factors : nullptr;
    tq_cache_params params = {};
    params.struct_size = sizeof params, params.n_layer = 1, params.n_pages = 64;
    if (s.transforms) {
        size_t bytes;
        params.calibration = d.calibration = emulated_calibration(seed + 1, N_HEAD_KV, s.head_dim);
        d.store.k_transforms = tq_calibration_transforms(d.calibration, 0, &bytes);
    }
    params.k_format = s.formats[0], params.v_format = s.formats[1], params.head_dim = s.head_dim, params.n_head_kv = N_HEAD_KV;
    params.head_dim_v = s.head_dim_v;
    params.page_size = s.page, params.n_sink = s.n_sink, params.n_recent = s.n_recent, params.k_ref_block = s.k_ref_block;
    tq_cache *cache;
    int32_t ids[N_SEQ];
    MUST(tq_cache_create(&cache, &params));
    if (s.factors) MUST(tq_cache_set_key_factors(cache, 0, d.factors));
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        fill_rows(d, &random, seq);
        MUST(tq_cache_seq_create(cache, &ids[seq]));
        MUST(tq_cache_append(cache, ids[seq], 0, lens[seq], d.exact[0][seq].data(), d.exact[1][seq].data(), NULL));
    }
    for (int32_t seq = 0; seq < N_SEQ; seq++) read_cache(d, cache, seq, ids[seq]), fill_wanted(d, seq);
    tq_cache_free(cache);
}

/* A piece of both prompts: of sequence i the tokens from done[i] on, counts[i] of them. */
struct piece {
    std::vector<int64_t> slots, positions;
    std::vector<int32_t> seq_ids;
    std::vector<float> rows[2], q;
    std::vector<uint8_t> mask;
    int32_t lengths[N_SEQ], query_starts[N_SEQ + 1], longest;
};

static piece piece_of(const test_data &d, const int32_t *done, const int32_t *counts)
{
    const size_t q_width = (size_t)N_HEAD * d.s.head_dim;
    piece p = {};
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        for (int32_t position = done[seq]; position < done[seq] + counts[seq]; position++) {
            const int32_t page = d.page_table[seq * PAGES_OF_SEQ + position / d.s.page];
            p.slots.push_back((int64_t)page * d.s.page + position % d.s.page);
            p.positions.push_back(position), p.seq_ids.push_back(seq);
        }
        for (int side = 0; side < 2; side++) {
            const size_t width = N_HEAD_KV * d.s.dim(side);
            const float *from = d.rows[side][seq].data() + done[seq] * width;
            p.rows[side].insert(p.rows[side].end(), from, from + counts[seq] * width);
        }
        const float *from = d.q[seq].data() + done[seq] * q_width;
        p.q.insert(p.q.end(), from, from + counts[seq] * q_width);
        const spec_bias &bias = d.bias[seq];
        const uint8_t *mask = bias.typed_mask.data() + done[seq] * bias.row_bytes();
        if (bias.kind.has_mask) p.mask.insert(p.mask.end(), mask, mask + counts[seq] * bias.row_bytes());
        p.lengths[seq] = done[seq] + counts[seq], p.query_starts[seq + 1] = p.query_starts[seq] + counts[seq];
        if (counts[seq] > p.longest) p.longest = counts[seq];
    }
    return p;
}

static attend_args args_of(const test_data &d, const piece &p)
{
    const test_setup &s = d.s;
    attend_args args = {};
    args.pages = d.store.pages, args.exact = reinterpret_cast<const __half *>(d.store.exact), args.n_pages = N_PAGES;
    args.n_head_kv = N_HEAD_KV, args.n_sink = s.n_sink, args.n_recent = s.n_recent, args.n_ring = s.n_ring;
    args.records_per_page = s.page / TQ_RECORD_TOKENS;
    args.page_magic = (uint32_t)(((uint64_t)1 << 32) / args.records_per_page + 1);
    args.key_kind = codes_kind(d.store.key.bits, d.store.key.is_trellis);
    args.value_kind = codes_kind(d.store.value.bits, d.store.value.is_trellis);
    args.reference_bytes = reference_bytes_of(d.store), args.head_dim = s.head_dim, args.head_dim_v = s.head_dim_v;
    args.page_stride = d.store.page_stride, args.exact_stride = d.store.exact_stride;
    args.rotation = d.store.rotation, args.value_rotation = d.store.value_rotation;
    args.key_factors = d.store.k_factors, args.key_transforms = d.store.k_transforms;
    memcpy(args.windows[0], d.store.key.windows, sizeof args.windows[0]);
    memcpy(args.windows[1], d.store.value.windows, sizeof args.windows[1]);
    args.dtype = s.dtype;
    args.q_token_stride = (int64_t)N_HEAD * s.head_dim, args.q_head_stride = s.head_dim;
    args.out_token_stride = (int64_t)N_HEAD * s.head_dim_v, args.out_head_stride = s.head_dim_v;
    args.new_k_stride = (int64_t)N_HEAD_KV * s.head_dim, args.new_v_stride = (int64_t)N_HEAD_KV * s.head_dim_v;
    args.page_table = d.page_table, args.page_table_stride = PAGES_OF_SEQ, args.exact_slots = slots;
    args.seq_lens = p.lengths, args.query_starts = p.query_starts, args.n_query = p.longest;
    args.n_head = N_HEAD, args.group = GROUP, args.n_row_tiles = blocks_of(p.longest * GROUP, TQ_TILE_ROWS);
    args.scale_log2 = 1.4426950408889634f / sqrtf((float)s.head_dim), args.window = s.window;
    args.splits_allowed = SPLITS, args.split_records_min = 1, args.out_dim = s.out_dim;
    d.bias[0].set(args, p.mask.data());
    return args;
}

/* Both prompts in pieces of `cut` tokens; what queries get to errors. */
static void run_prompts(test_data &d, int32_t cut, tq_random *random, spec_errors &errors)
{
    const test_setup &s = d.s;
    int32_t done[N_SEQ] = {}, n_left = lens[0] + lens[1];
    while (n_left > 0) {
        int32_t counts[N_SEQ];
        for (int32_t seq = 0; seq < N_SEQ; seq++) {
            const int32_t rest = lens[seq] - done[seq], n = cut > 1 && seq > 0 ? cut - 1 : cut; /* not side by side */
            counts[seq] = n < rest ? n : rest;
        }
        const piece p = piece_of(d, done, counts);
        const std::vector<uint8_t> k = typed(p.rows[0], s.dtype), v = typed(p.rows[1], s.dtype), q = typed(p.q, s.dtype);
        tq_paged_append_params append = {};
        append.n_tok = (int64_t)p.slots.size(), append.dtype = s.dtype, append.row_stride = (int64_t)N_HEAD_KV * s.head_dim;
        append.v_row_stride = (int64_t)N_HEAD_KV * s.head_dim_v;
        append.k = k.data(), append.v = v.data(), append.slot_mapping = p.slots.data(), append.positions = p.positions.data();
        append.seq_ids = p.seq_ids.data(), append.page_table = d.page_table, append.page_table_stride = PAGES_OF_SEQ;
        append.exact_slots = slots, append.half = TQ_APPEND_ENCODE;
        const append_how how = {tq_random_next(random) % 2 == 1, s.descending, 1 + (int32_t)(tq_random_next(random) % 64)};
        s.append(d.store, append, how);

        attend_args args = args_of(d, p);
        const size_t n_rows = p.q.size() / s.head_dim, n_tiles = (size_t)N_SEQ * N_HEAD_KV * args.n_row_tiles;
        std::vector<uint8_t> out(n_rows * s.head_dim_v * 4 + 16, 0xff);
        std::vector<float> lse(n_rows, NAN), partials(n_tiles * (SPLITS + 1) * TQ_PLAIN_TILE_ROWS * (s.head_dim_v + 2), NAN);
        std::vector<uint32_t> counters(n_tiles * TQ_COUNTER_STRIDE);
        args.q = q.data(), args.new_k = k.data(), args.new_v = v.data(), args.out = out.data(), args.lse = lse.data();
        args.partials = partials.data(), args.counters = counters.data();
        std::vector<float> transformed_q;
        transform_queries(args, transformed_q, {N_SEQ, s.descending}, p.query_starts[N_SEQ], s.head_dim);
        (p.longest * GROUP > TQ_PREFILL_ROWS_MIN ? s.prefill : s.decode)(args, {N_SEQ, s.descending});

        append.half = TQ_APPEND_STORE;
        s.append(d.store, append, how);
        for (int32_t seq = 0; seq < N_SEQ; seq++) {
            for (int32_t i = 0; i < counts[seq] * N_HEAD; i++) {
                const size_t row = (size_t)p.query_starts[seq] * N_HEAD + i;
                const size_t at = ((size_t)done[seq] * N_HEAD + i) * (s.head_dim_v + 1);
                const double *wanted = &d.wanted[seq][at], *narrow = &d.narrow[seq][at];
                errors.add(s.out_dim, [&](int32_t n) { return number_at(out, s.dtype, row * s.head_dim_v + n); }, wanted,
                           narrow, lse[row], wanted[s.head_dim_v], narrow[s.head_dim_v]);
            }
            done[seq] += counts[seq], n_left -= counts[seq];
        }
    }
}

/* The number of coded vectors and references that are not the CPU's. */
static int count_wrong(test_data &d)
{
    const test_setup &s = d.s;
    int n_wrong = 0;
    for (int32_t seq = 0; seq < N_SEQ; seq++) {
        std::vector<uint8_t> found(d.canonical[seq].size());
        export_pages(d.store, d.page_table + seq * PAGES_OF_SEQ, pages_of(d, seq), found.data(), s.descending);
        const uint8_t *mine = found.data(), *other = d.canonical[seq].data();
        for (int32_t list = 0; list < pages_of(d, seq) * N_HEAD_KV * 2; list++) {
            const int32_t side = list % 2, first = list / 2 / N_HEAD_KV * s.page;
            const size_t codes = d.codec[side]->code_bytes, scales = s.page * codes, references = scales + s.page * 2;
            for (int32_t i = 0; i < s.page; i++) {
                if (first + i < s.n_sink || first + i >= lens[seq] - s.n_recent) continue;
                n_wrong += memcmp(mine + i * codes, other + i * codes, codes) != 0 ||
                           memcmp(mine + scales + 2 * i, other + scales + 2 * i, 2) != 0;
                if (side || !s.k_ref_block) continue;
                const size_t at = references + i / 64 * s.head_dim;
                n_wrong += memcmp(mine + at, other + at, s.head_dim) != 0;
            }
            mine += head_bytes(d, side), other += head_bytes(d, side);
        }
    }
    return n_wrong;
}

static int n_passed, n_failed;

static void test(const char *kernels, const test_setup &s, uint64_t seed)
{
    test_data d = {};
    d.s = s;
    open_data(d, seed);
    tq_random random = tq_random_stream(seed, 2);
    std::vector<uint8_t> pages((size_t)d.store.page_stride * N_PAGES + 16);
    std::vector<uint16_t> exact((size_t)d.store.exact_stride * N_SEQ + 8);
    d.store.pages = pages.data() + (16 - (uintptr_t)pages.data() % 16) % 16;
    d.store.exact = exact.data() + (16 - (uintptr_t)exact.data() % 16) % 16 / 2;
    static const int32_t cuts[] = {1, 7, 64, 100, 1000};
    for (int32_t cut : cuts) {
        spec_errors errors;
        memset(pages.data(), 0xff, pages.size()), memset(exact.data(), 0xff, 2 * exact.size());
        run_prompts(d, cut, &random, errors);
        const int n_wrong = count_wrong(d);
        const bool good = errors.good() && n_wrong == 0;
        printf("%s prompt in pieces of %d, %s %s/%s, head_dims %d/%d, page %d, sinks %d, last %d exact, ring %d, "
               "references %d, ",
               good ? "ok    " : "FAILED", cut, kernels, d.codec[0]->traits->name, d.codec[1]->traits->name, s.head_dim,
               s.head_dim_v, s.page, s.n_sink, s.n_recent, s.n_ring, s.k_ref_block);
        printf("factors %d, transforms %d, dtype %d, window %d, ", s.factors, s.transforms, (int)s.dtype, s.window);
        s.bias.print();
        printf("out_dim %d: %d codes differ, ", s.out_dim, n_wrong);
        errors.print();
        fflush(stdout);
        if (good) n_passed++;
        else n_failed++;
    }
    for (tq_codec *codec : d.codec) tq_codec_free(codec);
    tq_calibration_free(d.calibration);
}

/* Options by a number. */
static test_setup setup_of(tq_format k, tq_format v, int32_t head_dim, int32_t head_dim_v, int i)
{
    test_setup s = {};
    s.formats[0] = k, s.formats[1] = v, s.head_dim = head_dim, s.head_dim_v = head_dim_v, s.page = i % 2 ? 128 : 64;
    s.n_sink = i % 3 == 2 ? 0 : i % 3 ? 30 : 4, s.n_recent = i % 2 ? 64 : 21, s.n_ring = s.n_recent + (i % 3 == 1 ? 9 : 0);
    s.k_ref_block = i % 4 == 3 ? 0 : 64, s.window = i % 4 == 2 ? 70 : 0;
    s.dtype = (tq_dtype)(i % 3), s.factors = i % 2, s.descending = i / 2 % 2;
    s.out_dim = head_dim_v;
    return s;
}

template <class K, class V, int D> static void test_pair(tq_format k, tq_format v, int i)
{
    test_setup s = setup_of(k, v, D, D, i);
    s.append = append<D>;
    s.decode = run_own<K, V, D, 2>, s.prefill = run_hopper<hopper_pair<K, V, D>, D>;
    test("own and Hopper's kernels,", s, 20 + (uint64_t)i);
    s.decode = run_decode<any_formats<D, 16>, D, 8>, s.prefill = run_prefill<D>, s.descending = !s.descending;
    s.dtype = (tq_dtype)((i + 1) % 3), s.transforms = i % 4 == 2; /* which Hopper's prefill does not have */
    s.bias = {i % 3 > 0, i % 3 == 1, i % 2 == 1, i % 3 == 0 || i == 5}, s.out_dim = i % 2 ? D : D - 7;
    test("general and portable kernels,", s, 40 + (uint64_t)i);
    s.prefill = run_hopper<hopper_pair<K, V, D>, D>;
    if (i % 2) test("general and Hopper's kernels,", s, 60 + (uint64_t)i);
}

/* Values of another head_dim than keys. */
template <int D, int DV> static void test_head_dims(tq_format k, tq_format v, int i)
{
    test_setup s = setup_of(k, v, D, DV, i);
    s.append = append<D, DV>, s.decode = run_decode<any_formats<D, 16, DV>, D, 8>, s.prefill = run_prefill<D, DV>;
    s.transforms = !s.factors;
    test("general and portable kernels,", s, 60 + (uint64_t)i);
}

static void test_plain(tq_format k, tq_format v, int32_t head_dim, int32_t head_dim_v, int i)
{
    test_setup s = setup_of(k, v, head_dim, head_dim_v, i);
    s.append = append_plain, s.decode = run_plain<2, 1>, s.prefill = i % 2 ? run_plain<1, 2> : run_plain<1, 4>;
    s.transforms = !s.factors, s.bias = {i == 3, false, false, i == 2};
    test("plain kernels,", s, 80 + (uint64_t)i);
}

int main()
{
    test_plain(TQ_FORMAT_TT4, TQ_FORMAT_TT4, 512, 512, 1);
    test_plain(TQ_FORMAT_SQ8, TQ_FORMAT_TT3, 80, 80, 2);
    test_plain(TQ_FORMAT_SQ4, TQ_FORMAT_SQ3, 40, 128, 3);
#define TQ_TEST_HEAD_DIMS(D, DV) \
    test_head_dims<D, DV>(TQ_FORMAT_SQ4, TQ_FORMAT_SQ3, 1), test_head_dims<D, DV>(TQ_FORMAT_TT3, TQ_FORMAT_TT3, 2);
    TQ_HEAD_DIM_PAIRS(TQ_TEST_HEAD_DIMS)
    test_pair<sq8, tt4, 64>(TQ_FORMAT_SQ8, TQ_FORMAT_TT4, 0);
    test_pair<tt4, tt4, 128>(TQ_FORMAT_TT4, TQ_FORMAT_TT4, 1);
    test_pair<tt3, tt3, 64>(TQ_FORMAT_TT3, TQ_FORMAT_TT3, 2);
    test_pair<tt3, tt2, 64>(TQ_FORMAT_TT3, TQ_FORMAT_TT2, 3);
    test_pair<sq4, sq4, 128>(TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 4);
    test_pair<sq3, sq3, 128>(TQ_FORMAT_SQ3, TQ_FORMAT_SQ3, 5);
    test_pair<sq4, sq4, 64>(TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 6);
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
