/* SPDX-License-Identifier: MIT */
/* Parts of tq are Python packages beside it, in tools; this finds them and an interpreter. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tq.h"

/* The folder that holds the packages, and the interpreter with its libraries; set by the build. */
#ifndef TQ_PACKAGES_FROM_BIN
#define TQ_PACKAGES_FROM_BIN "../libexec/turboquant"
#endif
#define BUILT_PACKAGES "../../tools"
#define STARTER "start_package.py"
#define BUILT_PYTHON "../deps/venv/bin/python"

static bool find_from_bin(char *out, const char *relative)
{
    char folder[PATH_MAX];
    return tool_own_folder(folder) && tool_join(out, folder, "", relative) && access(out, R_OK) == 0;
}

/* The script that starts the packages, to out. */
static bool find_starter(char *out)
{
    static const char *const places[] = {BUILT_PACKAGES, TQ_PACKAGES_FROM_BIN};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char folder[PATH_MAX];
        if (find_from_bin(folder, places[i]) && tool_join(out, folder, "", STARTER) && access(out, R_OK) == 0) return true;
    }
    return false;
}

int tool_become_python(const char *package, int argc, char **argv)
{
    char python[PATH_MAX], starter[PATH_MAX];
    if (!find_starter(starter))
        return tool_error(1, STARTER " was not found next to tq, so '%s' cannot start; install tq with 'make install'",
                          package);
    const char *interpreter = getenv("TQ_PYTHON");
    if (!interpreter) interpreter = find_from_bin(python, BUILT_PYTHON) ? python : "python3";
    /* exec wants char *, and changes nothing. Texts are UTF-8 whatever the locale, which -I would not let PYTHONUTF8 say. */
    char isolated[] = "-I", x_option[] = "-X", utf8[] = "utf8";
    char *front[] = {(char *)interpreter, isolated, x_option, utf8, starter, (char *)package};
    enum { N_FRONT = sizeof front / sizeof front[0] };
    char **words = calloc((size_t)argc + N_FRONT, sizeof *words);
    if (!words) return tool_error(1, "out of memory");
    memcpy(words, front, sizeof front);
    for (int i = 1; i < argc; i++) words[N_FRONT + i - 1] = argv[i];
    execvp(interpreter, words);
    free(words);
    perror(interpreter);
    return tool_error(1, "no Python 3 was found for this; 'make deps' installs one, or name it in TQ_PYTHON");
}
