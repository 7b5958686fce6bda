/* SPDX-License-Identifier: MIT */
/* Files: one that appears whole or not at all, one that is mapped for reading, and one without a name. */
#ifndef TQ_BASE_FILE_H
#define TQ_BASE_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "turboquant.h"

/* A file in the making, under a temporary name next to its path. */
typedef struct tq_file_writer {
    char *path; /* to be replaced: where symbolic links lead */
    char *temporary;
    int descriptor;
    size_t n_written;
} tq_file_writer;

/* Errors: IO (logged; also if the path is that of something else than a regular file), MEMORY. */
tq_status tq_file_begin(tq_file_writer *writer, const char *path);
tq_status tq_file_write(tq_file_writer *writer, const void *data, size_t bytes);
/* Flush to the disk and take the path's place, or if status is not TQ_OK remove it and return that. Errors: IO. */
tq_status tq_file_end(tq_file_writer *writer, tq_status status);

/* Map a file; *bytes gets its size. An empty one gives NULL. Errors: IO (logged). */
tq_status tq_file_map(const char *path, const uint8_t **data, size_t *bytes);
void tq_file_unmap(const uint8_t *data, size_t bytes);

/* A file without a name in a folder, of so many bytes of which none takes room yet, mapped for reading. Errors: IO (logged),
 * MEMORY. */
tq_status tq_file_scratch(const char *folder, size_t bytes, int *descriptor, const uint8_t **data);
/* Errors: IO (logged). */
tq_status tq_file_write_at(int descriptor, const void *data, size_t bytes, size_t offset);
void tq_file_close(int descriptor);

#endif
