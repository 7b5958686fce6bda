/* SPDX-License-Identifier: MIT */
/* Another program's output, also of one that hangs. */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tq.h"

enum { N_BYTES_MAX = 1 << 20 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void start(int output, void (*child)(const void *), const void *user)
{
    int nothing = open("/dev/null", O_RDONLY);
    /* A group of its own, so that what it starts can be ended with it. */
    if (nothing < 0 || setpgid(0, 0) != 0 || dup2(nothing, 0) < 0 || dup2(output, 1) < 0 || dup2(output, 2) < 0) _exit(127);
    close(nothing);
    close(output);
    child(user);
    _exit(127);
}

/* Take what comes within so many milliseconds; false if nothing does, or nothing more will (then *is_open is false). */
static bool take(char *text, size_t *n, int input, bool *is_open, int ms)
{
    struct pollfd ready = {input, POLLIN, 0};
    if (!*is_open || poll(&ready, 1, ms) <= 0) return false;
    if (*n == N_BYTES_MAX) *n /= 2; /* of an endless text its beginning is enough */
    ssize_t got = read(input, text + *n, N_BYTES_MAX - *n);
    *is_open = got > 0;
    if (got > 0) *n += (size_t)got;
    return *is_open;
}

/* Read until the process ends; false if it has not by then. Others may hold its output open for longer. */
static bool follow(char *text, int input, pid_t pid, int *status, double end)
{
    enum { WAIT_MS = 20 };
    size_t n = 0;
    bool is_open = true, has_ended = false;
    while (!has_ended && now() < end) {
        if (take(text, &n, input, &is_open, WAIT_MS)) continue;
        if (!is_open) nanosleep(&(struct timespec){0, WAIT_MS * 1000000}, NULL);
        has_ended = waitpid(pid, status, WNOHANG) == pid;
    }
    while (has_ended && now() < end && take(text, &n, input, &is_open, 0)) continue; /* what it wrote last */
    text[n] = '\0';
    return has_ended;
}

bool tool_capture(tool_output *out, void (*child)(const void *), const void *user, int seconds)
{
    *out = (tool_output){.text = malloc(N_BYTES_MAX + 1)};
    int ends[2], status = 0;
    if (!out->text || pipe(ends) != 0) return false;
    pid_t pid = fork();
    if (pid == 0) {
        close(ends[0]);
        start(ends[1], child, user);
    }
    close(ends[1]);
    if (pid > 0 && !follow(out->text, ends[0], pid, &status, now() + seconds)) {
        out->is_late = true;
        kill(-pid, SIGKILL);
        kill(pid, SIGKILL); /* if it has not come to its group yet */
        waitpid(pid, &status, 0);
    }
    close(ends[0]);
    out->exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    out->signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    return pid > 0;
}
