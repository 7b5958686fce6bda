/* SPDX-License-Identifier: MIT */
/* CUDA without a device: the layout of records, how calls are cut, the levels, and what is refused. tests/cuda has the rest. */
#define _POSIX_C_SOURCE 200809L /* setenv */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "codec/tables.h"
#include "device/cuda_store.h"
#include "kernels/cuda/choice.h"
#include "kernels/cuda/layout.h"
#include "kernels/cuda/levels.h"
#include "kernels/cuda/split.h"
#include "kv_test.h"
#include "last_message.h"

static const int32_t head_dims[] = {64, 96, 128, 192, 256}, all_bits[] = {8, 4, 3, 2};

/* Each bit of each code has a place of its own, and no byte is shared by tokens. */
static void check_plane(tq_plane plane)
{
    int32_t n_bytes = tq_plane_bytes(plane), n_bits = 0;
    uint8_t *used = calloc((size_t)n_bytes, 1);
    int8_t *owner = malloc((size_t)n_bytes);
    memset(owner, -1, (size_t)n_bytes);
    for (int32_t token = 0; token < TQ_RECORD_TOKENS; token++) {
        for (int32_t dim = 0; dim < plane.head_dim; dim++) {
            for (int32_t b = 0; b < plane.bits; b++, n_bits++) {
                int32_t bit = tq_code_bit(plane, token, dim, b), byte = bit / 8;
                assert_in_range(byte, 0, n_bytes - 1);
                assert_int_equal(used[byte] >> (bit % 8) & 1, 0);
                assert_true(owner[byte] < 0 || owner[byte] == token);
                used[byte] = (uint8_t)(used[byte] | 1u << bit % 8);
                owner[byte] = (int8_t)token;
            }
        }
    }
    assert_int_equal(n_bits, 8 * n_bytes); /* and none is left over */
    free(used);
    free(owner);
}

static void check_circles(tq_plane plane)
{
    int32_t n_bytes = tq_plane_bytes(plane), per_token = plane.head_dim * plane.bits / 8;
    uint8_t *used = calloc((size_t)n_bytes, 1);
    for (int32_t token = 0; token < TQ_RECORD_TOKENS; token++) {
        for (int32_t byte = 0; byte < per_token; byte++) {
            int32_t offset = tq_circle_offset(plane, token, byte);
            assert_in_range(offset, 0, n_bytes - 1);
            assert_int_equal(used[offset], 0);
            used[offset] = 1;
        }
    }
    free(used);
}

static void test_layout(void **state)
{
    (void)state;
    int n_planes = 0;
    for (size_t d = 0; d < sizeof head_dims / sizeof head_dims[0]; d++) {
        for (size_t b = 0; b < sizeof all_bits / sizeof all_bits[0]; b++) {
            for (int side = 0; side < 2; side++) {
                tq_plane scalar = {all_bits[b], head_dims[d], side == 1, false, false},
                         trellis = {all_bits[b], head_dims[d], side == 1, true, false};
                if (tq_plane_has_strings(scalar)) check_plane(scalar), n_planes++;
                if (all_bits[b] != 8 && tq_plane_has_strings(trellis)) check_circles(trellis), n_planes++;
                assert_int_equal(tq_record_bytes(scalar, scalar) % 128, 0);
            }
        }
    }
    assert_int_equal(n_planes, 2 * (20 + 12));
}

/* Which stores have plain planes, at all pairs of the library's head_dims: those that docs/cuda.md does not list. Their records
 * come by copies of 16 bytes. */
