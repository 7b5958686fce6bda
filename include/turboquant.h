/* SPDX-License-Identifier: MIT */
/*
 * turboquant.h - a language model's KV cache in 2 to 4 bits a value, with attention on the compressed bytes.
 *
 * The order of this file is that in which it is used: status, log, executor; formats and presets; attention parameters,
 * calibrations and factors; the cache (sequences with positions: what an engine without one embeds), batches of its sequences,
 * snapshots; then what experts need: single vectors, and paged stores (pages in caller-owned memory, on every device: what an
 * engine with its own block manager embeds).
 *
 * Conventions that hold throughout:
 *  - Every function that can fail returns tq_status; out parameters come first and are untouched on failure.
 *  - Every struct that a caller fills starts with struct_size, the sizeof that the caller was compiled with; all other fields
 * are zero unless it sets them, and zero is what suits most, or none. So fields that only the library knows, of another
 * version, have their defaults; those that only the caller knows must be zero. tq_cache_params params = {.struct_size = sizeof
 * params};
 *  - Strides are in elements unless the name ends in _bytes. Shapes are written [n_tok, n_head_kv, head_dim], last dimension
 *    contiguous.
 *  - Counts are checked, memory is not: a handle comes from its create, open or load function and has not been freed; a
 *    pointer to n things points to n, or is NULL where that is allowed or n is 0; a text ends with a zero byte; strides stay
 *    within what is pointed to. NULL elsewhere, negative and enormous counts are errors, never crashes.
 *  - Threads that call the library, or that an executor runs, need 256 KiB of stack.
 *  - The library never prints, exits or aborts. It keeps no copy of a caller's pointer beyond the call, unless stated.
 */
#ifndef TURBOQUANT_H
#define TURBOQUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TQ_VERSION_MAJOR 0
#define TQ_VERSION_MINOR 1
#define TQ_VERSION_PATCH 0

#if defined(_WIN32)
#define TQ_API
#elif defined(__GNUC__)
#define TQ_API __attribute__((visibility("default")))
#else
#define TQ_API
#endif

#if defined(__GNUC__)
#define TQ_NODISCARD __attribute__((warn_unused_result))
#else
#define TQ_NODISCARD
#endif

/* "0.1.0". Static storage. */
TQ_API const char *tq_version_string(void);

/* ---- status ------------------------------------------------------------------------------------------------------- */

/* 0 or negative; values are pinned, new ones are added at the end of a group. */
typedef enum tq_status {
    TQ_OK = 0,
    /* arguments and state */
    TQ_ERR_ARGUMENT = -1,   /* a null pointer, a negative count, a struct_size that this version does not know */
    TQ_ERR_SHAPE = -2,      /* shapes of two arguments disagree */
    TQ_ERR_NOT_FINITE = -3, /* NaN, infinity, or a magnitude above 65504 (the largest FP16 value) in a key or value */
    TQ_ERR_RANGE = -4,      /* a slot, position, sequence or layer that does not exist */
    /* memory and device */
    TQ_ERR_MEMORY = -10, /* an allocation failed; nothing was changed */
    TQ_ERR_FULL = -11,   /* the cache has no free page; nothing was changed */
    TQ_ERR_THREAD = -12, /* a thread could not be started */
    TQ_ERR_DEVICE = -13, /* a call of the device's driver failed; the log has its text */
    /* files */
    TQ_ERR_IO = -20,       /* a file could not be read or written; the log has the system's reason */
    TQ_ERR_CORRUPT = -21,  /* a file is damaged, cut off, or of another kind */
    TQ_ERR_MISMATCH = -22, /* a file of another version, or a snapshot of a cache of another shape */
    /* unsupported */
    TQ_ERR_HEAD_DIM = -30, /* a head_dim that has no rotation; tq_head_dim_list() names those that have one */
    TQ_ERR_FORMAT = -31,   /* an unknown format or preset */
    TQ_ERR_CPU = -32,      /* TQ_CPU names an instruction set that is unknown or that this machine lacks */
    TQ_ERR_NO_DEVICE = -33 /* no CUDA device, driver or libturboquant-cuda.so; the log says which */
} tq_status;

/* One line of English for a status, never NULL. Static storage; thread-safe. */
TQ_API const char *tq_status_string(tq_status status);

/* ---- log ---------------------------------------------------------------------------------------------------------- */

typedef enum tq_log_level { TQ_LOG_ERROR = 0, TQ_LOG_WARNING = 1, TQ_LOG_INFO = 2 } tq_log_level;
typedef void (*tq_log_fn)(void *user, tq_log_level level, const char *message);

/*
 * Set the process-wide log callback; NULL (the default) drops messages. A message is one line without a newline and says what
 * was wrong with which layer, head and position. Call before other threads use the library. The callback may be called from
 * any thread, when the call that it is about has let go of its locks: it may call the library, but not what would change or
 * free the sequence, store or stage that the call is about.
 */
TQ_API void tq_log_set(tq_log_fn log, void *user);

/* ---- executor ------------------------------------------------------------------------------------------------------ */

/*
 * How the library runs on several threads. run() calls body(arg, i_thread, n_threads) once for each i_thread below n_threads,
 * at the same time or one after the other, on any threads, and returns when all are done; it may use a smaller number than it
 * is given, provided that each body call is told that. Results never depend on the number of threads.
 */
typedef void (*tq_body_fn)(void *arg, int32_t i_thread, int32_t n_threads);
typedef struct tq_executor {
    int32_t n_threads;
    void *user;
    void (*run)(void *user, int32_t n_threads, tq_body_fn body, void *arg);
} tq_executor;

/*
 * A pool of threads. It sleeps when idle and spins at most some tens of microseconds. The calling thread does what no other has
 * begun, so that it waits for none that the system lets wait. In a child of fork() a pool has no threads: it runs on the
 * caller's, and can be freed.
 */
typedef struct tq_pool tq_pool;
/* n_threads >= 1 counts the caller's thread. Errors: ARGUMENT, MEMORY, THREAD. */
TQ_API TQ_NODISCARD tq_status tq_pool_create(tq_pool **out, int32_t n_threads);
/* The pool must be idle. NULL is fine. */
TQ_API void tq_pool_free(tq_pool *pool);
/* Valid until tq_pool_free. One run at a time per pool. */
TQ_API tq_executor tq_pool_executor(tq_pool *pool);

/*
 * The OpenMP runtime that a host computes with, GCC's or LLVM's: its functions GOMP_parallel, omp_get_thread_num and
 * omp_get_num_threads, as dlsym finds them, and the number of threads of the host's regions. Where the host's threads spin
 * between two regions, a pool next to them takes their cores. A child of fork() may not run on it if the parent has.
 */
