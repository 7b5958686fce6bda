/* SPDX-License-Identifier: MIT */
/* Logs as llama.cpp's programs do, on stderr, more than a pipe holds; says on stdout that it is done, and returns from main. */
#include <unistd.h>

enum {
    INFO = 2,     /* of ggml's log levels, one that goes to stderr, of which exit has nothing to write by itself */
    N_LINES = 400 /* fewer than the log's queue holds: main waits for nobody */
};

/* common/log.h, which is C++ */
void *main_log(void) __asm__("_Z15common_log_mainv");
void add_to_log(void *log, int level, const char *format, ...) __asm__("_Z14common_log_addP10common_log14ggml_log_levelPKcz");

int main(void)
{
    static const char done[] = "main is done\n";
    for (int i = 1; i <= N_LINES; i++) add_to_log(main_log(), INFO, "line %d: %0900d\n", i, 0);
    return write(STDOUT_FILENO, done, sizeof done - 1) < 0;
}