static void test_plain_stores(void **state)
{
    (void)state;
    int32_t n, n_plain = 0;
    const int32_t *all = tq_head_dim_list(&n);
    for (int32_t i = 0; i < n * n * 4; i++) {
        const int32_t d = all[i / 4 / n], d_v = all[i / 4 % n];
        const bool k_trellis = i & 1, v_trellis = i & 2;
        const tq_plane key = {3, d, false, k_trellis, false}, value = {4, d_v, true, v_trellis, false};
        bool has_strings = d == 192 && d_v == 128;
        for (size_t k = 0; k < sizeof head_dims / sizeof head_dims[0]; k++) has_strings |= d == head_dims[k] && d == d_v;
        if (d == 96 && (k_trellis || v_trellis)) has_strings = false;
        assert_int_equal(tq_is_plain(key, value), !has_strings);
        n_plain += !has_strings;
        assert_int_equal(tq_record_bytes(key, value) % 16, 0);
        assert_true(tq_reference_bytes(d) >= d + 2 && tq_reference_bytes(d) % 16 == 0 && tq_reference_bytes(d) < d + 18);
        tq_paged_store store = kv_paged_store();
        store.k_format = k_trellis ? TQ_FORMAT_TT3 : TQ_FORMAT_SQ3, store.v_format = v_trellis ? TQ_FORMAT_TT4 : TQ_FORMAT_SQ4;
        store.head_dim = d, store.head_dim_v = d_v, store.n_head_kv = 3, store.n_recent = 8, store.k_ref_block = 64;
        tq_paged_sizes sizes;
        tq_device_store device;
        assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
        assert_int_equal(tq_cuda_shape_store(&device, &store), TQ_OK);
        assert_int_equal(device.is_plain, !has_strings);
        const size_t of_head = sizes.page_bytes / (size_t)store.n_head_kv, tokens = (size_t)store.page_size;
        const size_t vectors = tokens * (size_t)(d * 3 / 8 + d_v * 4 / 8 + 4);
        assert_int_equal(of_head, vectors + tokens / 64 * (size_t)tq_reference_bytes(d));
    }
    assert_int_equal(n_plain, 4 * n * n - 5 * 4 - 4 + 3);
}

/* Kernels for any head_dim take the Hartley matrix by one of its rows. */
static void test_rotations(void **state)
{
    (void)state;
    int32_t n;
    const int32_t *all = tq_head_dim_list(&n);
    for (int32_t i = 0; i < n; i++) {
        tq_paged_store store = kv_paged_store();
        tq_device_store device;
        tq_rotation rotation;
        store.k_format = store.v_format = TQ_FORMAT_SQ4, store.head_dim = store.head_dim_v = all[i], store.n_head_kv = 1;
        assert_int_equal(tq_cuda_shape_store(&device, &store), TQ_OK);
        tq_rotation_init(&rotation, all[i], store.seed);
        const int32_t m = device.rotation.m;
        assert_int_equal(m * device.rotation.pow2, all[i]);
        assert_int_equal(device.rotation.n_rounds, rotation.n_rounds);
        for (int32_t k = 0; m > 1 && k < m * m; k++) {
            assert_true(device.rotation.cas[k / m * (k % m) % m] == rotation.hartley[k]);
            if (m == 3) assert_true(device.rotation.hartley[k] == rotation.hartley[k]);
        }
        for (int32_t k = 0; k < rotation.n_rounds * all[i]; k++) {
            const uint32_t word = device.rotation.signs[k / all[i]][k % all[i] / 32];
            assert_true((word >> k % all[i] % 32 & 1u) == (rotation.signs[k / all[i]][k % all[i]] < 0));
        }
    }
}

/* A page has as many bytes on the device as in the format's own arrangement: nothing is padded but references, of which each
 * block and head has one. */
static void test_sizes(void **state)
{
    (void)state;
    static const tq_format formats[] = {TQ_FORMAT_SQ8, TQ_FORMAT_SQ4, TQ_FORMAT_SQ3, TQ_FORMAT_SQ2,
                                        TQ_FORMAT_TT4, TQ_FORMAT_TT3, TQ_FORMAT_TT2};
    for (int k = 0; k < 7; k++) {
        for (int v = 0; v < 7; v++) {
            tq_paged_store store;
            tq_paged_sizes sizes;
            tq_format_info info[2];
            store = kv_paged_store();
            store.k_format = formats[k], store.v_format = formats[v];
            store.n_head_kv = 3, store.page_size = 96, store.n_sink = 4, store.n_recent = 10;
            assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
            assert_int_equal(tq_format_describe(&info[0], formats[k], 128), TQ_OK);
            assert_int_equal(tq_format_describe(&info[1], formats[v], 128), TQ_OK);
            assert_int_equal(sizes.page_bytes, 3 * 96 * (info[0].bytes_per_vector + info[1].bytes_per_vector));
            assert_int_equal(sizes.canonical_bytes, sizes.page_bytes);
            assert_int_equal(sizes.exact_bytes, 2 * 3 * 14 * 128 * 2);
            store.page_size = 192, store.k_ref_block = 64, store.n_ring = 25;
            size_t vectors = 192 * (info[0].bytes_per_vector + info[1].bytes_per_vector);
            assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
            assert_int_equal(sizes.page_bytes, 3 * (vectors + 3 * (128 + 16)));
            assert_int_equal(sizes.canonical_bytes, 3 * (vectors + 3 * (128 + 2)));
            assert_int_equal(sizes.exact_bytes, 2 * 3 * 29 * 128 * 2);
        }
    }
}

