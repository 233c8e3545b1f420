"""Processes that help a command and end with it."""

import multiprocessing
import os
import threading


def exit_with_parent() -> None:
    """Called in a child process: ends it as soon as its parent has ended, however that happened.

    Without this, a killed command would leave processes that write beside its successor's.
    """
    threading.Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
