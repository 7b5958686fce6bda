/* SPDX-License-Identifier: MIT */
/* tq eval is a Python package beside tq, tools/eval. */
#include "tq.h"

int cmd_eval(int argc, char **argv)
{
    return tool_become_python("eval", argc, argv);
}
