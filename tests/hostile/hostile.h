/* SPDX-License-Identifier: MIT */
/* What test_hostile.c, which generate.py writes, calls functions with, and how it sees that they return. */
#ifndef TQ_TESTS_HOSTILE_H
#define TQ_TESTS_HOSTILE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <float.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cache/cache.h"
#include "kv_test.h"

enum { HOSTILE_SECONDS = 120, N_ROWS = 8 };

/* Valid arguments, made again for every call: a call may free them. */
static struct {
    tq_cache *cache;
    tq_batch *batch; /* in a pass of one token */
    tq_codec *codec;
    tq_pool *pool;
    tq_store *store;
    tq_stage *stage;
    int32_t seq;
    size_t exact_bytes;
    tq_attend_params attend_params;
    tq_cache_params cache_params;
    tq_store_params store_params;
    tq_key_factors_params key_factors_params;
    tq_preset preset;
    tq_executor executor;
    tq_openmp openmp; /* without a runtime: one thread */
    tq_batch_rows batch_rows;
    tq_paged_store paged_store;
    tq_paged_append_params paged_append_params;
    tq_paged_attend_params paged_attend_params;
    void *handles[4];
    char path[256], long_text[1 << 16];
    _Alignas(128) uint8_t memory[1 << 18];
    _Alignas(64) uint8_t zeros[4096];
    _Alignas(64) uint8_t buffer[1 << 22];
} f;

/* What a child is about to call; its parent sees it. */
static struct {
    int number;
    char text[1024];
} * current;

static void drop_message(void *user, tq_log_level level, const char *message)
{
    (void)user;
    (void)level;
    (void)message;
}

/* With sinks, a ring and references, and a token whose append encodes another one. On CUDA all that there has to be but the
 * device. */
static void make_paged_store(float *half)
{
    static const int32_t ids[1] = {0};
    static const int64_t slots[1] = {40}, lengths[1] = {41};
    f.paged_store = kv_paged_store();
    f.paged_store.device = TQ_DEVICE_CPU;
    f.paged_store.n_head_kv = 1;
    f.paged_store.n_pages = f.paged_store.n_exact_slots = 1;
    f.paged_store.n_sink = 2;
    f.paged_store.n_recent = 4;
    f.paged_store.k_ref_block = 64;
    f.paged_store.pages = f.memory;
    f.paged_store.exact = f.memory + sizeof f.memory / 2;
    f.paged_append_params.struct_size = sizeof f.paged_append_params;
    f.paged_append_params.dtype = TQ_DTYPE_BF16;
    f.paged_append_params.n_tok = 1;
    f.paged_append_params.k = f.paged_append_params.v = half;
    f.paged_append_params.slot_mapping = f.paged_append_params.positions = slots;
    f.paged_append_params.seq_ids = f.paged_append_params.page_table = f.paged_append_params.exact_slots = ids;
    f.paged_attend_params.struct_size = sizeof f.paged_attend_params;
    f.paged_attend_params.dtype = TQ_DTYPE_BF16;
    f.paged_attend_params.n_seq = f.paged_attend_params.n_head = 1;
    f.paged_attend_params.q = f.paged_attend_params.new_k = f.paged_attend_params.new_v = half;
    f.paged_attend_params.out = half + 4096;
    f.paged_attend_params.page_table = f.paged_attend_params.exact_slots = ids;
    f.paged_attend_params.seq_lens = lengths;
    f.paged_attend_params.workspace = f.memory;
    f.paged_attend_params.workspace_bytes = sizeof f.memory;
}

static void make_structs(void)
{
    float *half = (float *)(void *)(f.buffer + sizeof f.buffer / 2);
    static const double angles[64];
    f.attend_params = kv_attend_params(1, 2, 64, half, half + 4096);
    f.cache_params = kv_cache_params();
    f.cache_params.head_dim = 64;
    f.cache_params.n_head_kv = 2;
    f.cache_params.n_recent = 4;
    f.store_params = kv_store_params(TQ_FORMAT_SQ4, 64, 2, 64);
    f.store_params.n_recent = 4;
    f.store_params.ref_block = 16;
    f.key_factors_params = (tq_key_factors_params){.struct_size = sizeof f.key_factors_params, .n_head = 1, .n_head_kv = 1};
    f.key_factors_params.head_dim = 64;
    f.key_factors_params.k_square = f.key_factors_params.k_mean = f.key_factors_params.q_square = half;
    f.key_factors_params.angles = angles;
    f.preset = *tq_preset_get(TQ_PRESET_DEFAULT);
    f.executor = (tq_executor){.n_threads = 1};
    f.batch_rows = (tq_batch_rows){.struct_size = sizeof f.batch_rows};
    f.batch_rows.q = f.batch_rows.k = f.batch_rows.v = half;
    f.batch_rows.out = half + 4096;
    make_paged_store(half);
}

