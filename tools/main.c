/* SPDX-License-Identifier: MIT */
/* tq: picks the subcommand; holds what the subcommands share. */
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tq.h"

// clang-format off
static const struct {
    const char *name, *summary;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"formats",    "list the formats and what they cost",                       cmd_formats},
    {"distortion", "measure a format's error on random vectors",                cmd_distortion},
    {"presets",    "list the presets, which choose formats for keys and values", cmd_presets},
    {"eval",       "measure what KV caches change in a model's output, and report", cmd_eval},
    {"calibrate",  "learn from texts how to code a model's keys",                cmd_calibrate},
    {"fold",       "write an equal model that loses less in any cache of few bits", cmd_fold},
    {"bench",      "time attention and encoding, next to those of llama.cpp",     cmd_bench},
    {"cache",      "look at saved caches, time paged ones, size a server",                  cmd_cache},
    {"run",        "run a stock llama.cpp tool with the compressed KV cache",   cmd_run},
    {"doctor",     "say which llama.cpp, plug-in and GPU fit together here",    cmd_doctor},
};
// clang-format on
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

int tool_error(int code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("tq: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return code;
}

int tool_print_json(cJSON *json)
{
    char *text = json ? cJSON_Print(json) : NULL;
    cJSON_Delete(json);
    if (!text) return tool_error(1, "out of memory");
    puts(text);
    cJSON_free(text);
    return 0;
}

bool tool_parse_int(int64_t *out, const char *option, const char *text, int64_t low, int64_t high)
{
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end || errno || value < low || value > high) {
        tool_error(EXIT_USAGE, "%s takes a whole number from %lld to %lld, not '%s'", option, (long long)low, (long long)high,
                   text);
        return false;
    }
    *out = value;
    return true;
}

bool tool_parse_double(double *out, const char *option, const char *text, double low, double high)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= low && value <= high)) {
        tool_error(EXIT_USAGE, "%s takes a number from %g to %g, not '%s'", option, low, high, text);
        return false;
    }
    *out = value;
    return true;
}

bool tool_parse_head_dim(int32_t *out, const char *text)
{
    int64_t value;
    if (!tool_parse_int(&value, "--head-dim", text, 1, INT32_MAX)) return false;
    int32_t n;
    const int32_t *list = tq_head_dim_list(&n);
    char known[256] = "";
    for (int32_t i = 0; i < n; i++) {
        if (list[i] == value) {
            *out = list[i];
            return true;
        }
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%d", i ? ", " : "", list[i]);
    }
    tool_error(1, "head_dim %lld is not supported; supported are %s", (long long)value, known);
    return false;
}

bool tool_own_folder(char *out)
{
    ssize_t n = readlink("/proc/self/exe", out, PATH_MAX - 1);
    if (n <= 0) return false;
    out[n] = '\0';
    char *slash = strrchr(out, '/');
    if (slash) *slash = '\0';
    return slash != NULL;
}

bool tool_join(char *out, const char *folder, const char *middle, const char *name)
{
    int n = snprintf(out, PATH_MAX, "%s/%s%s%s", folder, middle, *middle ? "/" : "", name);
    return n > 0 && n < PATH_MAX;
}

/* Is the program in the folder? With the name "", is there such a folder? */
static bool has_program(const char *folder, const char *name)
{
    char path[PATH_MAX];
    return *name ? tool_join(path, folder, "", name) && access(path, X_OK) == 0 : access(folder, X_OK) == 0;
}

bool tool_find_in_path(char *out, const char *name)
{
    const char *path = getenv("PATH");
    while (path && *path) {
        int length = (int)strcspn(path, ":");
        if (length > 0 && length < PATH_MAX) {
            snprintf(out, PATH_MAX, "%.*s", length, path);
            if (has_program(out, name)) return true;
        }
        path += length + (path[length] == ':');
    }
    return false;
}

bool tool_find_llama(char *out, const char *given, const char *name)
{
    char own[PATH_MAX];
    if (!given) given = getenv("TQ_LLAMA_BIN");
    if (given) {
        snprintf(out, PATH_MAX, "%s", given);
        return has_program(out, name);
    }
    if (tool_own_folder(own) && tool_join(out, own, "", "../deps/llama-bin") && has_program(out, name)) return true;
    return tool_find_in_path(out, *name ? name : "llama-bench");
}

int32_t tool_n_cpus(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 256 ? 256 : (int32_t)n;
}

static void print_help(FILE *file)
{
    fputs("usage: tq COMMAND [OPTIONS]\n\n"
          "A language model's KV cache in 2 to 8 bits a value.\n\ncommands:\n",
          file);
    for (int i = 0; i < N_COMMANDS; i++) fprintf(file, "  %-12s%s\n", commands[i].name, commands[i].summary);
    fputs("\n'tq COMMAND --help' explains a command; 'tq --version' prints the version.\n", file);
}

static void print_log(void *user, tq_log_level level, const char *message)
{
    (void)user;
    (void)level;
    fprintf(stderr, "tq: %s\n", message);
}

void tool_show_log(bool show)
{
    tq_log_set(show ? print_log : NULL, NULL);
}

static int run(int argc, char **argv)
{
    if (argc < 2) {
        print_help(stderr);
        return EXIT_USAGE;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("tq %s\n", tq_version_string());
        return 0;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return 0;
    }
    tool_show_log(true);
    for (int i = 0; i < N_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) return commands[i].run(argc - 1, argv + 1);
    }
    return tool_error(EXIT_USAGE, "unknown command '%s'; see 'tq --help'", argv[1]);
}

int main(int argc, char **argv)
{
    int code = run(argc, argv);
    if (fflush(stdout) != 0 || ferror(stdout)) return tool_error(1, "cannot write to standard output");
    return code;
}
