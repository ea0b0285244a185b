"""From the engine's words to protobuf: events, decisions and statistics as they go to clients.

It knows nothing of requests, calls or statuses: every function is pure.
Read first: every field of an event is sent; nothing is added but the request's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenroom.pb.greenroom.v1 import greenroom_pb2 as pb
from runtime.engine.request import Alternative, Finished, Located, TokenDelta, TokenLogprob, Usage

if TYPE_CHECKING:
    from runtime.engine.statistics import EngineStatistics

_HOW = {
    "located": pb.HOW_LOCATED,
    "pinned": pb.HOW_PINNED,
    "abstained": pb.HOW_ABSTAINED,
    "base": pb.HOW_BASE,
    "defaulted": pb.HOW_DEFAULTED,
    "weighted": pb.HOW_WEIGHTED,
}
_SOURCE = {"host": pb.SOURCE_HOST, "disk": pb.SOURCE_DISK}
_FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def response(event: Located | TokenDelta | Finished, request_id: str) -> pb.GenerateResponse:
    """One event of an answer."""
    match event:
        case Located():
            return pb.GenerateResponse(routing=routing(event, request_id))
        case TokenDelta():
            logprobs = [_token_logprob(item) for item in event.logprobs]
            delta = pb.TokenDelta(text=event.text, token_ids=event.token_ids, choice=event.choice, logprobs=logprobs)
            return pb.GenerateResponse(delta=delta)
        case Finished():
            return pb.GenerateResponse(done=_done(event, request_id))


def routing(located: Located, request_id: str) -> pb.Routing:
    """Who answers, why, and with which experts."""
    return pb.Routing(
        task=located.task or "",
        how=_HOW[located.how],
        margin=located.margin,
        scores=[pb.TaskScore(task=item.task, score=item.score) for item in located.scores],
        generation=located.generation,
        experts=[
            pb.ExpertUse(
                digest=item.digest,
                task=item.task,
                num_layers=item.num_layers,
                source=_SOURCE[item.source],
                bytes_read=item.bytes_read,
                load_seconds=item.load_s,
            )
            for item in located.experts
        ],
        request_id=request_id,
        task_weights=located.task_weights,
    )


def description(base_name: str, base_digest: str, statistics: EngineStatistics) -> pb.DescribeResponse:
    """What is served and how it is doing."""
    memory = statistics.memory
    return pb.DescribeResponse(
        base=pb.Base(name=base_name, digest=base_digest),
        generation=statistics.generation,
        tasks=[pb.Task(name=name) for name in statistics.tasks],
        memory=pb.MemoryStatistics(
            budget_bytes=memory.budget_bytes,
            resident_bytes=memory.resident_bytes,
            reserved_bytes=memory.reserved_bytes,
            resident_units=memory.resident_units,
            hits=memory.hits,
            misses=memory.misses,
            loads=memory.loads,
            evictions=memory.evictions,
            failures=memory.failures,
            bytes_read=memory.bytes_read,
            load_seconds=memory.load_s,
            prefetch_useful_bytes=memory.prefetch_useful_bytes,
            prefetch_wasted_bytes=memory.prefetch_wasted_bytes,
        ),
        engine=pb.EngineStatistics(
            running=statistics.running,
            waiting=statistics.waiting,
            steps=statistics.steps,
            tokens=statistics.tokens,
            kv_bytes_reserved=statistics.kv_bytes_reserved,
            stall_seconds=statistics.stall_s,
            prefix_hits=statistics.prefix_hits,
            prefix_base_tokens=statistics.prefix_base_tokens,
            prefix_adapted_tokens=statistics.prefix_adapted_tokens,
            prefix_bytes=statistics.prefix_bytes,
        ),
    )


def score(located: Located, finished: Finished, request_id: str) -> pb.ScoreResponse:
    """How likely a continuation is, and who says so."""
    return pb.ScoreResponse(
        routing=routing(located, request_id),
        tokens=[_alternative(item) for item in finished.scored],
        logprob=sum(item.logprob for item in finished.scored),
        usage=_usage(finished.usage),
        explanation=_explanation(finished),
    )


def _token_logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(chosen=_alternative(logprob.chosen), top=[_alternative(item) for item in logprob.top])


def _alternative(item: Alternative) -> pb.Alternative:
    return pb.Alternative(token_id=item.token_id, text=item.text, logprob=item.logprob)


def _done(finished: Finished, request_id: str) -> pb.Done:
    return pb.Done(
        finish_reason=_FINISH[finished.reason],
        other_finish_reasons=[_FINISH[reason] for reason in finished.other_reasons],
        usage=_usage(finished.usage),
        request_id=request_id,
        explanation=_explanation(finished),
    )


def _explanation(finished: Finished) -> list[pb.LayerWeights]:
    return [
        pb.LayerWeights(layer=item.layer, experts=item.experts, groups=item.groups) for item in finished.explanation
    ]


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        queue_seconds=usage.queue_s,
        first_token_seconds=usage.first_token_s,
        total_seconds=usage.total_s,
        cached_tokens=usage.cached_tokens,
    )
