/* SPDX-License-Identifier: MIT */
/*
 * Memory of a device, a stream of ours on it, and graphs that are captured from it: CUDA's driver, which is looked up when a
 * device is first used, so that the plug-in needs none to load. For tests all of it can be the host's: then nothing waits, and
 * nothing can be captured.
 *
 * Functions that can fail log why.
 */
#ifndef TQ_GGML_GPU_MEMORY_H
#define TQ_GGML_GPU_MEMORY_H

#include "turboquant.h"

typedef struct tq_gpu {
    bool is_host;
    int32_t ordinal;
    void *context; /* the device's primary one, which ggml-cuda and the library use, too */
} tq_gpu;

/* A stream, and an event of it. */
typedef struct tq_gpu_stream {
    const tq_gpu *gpu;
    void *stream, *event; /* NULL on the host */
} tq_gpu_stream;

/* The device of a PCI bus, "0000:01:00.0", or the host's memory for NULL. */
bool tq_gpu_open(tq_gpu *out, const char *pci);
/* Make the device current for the calling thread. */
bool tq_gpu_enter(const tq_gpu *gpu);
/* Aligned to 256 bytes. NULL: out of memory. */
void *tq_gpu_alloc(const tq_gpu *gpu, size_t bytes);
void tq_gpu_free(const tq_gpu *gpu, void *memory);
/* Bytes between host and device, now: after all that was put on any stream before. */
bool tq_gpu_copy_in(const tq_gpu *gpu, void *to, const void *from, size_t bytes);
bool tq_gpu_copy_out(const tq_gpu *gpu, void *to, const void *from, size_t bytes);
bool tq_gpu_zero(const tq_gpu *gpu, void *to, size_t bytes);

bool tq_gpu_stream_open(tq_gpu_stream *out, const tq_gpu *gpu);
void tq_gpu_stream_close(tq_gpu_stream *stream);
/* Put on the stream. `from` is the caller's again when this returns. */
bool tq_gpu_put(const tq_gpu_stream *stream, void *to, const void *from, size_t bytes);
bool tq_gpu_put_copy(const tq_gpu_stream *stream, void *to, const void *from, size_t bytes);
bool tq_gpu_put_zero(const tq_gpu_stream *stream, void *to, size_t bytes);
bool tq_gpu_wait(const tq_gpu_stream *stream);
/* What follows on the stream comes after a CUevent; and the stream's event is behind what it has now. */
bool tq_gpu_follow(const tq_gpu_stream *stream, void *event);
bool tq_gpu_mark(const tq_gpu_stream *stream);

/* Between these two nothing runs: it is kept in *graph. NULL: it could not be captured. */
bool tq_gpu_capture_begin(const tq_gpu_stream *stream);
void *tq_gpu_capture_end(const tq_gpu_stream *stream);
bool tq_gpu_launch(const tq_gpu_stream *stream, void *graph);
void tq_gpu_graph_free(const tq_gpu *gpu, void *graph);

#endif