/* A format that kernels do not know is refused, also one that is like another but for its bits. */
static void test_formats_without_a_layout(void **state)
{
    (void)state;
    static const bool has_layout[TQ_FORMAT_COUNT] = {
        [TQ_FORMAT_SQ8] = true, [TQ_FORMAT_SQ4] = true, [TQ_FORMAT_SQ3] = true, [TQ_FORMAT_SQ2] = true,
        [TQ_FORMAT_TT4] = true, [TQ_FORMAT_TT3] = true, [TQ_FORMAT_TT2] = true};
    for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
        tq_paged_store store = kv_paged_store();
        tq_paged_sizes sizes;
        store.n_head_kv = 1, store.k_format = (tq_format)format;
        assert_int_equal(tq_paged_sizes_get(&sizes, &store), has_layout[format] ? TQ_OK : TQ_ERR_FORMAT);
    }
}

/* A copy of contiguous bytes brings a record with the reference of its block; a head's page has each byte once. */
static void test_references(void **state)
{
    (void)state;
    for (size_t d = 0; d < sizeof head_dims / sizeof head_dims[0]; d++) {
        tq_plane key = {8, head_dims[d], false, false, false}, value = {2, head_dims[d], true, false, false};
        int32_t record = tq_record_bytes(key, value), reference = tq_reference_bytes(head_dims[d]), end = 0;
        assert_true(reference >= head_dims[d] + 2 && reference % 16 == 0);
        for (int32_t i = 0; i < 8; i++) {
            int32_t begin = tq_record_begin(record, reference, i), of_block = tq_record_begin(record, reference, i & ~1);
            int32_t own = begin + tq_record_within(reference, i), shared = begin + tq_reference_within(record, i);
            assert_int_equal(own, end + (i % 2 ? reference : 0));
            assert_int_equal(shared, of_block + record);
            assert_in_range(own - begin, 0, reference);
            assert_in_range(shared - begin, 0, record);
            assert_int_equal(begin % 16, 0);
            end = own + record;
            assert_int_equal(tq_record_begin(record, 0, i) + tq_record_within(0, i), i * record);
        }
        assert_int_equal(tq_device_head_page_bytes(record, reference, 8), end);
        assert_int_equal(tq_device_head_page_bytes(record, 0, 3), 3 * record);
    }
}

/* The share of a standard deviation by which levels times step miss the centroids, on N(0,1). */
static double level_error(const int *levels, double step, const float *centroids, const float *boundaries, int n)
{
    double sum = 0;
    for (int i = 0; i < n / 2; i++) {
        double centroid = (double)centroids[n / 2 + i], miss = levels[i] * step - centroid;
        double from = (double)boundaries[n / 2 - 1 + i], to = i == n / 2 - 1 ? 40.0 : (double)boundaries[n / 2 + i];
        sum += (erf(to / sqrt(2)) - erf(from / sqrt(2))) * miss * miss;
        assert_in_range(levels[i], 0, 127);
    }
    return sqrt(sum);
}

static void test_levels(void **state)
{
    (void)state;
    static const int levels4[] = TQ_LEVELS_4, levels3[] = TQ_LEVELS_3, levels2[] = TQ_LEVELS_2;
    assert_true(level_error(levels4, TQ_LEVEL_STEP_4, tq_lloyd4_centroids, tq_lloyd4_boundaries, 16) < 0.0033);
    assert_true(level_error(levels3, TQ_LEVEL_STEP_3, tq_lloyd3_centroids, tq_lloyd3_boundaries, 8) < 0.0011);
    assert_true(level_error(levels2, TQ_LEVEL_STEP_2, tq_lloyd2_centroids, tq_lloyd2_boundaries, 4) < 0.0003);
}

/* What the encoder of large batches assumes of the codebooks (encode_many.cuh): no quarter [i / 4, (i + 1) / 4) has two
 * boundaries. */
