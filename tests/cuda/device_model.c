/* SPDX-License-Identifier: MIT */
/* The model behind the device's tests: every token's vectors in floats, what the CPU's encoder makes of them, and attention in
 * double precision, once exactly and once with everything rounded to BF16 on the way. */
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "codec/codec.h"
#include "codec/transform.h"
#include "device_test.h"
#include "make_calibration.h"
#include "vectors.h"

enum { VECTOR_BYTES_MAX = 2 + TQ_HEAD_DIM_MAX }; /* of sq8 at the largest head_dim of a device */

static int n_passed, n_failed;
static bool is_running, has_failed;
static char test_name[256];
static void *allocations[1 << 16];
static int n_allocations;

static void end_test(void)
{
    if (!is_running) return;
    if (has_failed)
        n_failed++;
    else
        n_passed++;
    printf("%s %s\n", has_failed ? "FAILED" : "ok    ", test_name);
    fflush(stdout);
}

void device_test(const char *format, ...)
{
    end_test();
    va_list args;
    va_start(args, format);
    vsnprintf(test_name, sizeof test_name, format, args);
    va_end(args);
    is_running = true;
    has_failed = false;
}

bool device_check(bool condition, const char *file, int line, const char *format, ...)
{
    if (condition) return true;
    va_list args;
    va_start(args, format);
    if (!has_failed) {
        printf("%s:%d: %s: ", file, line, test_name);
        vprintf(format, args);
        printf("\n");
    }
    va_end(args);
    has_failed = true;
    return false;
}

int device_report(void)
{
    end_test();
    device_free_all();
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}

static void must(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return;
    printf("%s: %s: %s\n%d passed, %d failed\n", test_name, what, cudaGetErrorString(error), n_passed, n_failed + 1);
    exit(1);
}

void *device_alloc(size_t bytes, int fill)
{
    void *memory;
    must(cudaMalloc(&memory, bytes ? bytes : 1), "cudaMalloc");
    must(cudaMemset(memory, fill, bytes), "cudaMemset");
    allocations[n_allocations++] = memory;
    return memory;
}