typedef struct tq_openmp {
    int32_t n_threads;
    void *parallel, *thread_num, *num_threads;
} tq_openmp;
/* Valid as long as *runtime is there and as it was. One thread if that is NULL or not filled. */
TQ_API tq_executor tq_openmp_executor(tq_openmp *runtime);

/* ---- formats ------------------------------------------------------------------------------------------------------- */

/* How one head vector is stored; docs/formats.md gives the bytes. Values are pinned. */
typedef enum tq_format {
    TQ_FORMAT_F16 = 0,  /* reference, not rotated */
    TQ_FORMAT_BF16 = 1, /* reference, not rotated */
    TQ_FORMAT_SQ8 = 2,  /* rotated, 8-bit uniform */
    TQ_FORMAT_SQ4 = 3,  /* rotated, Lloyd-Max (TurboQuant, arXiv 2504.19874, Algorithm 1) */
    TQ_FORMAT_SQ3 = 4,
    TQ_FORMAT_SQ2 = 5,
    TQ_FORMAT_SQ4_PROD = 6, /* Algorithm 2: one bit fewer for the codebook, and a QJL sign bit. For comparison only:   */
    TQ_FORMAT_SQ3_PROD = 7, /* it is worse than Algorithm 1 after a softmax, and no preset uses it.                    */
    TQ_FORMAT_SQ2_PROD = 8,
    TQ_FORMAT_TT4 = 9, /* rotated, trellis-coded: the bytes of the Lloyd-Max formats, less error, slower to encode */
    TQ_FORMAT_TT3 = 10,
    TQ_FORMAT_TT2 = 11,
    TQ_FORMAT_COUNT
} tq_format;

typedef struct tq_format_info {
    const char *name;        /* "sq4" */
    const char *description; /* one line */
    int32_t bits;            /* nominal bits of a code */
    int32_t head_dim;
    size_t bytes_per_vector; /* codes and norm */
    double bits_per_value;   /* 8 * bytes_per_vector / head_dim */
    double ratio_to_f16;     /* 16 / bits_per_value */
    const float *codebook;   /* ascending centroids for N(0,1), or NULL where the format has none; static storage */
    int32_t n_codebook;
    double lloyd_max; /* distortion of that codebook on N(0,1) in theory, 0 where it has none */
} tq_format_info;

/* Fills *out. Errors: ARGUMENT, FORMAT, HEAD_DIM. Thread-safe. */
TQ_API TQ_NODISCARD tq_status tq_format_describe(tq_format_info *out, tq_format format, int32_t head_dim);
/* By name, as "sq4". Errors: ARGUMENT, FORMAT. */
TQ_API TQ_NODISCARD tq_status tq_format_from_name(tq_format *out, const char *name);
/* The supported head_dims in ascending order; *n_out gets their number. Static storage. */
TQ_API const int32_t *tq_head_dim_list(int32_t *n_out);

/* ---- presets ------------------------------------------------------------------------------------------------------- */

typedef struct tq_preset {
    const char *name;        /* "TQ4" */
    const char *description; /* one line */
    tq_format k_format, v_format;
    int32_t n_sink, n_recent;
    int32_t k_ref_block; /* of keys */
} tq_preset;
/* The number of TQ4. */
#define TQ_PRESET_DEFAULT 1
/* In their order, from 0; NULL behind the last. Static storage. */
TQ_API const tq_preset *tq_preset_get(int32_t i);
/* The preset of a name, in upper or lower case; NULL if it does not exist. */
TQ_API const tq_preset *tq_preset_find(const char *name);
/*
 * Mean bits of a value, keys and values together, with everything counted (norms, sinks, ring and its bookkeeping) in a store
 * of n_slots tokens. Errors: ARGUMENT, HEAD_DIM.
 */
TQ_API TQ_NODISCARD tq_status tq_preset_bits_per_value(double *out, const tq_preset *preset, int32_t head_dim,
                                                       int32_t n_head_kv, int64_t n_slots);

/* ---- attention parameters ------------------------------------------------------------------------------------------ */

/*
 * softmax(softmax_scale * q . K + bias) . V over columns. A column is a position of a sequence. With softcap c > 0 the logit
 * becomes c * tanh(logit / c) before bias and mask. Query head h reads KV head h / (n_head / n_head_kv). A query row that sees
 * no column at all gives zeros (and lse = -inf, or the learned sink's logit).
 */
typedef struct tq_attend_params {
    size_t struct_size;
    int64_t n_query; /* query tokens */
    int32_t n_head;  /* query heads, a multiple of n_head_kv, at most 65536 */
    const float *q;  /* [n_query, n_head, head_dim] with the strides below */
    int64_t q_token_stride, q_head_stride;
    float *out; /* [n_query, n_head, out_dim] with the strides below; out_dim <= the value head_dim */
    int64_t out_token_stride, out_head_stride;
    int32_t out_dim; /* 0: the value head_dim. Smaller: the first out_dim values (MLA reads its values from the keys' latent) */
    float *lse;      /* optional [n_query, n_head], natural logarithm of the sum of exponentials, learned sink included */
    float softmax_scale; /* 0: 1 / sqrt(head_dim) */
    float softcap;       /* 0: none */
    bool causal;         /* column <= first_pos + i_query */
    int64_t first_pos;   /* the position of query token 0 (causal, window, ALiBi) */
    int64_t window;      /* > 0: column > position - window */
    /* Optional additive mask [n_query, n_col], FP16 bits or FP32 by mask_is_f16; -inf hides a column. */
    const void *mask;
    bool mask_is_f16;
    int64_t mask_token_stride, mask_head_stride; /* mask_head_stride 0: the same mask for all heads */
    /* Optional [n_head]. With a mask, the mask is multiplied by the slope (ggml's convention); without, the bias is
     * -slope * (position - column). */
    const float *alibi_slopes;
    const float *sinks; /* optional [n_head]: learned sink logits (gpt-oss), part of the denominator only */
} tq_attend_params;

/* ---- calibration --------------------------------------------------------------------------------------------------- */

/*
 * What `tq calibrate` learnt of one model: for each layer and KV head a transform that keys go through before they are coded,
 * and queries the other way, so that the error of coding falls where attention feels it least (docs/calibrate.md). Read once,
 * used by any number of caches, and never changed: any thread may use it. It must live longer than they do.
 */
typedef struct tq_calibration tq_calibration;
/* Read a file. Errors: ARGUMENT, IO, CORRUPT, MISMATCH (another version), MEMORY. */
TQ_API TQ_NODISCARD tq_status tq_calibration_load(tq_calibration **out, const char *path);
TQ_API void tq_calibration_free(tq_calibration *calibration);
/*
 * One layer of a calibration as a calibration of its own, for caches of single layers. It copies nothing: free it before its
 * parent. A snapshot taken with it loads only with the same layer's calibration. Errors: ARGUMENT, RANGE (no such layer),
 * MEMORY.
 */