static void test_quarters(void **state)
{
    (void)state;
    static const float *const boundaries[] = {tq_lloyd4_boundaries, tq_lloyd3_boundaries, tq_lloyd2_boundaries};
    static const int n_boundaries[] = {15, 7, 3};
    for (int k = 0; k < 3; k++) {
        for (int i = 0; i < n_boundaries[k]; i++) {
            assert_in_range((int)floorf(4.0f * boundaries[k][i]) + 48, 0, 95);
            if (i > 0) assert_true(floorf(4.0f * boundaries[k][i]) > floorf(4.0f * boundaries[k][i - 1]));
        }
    }
}

/* n records, `together` at a time. */
static void check_cuts(tq_decode_cut cut, int32_t n, int32_t together)
{
    const tq_tile_cut plain = tq_tile_cut_of(n, together, false, cut.splits_allowed, cut.split_records_min);
    assert_in_range(plain.n_splits, 1, cut.splits_allowed);
    assert_true(plain.n_splits == 1 || plain.records % together == 0);
    assert_true((int64_t)plain.n_splits * plain.records >= n);
    assert_true(n == 0 || (int64_t)(plain.n_splits - 1) * plain.records < n); /* no split is empty */
    const tq_tile_cut exact = tq_tile_cut_of(n, together, true, cut.splits_allowed, cut.split_records_min);
    const int64_t before = (int64_t)(exact.n_splits - 1) * exact.records, last = n > before ? n - before : 0;
    assert_in_range(exact.n_splits, 1, cut.splits_allowed);
    assert_true(exact.n_splits == 1 || exact.records % together == 0);
    assert_true((int64_t)exact.n_splits * exact.records >= n);
    assert_true(exact.n_splits < 2 || before - exact.records < n); /* none but the last is empty */
    /* The longest split is no longer than the plain cut's by more than exact tokens take, and the last one, which has them, is
     * not the longest, unless they are all that it has. */
    assert_in_range(exact.records, plain.records, plain.records + TQ_EXACT_AS_RECORDS);
    if (exact.n_splits > 1 && last > 0) assert_true(last + TQ_EXACT_AS_RECORDS <= exact.records);
}

static void test_splits(void **state)
{
    (void)state;
    static const int64_t tiles[] = {1, 8, 64, 128, 133, 512, 5000}, records[] = {0, 1, 7, 128, 1000, 4096, 100000};
    for (int t = 0; t < 7; t++) {
        for (int r = 0; r < 7; r++) {
            for (int deterministic = 0; deterministic < 2; deterministic++) {
                tq_decode_cut cut = tq_decode_cut_of(tiles[t], records[r], 128, 132, deterministic);
                assert_in_range(cut.splits_allowed, 1, TQ_SPLITS_MAX);
                if (!deterministic && tiles[t] <= 132)
                    assert_true(cut.splits_allowed == 1 || cut.splits_allowed * tiles[t] <= 132);
                for (int32_t n = 0; n <= records[r] && n < 5000; n += 1 + n / 3) {
                    for (int32_t together = 1; together <= 2; together++) check_cuts(cut, n, together);
                }
            }
        }
    }
    /* The workspace of a call is enough for all smaller ones, but where several waves have more than one query. */
    for (int64_t n_tiles = 1; n_tiles < 600; n_tiles += 1 + n_tiles / 7) {
        for (int64_t n_records = 1; n_records < 9000; n_records += 1 + n_records / 3) {
            for (int i = 0; i < 4; i++) {
                const int32_t head_dim = i % 2 ? 64 : 128;
                tq_decode_cut cut = tq_decode_cut_of(n_tiles, n_records, head_dim, 132, i / 2);
                for (int64_t more = 0; more < 400; more += 57) {
                    int64_t of_one = n_tiles > 132 ? n_tiles + more / 2 : more / 9;
                    int64_t most = tq_partials_most(n_tiles + more, of_one, n_records + more, head_dim, 132, i / 2);
                    assert_int_equal(tq_splits_within(cut.splits_allowed, n_tiles, most), cut.splits_allowed);
                }
            }
        }
    }
    assert_int_equal(tq_splits_within(16, 100, 900), 8);
    assert_int_equal(tq_splits_within(16, 100, 100), 1);
    tq_decode_cut alone = tq_decode_cut_of(8, 100, 128, 132, true), batch = tq_decode_cut_of(4096, 9000, 128, 114, true);
    assert_int_equal(alone.splits_allowed, batch.splits_allowed);
    assert_int_equal(alone.split_records_min, batch.split_records_min);
    assert_int_equal(alone.small_blocks, batch.small_blocks);
}

