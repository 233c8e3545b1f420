"""What stops a script through no fault of its code is told in one sentence, not in a traceback."""

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from uc2.data_error import DataError, OptionError
from uc2.hub import HubError
from uc2.non_finite import NonFiniteLoss

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors report a failed write in words only.
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed")


@contextmanager
def told_in_one_sentence() -> Iterator[None]:
    """Turns errors of the data, the disk, the Hub or a worker into `SystemExit("error: …")`; others pass through."""
    try:
        yield
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        raise SystemExit(f"error: {sentence}") from error


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, (DataError, OptionError, HubError, NonFiniteLoss, BlockingIOError)):
        return str(error)
    if _is_full(error):
        return f"the disk is full ({_first_line(error)}); make room and start again: a run goes on where it was"
    if isinstance(error, pickle.UnpicklingError):
        return f"a checkpoint holds more than tensors and numbers, so it is not read ({_first_line(error)})"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return (
            f"a process that prepares batches has ended ({_first_line(error)}), often for want of memory; start again"
            " with a smaller dataloader_num_workers: a run goes on where it was"
        )
    return None


def _is_full(error: BaseException) -> bool:
    if isinstance(error, (OSError, RuntimeError, SafetensorError)):
        if getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS):
            return True
    # `datasets` wraps what stops a conversion.
    return error.__cause__ is not None and _is_full(error.__cause__)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
