/* SPDX-License-Identifier: MIT */
#include "observe.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"

#define ROWS_AT_A_TIME 256

typedef struct record_header {
    char magic[4];
    int32_t layer, n_query, n_head, n_head_kv, head_dim, n_col;
    float softmax_scale, softcap;
} record_header;
_Static_assert(sizeof(record_header) == 36, "the header has no gaps");

static bool write_queries(FILE *file, const tq_attend_params *p, int32_t head_dim)
{
    for (int64_t i = 0; i < p->n_query; i++) {
        for (int32_t head = 0; head < p->n_head; head++) {
            const float *q = p->q + i * p->q_token_stride + head * p->q_head_stride;
            if (fwrite(q, sizeof *q, (size_t)head_dim, file) != (size_t)head_dim) return false;
        }
    }
    return true;
}

static bool write_keys(FILE *file, const tq_store *store, int64_t n_col, int64_t n_embd, float *rows)
{
    for (int64_t first = 0, n; first < n_col; first += n) {
        n = n_col - first < ROWS_AT_A_TIME ? n_col - first : ROWS_AT_A_TIME;
        if (tq_store_read(store, first, n, rows, n_embd) != TQ_OK) return false;
        if (fwrite(rows, sizeof *rows, (size_t)(n * n_embd), file) != (size_t)(n * n_embd)) return false;
    }
    return true;
}

/* Without a mask all columns are visible. */
static bool write_mask(FILE *file, const tq_attend_params *p, int64_t n_col)
{
    static const ggml_fp16_t visible[ROWS_AT_A_TIME];
    for (int64_t i = 0; i < p->n_query; i++) {
        const ggml_fp16_t *row = p->mask ? (const ggml_fp16_t *)p->mask + i * p->mask_token_stride : NULL;
        for (int64_t first = 0, n; first < n_col; first += n) {
            n = n_col - first < ROWS_AT_A_TIME ? n_col - first : ROWS_AT_A_TIME;
            if (fwrite(row ? row + first : visible, sizeof *visible, (size_t)n, file) != (size_t)n) return false;
        }
    }
    return true;
}

tq_status tq_ggml_observe(tq_ggml_observer *observer, const tq_ggml_kv_tensor *keys, int64_t stream, int64_t n_col,
                          const tq_attend_params *queries)
{
    const char *path = keys->device->options->observe;
    if (!observer->file) observer->file = fopen(path, "abe");
    float *rows = malloc((size_t)(ROWS_AT_A_TIME * keys->n_embd) * sizeof *rows);
    record_header header = {{'T', 'Q', 'O', 'B'}, keys->layer,    (int32_t)queries->n_query, queries->n_head, keys->n_head_kv,
                            keys->head_dim,       (int32_t)n_col, queries->softmax_scale,    queries->softcap};
    bool ok = rows && observer->file && fwrite(&header, sizeof header, 1, observer->file) == 1 &&
              write_queries(observer->file, queries, keys->head_dim) &&
              write_keys(observer->file, keys->stores[stream], n_col, keys->n_embd, rows) &&
              write_mask(observer->file, queries, n_col) && fflush(observer->file) == 0;
    if (!ok) tq_ggml_log(TQ_LOG_ERROR, "observe=%s: it can't be written: %s", path, rows ? strerror(errno) : "out of memory");
    free(rows);
    return ok ? TQ_OK : rows ? TQ_ERR_IO : TQ_ERR_MEMORY;
}

void tq_ggml_observer_close(tq_ggml_observer *observer)
{
    if (observer->file && fclose(observer->file) != 0) tq_ggml_log(TQ_LOG_ERROR, "observe: its last records are lost");
    observer->file = NULL;
}
