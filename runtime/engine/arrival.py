"""From a request to a sequence: everything that can be checked and made before it is queued.

It knows nothing of queues; the engine calls it on the thread that submits.
Read first: tokenising and compiling constraints happen here, so the engine's thread never does either.
"""

from __future__ import annotations

import time

from runtime.engine.direction import check_direction
from runtime.engine.grammar import Grammars
from runtime.engine.kv import KVCache
from runtime.engine.request import Request
from runtime.engine.sequence import Sequence, Sink
from runtime.errors import DeadlineError, InvalidInputError
from runtime.model.base_tokenizer import BaseTokenizer
from runtime.model.chat import encode_chat
from runtime.model.generation import Generation


class Arrival:
    """Makes sequences.

    Args:
        tokenizer: of the base.
        cache: says which lengths can ever fit.
        grammars: compile constraints.
        max_context: tokens of prompt and answer together.
        max_choices: answers of one prompt that can run at once.
    """

    def __init__(
        self,
        tokenizer: BaseTokenizer,
        cache: KVCache,
        grammars: Grammars,
        *,
        max_context: int,
        max_choices: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._cache = cache
        self._grammars = grammars
        self._max_context = max_context
        self._max_choices = max_choices

    def sequence(self, request: Request, generation: Generation, sink: Sink) -> Sequence:
        """The sequence of a request, with its further choices.

        Raises:
            InvalidInputError: the prompt is empty or too long, more choices than can run, a bad constraint, or a
                wish that no router can follow.
            UnknownTaskError, RepertoireError: the pinned task does not exist or is quarantined.
            BudgetError, DeadlineError.
        """
        check_direction(request, generation)
        if request.default_task is not None:
            generation.mixture(request.default_task)
        num_choices = request.sampling.n
        if num_choices > self._max_choices:
            raise InvalidInputError("n", num_choices, f"at most {self._max_choices} sequences run at once")
        context = self._context(request, generation)
        prompt = context
        if request.continuation is not None:
            prompt = [*context, *generation.template.encode_part(self._tokenizer, request.continuation, plain=True)]
            if prompt == context:
                raise InvalidInputError("continuation", request.continuation, "has no tokens")
        room = self._max_context - len(prompt)
        if room < (request.continuation is None):
            raise InvalidInputError(
                "input", request.text, f"{len(prompt)} prompt tokens; the context of {self._max_context} must leave one"
            )
        max_tokens = min(request.sampling.max_tokens, room) if request.continuation is None else 0
        self._cache.check_fits((len(prompt) + max_tokens) * num_choices)
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise DeadlineError("the deadline has passed before the request could start")
        leader: Sequence | None = None
        for _ in range(num_choices):
            sequence = Sequence(
                request,
                prompt,
                generation=generation,
                max_tokens=max_tokens,
                sink=sink,
                tokenizer=self._tokenizer.backend_tokenizer,
                matcher=self._grammars.matcher(request.sampling),
                leader=leader,
                num_context=len(context),
            )
            leader = leader or sequence
        assert leader is not None, "there is at least one choice"
        return leader

    def _context(self, request: Request, generation: Generation) -> list[int]:
        if request.messages:
            context = encode_chat(generation.template, self._tokenizer, request.messages)
        else:
            context = generation.template.encode(self._tokenizer, request.text, raw=request.raw)
        if not context:
            raise InvalidInputError("input", request.text, "the prompt has no tokens")
        return context
