"""Tokens of documents in an Arrow file that is mapped into memory: the system brings pages in as rows are read.

The file loses its name as soon as it is mapped, so whatever happens to the process the disk gets its bytes back.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor

from planner.errors import PlanError
from trainer.streamed.disk_file import ELSEWHERE, nearest_folder

BATCH = 64
"""Documents in one record batch: what is in memory while it is written."""
FIELD = "input_ids"


class TokenFile:
    """A place for the tokens of some documents.

    Args:
        folder: one on the disk that takes them; where it is not there yet, the nearest above it is taken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = nearest_folder(folder)

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = f"{self._folder} does not take them: {error.strerror or error}."
            raise PlanError("tokens on disk (mapped_tokens)", why, ELSEWHERE) from error

    def mapped(self, documents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Write each document's tokens, ``[N]`` int32, then give all of them back as they lie in the file.

        Raises:
            PlanError: the disk does not take them.
        """
        import pyarrow  # here: nobody else should wait for it, or has to have it

        kind = pyarrow.large_list(pyarrow.int32())
        schema, waiting = pyarrow.schema([(FIELD, kind)]), iter(documents)
        with self._blamed():
            descriptor, path = tempfile.mkstemp(".arrow", ".tokens-", self._folder)
            os.close(descriptor)
        try:
            with self._blamed():
                writer = pyarrow.ipc.new_file(path, schema)
            # What reading and tokenising a document may fail of is not the disk's fault.
            while some := [ids.numpy() for ids in islice(waiting, BATCH)]:
                with self._blamed():
                    writer.write_batch(pyarrow.record_batch([pyarrow.array(some, kind)], schema=schema))
            with self._blamed():
                writer.close()
                reader = pyarrow.ipc.open_file(pyarrow.memory_map(path))
        finally:
            Path(path).unlink(missing_ok=True)
        for number in range(reader.num_record_batches):
            column = reader.get_batch(number).column(0)
            values, offsets = column.values.to_numpy(zero_copy_only=True), column.offsets.to_pylist()
            with warnings.catch_warnings():  # nobody writes to what torch warns may not be written to
                warnings.simplefilter("ignore", UserWarning)
                tokens = torch.from_numpy(values)
            yield from (tokens[start:stop] for start, stop in pairwise(offsets))
