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
#define BUILT_PYTHON "../deps/venv/bin/python"

static bool find_from_bin(char *out, const char *relative)
{
    char folder[PATH_MAX];
    return tool_own_folder(folder) && tool_join(out, folder, "", relative) && access(out, R_OK) == 0;
}

static bool find_packages(char *out, const char *package)
{
    static const char *const places[] = {BUILT_PACKAGES, TQ_PACKAGES_FROM_BIN};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char main_file[PATH_MAX];
        if (!find_from_bin(out, places[i])) continue;
        if (tool_join(main_file, out, package, "__main__.py") && access(main_file, R_OK) == 0) return true;
    }
    return false;
}

int tool_become_python(const char *package, int argc, char **argv)
{
    char python[PATH_MAX], packages[PATH_MAX];
    if (!find_packages(packages, package))
        return tool_error(1, "the Python package '%s' was not found beside tq; install tq with 'make install'", package);
    const char *interpreter = getenv("TQ_PYTHON");
    if (!interpreter) interpreter = find_from_bin(python, BUILT_PYTHON) ? python : "python3";
    if (setenv("PYTHONPATH", packages, 1) != 0) return tool_error(1, "out of memory");
    char **words = calloc((size_t)argc + 3, sizeof *words);
    if (!words) return tool_error(1, "out of memory");
    /* exec wants char *, and changes nothing. */
    char module_option[] = "-m";
    words[0] = (char *)interpreter;
    words[1] = module_option;
    words[2] = (char *)package;
    for (int i = 1; i < argc; i++) words[i + 2] = argv[i];
    execvp(interpreter, words);
    free(words);
    perror(interpreter);
    return tool_error(1, "there is no Python 3 for this; 'make deps' installs one, or name it in TQ_PYTHON");
}