static tq_paged_store usable_store(void *pages)
{
    tq_paged_store store = kv_paged_store();
    store.n_head_kv = 8, store.n_pages = 1, store.pages = pages;
    return store;
}

static void test_store_is_checked(void **state)
{
    (void)state;
    tq_paged_sizes sizes;
    tq_paged_store store = usable_store(NULL);
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
    assert_int_equal(tq_paged_sizes_get(NULL, &store), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_paged_sizes_get(&sizes, NULL), TQ_ERR_ARGUMENT);
    store.page_size = 48;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_ARGUMENT);
    store = usable_store(NULL);
    store.k_format = TQ_FORMAT_F16;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_FORMAT);
    assert_non_null(strstr(last_message, "f16"));
    store.k_format = TQ_FORMAT_TT3, store.head_dim = 24;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_HEAD_DIM);
    store = usable_store(NULL);
    store.n_sink = 100, store.n_recent = 500;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_ARGUMENT);
    store = usable_store(NULL);
    store.n_ring = 3;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_ARGUMENT); /* a ring of what? */
    store.n_recent = 4;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "n_ring"));
    store.n_sink = 4, store.n_recent = 508, store.n_ring = 4096;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
    store = usable_store(NULL);
    store.n_recent = 32, store.k_ref_block = 64;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
    store.page_size = 96;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "page_size must be a multiple of k_ref_block"));
    store.page_size = 128, store.k_ref_block = 32;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "k_ref_block must be 0 or 64"));
    store.n_recent = 0, store.n_sink = 4, store.k_ref_block = 64; /* that others write */
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
    store = usable_store(NULL);
    store.head_dim = 192, store.head_dim_v = 128, store.n_sink = 4, store.n_recent = 10;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
    assert_int_equal(sizes.exact_bytes, 8 * 14 * (192 + 128) * 2);
    assert_int_equal(sizes.page_bytes, 8 * 64 * (192 / 2 + 128 / 2 + 2 * 2)); /* sq4 */
    assert_int_equal(sizes.canonical_bytes, sizes.page_bytes);
    store = usable_store(NULL);
    store.k_factors = (const int8_t *)"", store.k_transforms = (const uint16_t *)(const void *)"";
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "leave one of them out"));
}

