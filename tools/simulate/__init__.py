# SPDX-License-Identifier: MIT
"""The plots and the page of `tq cache simulate`, which calls this package; docs/simulate.md."""
