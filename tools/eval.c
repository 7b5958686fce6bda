/* SPDX-License-Identifier: MIT */
/* tq eval is a Python package beside tq, tools/eval; this finds both and becomes the interpreter. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tq.h"

/* The folder that holds the package `eval`, and the interpreter with its libraries; set by the build. */
#ifndef TQ_EVAL_FROM_BIN
#define TQ_EVAL_FROM_BIN "../libexec/turboquant"
#endif
#define BUILT_EVAL "../../tools"
#define MAIN_FILE "/eval/__main__.py"
#define BUILT_PYTHON "../deps/venv/bin/python"

static bool find_from_bin(char *out, const char *relative)
{
    char folder[PATH_MAX];
    return tool_own_folder(folder) && tool_join(out, folder, "", relative) && access(out, R_OK) == 0;
}

int cmd_eval(int argc, char **argv)
{
    char python[PATH_MAX];
    char main_file[PATH_MAX];
    if (!find_from_bin(main_file, BUILT_EVAL MAIN_FILE) && !find_from_bin(main_file, TQ_EVAL_FROM_BIN MAIN_FILE)) {
        return tool_error(1, "the Python package of tq eval was not found beside tq; install tq with 'make install'");
    }
    main_file[strlen(main_file) - strlen(MAIN_FILE)] = '\0';
    const char *interpreter = getenv("TQ_PYTHON");
    if (!interpreter) interpreter = find_from_bin(python, BUILT_PYTHON) ? python : "python3";
    if (setenv("PYTHONPATH", main_file, 1) != 0) return tool_error(1, "out of memory");
    char **words = calloc((size_t)argc + 3, sizeof *words);
    if (!words) return tool_error(1, "out of memory");
    /* exec wants char *, and changes nothing. */
    char module_option[] = "-m", module[] = "eval";
    words[0] = (char *)interpreter;
    words[1] = module_option;
    words[2] = module;
    for (int i = 1; i < argc; i++) words[i + 2] = argv[i];
    execvp(interpreter, words);
    free(words);
    perror(interpreter);
    return tool_error(1, "there is no Python 3 to run tq eval with; 'make deps' installs one, or name it in TQ_PYTHON");
}
