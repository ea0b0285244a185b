"""Training of tasks: what is learned, what stays as it was, and what is refused."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from runtime.errors import BaseMismatchError, DataError, InvalidInputError, NonFiniteError
from runtime.model.attach import attached, load_mixture
from runtime.model.base import BaseModel
from runtime.model.generation import open_generation
from runtime.model.manifest import Manifest
from runtime.model.prompt import PromptTemplate
from runtime.model.repertoire import Repertoire
from training.batches import Row, collate, encode_example, encode_row, shuffled_batches
from training.config import TrainingConfig
from training.data import Example, TaskData
from training.grow import add_task
from training.mixtures import fresh_experts, new_mixture
from training.precision import base_dtype
from training.score import exact_match, is_exact, normalise
from training.steps import answer_loss, rate
from training.task import train_task
from training.usage import router_usage

CPU = torch.device("cpu")
CONFIG = TrainingConfig(
    first_layer=1, epochs=10, batch_size=16, learning_rate=1e-2, locator_steps=20, store_dtype="float32", rank=4
)
QUICK = dataclasses.replace(CONFIG, max_steps=2)
LETTERS = {"a": "1", "Z": "2", "3": "3", "?": "4"}
SIGNS = {"+": "p", "q": "m", "=": "e", "7": "s"}


def task_of(name: str, mapping: dict[str, str], num: int = 48) -> TaskData:
    """One letter, many times over, and the letter's own answer: what a random base of four layers can tell apart."""
    each = num // len(mapping)
    rows = [Example(letter * (20 + i), answer) for letter, answer in mapping.items() for i in range(each)]
    return TaskData(name, tuple(rows), tuple(rows[:: each // 2]))


def grown(root: Path, base: BaseModel, config: TrainingConfig, *tasks: TaskData) -> Repertoire:
    repertoire = Repertoire(root)
    for task in tasks:
        add_task(repertoire, base, task, config)
    return repertoire


def greedy(base: BaseModel, template: PromptTemplate, text: str, limit: int = 8) -> str:
    ids = template.encode(base.tokenizer, text)
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < limit:
            token = int(base.model(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if token in base.eos_token_ids:
                break
            answer.append(token)
    return base.tokenizer.decode(answer)


def task_logits(repertoire: Repertoire, base: BaseModel, task: str, generation: int) -> torch.Tensor:
    opened = open_generation(repertoire, generation)
    ids = torch.tensor([opened.template.encode(base.tokenizer, "aaa ZZZ +++ qqq")])
    with torch.no_grad(), attached(base.model, load_mixture(repertoire, opened, task, base.model)):
        logits: torch.Tensor = base.model(ids).logits
    return logits


def blobs(repertoire: Repertoire) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (repertoire.root / "blobs").rglob("*") if path.is_file()}


# ---- learning


def test_a_trained_router_stores_its_shares_and_each_layer_is_read_in_their_order(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    repertoire = Repertoire(tmp_path)
    add_task(repertoire, tiny_base, task_of("letters", LETTERS), QUICK)
    add_task(repertoire, tiny_base, task_of("more", LETTERS), QUICK)
    opened = open_generation(repertoire)
    task = opened.manifest.task("more")
    assert task.router.usage is not None
    layers = opened.manifest.visible_layers(task)
    assert [len(shares) for shares in task.router.usage] == [len(digests) for digests in layers.values()]
    assert all(sum(shares) == pytest.approx(1.0, abs=1e-3) for shares in task.router.usage)
    read = [(unit.layer, entry.digest) for entry, unit in opened.task_units("more")]
    wanted = []
    for (layer, digests), shares in zip(layers.items(), task.router.usage, strict=True):
        assert shares[0] != shares[1], "or this test would not see the order"
        wanted += [(layer, digest) for _, digest in sorted(zip(shares, digests, strict=True), reverse=True)]
    assert read == wanted


def test_usage_is_the_share_of_the_weight_that_real_tokens_gave(tiny_base: BaseModel) -> None:
    rows = [Row((1, 5, 6), (7, 2)), Row((1, 8), (9, 10, 2))]
    experts = [fresh_experts(tiny_base, [3], QUICK, seed_name=name) for name in ("one", "two")]
    ffns = new_mixture(tiny_base, experts[:1], experts[1], name="two", first_layer=3, config=QUICK)
    together = router_usage(tiny_base, ffns, rows, batch_size=2)
    assert router_usage(tiny_base, ffns, rows, batch_size=1)[3] == pytest.approx(together[3], abs=2e-4), "no padding"
    total = torch.zeros(2)
    for row in rows:
        with torch.no_grad(), attached(tiny_base.model, ffns):
            tiny_base.model(collate([row], tiny_base.model.device).ids)
        total += ffns[3].weights.sum(0)
    assert together[3] == pytest.approx((total / total.sum()).tolist(), abs=2e-4)


def test_training_lowers_the_loss_and_learns_a_mapping(tiny_base: BaseModel, tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    repertoire, task = Repertoire(tmp_path), task_of("letters", LETTERS)
    add_task(repertoire, tiny_base, task, CONFIG, on_progress=lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == list(range(1, 31))
    assert {num_steps for _, num_steps, _ in seen} == {30}
    assert sum(loss for _, _, loss in seen[-5:]) < 0.2 * sum(loss for _, _, loss in seen[:5])
    opened = open_generation(repertoire)
    with attached(tiny_base.model, load_mixture(repertoire, opened, "letters", tiny_base.model)):
        answers = [greedy(tiny_base, opened.template, row.input) for row in task.test]
    assert exact_match(answers, [row.output for row in task.test]) == 1.0


def test_only_what_is_new_is_trained_and_the_base_is_as_before(tiny_base: BaseModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_base.model.state_dict().items()}
    tiny_base.model.set_attn_implementation("sdpa")
    rows = [Row((1, 5, 6), (7, 2)), Row((1, 8), (9, 10, 2))]
    first = train_task(tiny_base, rows, [], name="one", first_layer=2, config=QUICK)
    old = {layer: expert.updates["gate"].b.clone() for layer, expert in first.experts.items()}
    second = train_task(tiny_base, rows, [first.experts], name="two", first_layer=1, config=QUICK)
    assert sorted(first.experts) == [2, 3]
    assert sorted(second.experts) == [1, 2, 3]
    assert (first.top_k, second.top_k) == (1, 2)
    assert {layer: tuple(router.shape) for layer, router in second.routers.items()} == {
        1: (1, 64),
        2: (2, 64),
        3: (2, 64),
    }
    assert all(torch.equal(first.experts[layer].updates["gate"].b, tensor) for layer, tensor in old.items())
    assert any(update.b.abs().max() > 0 for e in second.experts.values() for update in e.updates.values())
    after = tiny_base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in tiny_base.model.parameters())
    assert tiny_base.model.config._attn_implementation == "sdpa"


def test_the_base_is_restored_when_training_is_interrupted(tiny_base: BaseModel) -> None:
    modules = list(tiny_base.model.modules())

    def interrupt(*_step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_task(tiny_base, [Row((1, 2), (3, 2))], [], name="one", first_layer=1, config=QUICK, on_progress=interrupt)
    assert all(one is other for one, other in zip(tiny_base.model.modules(), modules, strict=True))


def test_a_loss_that_runs_away_is_reported_with_its_step(tiny_base: BaseModel) -> None:
    wild = dataclasses.replace(CONFIG, learning_rate=1e30, warmup_share=0.0)
    with pytest.raises(NonFiniteError, match=r"task one: the loss is nan at step \d+; a lower learning_rate"):
        train_task(tiny_base, [Row((1, 5), (3, 2))] * 9, [], name="one", first_layer=1, config=wild)


def test_the_loss_is_that_of_answer_and_end_tokens_alone(tiny_base: BaseModel) -> None:
    rows = [Row((1, 5, 6, 9), (7, 2)), Row((1, 8), (9, 10, 11, 12, 2))]
    ids, labels = torch.zeros(2, 7, dtype=torch.int64), torch.full((2, 7), -100)
    for i, row in enumerate(rows):
        tokens = torch.tensor((*row.prompt, *row.answer))
        ids[i, : len(tokens)] = tokens
        labels[i, len(row.prompt) : len(tokens)] = tokens[len(row.prompt) :]
    with torch.no_grad():
        wanted = tiny_base.model(ids, labels=labels).loss
        found = answer_loss(tiny_base, collate(rows, CPU))
    torch.testing.assert_close(found, wanted)


def test_the_rate_rises_in_a_line_and_falls_to_nothing() -> None:
    rates = [rate(step, 20, 4) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02


# ---- growing


def test_an_older_task_is_untouched_when_a_newer_one_arrives(tiny_base: BaseModel, tmp_path: Path) -> None:
    repertoire = grown(tmp_path, tiny_base, CONFIG, task_of("letters", LETTERS))
    before, files = repertoire.manifest(), blobs(repertoire)
    logits = task_logits(repertoire, tiny_base, "letters", 1)
    after = add_task(repertoire, tiny_base, task_of("signs", SIGNS), CONFIG)
    assert (after.generation, after.parent, after.task_names()) == (2, 1, ("letters", "signs"))
    assert after.tasks[0].model_dump_json() == before.tasks[0].model_dump_json()
    assert after.experts[0].model_dump_json() == before.experts[0].model_dump_json()
    assert (after.locator, after.arrival) == (before.locator, before.arrival)
    assert {path: path.read_bytes() for path in files} == files
    assert len(blobs(repertoire)) == len(files) + 4
    assert after.tasks[1].router.visible == (before.experts[0].digest, after.experts[1].digest)
    assert torch.equal(task_logits(repertoire, tiny_base, "letters", 2), logits)
    assert not torch.equal(task_logits(repertoire, tiny_base, "signs", 2), logits)
    assert open_generation(repertoire).faults == {}


def test_a_task_is_learned_on_top_of_another(tiny_base: BaseModel, tmp_path: Path) -> None:
    task = task_of("signs", SIGNS)
    repertoire = grown(tmp_path, tiny_base, CONFIG, task_of("letters", LETTERS), task)
    opened = open_generation(repertoire)
    with attached(tiny_base.model, load_mixture(repertoire, opened, "signs", tiny_base.model)):
        answers = [greedy(tiny_base, opened.template, row.input) for row in task.test]
    assert exact_match(answers, [row.output for row in task.test]) == 1.0


def test_one_seed_gives_one_generation_and_another_seed_another(tiny_base: BaseModel, tmp_path: Path) -> None:
    def made(folder: str, seed: int) -> Manifest:
        config = dataclasses.replace(QUICK, seed=seed)
        return grown(tmp_path / folder, tiny_base, config, task_of("letters", LETTERS)).manifest()

    one, same, other = made("one", 0), made("same", 0), made("other", 1)
    assert one.to_json() == same.to_json()
    # What prompts alone decide is shared: frames, backgrounds and Gaussian densities.
    refs = [digest for ref in (one.locator, one.arrival) for digest in (ref.frame, ref.background)]
    densities = [entry.digest for task in one.tasks for entry in (task.locator, task.arrival)]
    assert one.blob_digests() & other.blob_digests() == {*refs, *densities}


def test_a_new_repertoire_starts_its_experts_at_a_third_of_the_depth(tiny_base: BaseModel, tmp_path: Path) -> None:
    config = dataclasses.replace(QUICK, first_layer=None)
    manifest = grown(tmp_path, tiny_base, config, task_of("letters", LETTERS)).manifest()
    assert (manifest.first_layer, manifest.locator.layer, manifest.arrival.layer) == (1, 1, 0)
    assert [unit.layer for unit in manifest.experts[0].units] == [1, 2, 3]
    per_layer = 4 * (3 * 64 + 3 * 128) + 64
    # A density of a feature in three parts, and one of a feature in one.
    located, arriving = (width + 32 * width + 32 + 2 for width in (3 * 256, 256))
    assert manifest.tasks[0].trained_parameters == 3 * per_layer + located + arriving


def test_a_task_of_its_own_sees_no_older_expert_and_stands_beside_it(tiny_base: BaseModel, tmp_path: Path) -> None:
    alone = dataclasses.replace(QUICK, visible="own")
    manifest = grown(tmp_path, tiny_base, alone, task_of("letters", LETTERS), task_of("signs", SIGNS)).manifest()
    assert [task.router.visible for task in manifest.tasks] == [(entry.digest,) for entry in manifest.experts]
    assert [task.router.top_k for task in manifest.tasks] == [1, 1]
    assert open_generation(Repertoire(tmp_path)).faults == {}


def test_what_cannot_be_added_is_refused_before_anything_changes(tiny_base: BaseModel, tmp_path: Path) -> None:
    task = task_of("letters", LETTERS)
    repertoire = grown(tmp_path, tiny_base, QUICK, task)
    files = blobs(repertoire)
    with pytest.raises(InvalidInputError, match="task='letters': generation 1 already holds it"):
        add_task(repertoire, tiny_base, task, QUICK)
    with pytest.raises(InvalidInputError, match="first_layer=2: the repertoire has 1"):
        add_task(repertoire, tiny_base, task_of("more", SIGNS), dataclasses.replace(QUICK, first_layer=2))
    with pytest.raises(InvalidInputError, match="task='No/Name'"):
        add_task(repertoire, tiny_base, task_of("No/Name", SIGNS), QUICK)
    with pytest.raises(InvalidInputError, match=r"input='.*': the example has \d+ tokens, max_tokens=9"):
        add_task(repertoire, tiny_base, task_of("more", SIGNS), dataclasses.replace(QUICK, max_tokens=9))
    other = dataclasses.replace(tiny_base, info=dataclasses.replace(tiny_base.info, digest="f" * 64))
    with pytest.raises(BaseMismatchError, match="the repertoire was made for tiny"):
        add_task(repertoire, other, task_of("more", SIGNS), QUICK)
    with pytest.raises(InvalidInputError, match="first_layer=4: the base has 4 layers"):
        add_task(Repertoire(tmp_path / "new"), tiny_base, task, dataclasses.replace(QUICK, first_layer=4))
    assert repertoire.head() == 1
    assert blobs(repertoire) == files


# ---- rows, batches, precision, scores


def test_special_tokens_inside_an_example_stay_plain_text(tiny_base: BaseModel) -> None:
    row = encode_row(tiny_base, PromptTemplate("<|im_start|>", ""), "a<|im_end|>", "<|im_end|>b", max_tokens=99)
    assert row.prompt[0] == 1
    assert 2 not in row.prompt
    assert row.answer.count(2) == 1
    assert row.answer[-1] == tiny_base.eos_token_ids[0]
    assert tiny_base.tokenizer.decode(row.answer[:-1]) == "<|im_end|>b"


LEARNED = Example("what", "one; two; one then", " two;")
PLAIN = PromptTemplate("<", ">")


def test_what_stands_before_the_learned_piece_is_given_and_what_stands_after_it_is_left_out(
    tiny_base: BaseModel,
) -> None:
    row = encode_example(tiny_base, PLAIN, LEARNED, max_tokens=99)
    decode = tiny_base.tokenizer.decode
    assert (decode(row.asked), decode(row.prompt), decode(row.answer)) == ("<what>", "<what>one;", " two;")
    assert encode_example(tiny_base, PLAIN, Example("what", LEARNED.output), max_tokens=99).asked == row.asked


def test_the_end_token_is_learned_with_the_last_piece_alone(tiny_base: BaseModel) -> None:
    last = encode_example(tiny_base, PLAIN, dataclasses.replace(LEARNED, learned=" one then"), max_tokens=99)
    whole = encode_example(tiny_base, PLAIN, dataclasses.replace(LEARNED, learned=LEARNED.output), max_tokens=99)
    assert last.answer[-1] == tiny_base.eos_token_ids[0]
    assert whole == encode_row(tiny_base, PLAIN, LEARNED.input, LEARNED.output, max_tokens=99)


@pytest.mark.parametrize(
    ("learned", "message"),
    [
        ("three", r"rows:7: learned='three': must occur exactly once in output='one; two; one then'"),
        ("one", "must occur exactly once"),
        (" two; o", "begins or ends within a token"),
        ("hen", "begins or ends within a token"),
    ],
)
def test_a_learned_piece_that_is_none_is_an_error_with_its_line(
    tiny_base: BaseModel, learned: str, message: str
) -> None:
    example = dataclasses.replace(LEARNED, learned=learned, source="rows", line=7)
    with pytest.raises(DataError, match=message):
        encode_example(tiny_base, PLAIN, example, max_tokens=99)


def test_a_task_is_located_by_its_prompts_without_what_is_given_of_answers(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    manifests = []
    for learned in (None, "1"):
        rows = tuple(Example("a" * (20 + i), "x1", learned) for i in range(12))
        manifests.append(add_task(Repertoire(tmp_path / str(learned)), tiny_base, TaskData("a", rows, rows), QUICK))
    whole, piece = manifests
    assert whole.task("a").locator == piece.task("a").locator
    assert whole.experts != piece.experts, "or nothing else was learned"


def test_a_pass_gives_every_row_once_in_batches_of_similar_length() -> None:
    rng = random.Random(1)
    rows = [Row(tuple(range(rng.randint(1, 60))), (i, 2)) for i in range(150)]
    batches = list(shuffled_batches(rows, batch_size=16, rng=random.Random(0)))
    assert Counter(row for batch in batches for row in batch) == Counter(rows)
    assert len(batches) == 10 == TrainingConfig(epochs=1, batch_size=16).num_steps(150)
    padded = sum(len(batch) * max(row.num_tokens for row in batch) for batch in batches)
    assert padded < 1.25 * sum(row.num_tokens for row in rows)
    again = list(shuffled_batches(rows, batch_size=16, rng=random.Random(0)))
    other = list(shuffled_batches(rows, batch_size=16, rng=random.Random(1)))
    assert again == batches
    assert other != batches


def test_a_batch_predicts_exactly_the_answer_tokens() -> None:
    batch = collate([Row((1, 5, 6), (7, 2)), Row((1,), (9, 2))], CPU)
    assert batch.ids.tolist() == [[1, 5, 6, 7], [1, 9, 0, 0]]
    assert batch.real.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.predicts.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert batch.targets.tolist() == [7, 2, 9, 2]


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("flags: fma avx512_bf16 bmi2\n", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2 xbf16", torch.float32)],
)
def test_the_base_runs_in_bfloat16_where_the_cpu_multiplies_it(tmp_path: Path, flags: str, dtype: torch.dtype) -> None:
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text(flags)
    assert base_dtype("auto", CPU, cpu_info=cpu_info) == dtype
    assert base_dtype("float32", CPU, cpu_info=cpu_info) == torch.float32
    assert base_dtype("bfloat16", CPU, cpu_info=cpu_info) == torch.bfloat16


def test_a_cpu_that_does_not_describe_itself_runs_in_float32(tmp_path: Path) -> None:
    assert base_dtype("auto", CPU, cpu_info=tmp_path / "nothing") == torch.float32


def test_only_white_space_is_forgiven_in_an_exact_match() -> None:
    assert normalise("  a \n b\t") == "a b"
    assert is_exact(" 2024-05-01\n", "2024-05-01")
    assert not is_exact("Refund", "refund")
    assert exact_match(["a", "b ", "c", ""], ["a", "b", "d", "e"]) == 0.5
    assert exact_match([], []) == 0.0
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], [])


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("rank", 0, "whole number, 1 or more"),
        ("hyper_factor", 0, "whole number, 1 or more"),
        ("hyper_bottleneck", 0, "whole number, 1 or more"),
        ("top_k", 1.5, "whole number, 1 or more"),
        ("batch_size", True, "whole number, 1 or more"),
        ("max_steps", -1, "whole number, 1 or more"),
        ("first_layer", -1, "whole number, 0 or more"),
        ("seed", -1, "whole number, 0 or more"),
        ("learning_rate", 0.0, "finite number, above 0"),
        ("alpha", float("nan"), "finite number, above 0"),
        ("gradient_clip", float("inf"), "finite number, above 0"),
        ("balance_coefficient", -0.1, "finite number, 0 or more"),
        ("weight_decay", "0", "finite number, 0 or more"),
        ("warmup_share", 1.0, "share from 0 and below 1"),
        ("locator_held_out", 0.0, "share above 0 and below 1"),
        ("visible", "none", "one of all, own"),
        ("dtype", "float16", "one of auto, float32, bfloat16"),
        ("store_dtype", "int8", "one of float32, bfloat16, float16"),
        ("locator_score", "best", "one of raw, z, abs_z, neg_elbo"),
        ("locator_density", "kde", "one of low_rank, gaussian, vae"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(field: str, value: object, problem: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        TrainingConfig(**{field: value})
    assert str(caught.value) == f"{field}={value!r}: must be a {problem}".replace("a one", "one")
