/* SPDX-License-Identifier: MIT */
/* The subcommands of tq. Each gets argv with its own name first and returns tq's exit code: 0, 1 (failed) or 2 (usage). */
#ifndef TQ_TOOL_H
#define TQ_TOOL_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdint.h>

#include "turboquant.h"

enum { EXIT_USAGE = 2 };

int cmd_formats(int argc, char **argv);
int cmd_distortion(int argc, char **argv);
int cmd_presets(int argc, char **argv);
int cmd_run(int argc, char **argv);
int cmd_doctor(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_calibrate(int argc, char **argv);
int cmd_fold(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_cache(int argc, char **argv);
/* tq cache bench, tq cache simulate */
int cmd_cache_bench(int argc, char **argv);
int cmd_cache_simulate(int argc, char **argv);

/* The folder of this executable, without a slash at its end. */
bool tool_own_folder(char *out);
/* "folder/name" or "folder/middle/name" to out, of PATH_MAX bytes, as tool_own_folder's; false if it is too long. */
bool tool_join(char *out, const char *folder, const char *middle, const char *name);

/*
 * The folder of llama.cpp's programs, to out, of PATH_MAX bytes: the one given, $TQ_LLAMA_BIN, the one that this project built
 * them in, or one of $PATH. False if it has no program `name` ("": any).
 */
bool tool_find_llama(char *out, const char *given, const char *name);
/* The first folder of $PATH that has the program, to out, of PATH_MAX bytes. */
bool tool_find_in_path(char *out, const char *name);
/* The plug-in for llama.cpp, to out, of PATH_MAX bytes: $TQ_PLUGIN, or the one that was built or installed with tq. */
bool tool_find_plugin(char *out);

/* What a process printed on both its streams, and how it ended. */
typedef struct tool_output {
    char *text; /* of malloc, with a zero at its end */
    int exit_code, signal;
    bool is_late; /* it did not end in time, and was killed */
} tool_output;
/*
 * Run child(user) in a process of its own, which becomes another program or exits, with an empty standard input. Waits for at
 * most so many seconds, and kills what it has started then. Returns false if no process could be made.
 */
bool tool_capture(tool_output *out, void (*child)(const void *user), const void *user, int seconds);

/* Become Python with a package beside tq, of the given name, and its arguments argv[1] on. Returns only with an error. */
int tool_become_python(const char *package, int argc, char **argv);
/* Processors that are online. */
int32_t tool_n_cpus(void);

/* One line on standard error after "tq: "; returns `code`. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int tool_error(int code, const char *format, ...);
/* Whether the library's messages go to standard error; they do at first. */
void tool_show_log(bool show);
/* Print and delete; a NULL (out of memory) is an error. Returns the exit code. */
int tool_print_json(cJSON *json);
/* A whole number within [low, high], or an error that names the option. */
bool tool_parse_int(int64_t *out, const char *option, const char *text, int64_t low, int64_t high);
bool tool_parse_double(double *out, const char *option, const char *text, double low, double high);
/* As tool_parse_int, and a rotation must exist for it. */
bool tool_parse_head_dim(int32_t *out, const char *text);

#endif