TQ_API TQ_NODISCARD tq_status tq_calibration_take_layer(tq_calibration **out, const tq_calibration *calibration, int32_t layer);
typedef struct tq_calibration_info {
    char model[64];  /* that it was learnt from */
    int32_t n_layer; /* those without transforms among them */
    size_t bytes;    /* of memory in use; of a single layer, that layer's share */
} tq_calibration_info;
/* Errors: ARGUMENT. */
TQ_API TQ_NODISCARD tq_status tq_calibration_describe(tq_calibration_info *out, const tq_calibration *calibration);
/* The transforms of one layer (tq_paged_store.k_transforms), *bytes of them; NULL and 0 if it has none. As long as it lives. */
TQ_API const uint16_t *tq_calibration_transforms(const tq_calibration *calibration, int32_t layer, size_t *bytes);

/* ---- factors from a model's weights -------------------------------------------------------------------------------- */

/*
 * Coding spreads a key's error evenly over its channels, so a channel that outweighs the others costs all of them their
 * precision. Dividing keys by a factor for each channel, and multiplying queries, changes no product; the best factors follow
 * from the energies of keys and queries before RoPE, which a model's weights tell (docs/quality.md): project vectors of random
 * signs, as its norm would scale them, and take mean squares.
 */
typedef struct tq_key_factors_params {
    size_t struct_size;
    int32_t n_head, n_head_kv, head_dim; /* n_head a multiple of n_head_kv */
    const float *k_square;               /* [n_head_kv, head_dim]: mean squares of keys before RoPE */
    const float *k_mean;                 /* optional [n_head_kv, head_dim]: their means, a bias for example */
    const float *q_square;               /* [n_head, head_dim] */
    const int32_t *partners;             /* optional [head_dim]: the channel that RoPE turns each with, or itself */
    const double *angles;                /* optional [head_dim]: by how many radians a position */
    int32_t ref_block;                   /* the k_ref_block of what codes the keys: references take away what turns slowly */
} tq_key_factors_params;
/*
 * Fill out [n_head_kv, head_dim] with quarters of an octave: each value of a key is divided by 2^(factor / 4) before it is
 * coded, and queries are multiplied, so that products stay what they are. -32 to 32; zeros for a head whose energies are
 * not positive, finite numbers. *spread, optional, gets what tq_key_guard wants: the root mean square of a product of query and
 * key, of the head where it is largest, in the basis that is coded. Errors: ARGUMENT, HEAD_DIM, SHAPE (n_head).
 */
TQ_API TQ_NODISCARD tq_status tq_key_factors(int8_t *out, float *spread, const tq_key_factors_params *params);
/*
 * The guard: the smallest of `wanted`, tt2, tt3, tt4, sq8, f16, no smaller than `wanted`, that moves logits of such a spread
 * (softmax_scale included) by at most 1, root mean square. Beyond that attention's weights are off by a factor of e one time in
 * three. `wanted` if the spread is not a positive, finite number.
 */
TQ_API tq_format tq_key_guard(tq_format wanted, float spread);

/* ---- cache --------------------------------------------------------------------------------------------------------- */

/*
 * Sequences over pages from one pool. A page holds page_size tokens of all layers, keys and values. Each sequence keeps its
 * first n_sink and last n_recent tokens exact. Sequences may share pages: after a fork, or because they begin with the same
 * tokens; a page that is shared is copied before one of them writes to it.
 *
 * Threads: any number may use one cache, each sequence one thread at a time (several may attend to it while none changes it).
 * Results are those of one thread.
 *
 * fork(): a child has a cache of its own with what the parent's holds, whatever the parent's threads are doing; of a sequence
 * that one of them was changing it can only free its copy. With an offload file, which the two would share, a child gets
 * no copy: every call in the child but tq_cache_free is an ARGUMENT error, and the parent's file stays as it is.
 */
typedef struct tq_cache tq_cache;
/*
 * Where keys and values are. In a CUDA device's memory (the current one of the thread that creates the cache, and of every
 * call) they have the same bytes and exact tokens, and batches are the way in and out: append, prefill, attend and dry runs are
 * the CPU's.
 */
typedef enum tq_device_kind { TQ_DEVICE_CPU = 0, TQ_DEVICE_CUDA = 1 } tq_device_kind;
/* A host's allocator of device memory, aligned to 128 bytes; alloc gives NULL if memory has run out. Called by any thread that
 * uses the cache, and for what may still be in use by work on the stream. */
