# SPDX-License-Identifier: MIT
"""The package behind tq fold."""
