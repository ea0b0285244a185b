"""Writing rows: JSONL, CSV and Parquet, each as one file that appears whole.

It knows nothing of answers.
Read first: all files of a run have the same columns, whatever rows they hold, so that a folder of them can be read as
one table. Nested values become JSON in CSV; times and bytes become text where JSON has no word for them.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from runtime.batch.places import Place
from runtime.batch.rows import ADDED_FIELDS, Content
from runtime.batch.sources import Format, parquet
from runtime.errors import DataError

_ROWS_AT_ONCE = 1024
_ROUTING = {"task": "x", "how": "x", "margin": 0.0, "generation": 1}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "finish_reason": "x"}


class Columns:
    """What all rows of a source have between them; collected row by row in the first pass.

    Args:
        kind: of the target; only Parquet needs types.
    """

    def __init__(self, kind: Format) -> None:
        self._kind = kind
        self._names: dict[str, None] = {}
        self._sample: list[Content] = []
        self._schema: Any = None

    def add(self, content: Content) -> None:
        """See a row.

        Raises:
            DataError: its values have other types than those of earlier rows.
        """
        if self._kind == "csv":
            self._names.update(dict.fromkeys(content))
        elif self._kind == "parquet":
            self._sample.append(content)
            if len(self._sample) >= _ROWS_AT_ONCE:
                self._infer()

    @property
    def names(self) -> list[str]:
        """Columns in the order in which they first came, the added ones last."""
        return [*self._names, *ADDED_FIELDS]

    @property
    def schema(self) -> Any:  # noqa: ANN401 - an optional package
        """The types of all columns, for Parquet."""
        self._infer()
        import pyarrow as pa

        added = pa.Table.from_pylist([{"answer": "x", "routing": _ROUTING, "usage": _USAGE}]).schema
        return pa.schema([*(self._schema or ()), *added])

    def _infer(self) -> None:
        parquet()
        import pyarrow as pa

        try:
            found = _inferred(self._sample)
            both = [found] if self._schema is None else [self._schema, found]
            self._schema = pa.unify_schemas(both, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError("rows", 0, f"fit into no one table of Parquet: {error}") from error
        self._sample = []


def _inferred(rows: list[Content]) -> Any:  # noqa: ANN401 - an optional package
    """The schema of some rows, with every column that any of them has (pyarrow itself looks at the first row only)."""
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])


def write_rows(place: Place, kind: Format, rows: Iterable[Content], columns: Columns) -> None:
    """Write a file.

    Raises:
        DataError: a value does not fit its column.
    """
    with place.replacing() as file:
        if kind == "parquet":
            _write_parquet(file, rows, columns, place.url)
        elif kind == "csv":
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(columns.names)
            for row in rows:
                writer.writerow([_cell(row.get(name)) for name in columns.names])
            text.detach()
        else:
            for row in rows:
                file.write(json_line(row))


def json_line(content: Content) -> bytes:
    """One line of JSONL."""
    text = json.dumps(content, ensure_ascii=False, default=_as_text)
    return text.encode(errors="backslashreplace") + b"\n"


def _write_parquet(file: Any, rows: Iterable[Content], columns: Columns, url: str) -> None:  # noqa: ANN401
    opened = parquet()
    import pyarrow as pa

    schema = columns.schema
    pending: list[Content] = []
    try:
        with opened.ParquetWriter(file, schema) as writer:
            for row in rows:
                pending.append(row)
                if len(pending) >= _ROWS_AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                    pending = []
            writer.write_table(pa.Table.from_pylist(pending, schema=schema))
    except pa.ArrowException as error:
        raise DataError(url, 0, f"a value does not fit its column: {error}") from error


def _cell(value: object) -> object:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=_as_text)
    return "" if value is None else value if isinstance(value, str | int | float) else _as_text(value)


def _as_text(value: Any) -> str:  # noqa: ANN401 - whatever Parquet holds
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value.isoformat() if hasattr(value, "isoformat") else value)