typedef struct tq_allocator {
    void *user;
    void *(*alloc)(void *user, size_t bytes);
    void (*free)(void *user, void *memory);
} tq_allocator;
typedef struct tq_cache_params {
    size_t struct_size;
    int32_t n_layer, n_head_kv;
    int32_t head_dim, head_dim_v; /* head_dim_v 0: the same */
    tq_format k_format, v_format;
    const tq_format *layer_k_formats, *layer_v_formats; /* optional [n_layer], copied: override per layer */
    int32_t page_size;                                  /* tokens, 16 to 256, a multiple of 16; 0: 128 */
    int32_t n_pages;                                    /* capacity of the pool; 0: what budget and file hold */
    int32_t n_sink, n_recent;                           /* n_sink <= page_size */
    int32_t n_take_back; /* so many newest tokens can be trimmed (drafts that were rejected) as if they had never come */
    /*
     * 0: none. Else what is coded of keys is their difference from a reference, one for each so many positions of a page and
     * KV head: keys have a mean that costs bits and changes slowly along the context. The reference is the mean of the ring
     * when the block's first token is coded, kept as sq8. Needs a ring; for rotated formats but the product ones. 64 suits.
     */
    int32_t k_ref_block;
    /*
     * Others can begin with a sequence's first tokens (tq_cache_seq_match) where so many of them end, a multiple of page_size:
     * there a copy of its exact tokens is kept, one tq_cache_stats.exact_bytes each. 0: nowhere, and nothing is published.
     */
    int32_t checkpoint_stride;
    size_t budget_bytes; /* all that the cache may hold from the allocator, but its codecs; 0: no limit but n_pages */
    /*
     * Optional: a file of at most offload_bytes in this folder, for pages that the budget has no memory for, least recently
     * used first. It has no name and is gone with the cache. Its pages are read where they are, and come back when they are
     * used again. Needs a budget; pages that one append writes must fit in it. Where the disk is full, calls that may fail
     * with FULL fail with IO.
     */
    const char *offload_folder;
    size_t offload_bytes;
    const tq_calibration *calibration; /* optional, of keys in encoded formats, in place of factors; of as many layers */
    uint64_t seed;                     /* of the sign flips; 0: TQ_SEED_DEFAULT */
    bool dry_run; /* no vectors: pages, bytes, prefixes and refusals are those of a cache with them, in next to no memory */
    tq_device_kind device;
    const tq_allocator *allocator; /* of a device's memory, read as long as the cache lives; NULL: the device's own */
    /*
     * Values are the first out_dim values of the keys (MLA attends to the latents that both come from): v_format, what is given
     * as v and head_dim_v (0, or head_dim) mean nothing, and only keys take memory. On the CPU only.
     */
    bool values_in_keys;
} tq_cache_params;
/* Formats, sinks, ring and references as a preset has them. */
TQ_API void tq_cache_params_set_preset(tq_cache_params *params, const tq_preset *preset);
/* Pages are allocated as they are first used. Errors: ARGUMENT, FORMAT, HEAD_DIM, MEMORY, FULL (the budget), IO, CPU. */
TQ_API TQ_NODISCARD tq_status tq_cache_create(tq_cache **out, const tq_cache_params *params);
TQ_API void tq_cache_free(tq_cache *cache);
/*
 * Factors of a layer's keys [n_head_kv, head_dim], as tq_key_factors finds them; copied, and saved with sequences. NULL: none.
 * Other ones than it has only while the layer holds no tokens, no published page is kept, and nobody else uses the cache.
 * Errors: ARGUMENT, RANGE, MEMORY, FULL.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_set_key_factors(tq_cache *cache, int32_t layer, const int8_t *factors);
/* Those that a layer has, a file's perhaps, to factors [n_head_kv, head_dim]; zeros for none. Errors: ARGUMENT, RANGE. */
TQ_API TQ_NODISCARD tq_status tq_cache_get_key_factors(tq_cache *cache, int32_t layer, int8_t *factors);
/* An empty sequence. Errors: ARGUMENT, MEMORY, FULL. Ids of freed sequences are used again. */
TQ_API TQ_NODISCARD tq_status tq_cache_seq_create(tq_cache *cache, int32_t *seq);
/*
 * A sequence with the content of another, whose pages and exact tokens it shares; each goes its own way from there. Costs
 * memory as they come to differ. Errors: ARGUMENT, RANGE, MEMORY, FULL.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_seq_fork(tq_cache *cache, int32_t from, int32_t *seq);
/*
 * Say that the sequence's first n_tok tokens are tokens[n_tok] (all of them, also if some were published before). Pages that
 * they fill, and whose tokens have left the ring of every layer, can then be found by tq_cache_seq_match, also after the
 * sequence was freed, until the pool needs them for something else: least recently used first. A fork publishes places to begin
 * only behind its beginning, and what was trimmed by more than n_take_back nothing behind that. Errors: ARGUMENT (more tokens
 * than a layer has, a page was published with others, the cache has no checkpoint_stride, or a device, which is waited for, got
 * tokens that were not finite), RANGE, MEMORY, FULL, DEVICE; then fewer pages may have been published.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_seq_publish(tq_cache *cache, int32_t seq, const int32_t *tokens, int64_t n_tok);
/*
 * A sequence that begins with the published pages that tokens[n_tok] begin with; *n_matched tokens of them, a multiple of
 * checkpoint_stride, are there in every layer. It is as if they had been appended: the last n_recent are exact. (Where all
 * formats are exact, a multiple of page_size.) Pass all tokens but the last where the model must run over at least one. Tokens
 * are compared, hashes only find candidates. Errors: ARGUMENT, MEMORY, FULL.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_seq_match(tq_cache *cache, const int32_t *tokens, int64_t n_tok, int32_t *seq,
                                                 int64_t *n_matched);
/* Errors: ARGUMENT, RANGE. Its pages go back to the pool; published ones are kept for others as long as there is room. */
TQ_API TQ_NODISCARD tq_status tq_cache_seq_free(tq_cache *cache, int32_t seq);
/*
 * Append n_tok tokens to one layer: k [n_tok, n_head_kv, head_dim], v [n_tok, n_head_kv, head_dim_v], contiguous. Layers
 * advance independently. Errors: ARGUMENT, RANGE, NOT_FINITE (the log names layer, head and position), FULL, MEMORY; then
 * nothing was appended. executor may be NULL. In a dry run k and v are not read, and may be NULL. What needs the vectors
 * (attending, batches, reading, saving, loading) is an ARGUMENT error there.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_append(tq_cache *cache, int32_t seq, int32_t layer, int64_t n_tok, const float *k,
                                              const float *v, const tq_executor *executor);
/*
 * Attend over all tokens of one layer of a sequence; columns are positions. For causal prefill append first, then attend with
 * first_pos = length before the append. Errors: ARGUMENT, RANGE, SHAPE, MEMORY.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_attend(tq_cache *cache, int32_t seq, int32_t layer, const tq_attend_params *params,
                                              const tq_executor *executor);
/*
 * tq_cache_append and tq_cache_attend in one: the queries are those of the tokens appended. A token is exact for all queries
 * for which it is among the last n_recent tokens, so a prompt in large batches gives what token by token would. (After a
 * separate append only the last queries see exact tokens.) Sets n_query, causal and first_pos. Errors: those of both; then
 * nothing was appended. A mask has a column for each position of the sequence after the append.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_prefill(tq_cache *cache, int32_t seq, int32_t layer, int64_t n_tok, const float *k,
                                               const float *v, const tq_attend_params *params, const tq_executor *executor);
/*
 * Make room for n_tok more tokens in every layer, and give the sequence its own copy of the pages and exact tokens that they
 * will write; appending them then cannot fail for lack of memory. Errors: ARGUMENT, RANGE, FULL, MEMORY; then nothing changed.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_reserve(tq_cache *cache, int32_t seq, int64_t n_tok);
/*
 * The pages of a sequence, page_table[n] as far as room goes; *n_pages (optional) gets their number. Valid until the sequence
 * is next reserved, appended to, trimmed or freed. Errors: ARGUMENT, RANGE.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_page_table(tq_cache *cache, int32_t seq, int32_t *page_table, int32_t room,
                                                  int32_t *n_pages);
/*
 * Keep the first n_tok tokens of every layer. Of the last n_recent that stay, those are exact again that were when the sequence
 * was longest less n_take_back (a sequence that was loaded or imported begins with n_recent); what else was encoded stays
 * encoded. Errors: ARGUMENT, RANGE.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_trim(tq_cache *cache, int32_t seq, int64_t n_tok);
/* Tokens in one layer of a sequence, or -1 if there is no such sequence or layer. */
TQ_API int64_t tq_cache_length(tq_cache *cache, int32_t seq, int32_t layer);
/* Decode tokens [first, first + n) to k and/or v (either may be NULL), shapes as in append. Errors: ARGUMENT, RANGE. */
TQ_API TQ_NODISCARD tq_status tq_cache_read(tq_cache *cache, int32_t seq, int32_t layer, int64_t first, int64_t n, float *k,
                                            float *v);
