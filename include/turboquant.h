/* SPDX-License-Identifier: MIT */
/*
 * turboquant.h - a language model's KV cache in 2 to 4 bits a value, with attention on the compressed bytes.
 *
 * The order of this file: version, status, log, executor, formats, codec (single vectors), attention parameters,
 * store (slots in caller-owned memory; what an engine with its own cell management embeds), cache (sequences with
 * positions; what an engine without one embeds), presets.
 *
 * Conventions that hold throughout:
 *  - Every function that can fail returns tq_status; out parameters come first and are untouched on failure.
 *  - Every struct that a caller fills starts with struct_size; the matching *_default function sets it.
 *  - Strides are in elements unless the name ends in _bytes. Shapes are written [n_tok, n_head_kv, head_dim], last dimension
 *    contiguous.
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
    /* files and formats: -20 to -29 are reserved */
    /* unsupported */
    TQ_ERR_HEAD_DIM = -30, /* a head_dim that has no rotation; tq_head_dim_list() names those that have one */
    TQ_ERR_FORMAT = -31,   /* an unknown format or preset */
    TQ_ERR_CPU = -32       /* TQ_CPU names an instruction set that is unknown or that this machine lacks */
} tq_status;

/* One line of English for a status, never NULL. Static storage; thread-safe. */
TQ_API const char *tq_status_string(tq_status status);

/* ---- log ---------------------------------------------------------------------------------------------------------- */

typedef enum tq_log_level { TQ_LOG_ERROR = 0, TQ_LOG_WARNING = 1, TQ_LOG_INFO = 2 } tq_log_level;
typedef void (*tq_log_fn)(void *user, tq_log_level level, const char *message);

/*
 * Set the process-wide log callback; NULL (the default) drops messages. A message is one line without a newline and says what
 * was wrong with which layer, head and position. Call before other threads use the library. The callback may be called from
 * any thread.
 */
TQ_API void tq_log_set(tq_log_fn log, void *user);

/* ---- executor ------------------------------------------------------------------------------------------------------ */

/*
 * How the library runs on several threads. run() calls body(arg, i_thread, n_threads) once on each of n_threads threads, the
 * caller's among them, and returns when all are done; it may use fewer threads than `n_threads` says, provided that each body
 * call is told the number really used. Results never depend on the number of threads.
 */
typedef void (*tq_body_fn)(void *arg, int32_t i_thread, int32_t n_threads);
typedef struct tq_executor {
    int32_t n_threads;
    void *user;
    void (*run)(void *user, int32_t n_threads, tq_body_fn body, void *arg);
} tq_executor;

/* A pool of threads. It sleeps when idle and spins at most some tens of microseconds. */
typedef struct tq_pool tq_pool;
/* n_threads >= 1 counts the caller's thread. Errors: ARGUMENT, MEMORY, THREAD. */
TQ_API TQ_NODISCARD tq_status tq_pool_create(tq_pool **out, int32_t n_threads);
/* The pool must be idle. NULL is fine. */
TQ_API void tq_pool_free(tq_pool *pool);
/* Valid until tq_pool_free. One run at a time per pool. */
TQ_API tq_executor tq_pool_executor(tq_pool *pool);

/* ---- formats ------------------------------------------------------------------------------------------------------- */

/* How one head vector is stored; docs/formats.md gives the bytes. Values are pinned. */
typedef enum tq_format {
    TQ_FORMAT_F16 = 0,  /* reference, not rotated */
    TQ_FORMAT_BF16 = 1, /* reference, not rotated */
    TQ_FORMAT_TQ8 = 2,  /* rotated, 8-bit uniform */
    TQ_FORMAT_TQ4 = 3,  /* rotated, Lloyd-Max (TurboQuant, arXiv 2504.19874, Algorithm 1) */
    TQ_FORMAT_TQ3 = 4,
    TQ_FORMAT_TQ2 = 5,
    TQ_FORMAT_TQ4_PROD = 6, /* Algorithm 2: one bit fewer for the codebook, and a QJL sign bit. For comparison only:   */
    TQ_FORMAT_TQ3_PROD = 7, /* it is worse than Algorithm 1 after a softmax, and no preset uses it.                    */
    TQ_FORMAT_TQ2_PROD = 8,
    TQ_FORMAT_TT4 = 9, /* rotated, trellis-coded: the bytes of the Lloyd-Max formats, less error, slower to encode */
    TQ_FORMAT_TT3 = 10,
    TQ_FORMAT_TT2 = 11,
    TQ_FORMAT_COUNT
} tq_format;

