from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_SYSTEM: _ClassVar[Role]
    ROLE_USER: _ClassVar[Role]
    ROLE_ASSISTANT: _ClassVar[Role]

class How(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOW_UNSPECIFIED: _ClassVar[How]
    HOW_LOCATED: _ClassVar[How]
    HOW_PINNED: _ClassVar[How]
    HOW_ABSTAINED: _ClassVar[How]
    HOW_BASE: _ClassVar[How]
    HOW_DEFAULTED: _ClassVar[How]
    HOW_WEIGHTED: _ClassVar[How]

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_HOST: _ClassVar[Source]
    SOURCE_DISK: _ClassVar[Source]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
ROLE_UNSPECIFIED: Role
ROLE_SYSTEM: Role
ROLE_USER: Role
ROLE_ASSISTANT: Role
HOW_UNSPECIFIED: How
HOW_LOCATED: How
HOW_PINNED: How
HOW_ABSTAINED: How
HOW_BASE: How
HOW_DEFAULTED: How
HOW_WEIGHTED: How
SOURCE_UNSPECIFIED: Source
SOURCE_HOST: Source
SOURCE_DISK: Source
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("input", "raw_prompt", "chat", "task", "base_only", "abstain_fails", "default_task", "sampling", "request_id", "priority", "tenant", "group_bias", "group_mask", "explain", "task_weights")
    class GroupBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class TaskWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    INPUT_FIELD_NUMBER: _ClassVar[int]
    RAW_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BASE_ONLY_FIELD_NUMBER: _ClassVar[int]
    ABSTAIN_FAILS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TASK_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    GROUP_BIAS_FIELD_NUMBER: _ClassVar[int]
    GROUP_MASK_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    TASK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    input: str
    raw_prompt: str
    chat: Chat
    task: str
    base_only: bool
    abstain_fails: bool
    default_task: str
    sampling: Sampling
    request_id: str
    priority: int
    tenant: str
    group_bias: _containers.ScalarMap[str, float]
    group_mask: _containers.RepeatedScalarFieldContainer[str]
    explain: bool
    task_weights: _containers.ScalarMap[str, float]
    def __init__(self, input: _Optional[str] = ..., raw_prompt: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., task: _Optional[str] = ..., base_only: _Optional[bool] = ..., abstain_fails: _Optional[bool] = ..., default_task: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., request_id: _Optional[str] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., group_bias: _Optional[_Mapping[str, float]] = ..., group_mask: _Optional[_Iterable[str]] = ..., explain: _Optional[bool] = ..., task_weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    content: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., content: _Optional[str] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("input", "raw_prompt", "chat", "task", "base_only", "abstain_fails", "default_task", "continuation", "request_id", "priority", "tenant", "group_bias", "group_mask", "explain", "task_weights")
    class GroupBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class TaskWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    INPUT_FIELD_NUMBER: _ClassVar[int]
    RAW_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BASE_ONLY_FIELD_NUMBER: _ClassVar[int]
    ABSTAIN_FAILS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TASK_FIELD_NUMBER: _ClassVar[int]
    CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    GROUP_BIAS_FIELD_NUMBER: _ClassVar[int]
    GROUP_MASK_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    TASK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    input: str
    raw_prompt: str
    chat: Chat
    task: str
    base_only: bool
    abstain_fails: bool
    default_task: str
    continuation: str
    request_id: str
    priority: int
    tenant: str
    group_bias: _containers.ScalarMap[str, float]
    group_mask: _containers.RepeatedScalarFieldContainer[str]
    explain: bool
    task_weights: _containers.ScalarMap[str, float]
    def __init__(self, input: _Optional[str] = ..., raw_prompt: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., task: _Optional[str] = ..., base_only: _Optional[bool] = ..., abstain_fails: _Optional[bool] = ..., default_task: _Optional[str] = ..., continuation: _Optional[str] = ..., request_id: _Optional[str] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., group_bias: _Optional[_Mapping[str, float]] = ..., group_mask: _Optional[_Iterable[str]] = ..., explain: _Optional[bool] = ..., task_weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("routing", "tokens", "logprob", "usage", "explanation")
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    routing: Routing
    tokens: _containers.RepeatedCompositeFieldContainer[Alternative]
    logprob: float
    usage: Usage
    explanation: _containers.RepeatedCompositeFieldContainer[LayerWeights]
    def __init__(self, routing: _Optional[_Union[Routing, _Mapping]] = ..., tokens: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ..., logprob: _Optional[float] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., explanation: _Optional[_Iterable[_Union[LayerWeights, _Mapping]]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "logprobs", "json_schema", "regex")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    n: int
    logprobs: int
    json_schema: str
    regex: str
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., n: _Optional[int] = ..., logprobs: _Optional[int] = ..., json_schema: _Optional[str] = ..., regex: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("routing", "delta", "done")
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    routing: Routing
    delta: TokenDelta
    done: Done
    def __init__(self, routing: _Optional[_Union[Routing, _Mapping]] = ..., delta: _Optional[_Union[TokenDelta, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Routing(_message.Message):
    __slots__ = ("task", "how", "margin", "scores", "generation", "experts", "request_id", "task_weights")
    class TaskWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    HOW_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    task: str
    how: How
    margin: float
    scores: _containers.RepeatedCompositeFieldContainer[TaskScore]
    generation: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertUse]
    request_id: str
    task_weights: _containers.ScalarMap[str, float]
    def __init__(self, task: _Optional[str] = ..., how: _Optional[_Union[How, str]] = ..., margin: _Optional[float] = ..., scores: _Optional[_Iterable[_Union[TaskScore, _Mapping]]] = ..., generation: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertUse, _Mapping]]] = ..., request_id: _Optional[str] = ..., task_weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class TaskScore(_message.Message):
    __slots__ = ("task", "score")
    TASK_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    task: str
    score: float
    def __init__(self, task: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class ExpertUse(_message.Message):
    __slots__ = ("digest", "task", "num_layers", "source", "bytes_read", "load_seconds")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    task: str
    num_layers: int
    source: Source
    bytes_read: int
    load_seconds: float
    def __init__(self, digest: _Optional[str] = ..., task: _Optional[str] = ..., num_layers: _Optional[int] = ..., source: _Optional[_Union[Source, str]] = ..., bytes_read: _Optional[int] = ..., load_seconds: _Optional[float] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("text", "token_ids", "choice", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    choice: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., choice: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("chosen", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: Alternative
    top: _containers.RepeatedCompositeFieldContainer[Alternative]
    def __init__(self, chosen: _Optional[_Union[Alternative, _Mapping]] = ..., top: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ...) -> None: ...

class Alternative(_message.Message):
    __slots__ = ("token_id", "text", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    text: str
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("finish_reason", "usage", "request_id", "other_finish_reasons", "explanation")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OTHER_FINISH_REASONS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    usage: Usage
    request_id: str
    other_finish_reasons: _containers.RepeatedScalarFieldContainer[FinishReason]
    explanation: _containers.RepeatedCompositeFieldContainer[LayerWeights]
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., request_id: _Optional[str] = ..., other_finish_reasons: _Optional[_Iterable[_Union[FinishReason, str]]] = ..., explanation: _Optional[_Iterable[_Union[LayerWeights, _Mapping]]] = ...) -> None: ...

class LayerWeights(_message.Message):
    __slots__ = ("layer", "experts", "groups")
    class ExpertsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class GroupsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.ScalarMap[str, float]
    groups: _containers.ScalarMap[str, float]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Mapping[str, float]] = ..., groups: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "queue_seconds", "first_token_seconds", "total_seconds", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., first_token_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("input", "raw_prompt", "chat", "request_id", "priority", "tenant")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    RAW_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    input: str
    raw_prompt: str
    chat: Chat
    request_id: str
    priority: int
    tenant: str
    def __init__(self, input: _Optional[str] = ..., raw_prompt: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., request_id: _Optional[str] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class LocateResponse(_message.Message):
    __slots__ = ("routing",)
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    routing: Routing
    def __init__(self, routing: _Optional[_Union[Routing, _Mapping]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("base", "generation", "tasks", "memory", "engine")
    BASE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    base: Base
    generation: int
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    memory: MemoryStatistics
    engine: EngineStatistics
    def __init__(self, base: _Optional[_Union[Base, _Mapping]] = ..., generation: _Optional[int] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., memory: _Optional[_Union[MemoryStatistics, _Mapping]] = ..., engine: _Optional[_Union[EngineStatistics, _Mapping]] = ...) -> None: ...

class Base(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class MemoryStatistics(_message.Message):
    __slots__ = ("budget_bytes", "resident_bytes", "reserved_bytes", "resident_units", "hits", "misses", "loads", "evictions", "failures", "bytes_read", "load_seconds", "prefetch_useful_bytes", "prefetch_wasted_bytes")
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_UNITS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_USEFUL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_WASTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    budget_bytes: int
    resident_bytes: int
    reserved_bytes: int
    resident_units: int
    hits: int
    misses: int
    loads: int
    evictions: int
    failures: int
    bytes_read: int
    load_seconds: float
    prefetch_useful_bytes: int
    prefetch_wasted_bytes: int
    def __init__(self, budget_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., resident_units: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., loads: _Optional[int] = ..., evictions: _Optional[int] = ..., failures: _Optional[int] = ..., bytes_read: _Optional[int] = ..., load_seconds: _Optional[float] = ..., prefetch_useful_bytes: _Optional[int] = ..., prefetch_wasted_bytes: _Optional[int] = ...) -> None: ...

class EngineStatistics(_message.Message):
    __slots__ = ("running", "waiting", "steps", "tokens", "kv_bytes_reserved", "stall_seconds", "prefix_hits", "prefix_base_tokens", "prefix_adapted_tokens", "prefix_bytes")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_RESERVED_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BASE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_ADAPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BYTES_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    steps: int
    tokens: int
    kv_bytes_reserved: int
    stall_seconds: float
    prefix_hits: int
    prefix_base_tokens: int
    prefix_adapted_tokens: int
    prefix_bytes: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., kv_bytes_reserved: _Optional[int] = ..., stall_seconds: _Optional[float] = ..., prefix_hits: _Optional[int] = ..., prefix_base_tokens: _Optional[int] = ..., prefix_adapted_tokens: _Optional[int] = ..., prefix_bytes: _Optional[int] = ...) -> None: ...