/* Refused before any library is loaded. The pointers are never followed. */
static void test_calls_are_checked(void **state)
{
    (void)state;
    static _Alignas(128) uint8_t memory[128];
    tq_paged_store store = usable_store(memory);
    tq_paged_append_params append = {.struct_size = sizeof append};
    assert_int_equal(tq_paged_append(&store, NULL, NULL), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_OK); /* nothing to do */
    append.n_tok = 1;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT);
    append.k = append.v = memory, append.slot_mapping = (const int64_t *)(const void *)memory, append.row_stride = 5;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT);
    append.row_stride = 0, append.v_row_stride = 5;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT);
    append.v_row_stride = 0, store.n_recent = 8;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT); /* no memory for the ring */
    store.exact = memory;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT); /* no positions */
    append.seq_ids = append.page_table = (const int32_t *)(const void *)memory, append.positions = append.slot_mapping;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_NO_DEVICE); /* nothing else is missing */
    append.k = NULL;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT);
    append.half = TQ_APPEND_STORE;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT);
    append.half = TQ_APPEND_ENCODE;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_NO_DEVICE);
    store.n_recent = 0, store.n_sink = 4;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT); /* halves of what? */
    append.half = (tq_append_half)3, append.k = memory, store.n_recent = 8;
    assert_int_equal(tq_paged_append(&store, &append, NULL), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "half"));

    store = usable_store(memory);
    tq_paged_attend_params attend = {.struct_size = sizeof attend};
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_ARGUMENT);
    attend.n_seq = 1, attend.n_head = 16;
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_ARGUMENT);
    attend.q = attend.new_k = memory, attend.out = attend.workspace = memory;
    attend.page_table = attend.seq_lens = (const int32_t *)(const void *)memory;
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "new_v"));
    attend.new_v = memory, attend.new_row_stride = 8 * 128 - 1;
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "new_row_stride"));
    attend.new_row_stride++, attend.new_v_row_stride = 5;
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "new_v_row_stride"));
    attend.new_v_row_stride = 0, attend.n_head = 12;
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_SHAPE);
    attend.n_head = 16, attend.out_dim = 129;
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_SHAPE);
    attend.out_dim = 128;
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_NO_DEVICE); /* nothing else is missing */
    store.pages = memory + 16;
    assert_int_equal(tq_paged_attend(&store, &attend, NULL), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "128"));
    store = usable_store(memory);
    tq_paged_sizes sizes;
    assert_int_equal(tq_paged_sizes_get(&sizes, &store), TQ_OK);
    store.page_stride_bytes = sizes.page_bytes - 128;
    assert_int_equal(tq_paged_copy(&store, NULL, NULL, 0, NULL), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "page_stride_bytes"));
    store.page_stride_bytes = sizes.page_bytes + 8;
    assert_int_equal(tq_paged_copy(&store, NULL, NULL, 0, NULL), TQ_ERR_ARGUMENT);
    store.page_stride_bytes = sizes.page_bytes + 128, store.n_recent = 8, store.exact = memory;
    store.exact_stride_bytes = 2 * 8 * 8 * 128 * 2 + 8;
    assert_int_equal(tq_paged_copy(&store, NULL, NULL, 0, NULL), TQ_ERR_ARGUMENT);
    assert_non_null(strstr(last_message, "exact_stride_bytes"));
    store.exact_stride_bytes += 8;
    assert_int_equal(tq_paged_copy(&store, NULL, NULL, 0, NULL), TQ_ERR_NO_DEVICE);
    store = usable_store(memory);
    assert_int_equal(tq_paged_copy(&store, NULL, NULL, 0, NULL), TQ_ERR_NO_DEVICE);
    assert_int_equal(tq_paged_copy(&store, NULL, NULL, 1, NULL), TQ_ERR_ARGUMENT);
}

/* ---- which kernel a call goes to ------------------------------------------------------------------------------------- */

static const tq_attend_room ample = {.decode_own = true, .decode_any = true, .prefill_any = true},
                            hopper = {true, true, true, true, true, false};

static tq_attend_kernel kernel_of(const tq_paged_store *from, const tq_paged_attend_params *params, const tq_attend_room *room,
                                  bool general)
{
    const tq_decode_cut cut = {.splits_allowed = 4};
    tq_device_store store;
    assert_int_equal(tq_cuda_shape_store(&store, from), TQ_OK);
    store.k_transforms = from->k_transforms;
    const tq_attend_choice choice = tq_attend_choice_of(&store, params, cut, general);
    return tq_attend_kernel_of(&choice, room);
}

static tq_paged_store chosen_store(tq_format k, tq_format v, int32_t head_dim)
{
    tq_paged_store store = kv_paged_store();
    store.k_format = k, store.v_format = v, store.head_dim = store.head_dim_v = head_dim, store.n_head_kv = 2;
    store.n_sink = 4, store.n_recent = 64;
    return store;
}

/* As docs/cuda.md says. */
static bool has_own(tq_format k, tq_format v, int32_t head_dim)
{
    if (head_dim != 64 && head_dim != 128 && head_dim != 256) return false;
    for (int32_t i = 0; tq_preset_get(i); i++)
        if (tq_preset_get(i)->k_format == k && tq_preset_get(i)->v_format == v) return true;
    if (k == TQ_FORMAT_SQ4 && v == TQ_FORMAT_SQ4) return true;
    if (k == TQ_FORMAT_TT2 && v == TQ_FORMAT_TT2) return head_dim < 256;
    return head_dim == 128 && (k == TQ_FORMAT_SQ4 || k == TQ_FORMAT_SQ3) && v == TQ_FORMAT_SQ3;
}