typedef struct tq_format_info {
    const char *name;        /* "tq4" */
    const char *description; /* one line */
    int32_t bits;            /* nominal bits of a code */
    int32_t head_dim;
    size_t bytes_per_vector; /* codes and norm */
    double bits_per_value;   /* 8 * bytes_per_vector / head_dim */
    double ratio_to_f16;     /* 16 / bits_per_value */
    const float *codebook;   /* ascending centroids for N(0,1), or NULL where the format has none; static storage */
    int32_t n_codebook;
    double lloyd_max; /* distortion of that codebook on N(0,1) in theory, 0 where there is none */
} tq_format_info;

/* Fills *out. Errors: ARGUMENT, FORMAT, HEAD_DIM. Thread-safe. */
TQ_API TQ_NODISCARD tq_status tq_format_describe(tq_format_info *out, tq_format format, int32_t head_dim);
/* By name, as "tq4". Errors: ARGUMENT, FORMAT. */
TQ_API TQ_NODISCARD tq_status tq_format_from_name(tq_format *out, const char *name);
/* The supported head_dims in ascending order; *n_out gets their number. Static storage. */
TQ_API const int32_t *tq_head_dim_list(int32_t *n_out);

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

/* ---- attention parameters ------------------------------------------------------------------------------------------ */

/*
 * softmax(softmax_scale * q . K + bias) . V over columns. A column is a slot of a store or a position of a sequence. With
 * softcap c > 0 the logit becomes c * tanh(logit / c) before bias and mask. Query head h reads KV head h / (n_head /
 * n_head_kv). A query row that sees no column at all gives zeros (and lse = -inf, or the learned sink's logit).
 */
typedef struct tq_attend_params {
    size_t struct_size;
    int64_t n_query; /* query tokens */
    int32_t n_head;  /* query heads, a multiple of n_head_kv */
    const float *q;  /* [n_query, n_head, head_dim] with the strides below */
    int64_t q_token_stride, q_head_stride;
    float *out; /* [n_query, n_head, out_dim] with the strides below; out_dim <= the value head_dim */
    int64_t out_token_stride, out_head_stride;
    int32_t out_dim; /* 0: the value head_dim. Smaller: the first out_dim values (MLA reads its values from the keys' latent) */
    float *lse;      /* optional [n_query, n_head], natural logarithm of the sum of exponentials, learned sink included */
    float softmax_scale;
    float softcap;     /* 0: none */
    bool causal;       /* column <= first_pos + i_query */
    int64_t first_pos; /* the position of query token 0 (causal, window, ALiBi) */
    int64_t window;    /* > 0: column > position - window */
    /* Optional additive mask [n_query, n_col], FP16 bits or FP32 by mask_is_f16; -inf hides a column. */
    const void *mask;
    bool mask_is_f16;
    int64_t mask_token_stride, mask_head_stride; /* mask_head_stride 0: the same mask for all heads */
    /* Optional [n_head]. With a mask, the mask is multiplied by the slope (ggml's convention); without, the bias is
     * -slope * (position - column). */
    const float *alibi_slopes;
    const float *sinks; /* optional [n_head]: learned sink logits (gpt-oss), part of the denominator alone */
    /* Stores only. Optional: the settled stages of the rows that belong to the query tokens, one row each. */
    const struct tq_stage *key_stage, *value_stage;
} tq_attend_params;
TQ_API void tq_attend_params_default(tq_attend_params *params);

/* ---- store --------------------------------------------------------------------------------------------------------- */