void *device_copy_of(const void *host, size_t bytes)
{
    void *memory = device_alloc(bytes, 0);
    must(cudaMemcpy(memory, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    return memory;
}

void device_read(void *host, const void *device, size_t bytes)
{
    must(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

void device_free_all(void)
{
    while (n_allocations > 0) cudaFree(allocations[--n_allocations]);
}

size_t model_row_of(const model *m, int32_t seq, int64_t position, int32_t head)
{
    return (((size_t)seq * (size_t)m->max_len + (size_t)position) * (size_t)m->s.n_head_kv + (size_t)head) *
           (size_t)m->s.head_dim;
}

/* A key to the basis that is coded, and back: divided by its channels' factors, or transformed. */
static void key_to_basis(const model *m, int32_t head, float *x)
{
    int32_t d = m->s.head_dim;
    if (m->s.factors) tq_scale_channels(m->factors + head * d, -1, d, 1, x);
    if (!m->transforms) return;
    float plain[TQ_HEAD_DIM_MAX];
    memcpy(plain, x, (size_t)d * sizeof *plain);
    tq_transform_key(tq_transform_of_head(m->transforms, head, d), d, plain, x);
}

static void key_from_basis(const model *m, int32_t head, float *x)
{
    int32_t d = m->s.head_dim;
    if (m->s.factors) tq_scale_channels(m->factors + head * d, 1, d, 1, x);
    if (m->transforms) tq_transform_inverse(tq_transform_of_head(m->transforms, head, d), d, x);
}

static float bf16(float x)
{
    return tq_bfloat_to_float(tq_bfloat_from_float(x));
}

static void draw_rows(model *m)
{
    int32_t d = m->s.head_dim;
    size_t n = model_row_of(m, m->s.n_seq, 0, 0);
    for (int side = 0; side < 2; side++) {
        m->rows[side] = malloc(n * sizeof(float));
        m->decoded[side] = calloc(n, sizeof(float));
        for (size_t i = 0; i < n; i += (size_t)d) {
            vector_kind kind = m->s.outliers ? (vector_kind)(tq_random_next(&m->random) % VECTOR_KINDS) : VECTOR_GAUSSIAN;
            random_vector(&m->random, kind, side ? 0.7f : 1.3f, m->rows[side] + i, d);
            if (m->s.outliers && tq_random_next(&m->random) % 16 == 0) memset(m->rows[side] + i, 0, (size_t)d * sizeof(float));
            /* Factors and transforms follow from what keys hold. */
            if (!side) key_from_basis(m, (int32_t)(i / (size_t)d % (size_t)m->s.n_head_kv), m->rows[side] + i);
            for (int32_t k = 0; k < d; k++) {
                float *x = &m->rows[side][i + (size_t)k];
                if (m->s.bfloat_rows) *x = bf16(*x);
                *x = tq_half_to_float(tq_half_from_float(fmaxf(fminf(*x, 65504.0f), -65504.0f)));
            }
        }
    }
}

/* Of a key's head page in canonical arrangement: where its references begin, and all its bytes. */
static size_t references_begin(const model *m)
{
    tq_format_info info;
    if (tq_format_describe(&info, m->s.k_format, m->s.head_dim) != TQ_OK) abort();
    return (size_t)m->s.page_size * info.bytes_per_vector;
}

static size_t key_page_bytes(const model *m)
{
    size_t n_refs = m->s.k_ref_block ? (size_t)(m->s.page_size / m->s.k_ref_block) : 0;
    return references_begin(m) + n_refs * ((size_t)m->s.head_dim + 2);
}

/* The reference of the block that position is the first coded one of: the mean of the ring that it begins, through sq8, to
 * reference and to its canonical place in the head's page. */
static void set_reference(model *m, tq_codec *ref_codec, int32_t seq, int64_t position, int32_t head, uint8_t *head_page,
                          float *reference)
{
    const setup *s = &m->s;
    size_t d = (size_t)s->head_dim, n_refs = (size_t)(s->page_size / s->k_ref_block);
    size_t i = (size_t)(position % s->page_size / s->k_ref_block);
    uint8_t record[VECTOR_BYTES_MAX], *to = head_page + references_begin(m);
    for (size_t k = 0; k < d; k++) {
        reference[k] = 0;
        for (int32_t n = 0; n < s->n_recent; n++) reference[k] += m->rows[0][model_row_of(m, seq, position + n, head) + k];
        reference[k] /= (float)s->n_recent;
    }
    key_to_basis(m, head, reference);
    if (tq_codec_encode(ref_codec, reference, 1, record) != TQ_OK) abort();
    if (tq_codec_decode(ref_codec, record, 1, reference) != TQ_OK) abort();
    memcpy(to + i * d, record + 2, d);
    memcpy(to + n_refs * d + 2 * i, record, 2);
}

/* What the cache should hold: exact tokens as they came, others through the CPU's encoder, into canonical pages too. */
static void encode_rows(model *m)
{
    const setup *s = &m->s;
    size_t page_size = (size_t)s->page_size, d = (size_t)s->head_dim, key_page = key_page_bytes(m);
    uint8_t record[VECTOR_BYTES_MAX];
    float *references = calloc((size_t)s->n_head_kv * d, sizeof(float)), *x = malloc(d * sizeof(float));
    tq_codec *ref_codec;
    if (tq_codec_create(&ref_codec, TQ_FORMAT_SQ8, s->head_dim, m->store.seed) != TQ_OK) abort();
    for (int side = 0; side < 2; side++) {
        tq_codec *codec;
        tq_format_info info;
        tq_format format = side ? s->v_format : s->k_format;
        int32_t head_dim = side ? s->head_dim_v : s->head_dim;
        if (tq_codec_create(&codec, format, head_dim, m->store.seed) != TQ_OK) abort();
        if (tq_format_describe(&info, format, head_dim) != TQ_OK) abort();
        size_t codes = info.bytes_per_vector - 2, head_page = m->sizes.canonical_bytes / (size_t)s->n_head_kv;
        memset(references, 0, (size_t)s->n_head_kv * d * sizeof(float));
        for (int32_t seq = 0; seq < s->n_seq; seq++) {
            for (int64_t position = 0; position < s->lens[seq]; position++) {
                bool exact = position < s->n_sink || position >= s->lens[seq] - s->n_recent;
                int32_t page = m->page_table[seq * m->max_pages + position / s->page_size];
                size_t offset = (size_t)(position % s->page_size);
                for (int32_t head = 0; head < s->n_head_kv; head++) {
                    size_t row = model_row_of(m, seq, position, head);
                    float *to = m->decoded[side] + row, *reference = references + (size_t)head * d;
                    memcpy(to, m->rows[side] + row, d * sizeof(float));
                    if (exact) continue;
                    uint8_t *base = m->canonical + (size_t)page * m->sizes.canonical_bytes + (size_t)head * head_page;
                    if (!side && s->k_ref_block && (position == s->n_sink || position % s->k_ref_block == 0))
                        set_reference(m, ref_codec, seq, position, head, base, reference);
                    if (side) base += key_page;
                    memcpy(x, to, d * sizeof *x);
                    if (!side) key_to_basis(m, head, x);
                    for (size_t k = 0; k < d; k++) x[k] -= reference[k];
                    if (tq_codec_encode(codec, x, 1, record) != TQ_OK) abort();
                    if (tq_codec_decode(codec, record, 1, to) != TQ_OK) abort();
                    for (size_t k = 0; k < d; k++) to[k] += reference[k];
                    if (!side) key_from_basis(m, head, to);
                    memcpy(base + offset * codes, record + 2, codes);
                    memcpy(base + page_size * codes + 2 * offset, record, 2);
                    m->encoded_mark[(size_t)page * page_size + offset] = 1;
                }
            }
        }
        tq_codec_free(codec);
    }
    tq_codec_free(ref_codec);
    free(references), free(x);
}

void model_open(model *m, const setup *s, uint64_t seed)
{
    memset(m, 0, sizeof *m);
    m->s = *s;
    if (s->head_dim_v == 0) m->s.head_dim_v = s->head_dim;
    m->random = tq_random_stream(seed, 1);
    for (int32_t i = 0; i < s->n_seq; i++) m->max_len = s->lens[i] > m->max_len ? s->lens[i] : m->max_len;
    m->max_pages = m->max_len / s->page_size + 1;
    m->n_pages = m->max_pages * s->n_seq + 3;
    m->store = kv_paged_store();
    m->store.k_format = s->k_format, m->store.v_format = s->v_format;
    m->store.head_dim_v = m->s.head_dim_v;
    m->store.head_dim = s->head_dim, m->store.n_head_kv = s->n_head_kv, m->store.page_size = s->page_size;
    m->store.n_sink = s->n_sink, m->store.n_recent = s->n_recent, m->store.k_ref_block = s->k_ref_block;
    m->store.n_pages = m->n_pages, m->store.n_exact_slots = s->n_seq, m->store.n_ring = s->n_ring;
    CHECK(tq_paged_sizes_get(&m->sizes, &m->store) == TQ_OK, "sizes");
    const size_t page_stride = m->sizes.page_bytes + s->page_gap, exact_stride = m->sizes.exact_bytes + s->exact_gap;
    if (s->page_gap > 0) m->store.page_stride_bytes = page_stride;
    if (s->exact_gap > 0) m->store.exact_stride_bytes = exact_stride;
    size_t n_factors = (size_t)s->n_head_kv * (size_t)s->head_dim;
    m->factors = calloc(n_factors, 1);
    for (size_t i = 0; s->factors && i < n_factors; i++) m->factors[i] = (int8_t)((int)(i * 37 % 17) - 8);
    if (s->factors) m->store.k_factors = device_copy_of(m->factors, n_factors);
    if (s->transforms) {
        kv_random random = {.state = seed + 1};
        size_t bytes;
        m->calibration = make_calibration(&random, 1, s->n_head_kv, s->head_dim);
        m->transforms = tq_calibration_transforms(m->calibration, 0, &bytes);
        m->store.k_transforms = device_copy_of(m->transforms, bytes);
    }
    /* 0xff: NaN in scales, the largest codes. What was not written must not be seen. */
    m->store.pages = device_alloc((size_t)m->n_pages * page_stride, 0xff);
    m->store.exact = device_alloc((size_t)s->n_seq * exact_stride, 0xff);
    m->page_table = malloc((size_t)s->n_seq * (size_t)m->max_pages * sizeof(int32_t));
    int32_t *order = malloc((size_t)m->n_pages * sizeof(int32_t));
    for (int32_t i = 0; i < m->n_pages; i++) order[i] = i;
    for (int32_t i = (int32_t)m->n_pages - 1; i > 0; i--) {
        int32_t j = (int32_t)(tq_random_next(&m->random) % (uint64_t)(i + 1)), swap = order[i];
        order[i] = order[j], order[j] = swap;
    }
    for (int64_t i = 0; i < s->n_seq * m->max_pages; i++) m->page_table[i] = order[i];
    free(order);
    m->device_page_table = device_copy_of(m->page_table, (size_t)s->n_seq * (size_t)m->max_pages * sizeof(int32_t));
    m->canonical = calloc((size_t)m->n_pages, m->sizes.canonical_bytes);
    m->encoded_mark = calloc((size_t)m->n_pages, (size_t)s->page_size);
    draw_rows(m);
    encode_rows(m);
}

void *device_typed_copy(const float *x, size_t n, tq_dtype dtype)
{
    if (dtype == TQ_DTYPE_F32) return device_copy_of(x, n * sizeof(float));
    uint16_t *narrow = malloc(n * sizeof(uint16_t));
    for (size_t i = 0; i < n; i++) narrow[i] = dtype == TQ_DTYPE_F16 ? tq_half_from_float(x[i]) : tq_bfloat_from_float(x[i]);
    void *copy = device_copy_of(narrow, n * sizeof(uint16_t));
    free(narrow);
    return copy;
}

void model_append(model *m)
{
    const setup *s = &m->s;
    size_t width = (size_t)s->n_head_kv * (size_t)s->head_dim, v_width = (size_t)s->n_head_kv * (size_t)s->head_dim_v;
    int64_t *done = calloc((size_t)s->n_seq, sizeof(int64_t)), left = 0;
    for (int32_t i = 0; i < s->n_seq; i++) left += s->lens[i];
    int64_t room = left + 64;
    float *k = malloc((size_t)room * width * sizeof(float)), *v = malloc((size_t)room * v_width * sizeof(float));
    int64_t *slots = malloc((size_t)room * sizeof(int64_t)), *positions = malloc((size_t)room * sizeof(int64_t));
    int32_t *seqs = malloc((size_t)room * sizeof(int32_t));
    for (bool first = true; left > 0; first = false) {
        int64_t n = 0, longest = 0;
        for (int32_t seq = 0; seq < s->n_seq; seq++) {
            int64_t rest = s->lens[seq] - done[seq], most = first ? rest / 2 : tq_random_next(&m->random) % 4 ? 3 : 200;
            int64_t take = most > 0 ? (int64_t)(tq_random_next(&m->random) % (uint64_t)(most + 1)) : 0;
            if (first && s->first_batch > 0) take = s->first_batch;
            if (rest < 200 || take > rest) take = rest;
            if (take > longest) longest = take;
            for (int64_t i = 0; i < take; i++, n++) {
                int64_t position = done[seq]++;
                memcpy(k + (size_t)n * width, m->rows[0] + model_row_of(m, seq, position, 0), width * sizeof(float));
                for (int32_t head = 0; head < s->n_head_kv; head++) {
                    memcpy(v + (size_t)n * v_width + head * s->head_dim_v, m->rows[1] + model_row_of(m, seq, position, head),
                           (size_t)s->head_dim_v * sizeof(float));
                }
                int64_t page = m->page_table[seq * m->max_pages + position / s->page_size];
                slots[n] = page * s->page_size + position % s->page_size;
                positions[n] = position, seqs[n] = seq;
            }
            left -= take;
        }
        if (n == 0) continue;
        for (int pad = 0; pad < 2; pad++, n++) { /* as a captured batch has */
            memset(k + (size_t)n * width, 0xff, width * sizeof(float));
            memset(v + (size_t)n * v_width, 0xff, v_width * sizeof(float));
            slots[n] = -1, positions[n] = -1, seqs[n] = -1;
        }
        int32_t zero = 0, n_bad;
        tq_paged_append_params p = {.struct_size = sizeof p};
        p.n_tok = n;
        p.dtype = s->dtype == TQ_DTYPE_BF16 ? TQ_DTYPE_F32 : s->dtype; /* the model's rows are FP16 numbers */
        p.k = device_typed_copy(k, (size_t)n * width, p.dtype), p.v = device_typed_copy(v, (size_t)n * v_width, p.dtype);
        p.slot_mapping = device_copy_of(slots, (size_t)n * sizeof(int64_t));
        p.positions = device_copy_of(positions, (size_t)n * sizeof(int64_t));
        p.seq_ids = device_copy_of(seqs, (size_t)n * sizeof(int32_t));
        p.page_table = m->device_page_table, p.page_table_stride = m->max_pages;
        p.n_not_finite = device_copy_of(&zero, sizeof zero);
        if (longest <= s->n_recent && s->n_recent > 0) {
            tq_paged_append_params half = p;
            half.half = TQ_APPEND_ENCODE;
            if (!s->k_ref_block || longest <= 1) half.k = half.v = NULL;
            CHECK(tq_paged_append(&m->store, &half, NULL) == TQ_OK, "encode");
            p.half = TQ_APPEND_STORE;
        }
        CHECK(tq_paged_append(&m->store, &p, NULL) == TQ_OK, "append");
        device_read(&n_bad, p.n_not_finite, sizeof n_bad);
        CHECK(n_bad == 0, "append: %d vectors are not finite", (int)n_bad);
    }
    free(done), free(k), free(v), free(slots), free(positions), free(seqs);
}

void model_check_pages(model *m)
{
    const setup *s = &m->s;
    size_t bytes = (size_t)m->n_pages * m->sizes.canonical_bytes, page_size = (size_t)s->page_size;
    int32_t *ids = malloc((size_t)m->n_pages * sizeof(int32_t));
    for (int32_t i = 0; i < m->n_pages; i++) ids[i] = i;
    uint8_t *found = malloc(bytes);
    void *device = device_alloc(bytes, 0);
    CHECK(tq_paged_export(&m->store, device_copy_of(ids, (size_t)m->n_pages * sizeof(int32_t)), m->n_pages, device, NULL) ==
              TQ_OK,
          "export");
    device_read(found, device, bytes);
    size_t heads = (size_t)s->n_head_kv, n_wrong = 0, n_compared = 0, d = (size_t)s->head_dim;
    for (size_t page = 0; page < (size_t)m->n_pages; page++) {
        for (size_t head = 0; head < heads; head++) {
            size_t base = page * m->sizes.canonical_bytes + head * (m->sizes.canonical_bytes / heads);
            for (int side = 0; side < 2; side++) {
                tq_format_info info;
                tq_format format = side ? s->v_format : s->k_format;
                if (tq_format_describe(&info, format, side ? s->head_dim_v : s->head_dim) != TQ_OK) abort();
                size_t codes = info.bytes_per_vector - 2;
                for (size_t i = 0; i < page_size; i++) {
                    if (!m->encoded_mark[page * page_size + i]) continue;
                    size_t at = base + i * codes, scale_at = base + page_size * codes + 2 * i;
                    n_compared++;
                    n_wrong += memcmp(found + at, m->canonical + at, codes) != 0 ||
                               memcmp(found + scale_at, m->canonical + scale_at, 2) != 0;
                    if (side || !s->k_ref_block) continue;
                    size_t block = (size_t)s->k_ref_block, n_refs = page_size / block, refs = base + references_begin(m);
                    size_t ref_at = refs + i / block * d, ref_scale_at = refs + n_refs * d + 2 * (i / block);
                    n_wrong += memcmp(found + ref_at, m->canonical + ref_at, d) != 0 ||
                               memcmp(found + ref_scale_at, m->canonical + ref_scale_at, 2) != 0;
                }
                base += key_page_bytes(m);
            }
        }
    }
    CHECK(n_wrong == 0, "%zu of %zu vectors are not the CPU's, bit for bit", n_wrong, n_compared);
    free(ids), free(found);
}

/* The queries and learned sinks of a model: functions of its shape and factors. */
float model_query_value(const model *m, size_t i)
{
    tq_random random = tq_random_stream(i * 7919u + (uint64_t)m->s.head_dim, 5);
    float x = (float)random_gaussian(&random) * 1.5f;
    if (m->s.factors) {
        size_t d = (size_t)m->s.head_dim, head = i / d % (size_t)(m->s.group * m->s.n_head_kv) / (size_t)m->s.group;
        x *= tq_channel_factor((int8_t)-m->factors[head * d + i % d]);
    }
    return m->s.dtype == TQ_DTYPE_BF16 ? bf16(x) : tq_half_to_float(tq_half_from_float(x));
}

static float sink_value(int32_t head)
{
    return (float)(head % 5) - 1.0f;
}

int32_t model_out_dim(const model *m)
{
    return m->s.out_dim ? m->s.out_dim : m->s.head_dim_v;
}

static int32_t heads_of(const model *m)
{
    return m->s.group * m->s.n_head_kv;
}

static float slope_value(int32_t head)
{
    return head % 5 == 1 ? 0.0f : 0.5f / (float)(1 + head);
}

/* A mask's number: a function of its place. Every seventh row hides all. */
static float mask_value(const model *m, int32_t seq, int64_t position, int32_t head, int64_t column)
{
    uint64_t row = ((uint64_t)seq * (uint64_t)m->max_len + (uint64_t)position) * (uint64_t)heads_of(m);
    if (m->s.mask_of_heads) row += (uint64_t)head;
    tq_random random = tq_random_stream(row * (uint64_t)m->max_len + (uint64_t)column, 11);
    uint64_t drawn = tq_random_next(&random) % 1000;
    if (drawn < 300 || position % 7 == 3) return -INFINITY;
    return tq_half_to_float(tq_half_from_float((float)drawn / 250 - 3));
}

static double bias_value(const model *m, int32_t seq, int64_t position, int32_t head, int64_t column)
{
    double slope = m->s.alibi ? (double)slope_value(head) : 1;
    if (!m->s.mask) return m->s.alibi ? -slope * (double)(position - column) : 0;
    double x = (double)mask_value(m, seq, position, head, column);
    return isinf(x) ? x : slope * x;
}

void model_set_bias(const model *m, tq_paged_attend_params *params, const int32_t *seqs, const int64_t *positions, size_t n)
{
    size_t width = (size_t)m->max_len + 3, heads = m->s.mask_of_heads ? (size_t)heads_of(m) : 1;
    params->out_dim = m->s.out_dim;
    if (m->s.alibi) {
        float *slopes = malloc((size_t)heads_of(m) * sizeof(float));
        for (int32_t head = 0; head < heads_of(m); head++) slopes[head] = slope_value(head);
        params->alibi_slopes = device_copy_of(slopes, (size_t)heads_of(m) * sizeof(float));
        free(slopes);
    }
    if (!m->s.mask) return;
    params->mask_is_f16 = m->s.mask_is_f16;
    params->mask_head_stride = m->s.mask_of_heads ? (int64_t)width : 0;
    params->mask_token_stride = (int64_t)(heads * width + 5);
    size_t count = n * (size_t)params->mask_token_stride;
    float *mask = malloc((count + 1) * sizeof(float));
    for (size_t i = 0; i < count; i++) mask[i] = NAN; /* what nobody may look at */
    for (size_t i = 0; i < n * heads; i++) {
        float *row = mask + i / heads * (size_t)params->mask_token_stride + i % heads * width;
        int64_t position = positions[i / heads];
        for (int64_t c = 0; c <= position; c++) row[c] = mask_value(m, seqs[i / heads], position, (int32_t)(i % heads), c);
    }
    params->mask = device_typed_copy(mask, count, m->s.mask_is_f16 ? TQ_DTYPE_F16 : TQ_DTYPE_F32);
    free(mask);
}

double model_attend_row(const model *m, int32_t seq, int64_t position, int64_t oldest_exact, int32_t head, const float *q,
                        bool narrow, double *weights, double *out)
{
    const setup *s = &m->s;
    int32_t d = s->head_dim;
    const float scale = 1.0f / sqrtf((float)d), sink = sink_value(head);
    const int64_t own = position + 1 - s->n_recent, recent = own > oldest_exact ? own : oldest_exact;
    const int32_t query_head = head;
    head /= s->group;
    int64_t begin = s->window > 0 && position + 1 > s->window ? position + 1 - s->window : 0;
    double max = s->sinks ? (double)sink : -INFINITY, sum = 0;
    for (int64_t c = begin; c <= position; c++) {
        const float *key = (c < s->n_sink || c >= recent ? m->rows : m->decoded)[0] + model_row_of(m, seq, c, head);
        double dot = 0;
        for (int32_t i = 0; i < d; i++) dot += (double)(narrow ? bf16(q[i]) : q[i]) * (double)(narrow ? bf16(key[i]) : key[i]);
        dot *= (double)scale;
        if (s->softcap > 0) dot = (double)s->softcap * tanh(dot / (double)s->softcap);
        weights[c] = dot + bias_value(m, seq, position, query_head, c);
        if (weights[c] > max) max = weights[c];
    }
    for (int32_t i = 0; i < s->head_dim_v; i++) out[i] = 0;
    for (int64_t c = begin; c <= position; c++) {
        const float *value = (c < s->n_sink || c >= recent ? m->rows : m->decoded)[1] + model_row_of(m, seq, c, head);
        double p = isinf(weights[c]) ? 0 : exp(weights[c] - max);
        sum += p;
        if (narrow) p = (double)bf16((float)p);
        for (int32_t i = 0; i < s->head_dim_v; i++) out[i] += p * (double)(narrow ? bf16(value[i]) : value[i]);
    }
    if (s->sinks) sum += exp((double)sink - max);
    for (int32_t i = 0; i < s->head_dim_v; i++) {
        out[i] = sum > 0 && position >= begin ? out[i] / sum : 0.0;
        if (narrow) out[i] = (double)bf16((float)out[i]);
    }
    return sum > 0 ? max + log(sum) : -INFINITY;
}

void model_attend(model *m, int32_t first, int32_t n, int64_t max_seq_len, float *out, float *lse)
{
    const setup *s = &m->s;
    int32_t n_head = s->group * s->n_head_kv;
    size_t width = (size_t)n_head * (size_t)s->head_dim, rows = (size_t)n * (size_t)s->n_query;
    size_t n_out = rows * (size_t)n_head * (size_t)s->head_dim_v;
    float *q = malloc(rows * width * sizeof(float)), *sinks = malloc((size_t)n_head * sizeof(float));
    for (size_t i = 0; i < rows * width; i++) q[i] = model_query_value(m, (size_t)first * (size_t)s->n_query * width + i);
    for (int32_t i = 0; i < n_head; i++) sinks[i] = sink_value(i);
    tq_paged_attend_params p = {.struct_size = sizeof p};
    p.n_seq = n, p.n_query = s->n_query, p.n_head = n_head, p.dtype = s->dtype;
    p.q = device_typed_copy(q, rows * width, s->dtype);
    p.out = device_alloc(n_out * sizeof(float), 0xff);
    p.lse = device_alloc(rows * (size_t)n_head * sizeof(float), 0xff);
    p.out_head_stride = s->head_dim_v, p.out_token_stride = (int64_t)n_head * s->head_dim_v;
    p.page_table = m->device_page_table + first * m->max_pages, p.page_table_stride = m->max_pages;
    p.seq_lens_are_64 = true;
    p.seq_lens = device_copy_of(s->lens + first, (size_t)n * sizeof(int64_t));
    p.max_seq_len = max_seq_len;
    int32_t *slots = malloc((size_t)n * sizeof(int32_t));
    for (int32_t i = 0; i < n; i++) slots[i] = first + i;
    p.exact_slots = device_copy_of(slots, (size_t)n * sizeof(int32_t));
    int32_t *seqs = malloc(rows * sizeof(int32_t));
    int64_t *positions = malloc(rows * sizeof(int64_t));
    for (size_t i = 0; i < rows; i++) {
        seqs[i] = first + (int32_t)i / s->n_query;
        positions[i] = s->lens[seqs[i]] - s->n_query + (int32_t)i % s->n_query;
    }
    model_set_bias(m, &p, seqs, positions, rows);
    p.softmax_scale = 1.0f / sqrtf((float)s->head_dim);
    p.softcap = s->softcap, p.window = s->window, p.deterministic = s->deterministic;
    p.sinks = s->sinks ? device_copy_of(sinks, (size_t)n_head * sizeof(float)) : NULL;
    CHECK(tq_paged_workspace_bytes(&p.workspace_bytes, &m->store, &p) == TQ_OK, "workspace");
    p.workspace = device_alloc(p.workspace_bytes, 0);
    for (int repeat = 0; repeat < 2; repeat++) CHECK(tq_paged_attend(&m->store, &p, NULL) == TQ_OK, "attend");
    must(cudaDeviceSynchronize(), "attend");
    if (s->dtype == TQ_DTYPE_F32) {
        device_read(out, p.out, n_out * sizeof(float));
    } else {
        uint16_t *narrow = malloc(n_out * sizeof(uint16_t));
        device_read(narrow, p.out, n_out * sizeof(uint16_t));
        for (size_t i = 0; i < n_out; i++) {
            out[i] = s->dtype == TQ_DTYPE_F16 ? tq_half_to_float(narrow[i]) : tq_bfloat_to_float(narrow[i]);
        }
        free(narrow);
    }
    device_read(lse, p.lse, rows * (size_t)n_head * sizeof(float));
    free(q), free(sinks), free(slots), free(seqs), free(positions);
}

float *model_check_attend(model *m)
{
    const setup *s = &m->s;
    int32_t n_head = s->group * s->n_head_kv, d = s->head_dim, d_v = s->head_dim_v, out_dim = model_out_dim(m);
    size_t rows = (size_t)s->n_seq * (size_t)s->n_query * (size_t)n_head;
    float *out = malloc(rows * (size_t)d_v * sizeof(float)), *lse = malloc(rows * sizeof(float)), *q = malloc((size_t)d * 4);
    double *weights = malloc((size_t)(m->max_len + 1) * sizeof(double)), *exact = malloc((size_t)d * 8),
           *narrow = malloc((size_t)d * 8);
    model_attend(m, 0, s->n_seq, m->max_len, out, lse);
    double error = 0, error_narrow = 0, size = 0, lse_error = 0, lse_narrow = 0;
    for (size_t row = 0; row < rows; row++) {
        int32_t head = (int32_t)(row % (size_t)n_head), token = (int32_t)(row / (size_t)n_head), seq = token / s->n_query;
        int64_t position = s->lens[seq] - s->n_query + token % s->n_query;
        for (int32_t i = 0; i < d; i++) q[i] = model_query_value(m, row * (size_t)d + (size_t)i);
        const int64_t oldest = s->lens[seq] - (s->n_ring ? s->n_ring : s->n_recent);
        double l = model_attend_row(m, seq, position, oldest, head, q, false, weights, exact);
        double ln = model_attend_row(m, seq, position, oldest, head, q, true, weights, narrow);
        for (int32_t i = out_dim; i < d_v; i++) { /* as it was before */
            CHECK(isnan(out[row * (size_t)d_v + (size_t)i]), "row %zu: more than out_dim values are written", row);
        }
        for (int32_t i = 0; i < out_dim; i++) {
            double x = (double)out[row * (size_t)d_v + (size_t)i];
            if (!CHECK(isfinite(x), "row %zu: not finite", row)) break;
            error += (x - exact[i]) * (x - exact[i]);
            error_narrow += (narrow[i] - exact[i]) * (narrow[i] - exact[i]);
            size += exact[i] * exact[i];
        }
        if (isinf(l)) {
            CHECK(isinf(lse[row]), "row %zu: lse is %g", row, (double)lse[row]);
        } else {
            lse_error = fmax(lse_error, fabs((double)lse[row] - l));
            lse_narrow = fmax(lse_narrow, fabs(ln - l));
        }
    }
    size = size > 0 ? size : 1; /* no row sees anything */
    error = sqrt(error / size), error_narrow = sqrt(error_narrow / size);
    CHECK(error <= 2 * error_narrow, "error %.2e, but BF16 has %.2e", error, error_narrow);
    CHECK(lse_error <= 4 * lse_narrow + 1e-3, "lse is off by %.2e, BF16's by %.2e", lse_error, lse_narrow);
    printf("       error %.2e (BF16 %.2e), lse %.1e (%.1e)\n", error, error_narrow, lse_error, lse_narrow);
    free(lse), free(q), free(weights), free(exact), free(narrow);
    return out;
}

void model_close(model *m)
{
    for (int side = 0; side < 2; side++) free(m->rows[side]), free(m->decoded[side]);
    free(m->page_table), free(m->canonical), free(m->encoded_mark), free(m->factors);
    tq_calibration_free(m->calibration);
    device_free_all();
}
