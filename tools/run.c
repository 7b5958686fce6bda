/* SPDX-License-Identifier: MIT */
/*
 * tq run: the front of a stock llama.cpp tool. It finds the plug-in and the tool, adds the options that choose our device, and
 * becomes the tool, so that signals, exit code and output are the tool's own.
 */
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tq.h"

static const char help[] =
    "usage: tq run [--preset P] [--tool T] [--llama-bin DIR] [--dry-run] MODEL.gguf [OPTIONS OF THE TOOL...]\n\n"
    "Run a stock llama.cpp tool on a model, with its KV cache in the plug-in: on NVIDIA GPUs if that llama.cpp has any, else "
    "on\n"
    "the CPU. All after the model goes to the tool; --device there names another device.\n\n"
    "  --preset P       as 'tq presets' lists them (TQ4)\n"
    "  --tool T         completion, server, bench or perplexity (completion)\n"
    "  --llama-bin DIR  where llama.cpp's programs are\n"
    "  --dry-run        print the command and stop\n\n"
    "llama.cpp's programs are looked for in --llama-bin, $TQ_LLAMA_BIN, the folder that this project built them in, and\n"
    "$PATH; the plug-in, libggml-turboquant.so, in $TQ_PLUGIN (a file), next to tq, and where it was installed with tq.\n"
    "Finer control: the plug-in's environment variable TQ_GGML, see docs/llama-cpp.md.\n\n"
    "    tq run --preset TQ3 model.gguf -c 32768 -p 'Once upon a time' -n 200\n";

/* From tq's folder: the installed plug-in (set by the build). */
#ifndef TQ_PLUGIN_FROM_BIN
#define TQ_PLUGIN_FROM_BIN "../lib/turboquant"
#endif
#define PLUGIN_NAME "libggml-turboquant.so"

#define SECONDS_TO_ANSWER 30 /* of llama.cpp, which starts the GPUs' drivers first */

typedef struct request {
    const char *preset, *tool, *llama_bin, *model;
    bool dry_run;
    char **options; /* of the tool, NULL at the end */
    int n_options;
} request;

bool tool_find_plugin(char *out)
{
    char folder[PATH_MAX];
    const char *given = getenv("TQ_PLUGIN");
    if (given) {
        /* The host may look from another folder. */
        return realpath(given, out) != NULL && access(out, R_OK) == 0;
    }
    if (!tool_own_folder(folder)) return false;
    if (tool_join(out, folder, "", PLUGIN_NAME) && access(out, R_OK) == 0) return true;
    return tool_join(out, folder, TQ_PLUGIN_FROM_BIN, PLUGIN_NAME) && access(out, R_OK) == 0;
}

static bool find_tool(char out[PATH_MAX], const request *r)
{
    char name[64], folder[PATH_MAX];
    snprintf(name, sizeof name, "llama-%s", r->tool);
    return tool_find_llama(folder, r->llama_bin, name) && tool_join(out, folder, "", name);
}

static bool has_option(const request *r, const char *a, const char *b, const char *c)
{
    for (int i = 0; i < r->n_options; i++) {
        const char *option = r->options[i];
        if (strcmp(option, a) == 0 || strcmp(option, b) == 0 || strcmp(option, c) == 0) return true;
    }
    return false;
}

/* What asks llama.cpp for its devices. */
typedef struct question {
    const char *tool, *plugin;
} question;

static void ask_devices(const void *user)
{
    const question *q = user;
    if (setenv("GGML_BACKEND_PATH", q->plugin, 1) == 0) execl(q->tool, q->tool, "--list-devices", (char *)NULL);
}

/* The preset's devices: those in front of NVIDIA GPUs where llama.cpp has such, as "TQ4-CUDA0,TQ4-CUDA1", else the CPU's. */
static void find_device(char *out, size_t bytes, const char *preset, const question *q)
{
    tool_output devices;
    char wanted[64];
    snprintf(out, bytes, "%s", preset);
    int n = snprintf(wanted, sizeof wanted, "  %s-CUDA", preset);
    bool ok = tool_capture(&devices, ask_devices, q, SECONDS_TO_ANSWER) && devices.exit_code == 0;
    bool has_any = false;
    for (char *line = ok ? devices.text : NULL; line; line = strchr(line, '\n'), line = line ? line + 1 : NULL) {
        if (strncmp(line, wanted, (size_t)n) != 0) continue;
        size_t used = has_any ? strlen(out) : 0;
        snprintf(out + used, bytes - used, "%s%.*s", has_any ? "," : "", (int)strcspn(line + 2, ":\n"), line + 2);
        has_any = true;
    }
    free(devices.text);
}

