/* SPDX-License-Identifier: MIT */
/*
 * Cells whose keys or values are not numbers: those of a damaged state, which ggml's set_tensor can't refuse, and those that a
 * model computed. A query that sees one gets NaN, as with an FP16 cache. The graph does not fail: a failed one ends the
 * requests of all slots. A cell is whole again when it is written, and one that no query sees harms nobody.
 */
#ifndef TQ_GGML_DAMAGE_H
#define TQ_GGML_DAMAGE_H

#include "kv_tensor.h"

/* The marks of all cells. They take no memory until something is damaged. False: out of memory. */
bool tq_ggml_damage_open(tq_ggml_kv_tensor *kv);
void tq_ggml_damage_close(tq_ggml_kv_tensor *kv);
/* Cells [first, first + n) of a stream. */
void tq_ggml_damage_mark(tq_ggml_kv_tensor *kv, int64_t stream, int64_t first, int64_t n);
void tq_ggml_damage_heal(tq_ggml_kv_tensor *kv, int64_t stream, int64_t slot);
bool tq_ggml_damage_is_marked(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t slot);
/* All rows that bytes [offset, offset + size) of the tensor touch. */
void tq_ggml_damage_mark_bytes(tq_ggml_kv_tensor *kv, size_t offset, size_t size);
void tq_ggml_damage_copy(tq_ggml_kv_tensor *to, int64_t to_stream, const tq_ggml_kv_tensor *from, int64_t from_stream);
void tq_ggml_damage_clear(tq_ggml_kv_tensor *kv);
/*
 * After attention over the stream's first n_col cells: NaN for the queries that see a damaged one. Returns the first such cell,
 * or -1 if no query sees one, or only queries whose output was NaN already.
 */
int64_t tq_ggml_damage_poison(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t n_col, const tq_attend_params *queries);

#endif