/* Every pair at every head_dim: a step of decoding and a prompt, plain and with all that a call may ask for. */
static void test_kernels_of_pairs(void **state)
{
    (void)state;
    static const tq_format formats[] = {TQ_FORMAT_SQ8, TQ_FORMAT_SQ4, TQ_FORMAT_SQ3, TQ_FORMAT_SQ2,
                                        TQ_FORMAT_TT4, TQ_FORMAT_TT3, TQ_FORMAT_TT2};
    const float number = 0;
    int32_t n_own = 0;
    for (int32_t i = 0; i < 5 * 7 * 7; i++) {
        int32_t d = head_dims[i / 49];
        tq_format k = formats[i / 7 % 7], v = formats[i % 7];
        if (d == 96 && (i / 7 % 7 > 3 || i % 7 > 3)) continue; /* plain */
        tq_paged_store store = chosen_store(k, v, d);
        bool own = has_own(k, v, d);
        n_own += own;
        for (int32_t asked = 0; asked < 16; asked++) {
            tq_paged_attend_params one = {.n_query = 1, .n_head = 8, .max_seq_len = 4 * 32 * (d > 128 ? 64 : 8) + 1}, prompt;
            if (asked & 1) one.mask = &number;
            if (asked & 2) one.alibi_slopes = &number;
            if (asked & 4) one.out_dim = d / 2;
            if (asked & 8) one.window = 100, one.softcap = 3, one.sinks = &number, one.query_starts = (const int32_t *)&number;
            prompt = one, prompt.n_query = 17; /* 68 rows of a KV head */
            tq_attend_kernel decode = own && !(asked & 3) ? TQ_ATTEND_DECODE_OWN : TQ_ATTEND_DECODE_ANY;
            assert_int_equal(kernel_of(&store, &one, &ample, false), decode);
            tq_attend_kernel on_hopper = decode == TQ_ATTEND_DECODE_OWN ? TQ_ATTEND_DECODE_OWN_HOPPER : decode;
            assert_int_equal(kernel_of(&store, &one, &hopper, false), on_hopper);
            assert_int_equal(kernel_of(&store, &one, &hopper, true), TQ_ATTEND_DECODE_ANY);
            assert_int_equal(kernel_of(&store, &prompt, &ample, false), TQ_ATTEND_PREFILL_ANY);
            assert_int_equal(kernel_of(&store, &prompt, &hopper, false), own ? TQ_ATTEND_HOPPER_OWN : TQ_ATTEND_HOPPER_ANY);
            assert_int_equal(kernel_of(&store, &prompt, &hopper, true), TQ_ATTEND_HOPPER_ANY);
            prompt.n_query = 16; /* 64: still decoding */
            assert_int_equal(kernel_of(&store, &prompt, &hopper, false), on_hopper);
            one.max_seq_len -= 1; /* splits of 8 records, or 64 */
            assert_int_equal(kernel_of(&store, &one, &hopper, false), decode);
            one.deterministic = true; /* then all lengths have one kernel */
            assert_int_equal(kernel_of(&store, &one, &hopper, false), on_hopper);
            store.page_size = 96; /* not whole blocks */
            assert_int_equal(kernel_of(&store, &one, &hopper, false), decode);
            store.page_size = 64;
        }
    }
    assert_int_equal(n_own, 3 * 4 + 3 + 2 + 2);
}

/* What does not fit the device, or is not known to it. */
static void test_kernels_of_devices(void **state)
{
    (void)state;
    tq_paged_store store = chosen_store(TQ_FORMAT_TT3, TQ_FORMAT_TT3, 128);
    const tq_paged_attend_params one = {.n_query = 1, .n_head = 8, .max_seq_len = 9999}, prompt = {.n_query = 100, .n_head = 8};
    for (int32_t i = 0; i < 8; i++) {
        const tq_attend_room room = {.decode_own = i & 1, .decode_any = i & 2, .prefill_any = i & 4};
        tq_attend_kernel decode = i & 1 ? TQ_ATTEND_DECODE_OWN : i & 2 ? TQ_ATTEND_DECODE_ANY : TQ_ATTEND_NONE;
        tq_attend_kernel prefill = i & 4 ? TQ_ATTEND_PREFILL_ANY : TQ_ATTEND_NONE;
        assert_int_equal(kernel_of(&store, &one, &room, false), decode ? decode : prefill);
        assert_int_equal(kernel_of(&store, &prompt, &room, false), prefill ? prefill : decode);
    }
    store.n_sink = 0, store.n_recent = TQ_DEVICE_EXACT_MAX; /* and more with the windows of several queries */
    const tq_paged_attend_params two = {.n_query = 2, .n_head = 8};
    assert_int_equal(kernel_of(&store, &one, &hopper, false), TQ_ATTEND_DECODE_OWN_HOPPER);
    assert_int_equal(kernel_of(&store, &two, &hopper, false), TQ_ATTEND_HOPPER_OWN);
    assert_int_equal(kernel_of(&store, &two, &ample, false), TQ_ATTEND_PREFILL_ANY);
    store.n_recent = 64;
    store.k_transforms = (const uint16_t *)(const void *)""; /* which Hopper's prefill does not know */
    assert_int_equal(kernel_of(&store, &prompt, &hopper, false), TQ_ATTEND_PREFILL_ANY);
    assert_int_equal(kernel_of(&store, &one, &hopper, false), TQ_ATTEND_DECODE_OWN_HOPPER);
    store = chosen_store(TQ_FORMAT_TT3, TQ_FORMAT_TT3, 192);
    store.head_dim_v = 128;
    assert_int_equal(kernel_of(&store, &prompt, &hopper, false), TQ_ATTEND_PREFILL_ANY);
    assert_int_equal(kernel_of(&store, &one, &hopper, false), TQ_ATTEND_DECODE_ANY);
    for (tq_attend_kernel kernel = TQ_ATTEND_NONE; kernel <= TQ_ATTEND_HOPPER_ANY; kernel++)
        assert_int_equal(tq_attend_is_prefill(kernel), kernel > TQ_ATTEND_DECODE_PLAIN);
}