/* The id of a sequence that is no more. */
static int32_t freed_sequence(void)
{
    KV_CHECK(tq_cache_seq_free(f.cache, f.seq) == TQ_OK);
    return f.seq;
}

/* Lists of the same number, as long as any count that the calls give. */
#define LIST_OF(name, type)                                  \
    static type *name(type value)                            \
    {                                                        \
        static type list[N_LIST];                            \
        for (size_t i = 0; i < N_LIST; i++) list[i] = value; \
        return list;                                         \
    }
enum { N_LIST = 4096 };
LIST_OF(id_list, int32_t)
LIST_OF(place_list, int64_t)
LIST_OF(format_list, tq_format)
LIST_OF(float_list, float)
LIST_OF(angle_list, double)
LIST_OF(partner_list, int32_t)
LIST_OF(factor_list, int8_t)

/* Nothing of the call before is freed: it may be already. */
static void begin(int number, const char *text)
{
    current->number = number;
    snprintf(current->text, sizeof current->text, "%s", text);
    memset(&f, 0, sizeof f);
    make_structs();
    memset(f.long_text, 'x', sizeof f.long_text - 1);
    snprintf(f.path, sizeof f.path, "%s/turboquant-hostile-%d", kv_temporary_folder(), (int)getpid());
    /* More rows than sinks and rings hold, so that some are coded. */
    const float *rows = (const float *)(const void *)f.zeros;
    const int64_t slots[N_ROWS + 1] = {0, 1, 2, 3, 4, 5, 6, 7, 8}, row_stride = 128;
    KV_CHECK(sizeof f.zeros >= N_ROWS * (size_t)row_stride * sizeof *rows);
    KV_CHECK(tq_cache_create(&f.cache, &f.cache_params) == TQ_OK);
    KV_CHECK(tq_cache_seq_create(f.cache, &f.seq) == TQ_OK);
    KV_CHECK(tq_cache_append(f.cache, f.seq, 0, N_ROWS, rows, rows, NULL) == TQ_OK);
    KV_CHECK(tq_batch_create(&f.batch, f.cache, 1) == TQ_OK);
    KV_CHECK(tq_batch_begin(f.batch, &f.seq, slots + 1, 2) == TQ_OK);
    f.exact_bytes = f.cache->shape.exact_bytes;
    KV_CHECK(tq_codec_create(&f.codec, TQ_FORMAT_SQ4, 64, 0) == TQ_OK);
    KV_CHECK(tq_pool_create(&f.pool, 1) == TQ_OK);
    KV_CHECK(tq_stage_create(&f.stage) == TQ_OK);
    size_t bytes;
    KV_CHECK(tq_store_bytes(&bytes, &f.store_params) == TQ_OK && bytes <= sizeof f.memory);
    KV_CHECK(tq_store_open(&f.store, &f.store_params, kv_aligned(bytes), bytes) == TQ_OK);
    KV_CHECK(tq_store_write(f.store, slots, N_ROWS, rows, row_stride, NULL) == TQ_OK);
    KV_CHECK(tq_store_stage(f.store, f.stage, slots + N_ROWS, 1, rows, row_stride) == TQ_OK);
}

static void assert_survives(void (*call)(int), int n_calls)
{
    static const int fatal[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
    current = mmap(NULL, sizeof *current, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(current != MAP_FAILED);
    pid_t child = fork();
    if (child == 0) {
        alarm(HOSTILE_SECONDS);
        for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++) signal(fatal[i], SIG_DFL); /* which cmocka has taken */
        setenv("TQ_CUDA_LIBRARY", "/none", 1); /* these are no addresses of a device */
        tq_log_set(drop_message, NULL);
        for (int i = 0; i < n_calls; i++) call(i);
        unlink(f.path);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFSIGNALED(status) || WEXITSTATUS(status) != 0)
        fprintf(stderr, "call %d: %s: signal %d\n", current->number, current->text, WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    assert_int_equal(status, 0);
    munmap(current, sizeof *current);
}

#endif