typedef struct tq_cache_stats {
    int32_t n_sequences;
    int64_t n_pages_used, n_pages_kept, n_pages_free; /* kept: published, in no sequence; free: the rest of the pool */
    int64_t n_pages_shared;                           /* used by more than one sequence */
    int64_t n_pages_offloaded;                        /* now in the file */
    int64_t n_offloads, n_restores;                   /* pages moved there and back so far */
    size_t page_bytes;                                /* encoded bytes of one page */
    size_t exact_bytes;                               /* sinks and rings of all sequences */
    size_t checkpoint_bytes;                          /* those at which other sequences can begin */
    size_t table_bytes;                               /* page tables and sequence records */
    size_t allocated_bytes;                  /* all that the cache holds from the allocator now, its calibration with it */
    int64_t n_asked_tok, n_matched_tok;      /* of all tq_cache_seq_match so far */
    int64_t n_evicted_pages, n_copied_pages; /* published pages given up; pages copied before a write */
    double encode_seconds, attend_seconds;   /* spent in appending and attending, summed over calling threads */
} tq_cache_stats;
TQ_API TQ_NODISCARD tq_status tq_cache_get_stats(tq_cache *cache, tq_cache_stats *out);

/* ---- batches ------------------------------------------------------------------------------------------------------- */

/*
 * Sequences of a cache that go through a model together, on every device in the same way:
 *
 *     tq_batch_begin(batch, seqs, n_tok, n_head);     a forward pass: room is made, tables go to the device
 *     tq_batch_attend(batch, layer, rows, executor);  for each layer: its tokens are appended, and their queries attend
 *     tq_batch_end(batch);
 *
 * On a CUDA device calls only put work on the stream, and a step of decoding never waits: it can be captured in a CUDA graph if
 * a step like it ran before and all pages are reserved. What is captured has not happened; tq_batch_replayed says when it has.
 * One thread at a time. The cache must live longer.
 */
typedef struct tq_batch tq_batch;
/* n_rows: sequences, the same number in each pass. Errors: ARGUMENT, MEMORY, DEVICE. */
TQ_API TQ_NODISCARD tq_status tq_batch_create(tq_batch **out, tq_cache *cache, int32_t n_rows);
TQ_API void tq_batch_free(tq_batch *batch);
/*
 * seqs [n_rows], all different, with n_tok [n_rows] tokens to come each, from 0. A pass that was left without an end is
 * forgotten; tq_cache_trim takes back what its layers have appended. Errors: ARGUMENT (also: tokens of an earlier pass were not
 * finite on the device, or a graph is being captured and something must be copied), RANGE, FULL, MEMORY, IO, DEVICE; then
 * nothing was appended.
 */
TQ_API TQ_NODISCARD tq_status tq_batch_begin(tq_batch *batch, const int32_t *seqs, const int64_t *n_tok, int32_t n_head);
/* A layer's rows: the tokens of the first sequence, then those of the second, and so on. Pointers of the cache's device. */
typedef enum tq_dtype { TQ_DTYPE_F32 = 0, TQ_DTYPE_F16 = 1, TQ_DTYPE_BF16 = 2 } tq_dtype;
typedef struct tq_batch_rows {
    size_t struct_size;
    tq_dtype dtype;    /* of q, k, v and out */
    const void *q;     /* [n, n_head, head_dim] with the strides below, in elements; 0: contiguous */
    const void *k, *v; /* [n, n_head_kv, head_dim], of v head_dim_v; heads contiguous */
    void *out;         /* [n, n_head, out_dim] */
    int64_t q_token_stride, q_head_stride, k_token_stride, v_token_stride, out_token_stride, out_head_stride;
    float softmax_scale; /* 0: 1 / sqrt(head_dim) */
    float softcap;       /* 0: none */
    int64_t window;      /* > 0: column > position - window */
    const float *sinks;  /* optional [n_head]: learned sink logits */
    /* As in tq_attend_params. A mask has rows as q has, and as columns the positions of a row's sequence with these tokens. */
    const void *mask;
    bool mask_is_f16;
    int64_t mask_token_stride, mask_head_stride;
    const float *alibi_slopes;
    float *lse;      /* [n, n_head] */
    int32_t out_dim; /* 0: head_dim_v */
    /* CPU: other layers of the model also attend to these keys and values. Nothing is appended: the last of them, called with
     * the same k and v, does that. */
    bool is_shared;
    /* CPU, optional [n_rows]: how many queries each sequence has, which are its last tokens'; NULL: all tokens have one. q,
     * out, lse and mask have rows of these. */
    const int64_t *n_query;
} tq_batch_rows;
/*
 * Append and attend, as if token by token: a token is exact for the queries for which it is among the last n_recent. Errors:
 * ARGUMENT (no pass, or the layer has had its turn), SHAPE (out_dim), NOT_FINITE (a device says so in a later pass), MEMORY,
 * FULL, IO, DEVICE. On the CPU nothing was appended then; on a device tq_cache_length tells.
 */
TQ_API TQ_NODISCARD tq_status tq_batch_attend(tq_batch *batch, int32_t layer, const tq_batch_rows *rows,
                                              const tq_executor *executor);
/* The pass is over. Errors: ARGUMENT (there was none). */
TQ_API TQ_NODISCARD tq_status tq_batch_end(tq_batch *batch);
/* Is the pass that is open, or what would begin now, captured in a CUDA graph? */
TQ_API bool tq_batch_is_captured(const tq_batch *batch);
/*
 * A graph of a captured pass was launched. Errors: ARGUMENT: sequences have changed since the batch's last pass (trimmed,
 * forked, others), have no room, or the cache's memory has moved as it grew; then the graph may have written what others use.
 */
TQ_API TQ_NODISCARD tq_status tq_batch_replayed(tq_batch *batch, const int32_t *seqs, const int64_t *n_tok);
/* The stream, a cudaStream_t, on which a CUDA cache's calls work from now on; NULL, at first: the default one. */
TQ_API TQ_NODISCARD tq_status tq_cache_set_stream(tq_cache *cache, void *stream);

/* ---- snapshots ----------------------------------------------------------------------------------------------------- */

