/* SPDX-License-Identifier: MIT */
/*
 * Cells whose state could not be taken. ggml's set_tensor can't fail, so a damaged state shows when attention would see it:
 * that graph fails. A cell is whole again when it is written, and one that no query sees harms nobody.
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
/* The first damaged one of the stream's first n_col cells that a query sees, or -1. */
int64_t tq_ggml_damage_find(const tq_ggml_kv_tensor *kv, int64_t stream, int64_t n_col, const tq_attend_params *queries);

#endif
