"""The models that clients of foreign protocols name: the repertoire, which routes by itself, and one per task.

It knows nothing of protocols.
Read first: `NAME` is the repertoire, `NAME:TASK` pins a task; a version is the number of the current generation or
empty. Unloading refuses a name, nothing more: experts leave memory when others need the room. Loading takes the name
back and generates one token with the task's experts, so that they are read, checked and staged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from runtime.engine.request import Request, SamplingParams
from runtime.errors import GreenroomError, UnavailableError, UnknownModelError
from runtime.model.names import check_name
from runtime.service.request_id import new_request_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.engine.engine import Engine
    from runtime.service.answers import Answers

DEFAULT_NAME = "greenroom"
_WARM_UP = "."

ModelState = Literal["READY", "LOADING", "UNAVAILABLE"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a client may name.

    Args:
        name: `NAME` or `NAME:TASK`.
        task: pinned by the name; None where the locator decides.
        version: number of the generation that is served.
        state: whether it takes requests.
        reason: why it is not READY; else empty.
    """

    name: str
    task: str | None
    version: str
    state: ModelState
    reason: str


class Models:
    """The models of one engine.

    Args:
        engine: for its current generation.
        answers: over the same engine.
        name: of the repertoire.
        is_ready: whether the server takes requests at all.

    Raises:
        InvalidInputError: a name that does not fit.
    """

    def __init__(self, engine: Engine, answers: Answers, *, name: str, is_ready: Callable[[], bool]) -> None:
        self.name = check_name("name", name)
        self._engine = engine
        self._answers = answers
        self.is_ready = is_ready
        self._not_ready: dict[str, tuple[ModelState, str]] = {}

    def all(self) -> tuple[Model, ...]:
        """The repertoire, then its tasks in the order in which they were added."""
        manifest = self._engine.generation.manifest
        version = str(manifest.generation)
        tasks = (None, *manifest.task_names())
        return tuple(self._model(task, version) for task in tasks)

    def get(self, name: str, version: str = "") -> Model:
        """The model of this name, in whatever state.

        Raises:
            UnknownModelError: there is none, or not in this version.
        """
        found = next((model for model in self.all() if model.name == name), None)
        if found is None:
            raise UnknownModelError(f"no model {name[:300]!r}; there are {self.name!r} and '{self.name}:TASK'")
        if version not in {"", found.version}:
            raise UnknownModelError(f"model {name!r} is served in version {found.version} alone, not {version[:20]!r}")
        return found

    def get_ready(self, name: str, version: str = "") -> Model:
        """The model of this name, if it takes requests.

        Raises:
            UnknownModelError: as in `get`.
            UnavailableError: it takes none now.
        """
        model = self.get(name, version)
        if model.state != "READY":
            raise UnavailableError(f"model {name!r} is not ready: {model.reason}")
        return model

    async def load(self, name: str) -> None:
        """Make a model take requests, its experts in memory.

        Raises:
            UnknownModelError: as in `get`.
            GreenroomError: what keeps its experts from answering; the model stays UNAVAILABLE for that reason.
        """
        model = self.get(name)
        self._not_ready[name] = ("LOADING", "its experts are read")
        state: tuple[ModelState, str] | None = ("UNAVAILABLE", "loading it was given up")
        try:
            await self._warm_up(model)
            state = None
        except GreenroomError as error:
            state = ("UNAVAILABLE", f"loading it failed: {error.reason}")
            raise
        finally:
            self._not_ready.pop(name)
            if state is not None:
                self._not_ready[name] = state

    def unload(self, name: str) -> None:
        """Make a model refuse requests; those in flight go on.

        Raises:
            UnknownModelError: as in `get`.
        """
        self._not_ready[self.get(name).name] = ("UNAVAILABLE", "unloaded by a client")

    async def _warm_up(self, model: Model) -> None:
        request = Request(
            request_id=new_request_id(),
            text=_WARM_UP,
            task=model.task,
            base_only=model.task is None,
            sampling=SamplingParams(max_tokens=1),
        )
        async with self._answers.open(request) as events:
            async for _ in events:
                pass

    def _model(self, task: str | None, version: str) -> Model:
        name = self.name if task is None else f"{self.name}:{task}"
        state, reason = self._not_ready.get(name, ("READY", ""))
        if not self.is_ready():
            state, reason = "UNAVAILABLE", "the server is starting or draining"
        return Model(name=name, task=task, version=version, state=state, reason=reason)