/*
 * Write sequences to a file (docs/snapshot.md): seqs[n_seq], or with seqs NULL all of them and the published prefixes that are
 * kept. What sequences share is written once; what of it is published stays so. The file is written next to `path`, flushed and
 * renamed: the path holds the old file or the new one, whole. Symbolic links are followed; a device, a FIFO or a folder is an
 * IO error. No thread may change those sequences meanwhile. Errors: ARGUMENT, RANGE, IO, MEMORY.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_save(tq_cache *cache, const char *path, const int32_t *seqs, int32_t n_seq);
/*
 * Add a file's sequences to a cache that was created with the same shape, formats, page_size, n_sink, n_recent, n_take_back,
 * k_ref_block and seed, and that has the file's factors of keys, or no sequences yet and takes them; seqs [room] gets their
 * ids in the order of saving, *n_seq their number. Nothing in the file is trusted. Errors: ARGUMENT, IO,
 * CORRUPT, MISMATCH, SHAPE (room is too small), FULL, MEMORY; then the cache holds what it held.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_load(tq_cache *cache, const char *path, int32_t *seqs, int32_t room, int32_t *n_seq);
/*
 * The bytes that a snapshot has of a sequence, to and from stores elsewhere. Export copies pages [first_page, first_page +
 * n_pages) of its table to pages [n_pages, page_bytes], and its exact data to exact [exact_bytes], which may be NULL:
 * page_bytes as in tq_cache_stats, exact_bytes of one sequence. Import makes a sequence one of n_tok tokens in each layer: it
 * keeps its first first_page pages, shared or not, and `pages` has those that follow. The sinks and the last n_recent tokens
 * are those in `exact`. Any bytes decode to something; whether they were meant is the caller's affair. Errors: ARGUMENT
 * (also another number of exact_bytes), RANGE, FULL, MEMORY, IO; then nothing changed.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_seq_export(tq_cache *cache, int32_t seq, int64_t first_page, int64_t n_pages,
                                                  void *pages, void *exact, size_t exact_bytes);
TQ_API TQ_NODISCARD tq_status tq_cache_seq_import(tq_cache *cache, int32_t seq, int64_t n_tok, int64_t first_page,
                                                  const void *pages, const void *exact, size_t exact_bytes);
typedef struct tq_snapshot_info {
    int32_t version;
    int32_t n_layer, n_head_kv, head_dim, head_dim_v, page_size, n_sink, n_recent, n_take_back;
    int32_t k_ref_block, n_sequences, n_pages, n_prefixes;
    uint64_t seed, file_bytes, page_bytes, exact_bytes;
} tq_snapshot_info;
/*
 * What a file says of itself. Its header is checked, and if `verify` every hash. formats, optional, gets [room] of the formats
 * [n_layer, keys and values]. Errors: ARGUMENT, IO, CORRUPT, MISMATCH (another version). Thread-safe.
 */
TQ_API TQ_NODISCARD tq_status tq_snapshot_describe(tq_snapshot_info *out, const char *path, bool verify, tq_format *formats,
                                                   int32_t room);

/* ---- machine ------------------------------------------------------------------------------------------------------- */

/*
 * The instruction set that the kernels use: "scalar", "avx2", "avx512" or "amx", "neon", "dotprod" or "i8mm", after the cap by
 * the environment variable TQ_CPU. NULL with TQ_CPU set to an unknown or missing one; every create and open then fails with
 * TQ_ERR_CPU. On Linux, on a machine with AMX, the first use of kernels requests permission (arch_prctl), for the process.
 */
TQ_API const char *tq_cpu_name(void);

/* ---- codec --------------------------------------------------------------------------------------------------------- */

/* One format at one head_dim, with its rotation. Immutable after creation, so thread-safe. */
typedef struct tq_codec tq_codec;
/* The seed of the sign flips; encoder and decoder must agree. TQ_SEED_DEFAULT is what the presets use. */
#define TQ_SEED_DEFAULT UINT64_C(0x7475726271756e74)
/* Errors: ARGUMENT, FORMAT, HEAD_DIM, MEMORY, CPU. Free with tq_codec_free. */
TQ_API TQ_NODISCARD tq_status tq_codec_create(tq_codec **out, tq_format format, int32_t head_dim, uint64_t seed);
TQ_API void tq_codec_free(tq_codec *codec);
/*
 * Encode n vectors x [n, head_dim] to bytes [n, bytes_per_vector], each vector its norms (if any) followed by its codes.
 * Bit-exact across instruction sets and machines. Errors: ARGUMENT, NOT_FINITE (nothing is written).
 */
TQ_API TQ_NODISCARD tq_status tq_codec_encode(const tq_codec *codec, const float *x, int64_t n, void *bytes);
/* The inverse: bytes [n, bytes_per_vector] to x [n, head_dim]. Errors: ARGUMENT. */
TQ_API TQ_NODISCARD tq_status tq_codec_decode(const tq_codec *codec, const void *bytes, int64_t n, float *x);

/* ---- paged stores -------------------------------------------------------------------------------------------------- */

/*
 * Keys and values of one layer in pages, with attention on the compressed bytes, for engines with a block manager of their own.
 * The caller owns all memory and gives it with every call; the library keeps no state of it. Thread-safe, as long as no call
 * writes pages or exact slots that another one uses.
 *
 * TQ_DEVICE_CPU: pointers are the host's, streams are NULL, and a call is done when it returns. It runs on the executor that it
 * is given, and takes memory for its own duration: it may answer MEMORY, and CPU if TQ_CPU is not valid here. All
 * formats and head_dims are supported.
 *
 * TQ_DEVICE_CUDA (docs/cuda.md): pointers are device pointers unless stated; a stream is a cudaStream_t, NULL for the default
 * one; the device is the current one of the calling thread. Calls allocate nothing and never wait: each puts kernels on the
 * stream, so that they can be captured in a CUDA graph. The code is in libturboquant-cuda.so, which the first call loads: the
 * library itself needs no CUDA. NO_DEVICE and DEVICE can be the answers of every call.
 *
 * Positions of a sequence: the first n_sink are always exact, the last n_recent exact until newer ones push them out; those
 * between are encoded, position p in page page_table[sequence][p / page_size]. Encoded bytes are those of a cache's on the CPU.
 * Pages, exact slots and places that do not exist: on the CPU the call is refused (RANGE) before anything is read or written,
 * unless nobody uses them; on CUDA pages out of range are read as page 0 and never written, and exact slots of sequences that
 * have tokens must exist.
 */
typedef struct tq_cuda_info {
    char name[64];                        /* of the current device */
    int32_t compute_major, compute_minor; /* 9, 0 */
    int32_t n_multiprocessors;
    int32_t driver_version, runtime_version; /* 13000 is 13.0 */
    size_t memory_bytes;
} tq_cuda_info;
/* Errors: ARGUMENT, NO_DEVICE. */
TQ_API TQ_NODISCARD tq_status tq_cuda_describe(tq_cuda_info *out);

