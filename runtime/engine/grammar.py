"""Constrained output: JSON schemas and regular expressions are compiled by `llguidance`, checked and kept.

It knows nothing of sequences or logits; what is compiled becomes a `Matcher` for each answer.
Read first: compiling happens on the thread that submits and is cached; the engine's thread only masks and advances its
own copy of what was compiled. The library is the extra `greenroom[grammar]`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from runtime.engine.matcher import Matcher
from runtime.engine.request import SamplingParams
from runtime.errors import InvalidInputError
from runtime.model.base_tokenizer import BaseTokenizer
from runtime.model.tokenizer_copy import copied

MAX_CACHED = 64
BLANK = r"[ \n]?"
"""Between two parts of JSON at most one blank: models that may write more sometimes write nothing else."""


class Grammars:
    """Compiles constraints for one tokenizer and keeps the latest; safe to share between threads.

    Args:
        tokenizer: of the base.
        vocab_size: V, width of the logits.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: BaseTokenizer, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def matcher(self, sampling: SamplingParams) -> Matcher | None:
        """A matcher at its beginning; None where the answer is free.

        Raises:
            InvalidInputError: the constraint is malformed, impossible, too complex, or the library is not installed.
        """
        field = "json_schema" if sampling.json_schema is not None else "regex"
        text = sampling.json_schema if sampling.json_schema is not None else sampling.regex
        if text is None:
            return None
        key = (field, text)
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(field, text)
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return Matcher(self._compiled[key].deep_copy(), field, text)

    def _compile(self, field: str, text: str) -> Any:  # noqa: ANN401 - the library's own class
        try:
            import llguidance
        except ImportError as error:
            raise InvalidInputError(field, text, "this server was installed without the extra `grammar`") from error
        if self._tokenizer is None:
            sizes = {"n_vocab": self._vocab_size, "eos_token": self._eos_token_ids}
            serialised = copied(self._source.backend_tokenizer).to_str()
            self._tokenizer = llguidance.LLTokenizer(serialised, **sizes)
        try:
            grammar = (
                llguidance.LLMatcher.grammar_from_regex(text)
                if field == "regex"
                else llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": BLANK})
            )
        except ValueError as error:
            raise InvalidInputError(field, text, str(error)) from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidInputError(field, text, matcher.get_error())
        return matcher
