"""Reading rows: JSONL, CSV and Parquet, one at a time.

It knows nothing of prompts; `runtime.batch.rows` says which fields a row needs.
Read first: a line that is no row is yielded as a `BadRow`, and the rest is read all the same. JSONL counts physical
lines; CSV the line on which a record ends; Parquet rows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import IO, Any, Literal, get_args

from runtime.batch.places import Place
from runtime.batch.rows import BadRow, Content
from runtime.errors import DataError, InvalidInputError

Format = Literal["jsonl", "csv", "parquet", "openai"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: Mapping[Format, str] = MappingProxyType(
    {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet", "openai": ".jsonl"}
)
_ROWS_AT_ONCE = 1024
Read = tuple[int, Content] | BadRow


def format_of(url: str, wanted: str | None) -> Format:
    """The format that was asked for, or else what the name's end says.

    Raises:
        InvalidInputError: neither names one that we know.
    """
    if wanted is not None:
        for known in FORMATS:
            if wanted == known:
                return known
        raise InvalidInputError("format", wanted, f"is one of {', '.join(FORMATS)}")
    for name, suffix in SUFFIXES.items():
        if url.lower().endswith(suffix):
            return name
    raise InvalidInputError("format", url, "the name ends in none of .jsonl, .csv, .parquet; name the format")


def read_rows(place: Place, kind: Format) -> Iterator[Read]:
    """Every row with its line; lines that are blank are passed over.

    Raises:
        DataError: the file cannot be read as this format at all.
        InvalidInputError: Parquet, and pyarrow is not installed.
    """
    with place.reading() as file:
        yield from _READERS[kind](file, place.url)


def parquet() -> Any:  # noqa: ANN401 - an optional package
    """`pyarrow.parquet`.

    Raises:
        InvalidInputError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidInputError("format", "parquet", "needs pyarrow: pip install 'greenroom[batch]'") from error
    return pyarrow.parquet


def _jsonl(file: IO[bytes], _url: str) -> Iterator[Read]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            yield _bad(number, line.decode(errors="replace").strip(), f"is not JSON: {error}")
            continue
        if isinstance(content, dict):
            yield number, content
        else:
            yield _bad(number, content, "must be a JSON object")


def _csv(file: IO[bytes], url: str) -> Iterator[Read]:
    """Cells are text; an empty `task` or `max_tokens` counts as not there."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    try:
        names = next(reader, None)
        if names is None:
            return
        if len(set(names)) != len(names):
            raise DataError(url, 1, "two columns have the same name")
        for cells in reader:
            if cells:
                yield _record(reader.line_num, names, cells)
    except csv.Error as error:
        raise DataError(url, reader.line_num, f"is not CSV: {error}") from error
    finally:
        text.detach()  # whoever opened the file closes it


def _record(number: int, names: list[str], cells: list[str]) -> Read:
    if len(cells) != len(names):
        return _bad(number, ",".join(cells), f"has {len(cells)} cells, the header has {len(names)}")
    content: Content = dict(zip(names, cells, strict=True))
    for name, value in content.items():
        if any("\ud800" <= character <= "\udfff" for character in value):
            return BadRow.of(number, InvalidInputError(name, value, "is not UTF-8"))
    for name in ("task", "max_tokens"):
        if content.get(name) == "":
            content[name] = None
    if content.get("max_tokens") is not None:
        try:
            content["max_tokens"] = int(content["max_tokens"])
        except ValueError:
            return BadRow.of(number, InvalidInputError("max_tokens", content["max_tokens"], "must be a whole number"))
    return number, content


def _parquet(file: IO[bytes], url: str) -> Iterator[Read]:
    opened = parquet()
    try:
        batches = opened.ParquetFile(file).iter_batches(batch_size=_ROWS_AT_ONCE)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
    except ValueError as error:  # what pyarrow raises for a damaged file
        raise DataError(url, 0, f"is not Parquet: {error}") from error


def _bad(number: int, value: object, problem: str) -> BadRow:
    return BadRow.of(number, InvalidInputError("line", value, problem))


_READERS: Mapping[Format, Callable[[IO[bytes], str], Iterator[Read]]] = MappingProxyType(
    {"jsonl": _jsonl, "openai": _jsonl, "csv": _csv, "parquet": _parquet}
)
