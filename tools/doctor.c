/* SPDX-License-Identifier: MIT */
/*
 * tq doctor: which llama.cpp takes the plug-in here, and what else there is. It starts the programs themselves with the
 * plug-in, to list their devices: whether two libraries fit together is known for certain only where they have met.
 */
#include <dlfcn.h>
#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tq.h"

static const char help[] =
    "usage: tq doctor [--llama PATH] [--timeout S] [--json]\n\n"
    "Say which llama.cpp takes the plug-in here, and which kernels and NVIDIA GPU there are, before a model is loaded. The "
    "last\n"
    "line says what to run, or what is wrong; the exit code is 1 if nothing is usable.\n\n"
    "  --llama PATH   a program of llama.cpp, or a folder with them; without it, what 'tq run' takes and what is in $PATH\n"
    "  --timeout S    seconds that a program has to list its devices (30)\n"
    "  --json         an object: version, cpu, instruction_set, plugin, cuda, llama (an array), usable, verdict\n\n"
    "It looks for the plug-in as 'tq run' does, and for libturboquant-cuda.so next to the plug-in.\n";

#define CUDA_LIBRARY "libturboquant-cuda.so"
/* How descriptions of the plug-in's devices begin. */
#define OUR_DEVICE "KV cache with keys "

static const char *const program_names[] = {"llama-server", "llama-cli", "llama-completion", "llama-bench", "llama-perplexity"};
enum { N_NAMES = sizeof program_names / sizeof program_names[0], DEVICES_MAX = 32, LLAMAS_MAX = 8, SAID_MAX = 80 };

typedef struct device {
    char name[64], description[192];
    bool is_ours;
} device;

/* One folder of llama.cpp's programs, which share their libraries. */
typedef struct llama {
    char folder[PATH_MAX], program[PATH_MAX]; /* the program that was started */
    bool is_of_run;                           /* 'tq run' takes it */
    char version[128], ggml[64], ggml_path[PATH_MAX];
    device devices[DEVICES_MAX];
    int n_devices, n_ours;
    char why[2 * PATH_MAX]; /* it is not usable */
} llama;

typedef struct findings {
    const char *cpu; /* the instruction set, NULL: none */
    char cpu_name[128], plugin[PATH_MAX];
    char cuda_library[PATH_MAX], driver[64], cuda_why[512];
    bool has_cuda;
    tq_cuda_info cuda;
    llama llamas[LLAMAS_MAX];
    int n_llamas;
    const llama *usable; /* the first that is, or NULL */
    char verdict[4 * PATH_MAX];
} findings;

/* ---- texts ---- */

/* The rest of the first line that has `start` in it, to out; false if no line has it. */
static bool find_rest(char *out, size_t room, const char *text, const char *start)
{
    const char *found = strstr(text, start);
    if (!found) return false;
    found += strlen(start);
    snprintf(out, room, "%.*s", (int)strcspn(found, "\r\n"), found);
    return true;
}

/* The last line that is not empty, or "nothing". */
static void last_line(char *out, size_t room, const char *text)
{
    snprintf(out, room, "nothing");
    for (const char *line = text; *line; line += strspn(line, "\r\n")) {
        int length = (int)strcspn(line, "\r\n");
        if (length > 0) snprintf(out, room, "'%.*s'", length < SAID_MAX ? length : SAID_MAX, line);
        line += length;
    }
}

static bool read_rest(char *out, size_t room, const char *path, const char *start)
{
    char text[4096];
    FILE *file = fopen(path, "r");
    if (!file) return false;
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    return find_rest(out, room, text, start);
}

/* ---- what is started ---- */

typedef struct command {
    const char *program, *option, *variable, *value;
} command;

static void run_command(const void *user)
{
    const command *c = user;
    /* exec wants char *, and changes nothing. */
    char *argv[] = {(char *)c->program, (char *)c->option, NULL};
    if (c->variable && setenv(c->variable, c->value, 1) != 0) return;
    execv(c->program, argv);
    dprintf(2, "%s\n", strerror(errno));
}

