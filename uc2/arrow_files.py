"""Reading Arrow files of either kind."""

import os
from collections.abc import Iterator

import pyarrow as pa


def arrow_batches(file: str | os.PathLike) -> Iterator[pa.RecordBatch]:
    """The record batches of a memory-mapped Arrow file, be it of the file or of the stream kind.

    Raises:
        pyarrow.ArrowException: the file is not Arrow, or damaged in its structure.
    """
    with pa.memory_map(str(file)) as source:
        for batch in _batches(source):
            # Reading through a damaged offset would end the process. This reads offsets and texts, no other values.
            batch.validate(full=True)
            yield batch


def _batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
