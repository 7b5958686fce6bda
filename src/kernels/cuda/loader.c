/* SPDX-License-Identifier: MIT */
/* Loads libturboquant-cuda.so when it is first needed; the library has no other tie to CUDA. */
#if defined(__linux__)
#define _GNU_SOURCE /* dladdr */
#endif
#include "kernels/cuda/device.h"

#include "base/log.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIBRARY "libturboquant-cuda.so"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const tq_device_table *table;
static char reason[512];

/* The table of the shared object at `path`, or NULL with the reason. */
static const tq_device_table *open_library(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(reason, sizeof reason, "%s", dlerror());
        return NULL;
    }
    void *symbol = dlsym(library, TQ_DEVICE_SYMBOL);
    tq_device_table_fn get;
    memcpy(&get, &symbol, sizeof get);
    const tq_device_table *found = symbol ? get() : NULL;
    if (found && found->abi == TQ_DEVICE_ABI) return found; /* stays loaded: CUDA does not like to be unloaded */
    snprintf(reason, sizeof reason, "%s belongs to another version of the library", path);
    dlclose(library);
    return NULL;
}

/* The file beside the library (or program) that this function is part of. */
static bool path_beside(char *out, size_t room)
{
    Dl_info info;
    if (!dladdr(&once, &info) || !info.dli_fname) return false;
    const char *slash = strrchr(info.dli_fname, '/');
    int folder = slash ? (int)(slash - info.dli_fname + 1) : 0;
    return slash && snprintf(out, room, "%.*s" LIBRARY, folder, info.dli_fname) < (int)room;
}

static void load_once(void)
{
    char path[1024];
    const char *named = getenv("TQ_CUDA_LIBRARY");
    if (named && *named) {
        table = open_library(named);
        return;
    }
    if (path_beside(path, sizeof path)) table = open_library(path);
    if (!table) table = open_library(LIBRARY);
}

tq_status tq_device_load(const tq_device_table **out)
{
    pthread_once(&once, load_once);
    if (!table) {
        tq_log(TQ_LOG_ERROR, "CUDA: %s", reason);
        return TQ_ERR_NO_DEVICE;
    }
    *out = table;
    return TQ_OK;
}

#else

tq_status tq_device_load(const tq_device_table **out)
{
    (void)out;
    tq_log(TQ_LOG_ERROR, "CUDA: this build of the library has no CUDA loader; Linux builds have");
    return TQ_ERR_NO_DEVICE;
}

#endif
