# SPDX-License-Identifier: MIT
"""How the checks of this folder end."""


def report(faults, n_most=None):
    """Print the faults of each kind, the first n_most of them, once each, and 'N passed, M failed' kinds. Is there any?"""
    for messages in faults.values():
        for message in list(dict.fromkeys(messages))[:n_most]:
            print(message)
    n_failed = sum(1 for messages in faults.values() if messages)
    print(f"{len(faults) - n_failed} passed, {n_failed} failed")
    return n_failed > 0
