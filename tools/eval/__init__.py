# SPDX-License-Identifier: MIT
"""tq eval."""