/*
 * Keys or values (one of the two) of one layer, addressed by slot, in memory that the caller owns. A slot is exact (FP16) or
 * encoded: the slots below n_sink stay exact for ever, the last n_recent slots written stay exact until newer writes push them
 * out, and only then are they encoded, once. Values are rounded to FP16 on entry, as an FP16 cache would, so the bytes do not
 * depend on how writes were batched. All state lives in the caller's memory, which is valid (and empty) when zero-filled:
 * clearing a store is a memset, copying one is a memcpy.
 */
typedef struct tq_store tq_store;
typedef struct tq_store_params {
    size_t struct_size;
    tq_format format;
    int32_t head_dim, n_head_kv;
    int64_t n_slots;
    int32_t n_sink, n_recent;
    /*
     * 0: none. Else each ref_block slots of a head share a reference vector, and what is coded of a slot is its difference from
     * that: keys have a mean that costs bits and changes slowly along the context. The reference is the mean of the ring when
     * the first slot of the block is encoded, kept as tq8; later it stays. Needs a ring; for rotated formats but the product
     * ones. 64 suits.
     */
    int32_t ref_block;
    /*
     * Scale channels before they are coded, where a few of a key's channels outweigh the others (and a query's are as much
     * smaller): learnt once per head, when the first slot is encoded, from the ring and from the queries of tq_store_settle.
     */
    bool balance;
    uint64_t seed;
    const char *label; /* optional, copied: names the store in messages, as "layer 3 keys" */
} tq_store_params;
TQ_API void tq_store_params_default(tq_store_params *params);
/* The bytes of memory that tq_store_open needs. Errors: ARGUMENT, FORMAT, HEAD_DIM. */
TQ_API TQ_NODISCARD tq_status tq_store_bytes(size_t *out, const tq_store_params *params);
/*
 * Open a store over `memory` (aligned to 64 bytes, not touched by opening or closing). Errors: ARGUMENT, SHAPE (memory_bytes
 * too small), FORMAT, HEAD_DIM, MEMORY, CPU.
 */
TQ_API TQ_NODISCARD tq_status tq_store_open(tq_store **out, const tq_store_params *params, void *memory, size_t memory_bytes);
TQ_API void tq_store_close(tq_store *store);
/*
 * Write rows [n, n_head_kv, head_dim] (row_stride elements apart) to slots[n]; as if one by one in order. A slot < 0 is
 * skipped. Errors: ARGUMENT, RANGE, NOT_FINITE (the log names head and slot); then nothing is written. executor may be NULL.
 */
TQ_API TQ_NODISCARD tq_status tq_store_write(tq_store *store, const int64_t *slots, int64_t n, const float *rows,
                                             int64_t row_stride, const tq_executor *executor);
/* The same for slots that exist already: each stays exact or encoded as it is, and the order of recency is kept. */
TQ_API TQ_NODISCARD tq_status tq_store_update(tq_store *store, const int64_t *slots, int64_t n, const float *rows,
                                              int64_t row_stride, const tq_executor *executor);
/*
 * Read slots [first_slot, first_slot + n) to rows [n, n_head_kv, head_dim]; a slot never written reads as zeros, or as the
 * reference of its block.
 */
TQ_API TQ_NODISCARD tq_status tq_store_read(const tq_store *store, int64_t first_slot, int64_t n, float *rows,
                                            int64_t row_stride);
/* How many slots are exact now. */
TQ_API int32_t tq_store_n_exact(const tq_store *store);
/*
 * A stage keeps the exact rows of one batch until the batch has attended. A token is then seen exact by all queries for which
 * it is among the last n_recent tokens, no matter how many are written at once: prefill gives what decoding token by token
 * would. Its memory grows with the batch and is used again; one stage serves many stores in turn. Not thread-safe.
 *
 *     tq_store_stage(keys, key_stage, ...);      the rows are held; nothing is written
 *     tq_store_settle(keys, key_stage, ...);     they are written, as by tq_store_write
 *     tq_store_attend(..., params with .key_stage = key_stage), of as many query tokens as there were rows, in their order
 */
