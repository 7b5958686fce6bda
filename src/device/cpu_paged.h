/* SPDX-License-Identifier: MIT */
/*
 * Paged stores in the host's memory. A page holds of each KV head the head page of keys and that of values, each filled up to a
 * multiple of 64 bytes, as a cache's are. Arguments were checked by src/api.
 */
#ifndef TQ_DEVICE_CPU_PAGED_H
#define TQ_DEVICE_CPU_PAGED_H

#include "device/paged.h"

/* Positions of a sequence are below it. */
#define TQ_CPU_PAGED_LENGTH_MAX (INT64_C(1) << 30)

tq_paged_sizes tq_cpu_paged_sizes(const tq_paged_store *store);
/* Does an append come without the rows that it needs? */
bool tq_cpu_paged_needs_rows(const tq_paged_store *store, const tq_paged_append_params *params);
/* Errors: RANGE, logged; MEMORY, CPU; then nothing was written. */
tq_status tq_cpu_paged_append(const tq_paged_store *store, const tq_paged_append_params *params);
/* plain: what is the same for all sequences, with strides; query_starts were checked. Errors: RANGE, logged, CPU, then nothing
 * was written; MEMORY, perhaps after rows of other sequences were written. */
tq_status tq_cpu_paged_attend(const tq_paged_store *store, const tq_paged_attend_params *params, const tq_attend_params *plain);
/* Errors: RANGE, logged; then nothing was written. */
tq_status tq_cpu_paged_copy(const tq_paged_store *store, const int32_t *from, const int32_t *to, int64_t n);
tq_status tq_cpu_paged_export(const tq_paged_store *store, const int32_t *pages, int64_t n, uint8_t *bytes);
tq_status tq_cpu_paged_import(const tq_paged_store *store, const int32_t *pages, int64_t n, const uint8_t *bytes);

#endif