/* Plain planes have one kernel, whatever is asked for. */
static void test_kernels_of_plain_stores(void **state)
{
    (void)state;
    static const int32_t dims[][2] = {{512, 512}, {512, 256}, {80, 80}, {40, 40}, {128, 64}};
    const float number = 0;
    tq_attend_room room = hopper;
    for (int32_t i = 0; i < 5 * 8; i++) {
        tq_paged_store store = chosen_store(TQ_FORMAT_TT4, TQ_FORMAT_TT4, dims[i / 8][0]);
        store.head_dim_v = dims[i / 8][1];
        tq_paged_attend_params one = {.n_query = 8, .n_head = 16, .max_seq_len = 9999}, prompt = one;
        if (i & 1) one.mask = prompt.mask = &number;
        if (i & 2) store.n_recent = TQ_DEVICE_EXACT_MAX, store.n_sink = 0; /* more than others decode with */
        if (i & 4) store.k_transforms = (const uint16_t *)(const void *)"";
        prompt.n_query = 9; /* 72 rows of a KV head */
        for (int general = 0; general < 2; general++) {
            room.plain = true;
            assert_int_equal(kernel_of(&store, &one, &room, general), TQ_ATTEND_DECODE_PLAIN);
            assert_int_equal(kernel_of(&store, &prompt, &room, general), TQ_ATTEND_PREFILL_PLAIN);
            room.plain = false; /* and no other */
            assert_int_equal(kernel_of(&store, &one, &room, general), TQ_ATTEND_NONE);
            assert_int_equal(kernel_of(&store, &prompt, &room, general), TQ_ATTEND_NONE);
        }
    }
}

static void test_missing_library(void **state)
{
    (void)state;
    tq_cuda_info info = {.n_multiprocessors = 7};
    for (int repeat = 0; repeat < 2; repeat++) {
        last_message[0] = 0;
        assert_int_equal(tq_cuda_describe(&info), TQ_ERR_NO_DEVICE);
        assert_true(strlen(last_message) > 10); /* the loader's reason, each time */
    }
    assert_int_equal(info.n_multiprocessors, 7);
    assert_string_equal(tq_status_string(TQ_ERR_NO_DEVICE), "no CUDA device, driver or libturboquant-cuda.so");
}

int main(void)
{
    tq_log_set(keep_message, NULL);
    setenv("TQ_CUDA_LIBRARY", "missing/libturboquant-cuda.so", 1); /* the same on every machine */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_plain_stores),
        cmocka_unit_test(test_rotations),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_formats_without_a_layout),
        cmocka_unit_test(test_references),
        cmocka_unit_test(test_levels),
        cmocka_unit_test(test_splits),
        cmocka_unit_test(test_quarters),
        cmocka_unit_test(test_store_is_checked),
        cmocka_unit_test(test_calls_are_checked),
        cmocka_unit_test(test_kernels_of_pairs),
        cmocka_unit_test(test_kernels_of_devices),
        cmocka_unit_test(test_kernels_of_plain_stores),
        cmocka_unit_test(test_missing_library),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
