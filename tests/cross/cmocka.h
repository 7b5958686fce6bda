/* SPDX-License-Identifier: MIT */
/*
 * The part of cmocka that the unit tests use, in one header, for builds where the library is not to be had: those for another
 * architecture. Same names, same output; the first failed assertion ends a test.
 */
#ifndef TQ_TESTS_CROSS_CMOCKA_H
#define TQ_TESTS_CROSS_CMOCKA_H

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

struct CMUnitTest {
    const char *name;
    void (*run)(void **state);
    int (*setup)(void **state);
    int (*teardown)(void **state);
};

static jmp_buf cmocka_failed;

#define cmocka_unit_test(function) cmocka_unit_test_setup_teardown(function, NULL, NULL)
#define cmocka_unit_test_setup_teardown(function, setup, teardown) \
    {                                                              \
#function, function, setup, teardown                       \
    }

#define cmocka_check(condition, text)                                        \
    do {                                                                     \
        if (!(condition)) {                                                  \
            fprintf(stderr, "%s:%d: error: %s\n", __FILE__, __LINE__, text); \
            longjmp(cmocka_failed, 1);                                       \
        }                                                                    \
    } while (0)
#define assert_true(c) cmocka_check((c), #c)
#define assert_false(c) cmocka_check(!(c), "not " #c)
#define assert_null(p) cmocka_check((p) == NULL, #p " == NULL")
#define assert_non_null(p) cmocka_check((p) != NULL, #p " != NULL")
#define assert_ptr_equal(a, b) cmocka_check((const void *)(a) == (const void *)(b), #a " == " #b)
#define assert_int_equal(a, b) cmocka_check((long long)(a) == (long long)(b), #a " == " #b)
#define assert_int_not_equal(a, b) cmocka_check((long long)(a) != (long long)(b), #a " != " #b)
#define assert_in_range(a, low, high) cmocka_check((a) >= (low) && (a) <= (high), #a " in [" #low ", " #high "]")
#define assert_string_equal(a, b) cmocka_check(strcmp((a), (b)) == 0, #a " == " #b)
#define assert_memory_equal(a, b, n) cmocka_check(memcmp((a), (b), (n)) == 0, #a " == " #b)
#define assert_memory_not_equal(a, b, n) cmocka_check(memcmp((a), (b), (n)) != 0, #a " != " #b)
#define fail_msg(...)                                          \
    do {                                                       \
        fprintf(stderr, "%s:%d: error: ", __FILE__, __LINE__); \
        fprintf(stderr, __VA_ARGS__);                          \
        fputc('\n', stderr);                                   \
        longjmp(cmocka_failed, 1);                             \
    } while (0)
#define print_message printf
#define skip() longjmp(cmocka_failed, 2)

static inline int cmocka_run(const struct CMUnitTest *tests, size_t n, int (*setup)(void **), int (*teardown)(void **))
{
    void *state = NULL;
    /* volatile: kept across longjmp */
    volatile int n_failed = 0, n_passed = 0;
    if (setup && setup(&state) != 0) return 1;
    for (volatile size_t i = 0; i < n; i++) {
        volatile int outcome = setjmp(cmocka_failed);
        if (outcome == 0) {
            if (tests[i].setup && tests[i].setup(&state) != 0) cmocka_check(0, "setup");
            tests[i].run(&state);
        }
        if (tests[i].teardown && tests[i].teardown(&state) != 0) outcome = 1;
        if (outcome == 0) {
            n_passed++;
        } else if (outcome == 1) {
            fprintf(stderr, "[  FAILED  ] %s\n", tests[i].name);
            n_failed++;
        }
    }
    if (teardown && teardown(&state) != 0) n_failed++;
    printf("[  PASSED  ] %d test(s).\n", n_passed);
    if (n_failed > 0) printf("[  FAILED  ] %d test(s)\n", n_failed);
    return n_failed;
}
#define cmocka_run_group_tests(tests, setup, teardown) cmocka_run(tests, sizeof(tests) / sizeof((tests)[0]), setup, teardown)

#endif
