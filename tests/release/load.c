/* SPDX-License-Identifier: MIT */
/* Loads shared objects, as a host without their other symbols: the plug-in's are llama.cpp's. Prints one line for each. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

int main(int n_arg, char **args)
{
    for (int i = 1; i < n_arg; i++) {
        void *library = dlopen(args[i], RTLD_LAZY | RTLD_LOCAL);
        if (!library) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        const char *symbol = strstr(args[i], "ggml-turboquant") ? "ggml_backend_init" : NULL;
        if (symbol && !dlsym(library, symbol)) {
            fprintf(stderr, "%s: no symbol %s\n", args[i], symbol);
            return 1;
        }
        printf("loaded %s\n", strrchr(args[i], '/') + 1);
    }
    return 0;
}