typedef struct tq_stage tq_stage;
/* Errors: ARGUMENT, MEMORY. */
TQ_API TQ_NODISCARD tq_status tq_stage_create(tq_stage **out);
TQ_API void tq_stage_free(tq_stage *stage);
/* The number of rows that it holds. */
TQ_API int64_t tq_stage_n_rows(const tq_stage *stage);
/*
 * Hold rows for slots, as tq_store_write takes them. What the stage held before is forgotten, settled or not. Errors: those of
 * tq_store_write, MEMORY; then the stage holds nothing.
 */
TQ_API TQ_NODISCARD tq_status tq_store_stage(const tq_store *store, tq_stage *stage, const int64_t *slots, int64_t n,
                                             const float *rows, int64_t row_stride);
/*
 * Write what was staged for this store. queries (optional): the attention that follows, of which n_query, n_head, q and its
 * strides are read, for tq_store_params.balance. Errors: ARGUMENT (nothing is staged for this store, or it was settled).
 */
TQ_API TQ_NODISCARD tq_status tq_store_settle(tq_store *store, tq_stage *stage, const tq_attend_params *queries,
                                              const tq_executor *executor);
/*
 * Write to an empty store `to` what the stage holds: its rows, and the slots that were exact before them. If nothing was
 * encoded before, that is all there is, and `to`, of another format, can take the place of the store that was staged for.
 * queries as in tq_store_settle. Errors: ARGUMENT (nothing is staged, or a single row behind
 * slots that were encoded before), SHAPE (another head_dim, n_head_kv or n_slots).
 */
TQ_API TQ_NODISCARD tq_status tq_store_settle_into(tq_store *to, tq_stage *stage, const tq_attend_params *queries,
                                                   const tq_executor *executor);
/*
 * How far coding the keys moves a logit q . k (softmax_scale left out), root mean square, for each KV head: out [n_head_kv].
 * Estimated from the ring and the first queries when the first slot is encoded, if tq_store_params.balance is set; until then,
 * or without queries, false. Above 1, times softmax_scale, attention weights are off by factors.
 */
TQ_API bool tq_store_logit_error(const tq_store *store, float *out);
/*
 * Attend over slots [0, n_col) of a pair of stores (the same n_head_kv and n_slots; keys and values may be one store). Several
 * threads may attend at once, none may write meanwhile. Errors: ARGUMENT, SHAPE, RANGE, MEMORY. executor may be NULL. Scratch
 * memory is bounded and independent of n_col.
 */
TQ_API TQ_NODISCARD tq_status tq_store_attend(const tq_store *keys, const tq_store *values, int64_t n_col,
                                              const tq_attend_params *params, const tq_executor *executor);

/* ---- cache --------------------------------------------------------------------------------------------------------- */

/*
 * Sequences over pages from one pool. A page holds page_size tokens of all layers, keys and values. Each sequence keeps its
 * first n_sink and last n_recent tokens exact. Not thread-safe: one thread, or one lock, per cache.
 */
