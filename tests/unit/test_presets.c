/* SPDX-License-Identifier: MIT */
/* Presets: names, and a cost that counts everything and tends to the formats' own bits as the context grows. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "turboquant.h"

static void test_list(void **state)
{
    (void)state;
    assert_null(tq_preset_get(-1));
    assert_null(tq_preset_get(4));
    assert_int_equal(tq_preset_find("TQ6")->k_format, TQ_FORMAT_SQ8);
    assert_ptr_equal(tq_preset_find("tq6"), tq_preset_find("TQ6"));
    const char *const none[] = {"", "TQ", "TQ66", "TQ5", " TQ6", NULL};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) assert_null(tq_preset_find(none[i]));
    assert_int_equal(tq_preset_find("TQ4")->v_format, TQ_FORMAT_TT4);
    assert_int_equal(tq_preset_find("TQ3")->k_format, TQ_FORMAT_TT3);
    assert_int_equal(tq_preset_find("TQ2")->v_format, TQ_FORMAT_TT2);
    for (int32_t i = 0; tq_preset_get(i); i++) {
        assert_int_equal(tq_preset_get(i)->n_sink, 4);
        assert_true(tq_preset_get(i)->n_recent >= 64);
        assert_non_null(strstr(tq_preset_get(i)->description, "exact"));
    }
}

static void test_bits_per_value(void **state)
{
    (void)state;
    for (int32_t i = 0; tq_preset_get(i); i++) {
        const tq_preset *preset = tq_preset_get(i);
        tq_format_info k, v;
        assert_int_equal(tq_format_describe(&k, preset->k_format, 128), TQ_OK);
        assert_int_equal(tq_format_describe(&v, preset->v_format, 128), TQ_OK);
        double formats = (k.bits_per_value + v.bits_per_value) / 2;
        double previous = INFINITY;
        for (int64_t n_slots = 256; n_slots <= 1 << 20; n_slots *= 4) {
            double bits = 0.0;
            assert_int_equal(tq_preset_bits_per_value(&bits, preset, 128, 8, n_slots), TQ_OK);
            assert_true(bits > formats && bits < previous);
            /* the exact slots' FP16, the references, and the bookkeeping */
            double exact = preset->n_sink + preset->n_recent;
            assert_true(bits < formats + 0.1 + 16.0 * (exact + 12) / (double)n_slots + 1.0);
            previous = bits;
        }
        assert_true(previous < formats + 0.1); /* references included */
    }
}

/* A preset with different formats counts both. */
static void test_mean_of_keys_and_values(void **state)
{
    (void)state;
    tq_preset all_8 = *tq_preset_find("TQ6"), all_2 = all_8, mixed = all_8;
    all_8.k_format = all_8.v_format = mixed.k_format = TQ_FORMAT_SQ8;
    all_2.k_format = all_2.v_format = mixed.v_format = TQ_FORMAT_SQ2;
    double eight = 0.0, two = 0.0, both = 0.0;
    assert_int_equal(tq_preset_bits_per_value(&eight, &all_8, 64, 3, 4096), TQ_OK);
    assert_int_equal(tq_preset_bits_per_value(&two, &all_2, 64, 3, 4096), TQ_OK);
    assert_int_equal(tq_preset_bits_per_value(&both, &mixed, 64, 3, 4096), TQ_OK);
    assert_true(fabs(both - (eight + two) / 2) < 1e-9);
}

static void test_presets_of_caches(void **state)
{
    (void)state;
    tq_cache_params p = {.struct_size = sizeof p};
    const tq_preset *preset = tq_preset_get(TQ_PRESET_DEFAULT);
    assert_string_equal(preset->name, "TQ4");
    tq_cache_params_set_preset(&p, NULL);
    assert_int_equal(p.k_format, TQ_FORMAT_F16);
    tq_cache_params_set_preset(&p, preset);
    assert_int_equal(p.k_format, preset->k_format);
    assert_int_equal(p.v_format, preset->v_format);
    assert_int_equal(p.n_sink, preset->n_sink);
    assert_int_equal(p.n_recent, preset->n_recent);
    assert_int_equal(p.k_ref_block, preset->k_ref_block);
}

static void test_refusals(void **state)
{
    (void)state;
    double bits = -1.0;
    const tq_preset *preset = tq_preset_find("TQ4");
    assert_int_equal(tq_preset_bits_per_value(&bits, preset, 56, 8, 4096), TQ_ERR_HEAD_DIM);
    assert_int_equal(tq_preset_bits_per_value(&bits, preset, 128, 0, 4096), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_preset_bits_per_value(&bits, preset, 128, 8, 0), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_preset_bits_per_value(&bits, NULL, 128, 8, 4096), TQ_ERR_ARGUMENT);
    assert_int_equal(tq_preset_bits_per_value(NULL, preset, 128, 8, 4096), TQ_ERR_ARGUMENT);
    assert_true(bits == -1.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_list),
        cmocka_unit_test(test_bits_per_value),
        cmocka_unit_test(test_mean_of_keys_and_values),
        cmocka_unit_test(test_presets_of_caches),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
