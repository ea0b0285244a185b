"""The spool: rows put aside on the local disk, to be read again in any order.

It knows nothing of what a row means.
Read first: the file has no name, so it goes with the process, however that ends; only places stay in memory, 16 bytes a
row. Rows are pickled here and read back by this process alone: a Parquet row holds what JSON cannot say.
"""

from __future__ import annotations

import pickle
import tempfile
from array import array

from runtime.batch.rows import Content


class Spool:
    """Rows by number, from 0 in the order in which they were added; close it when done."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the spool
        self._begins = array("Q", [0])
        self.lines = array("Q")

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, line: int, content: Content) -> None:
        """Put a row aside; all are added before the first is read."""
        self._begins.append(self._begins[-1] + self._file.write(pickle.dumps(content)))
        self.lines.append(line)

    def __getitem__(self, number: int) -> Content:
        begin, end = self._begins[number], self._begins[number + 1]
        self._file.seek(begin)
        content: Content = pickle.loads(self._file.read(end - begin))  # noqa: S301 - written above
        return content

    def close(self) -> None:
        """Forget the rows; idempotent."""
        self._file.close()
