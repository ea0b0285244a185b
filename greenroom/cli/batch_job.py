"""From the flags of `greenroom batch` to a job and those who do it.

It knows nothing of how a job is run.
Read first: what cannot work is said before the model is loaded. This imports torch; the command imports it inside its
function.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

from greenroom.cli.build_engine import build_engine, open_repertoire
from greenroom.cli.engine_flags import EngineFlags
from greenroom.cli.ray_choice import RayChoice
from runtime.batch.job import Job
from runtime.batch.places import Place
from runtime.batch.plan import unit_sizes
from runtime.batch.rows import LOCATE_ROWS
from runtime.batch.sources import Format, format_of
from runtime.batch.workers import OneEngine, Workers
from runtime.engine.follower import open_held
from runtime.engine.request import SamplingParams
from runtime.engine.step_model import load_dtype
from runtime.errors import InvalidInputError
from runtime.model.generation import Generation
from runtime.scale.cluster import connected
from runtime.scale.ray_workers import RayWorkers


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


@contextmanager
def opened(flags: EngineFlags, number: int | None) -> Iterator[Generation]:
    """A generation, the current one by default, held for the length of the block.

    Raises:
        RepertoireError, InvalidInputError: it cannot be read.
    """
    generation, let_go = open_held(open_repertoire(flags), number)
    try:
        yield generation
    finally:
        let_go()


@contextmanager
def worked(
    flags: EngineFlags, job: Job, cluster: RayChoice | None, *, on_wait: Callable[[str], AbstractContextManager[object]]
) -> Iterator[Workers]:
    """Who does a job: an engine in this process, or many on a Ray cluster.

    Args:
        flags: of each engine.
        job: what is to be done.
        cluster: None for one engine here.
        on_wait: shows a text for the length of a block.
    """
    build = partial(build_engine, batch_flags(flags, shard_rows=job.shard_rows), number=job.generation)
    if cluster is None:
        with on_wait("loading the base model"):
            engine = build()
        engine.start()
        try:
            yield OneEngine(engine)
        finally:
            engine.close()
    else:
        num_cpus = max(1, flags.threads)
        with on_wait("connecting to Ray"):
            connection = connected(cluster.address, num_cpus=cluster.num_workers * num_cpus)
        with connection:
            yield RayWorkers(build, num_workers=cluster.num_workers, num_cpus=num_cpus, num_gpus=cluster.num_gpus)


def batch_flags(flags: EngineFlags, *, shard_rows: int) -> EngineFlags:
    """The flags of an engine that takes a whole shard at once."""
    room = max(shard_rows, LOCATE_ROWS, flags.limits.max_waiting)
    return replace(flags, limits=replace(flags.limits, max_waiting=room))


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
        "device": flags.device,
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
        sizes=unit_sizes(generation, dtype=load_dtype(flags.dtype)),
        budget_bytes=flags.limits.expert_budget_bytes,
        settings=settings,
        shard_rows=shard_rows,
        fresh=fresh,
    )