static int execute(const request *r, char *plugin, char *tool)
{
    char **argv = calloc((size_t)r->n_options + 8, sizeof *argv);
    if (!argv) return tool_error(1, "out of memory");
    /* exec wants char *, and changes nothing. */
    char model_option[] = "-m", device_option[] = "-dev", layers_option[] = "-ngl", all_layers[] = "999";
    int n = 0;
    argv[n++] = tool;
    argv[n++] = model_option;
    argv[n++] = (char *)r->model;
    /* Without this a llama.cpp with backends linked in would not even load the plug-in. */
    char devices[512];
    if (!has_option(r, "-dev", "--device", "")) {
        find_device(devices, sizeof devices, tq_preset_find(r->preset)->name, &(question){tool, plugin});
        argv[n++] = device_option;
        argv[n++] = devices;
    }
    if (!has_option(r, "-ngl", "--gpu-layers", "--n-gpu-layers")) {
        argv[n++] = layers_option;
        argv[n++] = all_layers;
    }
    for (int i = 0; i < r->n_options; i++) argv[n++] = r->options[i];
    if (r->dry_run) {
        printf("GGML_BACKEND_PATH=%s", plugin);
        for (int i = 0; i < n; i++) printf(" %s", argv[i]);
        putchar('\n');
        free(argv);
        return 0;
    }
    if (setenv("GGML_BACKEND_PATH", plugin, 1) == 0) execv(tool, argv);
    perror(tool);
    free(argv);
    return 1;
}

static int run(const request *r)
{
    static const char *const tools[] = {"completion", "server", "bench", "perplexity"};
    bool known = false;
    for (size_t i = 0; i < sizeof tools / sizeof tools[0]; i++) known |= strcmp(r->tool, tools[i]) == 0;
    if (!known) return tool_error(EXIT_USAGE, "--tool is completion, server, bench or perplexity, not '%s'", r->tool);
    if (!tq_preset_find(r->preset)) return tool_error(EXIT_USAGE, "unknown preset '%s'; 'tq presets' lists them", r->preset);
    if (access(r->model, R_OK) != 0) return tool_error(1, "cannot read the model '%s'", r->model);
    char plugin[PATH_MAX], tool[PATH_MAX];
    if (!tool_find_plugin(plugin)) {
        return tool_error(
            1, "the plug-in " PLUGIN_NAME " was not found%s; build it with 'make run', or give its path in TQ_PLUGIN",
            getenv("TQ_PLUGIN") ? " where TQ_PLUGIN says" : "");
    }
    if (!find_tool(tool, r)) {
        return tool_error(
            1, "llama-%s was not found%s; 'make deps' builds it, or give llama.cpp's folder of programs by --llama-bin",
            r->tool, r->llama_bin ? " in that folder" : "");
    }
    return execute(r, plugin, tool);
}

int cmd_run(int argc, char **argv)
{
    static const struct option options[] = {{"preset", required_argument, NULL, 'p'},
                                            {"tool", required_argument, NULL, 't'},
                                            {"llama-bin", required_argument, NULL, 'l'},
                                            {"dry-run", no_argument, NULL, 'n'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    request r = {.preset = "TQ4", .tool = "completion"};
    int option;
    /* '+': stop at the model; what follows is the tool's. */
    while ((option = getopt_long(argc, argv, "+h", options, NULL)) != -1) {
        switch (option) {
        case 'p':
            r.preset = optarg;
            break;
        case 't':
            r.tool = optarg;
            break;
        case 'l':
            r.llama_bin = optarg;
            break;
        case 'n':
            r.dry_run = true;
            break;
        case 'h':
            fputs(help, stdout);
            return 0;
        default:
            return EXIT_USAGE;
        }
    }
    if (optind == argc) return tool_error(EXIT_USAGE, "which model? See 'tq run --help'");
    r.model = argv[optind];
    r.options = argv + optind + 1;
    r.n_options = argc - optind - 1;
    return run(&r);
}
