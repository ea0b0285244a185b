"""The work folder: what a run has done so far, so that a later process can go on.

It knows nothing of how the work is done.
Read first: `job.json` says which run it is and is written first; then one file for each chunk that was located and each
shard that was answered, each appearing whole. A file that is there is never done again; the folder goes when the run
has ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from runtime.batch.answering import Answered
from runtime.batch.places import Place
from runtime.batch.rows import Answer, BadRow, Location
from runtime.errors import DataError, InvalidInputError

_JOB = "job.json"


class WorkFolder:
    """One run's folder.

    Args:
        place: the folder.
        job: what the results depend on; JSON values.
        fresh: forget what an earlier run left.

    Raises:
        InvalidInputError: the folder belongs to a run that would have given other results.
    """

    def __init__(self, place: Place, job: Mapping[str, Any], *, fresh: bool) -> None:
        self._place = place
        if fresh:
            place.remove()
        wanted = json.loads(json.dumps(job))
        if (place / _JOB).is_file():
            self.resumed = True
            _check_same(place.url, json.loads((place / _JOB).read()), wanted)
        else:
            self.resumed = False
            place.remove()  # a folder without its first file was being made, or removed
            (place / _JOB).write(json.dumps(wanted, indent=1).encode())
        names = place.names()
        self.located = _numbers(names, "located-")
        self.answered = _numbers(names, "answers-")

    def put_located(self, number: int, locations: tuple[Location, ...]) -> None:
        """Keep what was found of a chunk."""
        self._write(f"located-{number:06d}.json", [asdict(location) for location in locations])
        self.located.add(number)

    def get_located(self, number: int) -> tuple[Location, ...]:
        """What was found of a chunk."""
        return tuple(Location(**_with_bad(one)) for one in self._read(f"located-{number:06d}.json"))

    def put_answered(self, number: int, answered: Answered) -> None:
        """Keep the answers of a shard."""
        self._write(f"answers-{number:06d}.json", asdict(answered))
        self.answered.add(number)

    def get_answered(self, number: int) -> Answered:
        """The answers of a shard."""
        found = self._read(f"answers-{number:06d}.json")
        return Answered(**{**found, "answers": tuple(Answer(**_with_bad(one)) for one in found["answers"])})

    def remove(self) -> None:
        """The run has ended; the job goes first, so that a folder that is half gone is never taken up again."""
        (self._place / _JOB).remove()
        self._place.remove()

    def _write(self, name: str, content: object) -> None:
        (self._place / name).write(json.dumps(content, ensure_ascii=True).encode())

    def _read(self, name: str) -> Any:  # noqa: ANN401 - JSON
        try:
            return json.loads((self._place / name).read())
        except ValueError as error:
            raise DataError((self._place / name).url, 0, f"is damaged: {error}") from error


def _numbers(names: list[str], prefix: str) -> set[int]:
    return {int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)}


def _with_bad(fields: dict[str, Any]) -> dict[str, Any]:
    return fields if fields["bad"] is None else {**fields, "bad": BadRow(**fields["bad"])}


def _check_same(url: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*wanted, *found]):
        if found.get(name) != wanted.get(name):
            raise InvalidInputError(
                name,
                wanted.get(name),
                f"the unfinished run in {url} had {found.get(name)!r}; give that to go on, or begin anew with --fresh",
            )