static void print_ggml_version(const void *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const char *(*version)(void) = NULL;
    if (library) *(void **)(void *)&version = dlsym(library, "ggml_version");
    if (version) dprintf(1, "%s\n", version());
    _exit(!version);
}

static bool start(tool_output *out, const llama *l, const char *option, const char *variable, const char *value, int seconds)
{
    command c = {l->program, option, variable, value};
    return tool_capture(out, run_command, &c, seconds);
}

/* ---- llama.cpp ---- */

/* The libggml-base that the dynamic linker gives the program, as ldd does it, and that library's own word for its version. */
static void find_ggml(llama *l, int seconds)
{
    tool_output out;
    char found[PATH_MAX];
    bool ok = start(&out, l, "--version", "LD_TRACE_LOADED_OBJECTS", "1", seconds);
    char *line = ok ? strstr(out.text, "libggml-base.") : NULL;
    if (line) line[strcspn(line, "\n")] = '\0';
    char *path = line ? strchr(line, '/') : NULL;
    if (path) path[strcspn(path, " ")] = '\0';
    bool is_there = path && strlen(path) < sizeof found && realpath(path, l->ggml_path);
    free(out.text);
    if (!is_there) {
        l->ggml_path[0] = '\0';
        return;
    }
    if (tool_capture(&out, print_ggml_version, l->ggml_path, seconds) && out.exit_code == 0)
        snprintf(l->ggml, sizeof l->ggml, "%.*s", (int)strcspn(out.text, "\n"), out.text);
    free(out.text);
}

/* "  NAME: description (so many MiB, so many MiB free)", after the line "Available devices:". */
static void read_devices(llama *l, const char *text)
{
    const char *line = strstr(text, "Available devices:");
    while (line && (line = strchr(line, '\n')) && strncmp(++line, "  ", 2) == 0 && l->n_devices < DEVICES_MAX) {
        device *d = &l->devices[l->n_devices];
        char whole[512];
        snprintf(whole, sizeof whole, "%.*s", (int)strcspn(line, "\r\n"), line);
        char *colon = strstr(whole, ": "), *memory = strrchr(whole, '(');
        if (!colon) continue;
        *colon = '\0';
        if (memory > colon && memory[-1] == ' ' && strstr(memory, "MiB")) memory[-1] = '\0';
        snprintf(d->name, sizeof d->name, "%.63s", whole + 2);
        snprintf(d->description, sizeof d->description, "%.191s", colon + 2);
        d->is_ours = strncmp(d->description, OUR_DEVICE, strlen(OUR_DEVICE)) == 0;
        l->n_ours += d->is_ours;
        l->n_devices++;
    }
}

/* Why a program has no device of ours. */
static void explain(llama *l, const tool_output *out, int seconds)
{
    char line[1024];
    const char *program = l->program;
    if (out->is_late) {
        snprintf(
            l->why, sizeof l->why,
            "%s did not list its devices within %d s and was stopped. Give more by --timeout, or another program by --llama",
            program, seconds);
    } else if (out->signal) {
        snprintf(l->why, sizeof l->why, "%s was ended by signal %d (%s)%s", program, out->signal, strsignal(out->signal),
                 out->signal == SIGILL ? ": it was built for another processor. Build llama.cpp on this machine" : "");
    } else if (find_rest(line, sizeof line, out->text, "turboquant: not loaded: ")) {
        snprintf(l->why, sizeof l->why, "the plug-in was not loaded: %s", line);
    } else if (find_rest(line, sizeof line, out->text, "failed to load ")) {
        snprintf(l->why, sizeof l->why, "llama.cpp could not load %s", line);
    } else if (find_rest(line, sizeof line, out->text, "error while loading shared libraries: ")) {
        snprintf(l->why, sizeof l->why, "%s does not start: %s. Build or install llama.cpp again", program, line);
    } else if (!strstr(out->text, "Available devices:")) {
        last_line(line, sizeof line, out->text);
        snprintf(l->why, sizeof l->why,
                 "%s does not list devices, it says %s. Name llama-server or another program of llama.cpp", program, line);
    } else {
        snprintf(
            l->why, sizeof l->why,
            "%s has not looked at GGML_BACKEND_PATH, by which it would load the plug-in. Take a llama.cpp with ggml 0.10 or "
            "newer, whose libraries are shared",
            program);
    }
}