typedef struct tq_paged_store {
    size_t struct_size;
    tq_device_kind device;
    tq_format k_format, v_format; /* CUDA: sq8, sq4, sq3, sq2; tt4, tt3, tt2. docs/cuda.md: fast pairs, and fast head_dims */
    int32_t head_dim, n_head_kv;
    int32_t head_dim_v;       /* 0: the same */
    int32_t page_size;        /* tokens, 16 to 256, a multiple of 16; CUDA: of 32 */
    int32_t n_sink, n_recent; /* at most 1024 together; CUDA: 512 */
    /* Keys are coded against references, one for each so many positions of a page and KV head, as a cache's with this
     * k_ref_block. Appends want n_recent > 0. CUDA: 64, and page_size must be a multiple of it. 0: none. */
    int32_t k_ref_block;
    const int8_t *k_factors; /* optional [n_head_kv, head_dim]: as tq_cache_set_key_factors; the same in all calls */
    /* Optional, in place of factors: a layer's transforms of keys as tq_calibration_transforms gives them; CUDA: copied to the
     * device. The same in all calls. */
    const uint16_t *k_transforms;
    uint64_t seed;         /* 0: TQ_SEED_DEFAULT */
    int64_t n_pages;       /* of `pages` */
    int64_t n_exact_slots; /* of `exact`: sequences that can be alive at once */
    void *pages;           /* n_pages * page_bytes, aligned to 64 bytes, CUDA: 128; contents do not matter at first */
    /* FP16 [n_exact_slots, 2 (keys, values), n_head_kv, n_sink + n_ring, head_dim], of values head_dim_v; NULL if there are
     * neither sinks nor a ring; CUDA: aligned to 16 bytes. Sink i is entry i, ring position p entry n_sink + p % n_ring. Keys
     * or values in an exact format (f16, bf16) have none. */
    void *exact;
    /* Vectors that the ring holds: at least n_recent, at most 65536; 0: n_recent. Tokens are encoded when they leave the last
     * n_recent; a longer ring keeps as many before these, so that tokens can be taken back (drafts), or several queries
     * of a call have each its own last n_recent. */
    int32_t n_ring;
    size_t page_stride_bytes;  /* from one page to the next: at least page_bytes, a multiple of 16; 0: page_bytes */
    size_t exact_stride_bytes; /* from one exact slot to the next: at least exact_bytes, a multiple of 16; 0: exact_bytes */
} tq_paged_store;

/* Bytes of the caller's memory, from plain arithmetic: needs no device. */
typedef struct tq_paged_sizes {
    size_t page_bytes;      /* of one page where it lies: keys and values of all KV heads */
    size_t exact_bytes;     /* of one exact slot */
    size_t canonical_bytes; /* of one page in the format's own arrangement, as tq_paged_export writes it */
} tq_paged_sizes;
/* Errors: ARGUMENT, FORMAT, HEAD_DIM (the device has no layout for these; the log says what there is). */
TQ_API TQ_NODISCARD tq_status tq_paged_sizes_get(tq_paged_sizes *out, const tq_paged_store *store);

/*
 * An append has two halves. A token pushes another one out of the ring, which is encoded; then it takes that one's place. The
 * first half takes longer and needs nothing of the new token, so it may run long before, on CUDA on another stream. Keys or
 * values in an exact format are written by the first half.
 */
typedef enum tq_append_half {
    TQ_APPEND_BOTH = 0,
    /* k and v may be NULL where no sequence gets more than n_recent tokens, no format is exact and, with references, none but
     * a sequence's first token makes a block begin to be coded. */
    TQ_APPEND_ENCODE = 1,
    TQ_APPEND_STORE = 2, /* writes the exact tokens; the other half must be done with the same tokens */
} tq_append_half;

typedef struct tq_paged_append_params {
    size_t struct_size;
    int64_t n_tok;
    tq_dtype dtype;
    const void *k, *v;  /* [n_tok, n_head_kv, head_dim], of v head_dim_v, rounded to FP16 on entry */
    int64_t row_stride; /* elements from one token to the next; 0: contiguous */
    /*
     * Where tokens go: page * page_size + offset, int64 [n_tok]; negative: skip the token (padding of a captured batch, or
     * tokens that a sequence begins with and masks hide; with references whole blocks of them, since a reference is a mean of
     * what the ring holds). Without sinks and ring this is all that is read.
     */
    const int64_t *slot_mapping;
    /* With sinks or ring: the sequence (row of page_table) and position of each token. The tokens of a sequence in one call
     * stand together, none that is skipped between them, in ascending positions, and follow what was appended before. */
    const int32_t *seq_ids;    /* int32 [n_tok] */
    const int64_t *positions;  /* int64 [n_tok] */
    const int32_t *page_table; /* int32 [n_seq, max_pages] */
    int64_t page_table_stride;
    const int32_t *exact_slots; /* optional int32 [n_seq]: the exact slot of a sequence; NULL: sequence i has slot i */
    /* Optional int32: incremented for each vector with NaN, infinity or a magnitude above 65504. NaN is stored as 0, the others
     * as the largest FP16 number. */
    int32_t *n_not_finite;
    tq_append_half half;         /* other than BOTH: only with a ring */
    int64_t v_row_stride;        /* of v; 0: row_stride, or contiguous if that is 0 */
    const tq_executor *executor; /* CPU: the threads to run on; NULL: the caller's */
    /* What is encoded is coded against the references that its blocks have: for positions that are written again while others
     * of their block stay coded. Pages must have been zeroed before their first use: no reference, which is 0. */
    bool keep_references;
    /* With a ring: what is pushed out of positions before it stays as its page has it. */
    int64_t encode_from;
} tq_paged_append_params;
/* Errors: ARGUMENT, FORMAT, HEAD_DIM, MEMORY, CPU: RANGE; then nothing was written. */
TQ_API TQ_NODISCARD tq_status tq_paged_append(const tq_paged_store *store, const tq_paged_append_params *params, void *stream);

/*
 * Exact tokens in pages, for engines that share, free and hash blocks of tokens without rings of sequences: the store has
 * n_sink and n_recent 0, so that each token is encoded when it comes, and the caller also keeps it here, FP16 [n_head_kv,
 * tokens, head_dim of keys, then head_dim_v of values]. Keys or values in an exact format are read from the store's pages.
 */
