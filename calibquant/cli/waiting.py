"""How the command's threads wait for each other."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # variables by which a user decides it
SPINS = "1000"  # some microseconds; benchmarks/results/threads.md


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait give their core away after some microseconds, unless the user's environment says otherwise.

    By default OpenMP's threads spin while they wait. On a machine that does other work too, they spin on the core that
    the thread they wait for needs. Call it before torch is imported: OpenMP reads its variables when it is loaded.
    Processes that this one starts inherit the setting.

    Args:
        environment: variables of the process, to which one is added.

    Example:
        >>> chosen = {"HOME": "/root"}
        >>> wait_briefly(chosen)
        >>> chosen["GOMP_SPINCOUNT"]
        '1000'
    """
    if not any(name in environment for name in OWN):
        environment["GOMP_SPINCOUNT"] = SPINS
