/* SPDX-License-Identifier: MIT */
/*
 * Paged stores: what they hold and answer is what a cache with the same parameters does, on the CPU bit for bit, and on the
 * emulated device that TQ_CUDA_LIBRARY names, if it does; and what they refuse.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>

#include "base/alloc.h"
#include "last_message.h"
#include "make_calibration.h"
#include "paged_model.h"

/* Of presets all head_dims, pages and distances; then what presets do not have. */
static const paged_shape others[] = {
    {TQ_FORMAT_F16, TQ_FORMAT_F16, 64, 0, 2, 32, 0, 0, 0, false, NULL},
    {TQ_FORMAT_BF16, TQ_FORMAT_F16, 128, 0, 1, 16, 4, 16, 0, false, NULL},
    {TQ_FORMAT_F16, TQ_FORMAT_TT4, 64, 0, 2, 64, 4, 32, 64, false, NULL},
    {TQ_FORMAT_SQ4, TQ_FORMAT_BF16, 64, 0, 2, 64, 4, 32, 64, true, NULL},
    {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 128, 0, 2, 64, 0, 0, 0, false, NULL},
    {TQ_FORMAT_SQ3, TQ_FORMAT_SQ2, 64, 0, 2, 96, 5, 0, 0, true, NULL},
    {TQ_FORMAT_SQ8, TQ_FORMAT_SQ4, 64, 0, 2, 32, 0, 3, 0, false, NULL},
    {TQ_FORMAT_SQ4_PROD, TQ_FORMAT_SQ3_PROD, 64, 0, 1, 32, 2, 16, 64, false, NULL},
    {TQ_FORMAT_SQ4, TQ_FORMAT_SQ4, 64, 0, 2, 16, 14, 16, 16, true, NULL},
};

static void run(paged_shape shape, tq_device_kind device, int32_t n_steps, uint64_t seed)
{
    paged_model *m = paged_open(&shape, device, seed % 2 == 1, seed);
    if (device == TQ_DEVICE_CUDA) m->tolerance = 2e-3;
    paged_run(m, n_steps);
    paged_close(m);
}

static paged_shape shape_of_preset(const tq_preset *preset, int32_t head_dim, int32_t head_dim_v, int32_t page_size)
{
    return (paged_shape){.k_format = preset->k_format,
                         .v_format = preset->v_format,
                         .head_dim = head_dim,
                         .head_dim_v = head_dim_v,
                         .n_head_kv = 2,
                         .page_size = page_size,
                         .n_sink = preset->n_sink,
                         .n_recent = preset->n_recent,
                         .k_ref_block = preset->k_ref_block};
}

static void test_presets(void **state)
{
    (void)state;
    static const int32_t dims[][2] = {{64, 0}, {80, 0}, {128, 0}, {192, 128}}, page_sizes[] = {16, 64, 128, 48};
    uint64_t seed = 1;
    for (int32_t i = 0; i < tq_preset_count(); i++) {
        for (int32_t d = 0; d < 4; d++, seed++) {
            paged_shape shape = shape_of_preset(tq_preset_get(i), dims[d][0], dims[d][1], page_sizes[(i + d) % 4]);
            shape.has_factors = i % 2 == 1;
            run(shape, TQ_DEVICE_CPU, kv_runs(16), seed);
        }
    }
}

static void test_other_formats(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) run(others[i], TQ_DEVICE_CPU, kv_runs(16), 50 + i);
}

static void test_calibrated(void **state)
{
    (void)state;
    kv_random random = {.state = 7};
    tq_calibration *calibration = make_calibration(&random, 1, 2, 64);
    paged_shape shape = shape_of_preset(tq_preset_find("tq3"), 64, 0, 64);
    shape.calibration = calibration;
    run(shape, TQ_DEVICE_CPU, kv_runs(16), 90);
    tq_calibration_free(calibration);
}

static void test_on_a_device(void **state)
{
    (void)state;
    if (!getenv("TQ_CUDA_LIBRARY")) skip();
    for (int32_t i = 0; i < tq_preset_count(); i++)
        run(shape_of_preset(tq_preset_get(i), i % 2 ? 64 : 128, 0, i % 2 ? 64 : 128), TQ_DEVICE_CUDA, kv_runs(8), 20 + (uint64_t)i);
    for (size_t i = 4; i < 7; i++) run(others[i], TQ_DEVICE_CUDA, kv_runs(8), 30 + i);
}

int main(void)
{
    tq_log_set(keep_message, NULL);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_other_formats),
        cmocka_unit_test(test_calibrated),
        cmocka_unit_test(test_on_a_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
