/* SPDX-License-Identifier: MIT */
/* tq fold is a Python package next to tq, tools/fold, which asks the library for factors. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "tq.h"

/* The library's folder as it is installed, from tq's own; set by the build. */
#ifndef TQ_LIBRARY_FROM_BIN
#define TQ_LIBRARY_FROM_BIN "../lib"
#endif

int cmd_fold(int argc, char **argv)
{
    static const char *const places[] = {"", TQ_LIBRARY_FROM_BIN};
    char folder[PATH_MAX], library[PATH_MAX];
    for (size_t i = 0; i < sizeof places / sizeof places[0] && tool_own_folder(folder); i++) {
        if (!tool_join(library, folder, places[i], "libturboquant.so") || access(library, R_OK) != 0) continue;
        if (setenv("TURBOQUANT_LIBRARY", library, 0) != 0) return tool_error(1, "out of memory");
        break;
    }
    return tool_become_python("fold", argc, argv);
}