static void examine(llama *l, const char *plugin, int seconds)
{
    tool_output out;
    if (!start(&out, l, "--list-devices", "GGML_BACKEND_PATH", plugin, seconds)) {
        snprintf(l->why, sizeof l->why, "%s could not be started: %s", l->program, strerror(errno));
        free(out.text);
        return;
    }
    read_devices(l, out.text);
    if (l->n_ours == 0) explain(l, &out, seconds);
    bool has_started = !out.is_late && out.signal == 0;
    free(out.text);
    if (!has_started) return;
    find_ggml(l, seconds);
    if (start(&out, l, "--version", NULL, NULL, seconds)) find_rest(l->version, sizeof l->version, out.text, "version: ");
    free(out.text);
}

/* ---- where to look ---- */

/* Does the folder have the program? */
static bool has_program(const char *folder, const char *name)
{
    char path[PATH_MAX];
    struct stat info;
    return tool_join(path, folder, "", name) && access(path, X_OK) == 0 && stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

/* One more llama.cpp, unless its folder is known; by `program` if it is given, else by the first that is there. */
static bool add_folder(findings *f, const char *folder, const char *program, bool is_of_run)
{
    char path[PATH_MAX];
    if (!realpath(folder, path)) return false;
    for (int i = 0; i < f->n_llamas; i++) {
        if (strcmp(f->llamas[i].folder, path) == 0) return true;
    }
    for (int i = 0; i < N_NAMES && !program; i++) {
        if (has_program(path, program_names[i])) program = program_names[i];
    }
    if (!program || f->n_llamas == LLAMAS_MAX) return false;
    llama *l = &f->llamas[f->n_llamas];
    *l = (llama){.is_of_run = is_of_run};
    memcpy(l->folder, path, sizeof path);
    if (!tool_join(l->program, path, "", program)) return false;
    f->n_llamas++;
    return true;
}

/* A program, or a folder with some. */
static bool add_given(findings *f, const char *path)
{
    char folder[PATH_MAX];
    struct stat info;
    if (stat(path, &info) != 0) {
        tool_error(1, "--llama: '%s' does not exist; give a program of llama.cpp, or the folder with its programs", path);
        return false;
    }
    snprintf(folder, sizeof folder, "%s", path);
    if (S_ISDIR(info.st_mode)) {
        char inner[PATH_MAX];
        if (add_folder(f, folder, NULL, false) || (tool_join(inner, folder, "", "bin") && add_folder(f, inner, NULL, false)) ||
            (tool_join(inner, folder, "", "build/bin") && add_folder(f, inner, NULL, false)))
            return true;
        tool_error(1, "--llama: '%s' has no llama-server, llama-cli, llama-completion, llama-bench or llama-perplexity", path);
        return false;
    }
    if (!S_ISREG(info.st_mode) || access(path, X_OK) != 0) {
        tool_error(1, "--llama: '%s' is not a program; give one of llama.cpp, or the folder with its programs", path);
        return false;
    }
    char *slash = strrchr(folder, '/');
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    if (slash == folder) slash++;
    if (slash)
        *slash = '\0';
    else
        snprintf(folder, sizeof folder, ".");
    return add_folder(f, folder, name, false);
}

static void add_found(findings *f)
{
    char folder[PATH_MAX];
    for (int i = 0; i < N_NAMES; i++) {
        /* By default it runs llama-completion, but any of its programs will do. */
        if (tool_find_llama(folder, NULL, program_names[i]) && add_folder(f, folder, NULL, true)) break;
    }
    for (int i = 0; i < N_NAMES; i++) {
        if (tool_find_in_path(folder, program_names[i])) add_folder(f, folder, NULL, false);
    }
}

/* ---- this machine ---- */

static void keep_message(void *user, tq_log_level level, const char *message)
{
    (void)level;
    findings *f = user;
    snprintf(f->cuda_why, sizeof f->cuda_why, "%s", strncmp(message, "CUDA: ", 6) == 0 ? message + 6 : message);
}

/* The plug-in looks for the library next to itself, and this program next to this one. */
static void look_for_cuda(findings *f)
{
    const char *given = getenv("TQ_CUDA_LIBRARY");
    char *slash;
    snprintf(f->cuda_library, sizeof f->cuda_library, "%s", given && *given ? given : f->plugin);
    if ((!given || !*given) && (slash = strrchr(f->cuda_library, '/')))
        snprintf(slash + 1, sizeof f->cuda_library - (size_t)(slash + 1 - f->cuda_library), CUDA_LIBRARY);
    if (access(f->cuda_library, R_OK) == 0)
        setenv("TQ_CUDA_LIBRARY", f->cuda_library, 1);
    else
        f->cuda_library[0] = '\0';
    if (!read_rest(f->driver, sizeof f->driver, "/proc/driver/nvidia/version", "Kernel Module  ")) f->driver[0] = '\0';
    f->driver[strcspn(f->driver, " ")] = '\0';
    tq_log_set(keep_message, f);
    tq_status status = tq_cuda_describe(&f->cuda);
    tool_show_log(true);
    f->has_cuda = status == TQ_OK;
    if (!f->has_cuda && !f->cuda_library[0]) {
        snprintf(f->cuda_why, sizeof f->cuda_why,
                 CUDA_LIBRARY " is not next to the plug-in. 'cmake --preset release-cuda' prepares a build with it, "
                              "TQ_CUDA_LIBRARY names one");
    }
}

/* ---- the verdict ---- */

/* What starts a server, or else any program of this llama.cpp, with the plug-in. */
static void say_what_to_run(findings *f)
{
    static const char *const tools[] = {"server", "completion", "bench", "perplexity"};
    const llama *l = f->usable;
    char name[64];
    for (size_t i = 0; i < sizeof tools / sizeof tools[0]; i++) {
        snprintf(name, sizeof name, "llama-%s", tools[i]);
        if (!has_program(l->folder, name)) continue;
        snprintf(f->verdict, sizeof f->verdict, "run: tq run %s%s%s--tool %s MODEL.gguf", l->is_of_run ? "" : "--llama-bin ",
                 l->is_of_run ? "" : l->folder, l->is_of_run ? "" : " ", tools[i]);
        return;
    }
    snprintf(f->verdict, sizeof f->verdict, "run: GGML_BACKEND_PATH=%s %s -m MODEL.gguf --device TQ4", f->plugin, l->program);
}

static void judge(findings *f)
{
    for (int i = 0; i < f->n_llamas && !f->usable; i++) {
        if (f->llamas[i].n_ours > 0) f->usable = &f->llamas[i];
    }
    if (!f->cpu) {
        snprintf(f->verdict, sizeof f->verdict, "wrong: TQ_CPU is '%s', which this machine does not have. Unset it",
                 getenv("TQ_CPU") ? getenv("TQ_CPU") : "");
        f->usable = NULL;
    } else if (!f->plugin[0]) {
        snprintf(f->verdict, sizeof f->verdict,
                 "wrong: the plug-in libggml-turboquant.so was not found%s. 'make run' builds it, TQ_PLUGIN names one",
                 getenv("TQ_PLUGIN") ? " where TQ_PLUGIN says" : "");
    } else if (f->usable) {
        say_what_to_run(f);
    } else if (f->n_llamas == 0) {
        snprintf(f->verdict, sizeof f->verdict, "wrong: no llama.cpp was found. 'make deps' builds one, --llama names one");
    } else {
        snprintf(f->verdict, sizeof f->verdict, "wrong: %s", f->llamas[0].why);
    }
}

/* ---- reports ---- */

static void print_line(const char *name, const char *what)
{
    printf("  %-14s%s\n", name, what);
}

static void list_programs(char *out, size_t room, const llama *l)
{
    size_t n = 0;
    *out = '\0';
    for (int i = 0; i < N_NAMES && n < room; i++) {
        if (has_program(l->folder, program_names[i]))
            n += (size_t)snprintf(out + n, room - n, "%s%s", n > 0 ? ", " : "", program_names[i]);
    }
}

static void print_llama(const llama *l)
{
    char text[PATH_MAX + 128];
    printf("\nllama.cpp in %s%s\n", l->folder, l->is_of_run ? ", which tq run takes" : "");
    list_programs(text, sizeof text, l);
    if (*text) print_line("programs", text);
    if (l->version[0]) print_line("version", l->version);
    snprintf(text, sizeof text, "%s   %s", l->ggml[0] ? l->ggml : "version unknown", l->ggml_path);
    if (l->ggml_path[0]) print_line("ggml", text);
    for (int i = 0; i < l->n_devices; i++) {
        snprintf(text, sizeof text, "%s%s", l->devices[i].description, l->devices[i].is_ours ? "" : "   (not ours)");
        print_line(l->devices[i].name, text);
    }
    if (l->why[0]) print_line("not usable", l->why);
}

static void print_text(const findings *f)
{
    char text[1024];
    printf("turboquant %s\n", tq_version_string());
    print_line("kernels", f->cpu ? f->cpu : "none");
    if (f->cpu_name[0]) print_line("CPU", f->cpu_name);
    print_line("plug-in", f->plugin[0] ? f->plugin : "not found");
    if (f->has_cuda) {
        snprintf(text, sizeof text, "%s, compute capability %d.%d, %.1f GiB, CUDA %d.%d of the driver, %d.%d of the library",
                 f->cuda.name, f->cuda.compute_major, f->cuda.compute_minor, (double)f->cuda.memory_bytes / 1073741824,
                 f->cuda.driver_version / 1000, f->cuda.driver_version % 1000 / 10, f->cuda.runtime_version / 1000,
                 f->cuda.runtime_version % 1000 / 10);
    } else {
        snprintf(text, sizeof text, "no: %s", f->cuda_why);
    }
    print_line("CUDA", text);
    if (f->cuda_library[0]) print_line("", f->cuda_library);
    if (f->driver[0]) print_line("NVIDIA driver", f->driver);
    for (int i = 0; i < f->n_llamas; i++) print_llama(&f->llamas[i]);
    printf("\n%s\n", f->verdict);
}

/* A text, or null if it is empty. */
static void add_text(cJSON *object, const char *name, const char *text)
{
    if (text && *text)
        cJSON_AddStringToObject(object, name, text);
    else
        cJSON_AddNullToObject(object, name);
}

static cJSON *json_of_cuda(const findings *f)
{
    cJSON *object = cJSON_CreateObject();
    char compute[32];
    snprintf(compute, sizeof compute, "%d.%d", f->cuda.compute_major, f->cuda.compute_minor);
    add_text(object, "library", f->cuda_library);
    add_text(object, "nvidia_driver", f->driver);
    add_text(object, "device", f->has_cuda ? f->cuda.name : NULL);
    add_text(object, "why", f->has_cuda ? NULL : f->cuda_why);
    if (!f->has_cuda) return object;
    add_text(object, "compute", compute);
    cJSON_AddNumberToObject(object, "memory_bytes", (double)f->cuda.memory_bytes);
    cJSON_AddNumberToObject(object, "driver", f->cuda.driver_version);
    cJSON_AddNumberToObject(object, "runtime", f->cuda.runtime_version);
    return object;
}

static cJSON *json_of_llama(const llama *l)
{
    cJSON *object = cJSON_CreateObject(), *programs = cJSON_CreateArray(), *devices = cJSON_CreateArray();
    for (int i = 0; i < N_NAMES; i++) {
        if (has_program(l->folder, program_names[i])) cJSON_AddItemToArray(programs, cJSON_CreateString(program_names[i]));
    }
    for (int i = 0; i < l->n_devices; i++) {
        cJSON *each = cJSON_CreateObject();
        add_text(each, "name", l->devices[i].name);
        add_text(each, "description", l->devices[i].description);
        cJSON_AddBoolToObject(each, "is_ours", l->devices[i].is_ours);
        cJSON_AddItemToArray(devices, each);
    }
    add_text(object, "folder", l->folder);
    add_text(object, "program", l->program);
    cJSON_AddItemToObject(object, "programs", programs);
    cJSON_AddBoolToObject(object, "is_of_run", l->is_of_run);
    add_text(object, "version", l->version);
    add_text(object, "ggml", l->ggml);
    add_text(object, "ggml_library", l->ggml_path);
    cJSON_AddItemToObject(object, "devices", devices);
    add_text(object, "why", l->why);
    return object;
}

static int print_json(const findings *f)
{
    cJSON *object = cJSON_CreateObject(), *llamas = cJSON_CreateArray();
    add_text(object, "version", tq_version_string());
    add_text(object, "cpu", f->cpu_name);
    add_text(object, "instruction_set", f->cpu);
    add_text(object, "plugin", f->plugin);
    cJSON_AddItemToObject(object, "cuda", json_of_cuda(f));
    for (int i = 0; i < f->n_llamas; i++) cJSON_AddItemToArray(llamas, json_of_llama(&f->llamas[i]));
    cJSON_AddItemToObject(object, "llama", llamas);
    cJSON_AddBoolToObject(object, "usable", f->usable != NULL);
    add_text(object, "verdict", f->verdict);
    return tool_print_json(object);
}

static int diagnose(const char *given, int seconds, bool json)
{
    findings *f = calloc(1, sizeof *f);
    if (!f) return tool_error(1, "out of memory");
    if (given && !add_given(f, given)) {
        free(f);
        return 1;
    }
    if (!given) add_found(f);
    tool_show_log(false);
    f->cpu = tq_cpu_name();
    if (!read_rest(f->cpu_name, sizeof f->cpu_name, "/proc/cpuinfo", "model name\t: ")) f->cpu_name[0] = '\0';
    if (!tool_find_plugin(f->plugin)) f->plugin[0] = '\0';
    for (int i = 0; i < f->n_llamas && f->plugin[0]; i++) examine(&f->llamas[i], f->plugin, seconds);
    /* Last: a process that has met CUDA should not fork. */
    look_for_cuda(f);
    judge(f);
    int code = 0;
    if (json)
        code = print_json(f);
    else
        print_text(f);
    if (!f->usable) code = 1;
    free(f);
    return code;
}

int cmd_doctor(int argc, char **argv)
{
    static const struct option options[] = {{"llama", required_argument, NULL, 'l'},
                                            {"timeout", required_argument, NULL, 't'},
                                            {"json", no_argument, NULL, 'j'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    const char *given = NULL;
    int64_t seconds = 30;
    bool json = false;
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case 'l':
            given = optarg;
            break;
        case 't':
            if (!tool_parse_int(&seconds, "--timeout", optarg, 1, 3600)) return EXIT_USAGE;
            break;
        case 'j':
            json = true;
            break;
        case 'h':
            fputs(help, stdout);
            return 0;
        default:
            return EXIT_USAGE;
        }
    }
    if (optind < argc) return tool_error(EXIT_USAGE, "unexpected argument '%s'; see 'tq doctor --help'", argv[optind]);
    return diagnose(given, (int)seconds, json);
}
