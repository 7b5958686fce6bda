/* SPDX-License-Identifier: MIT */
/* tq calibrate is a Python package beside tq, tools/calibrate. */
#include "tq.h"

int cmd_calibrate(int argc, char **argv)
{
    return tool_become_python("calibrate", argc, argv);
}
