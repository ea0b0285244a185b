"""What a sequence tells of its mixture: the task, how it was found, and where the experts came from.

It knows nothing of how they are chosen or loaded.
Read first: what was read for this sequence is known only when its reservation is complete.
"""

from __future__ import annotations

from runtime.engine.request import ExpertUse, How, Located, TaskScore
from runtime.engine.sequence import Sequence


def located(sequence: Sequence) -> Located:
    """Which task a sequence is of, how that was found out, and where its experts came from."""
    decision = sequence.decision
    return Located(
        task=sequence.task if len(sequence.tasks) < 2 else None,
        how=_how(sequence),
        margin=decision.margin if decision else 0.0,
        scores=tuple(TaskScore(task, score) for task, score in decision.scores) if decision else (),
        generation=sequence.generation.manifest.generation,
        experts=_uses(sequence),
        task_weights=sequence.request.named_tasks if sequence.request.task_weights else {},
    )


def _uses(sequence: Sequence) -> tuple[ExpertUse, ...]:
    reservation = sequence.reservation
    if reservation is None:
        return ()
    uses = []
    for digest in reservation.expert_sets():
        bytes_read = reservation.bytes_read(digest)
        use = ExpertUse(
            digest=digest,
            task=sequence.generation.manifest.expert_set(digest).task,
            num_layers=reservation.num_layers(digest),
            source="disk" if bytes_read else "host",
            bytes_read=bytes_read,
            load_s=reservation.load_s if bytes_read else 0.0,
        )
        uses.append(use)
    return tuple(uses)


def _how(sequence: Sequence) -> How:
    if sequence.request.task is not None:
        return "pinned"
    if sequence.request.task_weights:
        return "weighted"
    if sequence.decision is None or (not sequence.decision.scores and sequence.task is None):
        return "base"
    if sequence.decision.task is not None:
        return "located"
    return "abstained" if sequence.task is None else "defaulted"
