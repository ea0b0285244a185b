from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListTasksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTasksResponse(_message.Message):
    __slots__ = ("generation", "tasks")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    tasks: _containers.RepeatedCompositeFieldContainer[TaskStatus]
    def __init__(self, generation: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[TaskStatus, _Mapping]]] = ...) -> None: ...

class TaskRequest(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: str
    def __init__(self, task: _Optional[str] = ...) -> None: ...

class TaskStatus(_message.Message):
    __slots__ = ("task", "digest", "set_bytes", "num_visible", "units", "units_ready", "units_loading", "units_failed", "resident_bytes", "references", "pinned", "quarantine_reason")
    TASK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SET_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_VISIBLE_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    UNITS_READY_FIELD_NUMBER: _ClassVar[int]
    UNITS_LOADING_FIELD_NUMBER: _ClassVar[int]
    UNITS_FAILED_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_REASON_FIELD_NUMBER: _ClassVar[int]
    task: str
    digest: str
    set_bytes: int
    num_visible: int
    units: int
    units_ready: int
    units_loading: int
    units_failed: int
    resident_bytes: int
    references: int
    pinned: bool
    quarantine_reason: str
    def __init__(self, task: _Optional[str] = ..., digest: _Optional[str] = ..., set_bytes: _Optional[int] = ..., num_visible: _Optional[int] = ..., units: _Optional[int] = ..., units_ready: _Optional[int] = ..., units_loading: _Optional[int] = ..., units_failed: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., references: _Optional[int] = ..., pinned: _Optional[bool] = ..., quarantine_reason: _Optional[str] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("freed_bytes", "task")
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    task: TaskStatus
    def __init__(self, freed_bytes: _Optional[int] = ..., task: _Optional[_Union[TaskStatus, _Mapping]] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("expected_generation", "generation")
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    expected_generation: int
    generation: int
    def __init__(self, expected_generation: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("expected_generation", "to_generation")
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    TO_GENERATION_FIELD_NUMBER: _ClassVar[int]
    expected_generation: int
    to_generation: int
    def __init__(self, expected_generation: _Optional[int] = ..., to_generation: _Optional[int] = ...) -> None: ...

class GenerationResponse(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdminEvent(_message.Message):
    __slots__ = ("generation", "loaded", "evicted", "quarantined", "released")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    loaded: TaskStatus
    evicted: TaskStatus
    quarantined: TaskStatus
    released: TaskStatus
    def __init__(self, generation: _Optional[int] = ..., loaded: _Optional[_Union[TaskStatus, _Mapping]] = ..., evicted: _Optional[_Union[TaskStatus, _Mapping]] = ..., quarantined: _Optional[_Union[TaskStatus, _Mapping]] = ..., released: _Optional[_Union[TaskStatus, _Mapping]] = ...) -> None: ...
