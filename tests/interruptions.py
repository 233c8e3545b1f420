"""A command stopped in the middle of its file operations and started again."""

import os
from collections.abc import Callable

import pytest

MOST_STOPS = 50


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


def run_stopped_at_every_fifth_rename(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """Calls `run` again and again until it ends by itself; how often it was stopped."""
    renames, rename = 0, os.replace

    def replace(source, target):
        nonlocal renames
        renames += 1
        if renames % 5 == 0:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for stops in range(MOST_STOPS):
        try:
            run()
        except Killed:
            continue
        return stops
    raise AssertionError(f"not done after {MOST_STOPS} stops")
