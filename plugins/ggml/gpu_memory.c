/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE /* aligned_alloc's friends */

#include "gpu_memory.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"

#define HOST_ALIGN 256

/* The driver's interface, as far as it is used. Handles are pointers, device addresses numbers of 64 bits, results 0 or why
 * not. */
#define DRIVER_FUNCTIONS(X)                                               \
    X(cuInit, (unsigned))                                                 \
    X(cuGetErrorName, (int, const char **))                               \
    X(cuDeviceGetByPCIBusId, (int *, const char *))                       \
    X(cuDevicePrimaryCtxRetain, (void **, int))                           \
    X(cuCtxSetCurrent, (void *))                                          \
    X(cuCtxSynchronize, (void))                                           \
    X(cuMemAlloc_v2, (uint64_t *, size_t))                                \
    X(cuMemFree_v2, (uint64_t))                                           \
    X(cuMemcpyHtoD_v2, (uint64_t, const void *, size_t))                  \
    X(cuMemcpyDtoH_v2, (void *, uint64_t, size_t))                        \
    X(cuMemsetD8_v2, (uint64_t, unsigned char, size_t))                   \
    X(cuMemcpyHtoDAsync_v2, (uint64_t, const void *, size_t, void *))     \
    X(cuMemcpyDtoDAsync_v2, (uint64_t, uint64_t, size_t, void *))         \
    X(cuMemsetD8Async, (uint64_t, unsigned char, size_t, void *))         \
    X(cuStreamCreate, (void **, unsigned))                                \
    X(cuStreamDestroy_v2, (void *))                                       \
    X(cuStreamSynchronize, (void *))                                      \
    X(cuStreamWaitEvent, (void *, void *, unsigned))                      \
    X(cuEventCreate, (void **, unsigned))                                 \
    X(cuEventDestroy_v2, (void *))                                        \
    X(cuEventRecord, (void *, void *))                                    \
    X(cuStreamBeginCapture_v2, (void *, int))                             \
    X(cuStreamEndCapture, (void *, void **))                              \
    X(cuGraphInstantiateWithFlags, (void **, void *, unsigned long long)) \
    X(cuGraphDestroy, (void *))                                           \
    X(cuGraphLaunch, (void *, void *))                                    \
    X(cuGraphExecDestroy, (void *))

#define STREAM_NON_BLOCKING 1
#define EVENT_DISABLE_TIMING 2
#define CAPTURE_MODE_RELAXED 2

static struct {
#define X(name, arguments) int(*name) arguments;
    DRIVER_FUNCTIONS(X)
#undef X
} cu;

static bool is_loaded;

static void load(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
        tq_ggml_log(TQ_LOG_ERROR, "CUDA's driver: %s", dlerror());
        return;
    }
#define X(name, arguments)                                                                  \
    *(void **)(void *)&cu.name = dlsym(library, #name);                                     \
    if (!cu.name) {                                                                         \
        tq_ggml_log(TQ_LOG_ERROR, "CUDA's driver has no " #name ": a newer one is needed"); \
        return;                                                                             \
    }
    DRIVER_FUNCTIONS(X)
#undef X
    is_loaded = cu.cuInit(0) == 0;
    if (!is_loaded) tq_ggml_log(TQ_LOG_ERROR, "CUDA's driver can't be started");
}

static bool check(int result, const char *what)
{
    if (result == 0) return true;
    const char *name = NULL;
    cu.cuGetErrorName(result, &name);
    tq_ggml_log(TQ_LOG_ERROR, "CUDA: %s: %s", what, name ? name : "unknown error");
    return false;
}
#define CHECK(name, ...) check(cu.name(__VA_ARGS__), #name)

static uint64_t address(const void *p)
{
    return (uint64_t)(uintptr_t)p;
}

bool tq_gpu_open(tq_gpu *out, const char *pci)
{
    *out = (tq_gpu){.is_host = !pci};
    if (!pci) return true;
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (!is_loaded) return false;
    int device;
    if (!CHECK(cuDeviceGetByPCIBusId, &device, pci)) return false;
    out->ordinal = device;
    /* Kept until the process ends, as the runtime of ggml-cuda does. */
    return CHECK(cuDevicePrimaryCtxRetain, &out->context, device);
}

bool tq_gpu_enter(const tq_gpu *gpu)
{
    return gpu->is_host || CHECK(cuCtxSetCurrent, gpu->context);
}

void *tq_gpu_alloc(const tq_gpu *gpu, size_t bytes)
{
    void *host = NULL;
    uint64_t device = 0;
    if (bytes == 0) bytes = 1;
    if (gpu->is_host) return posix_memalign(&host, HOST_ALIGN, bytes) == 0 ? host : NULL;
    if (!tq_gpu_enter(gpu) || !CHECK(cuMemAlloc_v2, &device, bytes)) return NULL;
    return (void *)(uintptr_t)device;
}

void tq_gpu_free(const tq_gpu *gpu, void *memory)
{
    if (!memory) return;
    if (gpu->is_host)
        free(memory);
    else if (tq_gpu_enter(gpu))
        CHECK(cuMemFree_v2, address(memory));
}

bool tq_gpu_copy_in(const tq_gpu *gpu, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) return true;
    if (!gpu->is_host) {
        return tq_gpu_enter(gpu) && CHECK(cuCtxSynchronize) && CHECK(cuMemcpyHtoD_v2, address(to), from, bytes) &&
               CHECK(cuCtxSynchronize);
    }
    memcpy(to, from, bytes);
    return true;
}