typedef struct tq_cache tq_cache;
typedef struct tq_cache_params {
    size_t struct_size;
    int32_t n_layer, n_head_kv;
    int32_t head_dim, head_dim_v; /* head_dim_v 0: the same */
    tq_format k_format, v_format;
    const tq_format *layer_k_formats, *layer_v_formats; /* optional [n_layer], copied: override per layer */
    int32_t page_size;                                  /* tokens, 16 to 256, a multiple of 16 */
    int32_t n_pages;                                    /* capacity of the pool */
    int32_t n_sink, n_recent;
    uint64_t seed;
} tq_cache_params;
TQ_API void tq_cache_params_default(tq_cache_params *params);
/* Pages are allocated as they are first used. Errors: ARGUMENT, FORMAT, HEAD_DIM, MEMORY, CPU. */
TQ_API TQ_NODISCARD tq_status tq_cache_create(tq_cache **out, const tq_cache_params *params);
TQ_API void tq_cache_free(tq_cache *cache);
/* An empty sequence. Errors: ARGUMENT, MEMORY. Ids of freed sequences are used again. */
TQ_API TQ_NODISCARD tq_status tq_cache_seq_create(tq_cache *cache, int32_t *seq);
/* Errors: ARGUMENT, RANGE. Its pages go back to the pool. */
TQ_API TQ_NODISCARD tq_status tq_cache_seq_free(tq_cache *cache, int32_t seq);
/*
 * Append n_tok tokens to one layer: k [n_tok, n_head_kv, head_dim], v [n_tok, n_head_kv, head_dim_v], contiguous. Layers
 * advance independently. Errors: ARGUMENT, RANGE, NOT_FINITE (the log names layer, head and position), FULL, MEMORY; then
 * nothing was appended. executor may be NULL.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_append(tq_cache *cache, int32_t seq, int32_t layer, int64_t n_tok, const float *k,
                                              const float *v, const tq_executor *executor);
/*
 * Attend over all tokens of one layer of a sequence; columns are positions. For causal prefill append first, then attend with
 * first_pos = length before the append. Errors: ARGUMENT, RANGE, SHAPE, MEMORY.
 */
TQ_API TQ_NODISCARD tq_status tq_cache_attend(const tq_cache *cache, int32_t seq, int32_t layer, const tq_attend_params *params,
                                              const tq_executor *executor);
/* Keep the first n_tok tokens of every layer. What was encoded stays encoded. Errors: ARGUMENT, RANGE. */
TQ_API TQ_NODISCARD tq_status tq_cache_trim(tq_cache *cache, int32_t seq, int64_t n_tok);
/* Tokens in one layer of a sequence, or -1 if there is no such sequence or layer. */
TQ_API int64_t tq_cache_length(const tq_cache *cache, int32_t seq, int32_t layer);
/* Decode tokens [first, first + n) to k and/or v (either may be NULL), shapes as in append. Errors: ARGUMENT, RANGE. */
TQ_API TQ_NODISCARD tq_status tq_cache_read(const tq_cache *cache, int32_t seq, int32_t layer, int64_t first, int64_t n,
                                            float *k, float *v);
typedef struct tq_cache_stats {
    int64_t n_pages_used, n_pages_free;
    size_t page_bytes;      /* encoded bytes of one page */
    size_t exact_bytes;     /* sinks and rings of all sequences */
    size_t table_bytes;     /* page tables and sequence records */
    size_t allocated_bytes; /* everything that the cache holds from the allocator now */
} tq_cache_stats;
TQ_API TQ_NODISCARD tq_status tq_cache_get_stats(const tq_cache *cache, tq_cache_stats *out);

/* ---- presets ------------------------------------------------------------------------------------------------------- */

typedef struct tq_preset {
    const char *name;        /* "TQ4" */
    const char *description; /* one line */
    tq_format k_format, v_format;
    int32_t n_sink, n_recent;
    int32_t k_ref_block; /* of the keys' stores, as k_balance */
    bool k_balance;
} tq_preset;
TQ_API int32_t tq_preset_count(void);
/* NULL if i is out of range. Static storage. */
TQ_API const tq_preset *tq_preset_get(int32_t i);
/*
 * Mean bits of a value, keys and values together, with everything counted (norms, sinks, ring and its bookkeeping) in a store
 * of n_slots tokens. Errors: ARGUMENT, HEAD_DIM.
 */
TQ_API TQ_NODISCARD tq_status tq_preset_bits_per_value(double *out, const tq_preset *preset, int32_t head_dim,
                                                       int32_t n_head_kv, int64_t n_slots);

/* ---- machine ------------------------------------------------------------------------------------------------------- */

/*
 * The instruction set that the kernels use: "scalar", "avx2", "avx512" or "neon", after the cap by the environment variable
 * TQ_CPU. NULL with TQ_CPU set to an unknown or missing one; every create and open then fails with TQ_ERR_CPU.
 */
TQ_API const char *tq_cpu_name(void);

#ifdef __cplusplus
}
#endif
#endif
