# SPDX-License-Identifier: MIT
"""tq calibrate; docs/calibrate.md."""
