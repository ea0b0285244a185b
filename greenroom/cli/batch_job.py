"""From the flags of `greenroom batch` to a job and an engine that does nothing else.

It knows nothing of how a job is run.
Read first: what cannot work is said before the model is loaded. This imports torch; the command imports it inside its
function.
"""

from dataclasses import asdict, dataclass, replace

from greenroom.cli.build_engine import build_engine
from greenroom.cli.engine_flags import EngineFlags
from runtime.batch.job import Job
from runtime.batch.places import Place
from runtime.batch.plan import unit_sizes
from runtime.batch.rows import LOCATE_ROWS
from runtime.batch.sources import Format, format_of
from runtime.engine.engine import Engine
from runtime.engine.request import SamplingParams
from runtime.errors import InvalidInputError
from runtime.model.generation import Generation


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where rows come from and where answers go."""

    source: Place
    source_format: Format
    target: Place
    target_format: Format
    target_is_folder: bool


def check_places(source: str, target: str, *, source_format: str | None, target_format: str | None) -> Places:
    """What two names mean.

    Raises:
        InvalidInputError: the source is no file, the target cannot be made, or a format is not known.
    """
    found = Place(source)
    if not found.is_file():
        raise InvalidInputError("source", source, "is not a file")
    kind = format_of(source, source_format)
    place = Place(target)
    is_folder = target.endswith("/") or place.is_folder()
    if not place.parent_exists:
        raise InvalidInputError("target", target, "its folder does not exist")
    if target_format is None and (is_folder or kind == "openai"):
        target_format = kind
    return Places(
        source=found,
        source_format=kind,
        target=place,
        target_format=format_of(target, target_format),
        target_is_folder=is_folder,
    )


def batch_flags(flags: EngineFlags, *, shard_rows: int) -> EngineFlags:
    """The flags of an engine that takes a whole shard at once."""
    room = max(shard_rows, LOCATE_ROWS, flags.limits.max_waiting)
    return replace(flags, limits=replace(flags.limits, max_waiting=room))


def engine_for_batch(flags: EngineFlags, *, generation: int | None, shard_rows: int) -> Engine:
    """An engine of one generation, not started; see `build_engine` for what it raises."""
    return build_engine(batch_flags(flags, shard_rows=shard_rows), number=generation)


def make_job(
    places: Places,
    flags: EngineFlags,
    generation: Generation,
    *,
    sampling: SamplingParams,
    shard_rows: int,
    fresh: bool,
) -> Job:
    """The job that these flags ask for."""
    manifest = generation.manifest
    settings = {
        "base": manifest.base.digest,
        "dtype": flags.dtype,
        "step": flags.step,
        "threads": flags.threads,
        **asdict(flags.limits),
    }
    return Job(
        source=places.source,
        source_format=places.source_format,
        target=places.target,
        target_format=places.target_format,
        target_is_folder=places.target_is_folder,
        sampling=sampling,
        generation=manifest.generation,
        sizes=unit_sizes(generation),
        budget_bytes=flags.limits.expert_budget_bytes,
        settings=settings,
        shard_rows=shard_rows,
        fresh=fresh,
    )
