/* SPDX-License-Identifier: MIT */
/*
 * libtq-flush-log.so, for LD_PRELOAD: lets llama.cpp's programs write all of their log before they exit.
 *
 * They log from a thread, and never wait for it: what the thread has not written when main returns is lost, and the exit status
 * is 0 all the same. The functions that wait are in libllama-common.so, so a handler of exit can call them. Where they are
 * missing (programs linked statically, versions with other names) nothing happens.
 *
 * It also stands in for two functions of llama.cpp's libraries, which it calls: at the end of this file.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE_SECONDS = 30 };

/* What llama.cpp's headers declare in C++: common_log_main(), and common_log_pause(log). */
typedef void *main_log_function(void);
typedef void pause_function(void *log);

static struct {
    main_log_function *main_log;
    pause_function *pause;
    pthread_mutex_t lock;
    pthread_cond_t end;
    bool has_ended;
} task = {.lock = PTHREAD_MUTEX_INITIALIZER, .end = PTHREAD_COND_INITIALIZER};

static int steps = -1; /* a file */

/* A pause waits until all is written. A flush would start the log's thread again, in a process that is being torn down. */
static void *pause_log(void *unused)
{
    (void)unused;
    task.pause(task.main_log());
    pthread_mutex_lock(&task.lock);
    task.has_ended = true;
    pthread_cond_signal(&task.end);
    pthread_mutex_unlock(&task.lock);
    return NULL;
}

/*
 * In a thread of its own, because a pause may never end: its end mark makes a queue that is exactly full look empty. Then
 * the log is cut as it would have been without us, but the program ends.
 */
static void flush(void)
{
    pthread_t thread;
    struct timespec limit;
    /* By its address, because ISO C has no cast from dlsym's pointer to a function's. */
    *(void **)&task.main_log = dlsym(RTLD_DEFAULT, "_Z15common_log_mainv");
    *(void **)&task.pause = dlsym(RTLD_DEFAULT, "_Z16common_log_pauseP10common_log");
    if (!task.main_log || !task.pause || pthread_create(&thread, NULL, pause_log, NULL) != 0) return;
    pthread_detach(thread);
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += PATIENCE_SECONDS;
    pthread_mutex_lock(&task.lock);
    while (!task.has_ended && pthread_cond_timedwait(&task.end, &task.lock, &limit) != ETIMEDOUT) {
    }
    pthread_mutex_unlock(&task.lock);
}

/*
 * Handlers run last in, first out: one that is there before main comes after those of the program, whose messages are written
 * too. Not on abort, where the thread that gives up may hold the log's lock.
 */
__attribute__((constructor)) static void install(void)
{
    const char *path = getenv("TQ_HOST_STEPS");
    if (path) steps = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    atexit(flush);
}

/* ---- what tq eval asks for besides ---- */

#define EXPORTED __attribute__((visibility("default")))

/* The function of that name that `own` stands in for. Where a host has loaded llama.cpp with local symbols, as Python's ctypes
 * does, it is not the next one for the loader: then it is looked for in every library of the process. */
static void *find_original(const char *name, void *own)
{
    void *found = dlsym(RTLD_NEXT, name);
    struct link_map *library = NULL;
    void *self = found ? NULL : dlopen(NULL, RTLD_LAZY);
    if (self) dlinfo(self, RTLD_DI_LINKMAP, &library);
    for (; library && !found; library = library->l_next) {
        void *handle = library->l_name[0] ? dlopen(library->l_name, RTLD_LAZY | RTLD_NOLOAD) : NULL;
        void *candidate = handle ? dlsym(handle, name) : NULL;
        if (candidate != own) found = candidate;
        if (handle) dlclose(handle);
    }
    if (self) dlclose(self);
    return found;
}

/* TQ_HOST_STEPS names a file that gets a byte for each graph that llama.cpp has computed, by which a bar moves. */
typedef int compute_function(void *scheduler, void *graph);
EXPORTED compute_function ggml_backend_sched_graph_compute_async;
int ggml_backend_sched_graph_compute_async(void *scheduler, void *graph)
{
    compute_function *next, *own = ggml_backend_sched_graph_compute_async;
    *(void **)&next = find_original("ggml_backend_sched_graph_compute_async", *(void **)&own);
    int status = next(scheduler, graph);
    if (steps >= 0 && write(steps, "", 1) != 1) steps = -1;
    return status;
}

/* With TQ_HOST_SPECIAL marks of special tokens in a text are these tokens; it has all that it needs, so that none is added. */
typedef int32_t tokenize_function(const void *vocab, const char *text, int32_t length, int32_t *tokens, int32_t n_max,
                                  bool add_special, bool parse_special);
EXPORTED tokenize_function llama_tokenize;
int32_t llama_tokenize(const void *vocab, const char *text, int32_t length, int32_t *tokens, int32_t n_max, bool add_special,
                       bool parse_special)
{
    bool reads_special = getenv("TQ_HOST_SPECIAL") != NULL;
    tokenize_function *next, *own = llama_tokenize;
    *(void **)&next = find_original("llama_tokenize", *(void **)&own);
    return next(vocab, text, length, tokens, n_max, add_special && !reads_special, parse_special || reads_special);
}