typedef struct tq_paged_exact {
    size_t struct_size;
    /* What a query at position p sees exact: the first n_sink positions, and those above p - n_recent. At most 1024 together,
     * n_sink at most the store's page_size. */
    int32_t n_sink, n_recent;
    /* Recent ones: position p is token p % page_size of page page_table[sequence][p / page_size]. Of the table only what
     * queries see exact is read. NULL if n_recent is 0. */
    const void *pages;
    int64_t n_pages;
    int32_t page_size;
    size_t page_stride_bytes;  /* 0: pages follow each other */
    const int32_t *page_table; /* int32 [n_seq, max_pages] */
    int64_t page_table_stride;
    /* The sinks: in each page of the store there is room for n_sink tokens, so many bytes behind its beginning, between
     * page_bytes and page_stride_bytes; of a sequence's first page it is read. */
    size_t sink_offset_bytes;
} tq_paged_exact;

typedef struct tq_paged_attend_params {
    size_t struct_size;
    int32_t n_seq;
    int32_t n_query; /* query tokens of each sequence, its last positions; 0: 1, plain decoding; with query_starts the most of
                        one */
    int32_t n_head;  /* query heads, a multiple of n_head_kv */
    tq_dtype dtype;  /* of q and out */
    const void *q;   /* [n_seq * n_query, n_head, head_dim] with the strides below, in elements; 0: contiguous */
    void *out;       /* [n_seq * n_query, n_head, out_dim] likewise */
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    float *lse; /* optional [n_seq * n_query, n_head], natural logarithm of the sum of exponentials, learned sink included */
    const int32_t *page_table; /* int32 [n_seq, max_pages] */
    int64_t page_table_stride;
    const void *seq_lens; /* tokens of each sequence, those of the queries included: int32 [n_seq], or int64 */
    bool seq_lens_are_64;
    int64_t max_seq_len;        /* host: no sequence is longer; it only decides how the work is cut */
    const int32_t *exact_slots; /* as in tq_paged_append_params */
    float softmax_scale;        /* 0: 1 / sqrt(head_dim) */
    float softcap;              /* 0: none */
    int64_t window;             /* > 0: column > position - window */
    const float *sinks;         /* optional float [n_head]: learned sink logits */
    /* Results are repeated bit for bit, and do not depend on what else is in the batch or on max_seq_len. Costs some speed. On
     * the CPU it is always so. */
    bool deterministic;
    /* CUDA: the call before on this stream is the tq_paged_append, or its STORE half, of the newest token: kernels may then
     * begin next to it, where there are sinks or a ring and the device can (sm_90 on). Nothing changes in the results. */
    bool follows_append;
    /* CUDA: scratch, aligned to 128 bytes, whose first 1 / TQ_PAGED_WORKSPACE_COUNTERS must be zero before its first use; each
     * call leaves them zero. Calls of all shapes may use one workspace, each after the other and with the same workspace_bytes:
     * those that tq_paged_workspace_bytes says for the most that any of them has. Calls that may run at the same time need one
     * each. */
    void *workspace;
    size_t workspace_bytes;
    /* Optional int32 [n_seq + 1]: sequence i has queries query_starts[i] to query_starts[i + 1], none to n_query of them; there
     * are query_starts[n_seq] in all, of which q, out, lse and new rows are. */
    const int32_t *query_starts;
    /*
     * Optional: keys and values of the query tokens, as in an append, of this dtype, rounded to FP16 on entry. Then the
     * call comes between the two halves of their append, TQ_APPEND_ENCODE and TQ_APPEND_STORE, and each query has its
     * own last n_recent tokens exact: results are those of tokens that come one by one, however a prompt is cut. Without a ring
     * they are not read, and the append comes first.
     */
    const void *new_k, *new_v;
    int64_t new_row_stride; /* elements from one token to the next; 0: contiguous */
    /* As in tq_attend_params, in memory of the device. A mask has rows as q has, and as columns the positions of a row's
     * sequence, of which those behind the query are not read; what it hides may hold any bytes (rows that appends skipped). */
    const void *mask;
    bool mask_is_f16;
    int64_t mask_token_stride, mask_head_stride;
    const float *alibi_slopes;
    int32_t out_dim;                   /* 0: that of the values */
    int64_t new_v_row_stride;          /* of new_v; 0: new_row_stride, or contiguous if that is 0 */
    const tq_executor *executor;       /* CPU: the threads to run on; NULL: the caller's */
    const tq_paged_exact *exact_pages; /* CPU, optional: what is exact, with a store that has neither sinks nor a ring */
} tq_paged_attend_params;
#define TQ_PAGED_WORKSPACE_COUNTERS 32
/*
 * What any call needs whose n_seq, n_query and max_seq_len are at most these, with this n_head, and deterministic calls if
 * these are. CPU: 0. Errors: ARGUMENT, SHAPE, FORMAT, HEAD_DIM.
 */
TQ_API TQ_NODISCARD tq_status tq_paged_workspace_bytes(size_t *out, const tq_paged_store *store,
                                                       const tq_paged_attend_params *params);
/*
 * softmax(softmax_scale * q . K) . V, causal: query token i of a sequence sees positions up to length - n_query + i, and
 * exactly the sinks and its own last n_recent of them, as far as the ring or new_k and new_v have these. A row that sees
 * nothing gives zeros. CUDA: scales of values (their root mean square) should lie between 1e-4 and 2000. Errors: ARGUMENT,
 * SHAPE, FORMAT, HEAD_DIM, MEMORY; CPU: RANGE, also if query_starts do not ascend or a sequence has more than n_query.
 */
TQ_API TQ_NODISCARD tq_status tq_paged_attend(const tq_paged_store *store, const tq_paged_attend_params *params, void *stream);

/* Copy pages from[i] to to[i], int32 [n] each; no page may be in both. On CUDA what is out of range is left out. Errors:
 * ARGUMENT, FORMAT, HEAD_DIM, CPU: RANGE. */
TQ_API TQ_NODISCARD tq_status tq_paged_copy(const tq_paged_store *store, const int32_t *from, const int32_t *to, int64_t n,
                                            void *stream);
/*
 * Pages pages[n] (int32) to and from the format's own bytes [n, n_head_kv, head page of keys with references, head page of
 * values] (docs/formats.md), bit for bit. bytes: on CUDA device memory, or host memory that the device can reach
 * (cudaMallocHost). Out of range and errors as above.
 */
TQ_API TQ_NODISCARD tq_status tq_paged_export(const tq_paged_store *store, const int32_t *pages, int64_t n, void *bytes,
                                              void *stream);
TQ_API TQ_NODISCARD tq_status tq_paged_import(const tq_paged_store *store, const int32_t *pages, int64_t n, const void *bytes,
                                              void *stream);

#ifdef __cplusplus
}
#endif
#endif
