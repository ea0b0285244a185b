"""The frozen base model: what it is, where it lies, and how it is loaded.

It does not know experts, routers or prompts, and it never writes to the folder it reads.
Read first: a base is a local Hugging Face causal-LM folder with safetensors weights; its identity is `BaseInfo.digest`,
never its name or path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError

from runtime.errors import InvalidInputError, UnknownBaseError
from runtime.model.base_tokenizer import end_tokens, load_tokenizer, quiet_transformers
from runtime.model.json_object import read_json_object

if TYPE_CHECKING:
    import transformers


class BasePin(NamedTuple):
    """The digests that a known base must have; see `BaseInfo`."""

    digest: str
    tokenizer_digest: str


KNOWN_BASES: Mapping[str, BasePin] = MappingProxyType(
    {
        "smollm2": BasePin(
            digest="52172bc28a58a7a1a63dd202500ca18bbb5473eafbebef00e423df2b77868fa5",
            tokenizer_digest="6b672b67e9de5fb1c93064413be0637e201a4650e600791c50c6a992beae0e6e",
        ),
    }
)
"""Bases that `greenroom base get NAME` makes."""

_VOLATILE_KEYS = frozenset(
    {
        "_from_model_config",
        "_model_name_or_path",
        "_name_or_path",
        "is_local",
        "local_files_only",
        "name_or_path",
        "transformers_version",
    }
)
_TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """What a repertoire remembers of the base model it was made for.

    Args:
        name: name of the folder; for people only.
        digest: SHA-256, 64 hex characters, over config.json and all *.safetensors; see `describe_base`.
        tokenizer_digest: the same over the tokenizer's files.
        architecture: class name in `transformers`, for example "LlamaForCausalLM".
        num_layers: decoder layers, L.
        width: model width, D.
        ffn_width: width inside the feed-forward network.
        vocab_size: rows of the embedding.
        attention_width: all query heads together.
        kv_width: all key heads together, and all value heads.
    """

    name: str
    digest: str
    tokenizer_digest: str
    architecture: str
    num_layers: int
    width: int
    ffn_width: int
    vocab_size: int
    attention_width: int
    kv_width: int


@dataclass(frozen=True)
class BaseModel:
    """A loaded base, in eval mode, with every parameter frozen.

    Args:
        model: the causal LM.
        tokenizer: its fast tokenizer.
        info: its identity and sizes.
        eos_token_ids: tokens that end an answer; never empty.
    """

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerFast
    info: BaseInfo
    eos_token_ids: tuple[int, ...]


def describe_base(folder: Path) -> BaseInfo:
    """Identity and sizes of the base in `folder`; loads no weights, streams every byte of them through SHA-256.

        digest = sha256(sum over files in name order of  len(name) | name | len(content) | content)

    Lengths are 8 bytes, little endian. JSON files enter as compact JSON with sorted keys and without the fields that
    only record who saved them and where (`transformers_version`, `_name_or_path` and the like), so that saving the same
    model again with another library version does not make it another base.

    Args:
        folder: a Hugging Face folder: config.json, *.safetensors, tokenizer files.

    Raises:
        UnknownBaseError: not such a folder.
        InvalidInputError: config.json is not JSON or lacks a size we need.
    """
    weights = sorted(folder.glob("*.safetensors"), key=lambda path: path.name)
    if not (folder / "config.json").is_file() or not weights:
        raise UnknownBaseError(f"{folder} is no base model: it needs config.json and *.safetensors")
    tokenizer_files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not tokenizer_files:
        raise UnknownBaseError(f"{folder} is no base model: it has no tokenizer.json")
    config = read_json_object(folder / "config.json")
    # Multimodal configs keep the language model's sizes one level down.
    nested = config.get("text_config")
    sizes = _with_usual_names({**config, **nested} if isinstance(nested, dict) else config)
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise InvalidInputError("config.json: architectures", architectures, "must name the model class")
    num_heads, width = _size(sizes, "num_attention_heads"), _size(sizes, "hidden_size")
    head_width = width // num_heads if sizes.get("head_dim") is None else _size(sizes, "head_dim")
    num_kv_heads = num_heads if sizes.get("num_key_value_heads") is None else _size(sizes, "num_key_value_heads")
    return BaseInfo(
        name=folder.resolve().name,
        digest=_digest([folder / "config.json", *weights]),
        tokenizer_digest=_digest(tokenizer_files),
        architecture=architectures[0],
        num_layers=_size(sizes, "num_hidden_layers"),
        width=width,
        ffn_width=_size(sizes, "intermediate_size"),
        vocab_size=_size(sizes, "vocab_size"),
        attention_width=num_heads * head_width,
        kv_width=num_kv_heads * head_width,
    )


def known_base_folder(name: str, *, cache: Path) -> Path:
    """Where the known base `name` lies in `cache`, whether or not it is there yet."""
    return cache / "bases" / name


def is_known_base(name: str, folder: Path) -> bool:
    """Whether `folder` holds the known base `name`, complete and unchanged: reads all of it."""
    return _described_as(name, folder) is not None


def _described_as(name: str, folder: Path) -> BaseInfo | None:
    try:
        info = describe_base(folder)
    except (UnknownBaseError, InvalidInputError):
        return None
    return info if KNOWN_BASES[name] == (info.digest, info.tokenizer_digest) else None


def resolve_base(name_or_path: str, *, cache: Path) -> Path:
    """The folder of a base given by name or path; a known name wins over a folder of that name.

    Args:
        name_or_path: a key of `KNOWN_BASES`, or the path of a local Hugging Face causal-LM folder.
        cache: folder in which known bases are kept.

    Raises:
        UnknownBaseError: neither, or a known base that is not in the cache or not what it should be.
    """
    return _find(name_or_path, cache)[0]


def find_base(name_or_path: str, *, cache: Path) -> tuple[Path, BaseInfo]:
    """`resolve_base` and `describe_base` in one, which reads every byte for its digest once and not twice.

    Raises:
        UnknownBaseError, InvalidInputError: as for these.
    """
    folder, info = _find(name_or_path, cache)
    return folder, info or describe_base(folder)


def _find(name_or_path: str, cache: Path) -> tuple[Path, BaseInfo | None]:
    """The folder, and what it holds if finding it took reading it."""
    if name_or_path in KNOWN_BASES:
        folder = known_base_folder(name_or_path, cache=cache)
        info = _described_as(name_or_path, folder)
        if info is None:
            raise UnknownBaseError(
                f"base {name_or_path!r} is not in {cache}, or is damaged: run `greenroom base get {name_or_path}`"
            )
        return folder, info
    folder = Path(name_or_path)
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(KNOWN_BASES))
        raise UnknownBaseError(f"base {name_or_path!r} is neither a known name ({known}) nor a model folder")
    return folder, None


def load_base(folder: Path, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """Load the base in `folder`, frozen and in eval mode; asks no network and runs no code from the folder.

    Args:
        folder: as for `describe_base`.
        dtype: floating dtype of the weights, whatever they are stored in.
        device: where the weights go.

    Raises:
        UnknownBaseError: `transformers` cannot load it, a weight is missing, or its tokenizer has no fast form or no
            end token.
        InvalidInputError: as for `describe_base`.
    """
    return load_described(folder, describe_base(folder), dtype=dtype, device=device)


def load_described(folder: Path, info: BaseInfo, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """`load_base` of a folder that `describe_base` has read already."""
    import transformers  # half a second, which a server whose base is read tensor by tensor does not spend

    with quiet_transformers():
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UnknownBaseError(f"{folder} does not load as a causal LM: {error}") from error
    # `transformers` fills what is missing with random numbers and only warns.
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            raise UnknownBaseError(f"{folder} does not load as a causal LM: {problem} {sorted(loading[problem])[:3]}")
    tokenizer = load_tokenizer(folder)
    told = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos_token_ids = end_tokens(folder, told, tokenizer.eos_token_id)
    model.to(device).eval().requires_grad_(requires_grad=False)
    return BaseModel(model, tokenizer, info, eos_token_ids)


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents, each preceded by its length; formula in `describe_base`."""
    total = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        name = path.name.encode()
        total.update(len(name).to_bytes(8, "little") + name)
        if path.suffix == ".json" and path.name != "tokenizer.json":
            stable = {key: value for key, value in read_json_object(path).items() if key not in _VOLATILE_KEYS}
            content = json.dumps(stable, sort_keys=True, separators=(",", ":")).encode()
            total.update(len(content).to_bytes(8, "little") + content)
            continue
        total.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                total.update(block)
    return total.hexdigest()


def _with_usual_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with the names that most have; GPT-2's says `n_embd`, and nothing of an FFN of four times the width."""
    if "n_embd" not in config:
        return config
    renamed = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    found = {name: config.get(own) for name, own in renamed.items()}
    inner = config.get("n_inner")
    width = found["hidden_size"]
    found["intermediate_size"] = 4 * width if inner is None and isinstance(width, int) else inner
    return {**config, **found}


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInputError(f"config.json: {key}", value, "must be a positive integer")
    return value
