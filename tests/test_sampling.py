"""Sampling: each option does what it says, alone and in a batch, and options left out cost nothing."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.engine.penalties import Penalties
from runtime.engine.request import MAX_CHOICES, MAX_REGEX_CHARS, MAX_SEED, SamplingParams
from runtime.engine.sampling import Chosen, Sampler, choose
from runtime.engine.warping import CANDIDATES, warp
from runtime.errors import GreenroomError, InvalidInputError
from runtime.model.base import BaseModel

V = 50


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(3)) * 3


def sampler(base: BaseModel, prompt: tuple[int, ...] = (), choice: int = 0, **options: object) -> Sampler:
    params = SamplingParams(**options)  # type: ignore[arg-type]
    return Sampler(params, prompt, tokenizer=base.tokenizer.backend_tokenizer, choice=choice)


def draws(drawn: Sampler, logits: torch.Tensor, count: int = 300) -> list[int]:
    return [drawn.choose(logits).token for _ in range(count)]


def test_greedy_is_the_argmax(tiny_base: BaseModel, logits: torch.Tensor) -> None:
    assert sampler(tiny_base).plain
    assert sampler(tiny_base, top_p=0.5, top_k=3, min_p=0.2, seed=4).plain, "options of drawing mean nothing to greedy"
    assert sampler(tiny_base).choose(logits) == Chosen(int(logits.argmax()))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 2.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_drawing_follows_the_distribution_that_the_options_leave(
    tiny_base: BaseModel, logits: torch.Tensor, options: dict[str, float]
) -> None:
    scores = logits.unsqueeze(0)
    scores = TemperatureLogitsWarper(options["temperature"])(None, scores)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in options:
            scores = warper(options[name])(None, scores)
    expected = torch.softmax(scores[0], 0)
    drawn = torch.bincount(torch.tensor(draws(sampler(tiny_base, seed=1, **options), logits, 2000)), minlength=V) / 2000
    assert not drawn[expected == 0].any(), "what an option cuts off never comes"
    assert (drawn - expected).abs().max() < 0.06


def test_a_seed_repeats_and_choices_differ(tiny_base: BaseModel, logits: torch.Tensor) -> None:
    def drawn(**options: int) -> list[int]:
        return draws(sampler(tiny_base, temperature=1.0, **options), logits, 50)

    assert drawn(seed=7) == drawn(seed=7)
    assert drawn(seed=7) != drawn(seed=8)
    assert drawn(seed=7, choice=1) == drawn(seed=8), "choice i draws with seed + i"
    assert len(drawn(seed=MAX_SEED, choice=1)) == 50, "the largest seed has a next one"


def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_answer(logits: torch.Tensor) -> None:
    penalties = Penalties(SamplingParams(repetition_penalty=1.7), [1, 2, 2, 30])
    penalties.add(int(logits.argmax()))
    scores = logits.clone()
    penalties.apply(scores)
    seen = torch.tensor([[1, 2, 30, int(logits.argmax())]])
    torch.testing.assert_close(scores, RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.unsqueeze(0))[0])


def test_presence_and_frequency_count_the_answer_and_not_the_prompt(logits: torch.Tensor) -> None:
    penalties = Penalties(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [1, 2])
    for token in (4, 4, 4, 9):
        penalties.add(token)
    scores = logits.clone()
    penalties.apply(scores)
    expected = logits.clone()
    expected[4] -= 0.5 + 3 * 0.25
    expected[9] -= 0.5 + 0.25
    torch.testing.assert_close(scores, expected)


def test_a_penalty_turns_greedy_away_from_what_it_said(tiny_base: BaseModel, logits: torch.Tensor) -> None:
    before = logits.clone()
    said = draws(sampler(tiny_base, presence_penalty=2.0, frequency_penalty=2.0), logits, 12)
    assert len(set(said)) > 1
    assert said[0] == int(logits.argmax())
    assert torch.equal(logits, before), "the logits are left as they are"


def test_log_probabilities_are_the_models_own(tiny_base: BaseModel, logits: torch.Tensor) -> None:
    expected = torch.log_softmax(logits, 0)
    chosen = sampler(tiny_base, temperature=2.0, seed=1, presence_penalty=1.0, logprobs=3).choose(logits)
    assert chosen.logprob is not None
    assert chosen.logprob.chosen.token_id == chosen.token
    assert chosen.logprob.chosen.logprob == pytest.approx(float(expected[chosen.token]))
    assert [item.token_id for item in chosen.logprob.top] == expected.topk(3).indices.tolist()
    assert [item.logprob for item in chosen.logprob.top] == pytest.approx(expected.topk(3).values.tolist())
    assert chosen.logprob.chosen.text == tiny_base.tokenizer.decode([chosen.token])
    none = sampler(tiny_base, logprobs=0).choose(logits).logprob
    assert none is not None
    assert none.top == ()


def test_a_batch_chooses_as_each_alone(tiny_base: BaseModel) -> None:
    batch = torch.randn(4, V, generator=torch.Generator().manual_seed(5))
    options: list[dict[str, object]] = [{}, {"temperature": 1.0, "seed": 2}, {"presence_penalty": 1.0}, {"logprobs": 1}]
    together = choose([sampler(tiny_base, **each) for each in options], batch)
    assert together == [sampler(tiny_base, **each).choose(row) for each, row in zip(options, batch, strict=True)]
    assert choose([], batch[:0]) == []


def test_one_that_fails_leaves_the_others_alone(tiny_base: BaseModel) -> None:
    class Failing(Sampler):
        def choose(self, logits: torch.Tensor) -> Chosen:
            raise InvalidInputError("regex", "x", "cannot be followed")

    params = SamplingParams(temperature=1.0)
    failing = Failing(params, (), tokenizer=tiny_base.tokenizer.backend_tokenizer)
    first, second = choose([failing, sampler(tiny_base)], torch.eye(2, V))
    assert isinstance(first, GreenroomError)
    assert second == Chosen(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 11.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", MAX_SEED + 1),
        ("n", 0),
        ("n", MAX_CHOICES + 1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("json_schema", ""),
        ("regex", "x" * (MAX_REGEX_CHARS + 1)),
        ("stop", ("",)),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "options"),
    [("regex", {"regex": "a", "json_schema": "{}"}), ("json_schema", {"json_schema": "{}", "ignore_eos": True})],
)
def test_options_that_exclude_each_other_are_refused(field: str, options: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("spread", [8.0, 1.0, 0.01])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.3},
        {"temperature": 1.3, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.0, "top_k": 3000, "top_p": 0.95, "min_p": 0.01},
        {"temperature": 0.5, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_a_large_vocabulary_is_cut_as_by_sorting_all_of_it(options: dict[str, float], spread: float) -> None:
    scores = torch.randn(4 * CANDIDATES, generator=torch.Generator().manual_seed(5)) * spread
    expected = TemperatureLogitsWarper(options["temperature"])(None, scores.unsqueeze(0))
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in options:
            expected = warper(options[name])(None, expected)
    before = scores.clone()
    assert torch.equal(warp(scores, SamplingParams(**options)), expected[0])  # type: ignore[arg-type]
    assert torch.equal(scores, before)


def test_tokens_that_a_constraint_forbids_are_never_among_the_candidates() -> None:
    scores = torch.full((4 * CANDIDATES,), -torch.inf)
    scores[[7, 900, 4000]] = torch.tensor([1.0, 2.0, 0.5])
    kept = warp(scores, SamplingParams(temperature=1.0, top_p=0.99))
    assert torch.isfinite(kept).nonzero()[:, 0].tolist() == [7, 900, 4000]


def test_temperature_1_without_options_changes_nothing(logits: torch.Tensor) -> None:
    assert warp(logits, SamplingParams(temperature=1.0)) is logits