bool tq_gpu_copy_out(const tq_gpu *gpu, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) return true;
    if (!gpu->is_host) return tq_gpu_enter(gpu) && CHECK(cuCtxSynchronize) && CHECK(cuMemcpyDtoH_v2, to, address(from), bytes);
    memcpy(to, from, bytes);
    return true;
}

bool tq_gpu_zero(const tq_gpu *gpu, void *to, size_t bytes)
{
    if (bytes == 0) return true;
    if (!gpu->is_host) {
        return tq_gpu_enter(gpu) && CHECK(cuCtxSynchronize) && CHECK(cuMemsetD8_v2, address(to), 0, bytes) &&
               CHECK(cuCtxSynchronize);
    }
    memset(to, 0, bytes);
    return true;
}

bool tq_gpu_stream_open(tq_gpu_stream *out, const tq_gpu *gpu)
{
    *out = (tq_gpu_stream){.gpu = gpu};
    if (gpu->is_host) return true;
    return tq_gpu_enter(gpu) && CHECK(cuStreamCreate, &out->stream, STREAM_NON_BLOCKING) &&
           CHECK(cuEventCreate, &out->event, EVENT_DISABLE_TIMING);
}

void tq_gpu_stream_close(tq_gpu_stream *stream)
{
    if (stream->stream && tq_gpu_enter(stream->gpu)) {
        CHECK(cuStreamSynchronize, stream->stream);
        if (stream->event) CHECK(cuEventDestroy_v2, stream->event);
        CHECK(cuStreamDestroy_v2, stream->stream);
    }
    stream->stream = stream->event = NULL;
}

bool tq_gpu_put(const tq_gpu_stream *stream, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) return true;
    /* From memory that is not pinned the driver takes its own copy before it returns. */
    if (!stream->gpu->is_host) return CHECK(cuMemcpyHtoDAsync_v2, address(to), from, bytes, stream->stream);
    memcpy(to, from, bytes);
    return true;
}

bool tq_gpu_put_copy(const tq_gpu_stream *stream, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) return true;
    if (!stream->gpu->is_host) return CHECK(cuMemcpyDtoDAsync_v2, address(to), address(from), bytes, stream->stream);
    memcpy(to, from, bytes);
    return true;
}

bool tq_gpu_put_zero(const tq_gpu_stream *stream, void *to, size_t bytes)
{
    if (!stream->gpu->is_host) return CHECK(cuMemsetD8Async, address(to), 0, bytes, stream->stream);
    memset(to, 0, bytes);
    return true;
}

bool tq_gpu_wait(const tq_gpu_stream *stream)
{
    return stream->gpu->is_host || CHECK(cuStreamSynchronize, stream->stream);
}

bool tq_gpu_follow(const tq_gpu_stream *stream, void *event)
{
    return stream->gpu->is_host || CHECK(cuStreamWaitEvent, stream->stream, event, 0);
}

bool tq_gpu_mark(const tq_gpu_stream *stream)
{
    return stream->gpu->is_host || CHECK(cuEventRecord, stream->event, stream->stream);
}

bool tq_gpu_capture_begin(const tq_gpu_stream *stream)
{
    return !stream->gpu->is_host && CHECK(cuStreamBeginCapture_v2, stream->stream, CAPTURE_MODE_RELAXED);
}

void *tq_gpu_capture_end(const tq_gpu_stream *stream)
{
    void *graph = NULL, *launchable = NULL;
    if (!CHECK(cuStreamEndCapture, stream->stream, &graph) || !graph) return NULL;
    bool ok = CHECK(cuGraphInstantiateWithFlags, &launchable, graph, 0);
    CHECK(cuGraphDestroy, graph);
    return ok ? launchable : NULL;
}

bool tq_gpu_launch(const tq_gpu_stream *stream, void *graph)
{
    return CHECK(cuGraphLaunch, graph, stream->stream);
}

void tq_gpu_graph_free(const tq_gpu *gpu, void *graph)
{
    if (graph && tq_gpu_enter(gpu)) CHECK(cuGraphExecDestroy, graph);
}
