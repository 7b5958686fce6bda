/* SPDX-License-Identifier: MIT */
/* Looking up the host's functions. dlsym on a handle searches that library and then everything it was linked with, in order. */
#define _GNU_SOURCE /* dladdr, RTLD_NOLOAD, RTLD_DEFAULT */

#include "host.h"

#include <dlfcn.h>
#include <string.h>

/* ggml 0.10 has so many operations, and later versions more: ggml_op_name looks into an array without looking at its end. */
#define N_OPS 96

tq_ggml_host_table tq_ggml_host;
tq_ggml_op_numbers tq_ggml_ops;

/* The loaded library that holds an address; the program itself (and so the global scope) if it is no library. */
static void *open_library_of(const void *address)
{
    Dl_info info;
    void *handle = NULL;
    if (dladdr(address, &info) && info.dli_fname) handle = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    return handle ? handle : dlopen(NULL, RTLD_NOW);
}

void *tq_ggml_host_symbol_near(const void *address, const char *name)
{
    void *handle = open_library_of(address);
    if (!handle) return NULL;
    void *symbol = dlsym(handle, name);
    dlclose(handle);
    return symbol;
}

static void *find(void *handle, const char *name)
{
    void *symbol = dlsym(handle, name);
    /* A loader that is no direct or indirect user of libggml-base would be odd, but the global scope is a fair second guess. */
    return symbol ? symbol : dlsym(RTLD_DEFAULT, name);
}

bool tq_ggml_host_resolve(const void *caller, const char **missing)
{
    void *handle = open_library_of(caller);
    if (!handle) {
        *missing = "dlopen";
        return false;
    }
    *missing = NULL;
    tq_ggml_host_table table = {0};
    /* POSIX's way to turn dlsym's object pointer into a function pointer. */
#define X(name)                                          \
    *(void **)(void *)&table.name = find(handle, #name); \
    if (!table.name && !*missing) *missing = #name;
    TQ_GGML_HOST_FUNCTIONS(X)
#undef X
    *(void **)(void *)&table.ggml_log_get = find(handle, "ggml_log_get");
    table.has_tensor_set_2d = find(handle, "ggml_backend_tensor_set_2d") != NULL;
    dlclose(handle);
    if (*missing) return false;
    tq_ggml_host = table;
    return true;
}

/* The number of an operation, or N_OPS. */
static int find_op(const char *name)
{
    for (int i = 0; i < N_OPS; i++) {
        if (strcmp(tq_ggml_host.ggml_op_name((enum ggml_op)i), name) == 0) return i;
    }
    return N_OPS;
}

bool tq_ggml_host_resolve_ops(const char **missing)
{
    *missing = NULL;
#define X(field, name)                               \
    tq_ggml_ops.field = (enum ggml_op)find_op(name); \
    if (tq_ggml_ops.field == (enum ggml_op)N_OPS && !*missing) *missing = name;
    TQ_GGML_HOST_OPS(X)
#undef X
    return !*missing;
}
