# SPDX-License-Identifier: MIT
"""
tq starts the packages in this file's folder with it: python -I start_package.py PACKAGE ARGUMENTS. Isolated (-I), so that a
file in the current folder or on PYTHONPATH never runs in place of one of ours, of the standard library's or of what is
installed.
"""
import os
import runpy
import site
import sys


def add_users_folders():
    """-I leaves out what users install for themselves. It may have the libraries that we need, so it comes last."""
    if sys.prefix == sys.base_prefix and not os.environ.get("PYTHONNOUSERSITE"):
        site.addsitedir(site.getusersitepackages())
    # A relative folder would be one of wherever the user happens to be.
    sys.path += filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    add_users_folders()
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
