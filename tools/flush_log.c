/* SPDX-License-Identifier: MIT */
/*
 * libtq-flush-log.so, for LD_PRELOAD: lets llama.cpp's programs write all of their log before they exit.
 *
 * They log from a thread, and never wait for it: what the thread has not written when main returns is lost, and the exit status
 * is 0 all the same. The functions that wait are in libllama-common.so, so a handler of exit can call them. Where they are
 * missing (programs linked statically, versions with other names) nothing happens.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

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
    atexit(flush);
}
