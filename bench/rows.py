# SPDX-License-Identifier: MIT
"""CSV files of results that grow by rows."""
import csv


def read_rows(path):
    """Rows as dictionaries; none where the file does not exist."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path, columns, rows):
    """Rows have no other columns than these. A new file begins with their names."""
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
