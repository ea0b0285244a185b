"""A base before its weights are loaded: who it is, how it reads text, and the two ways to its weights.

It knows nothing of steps.
Read first: `source` reads weights one by one, without a model of `transformers`; where it gives None, `load` does it
with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.model.base import (
    BaseInfo,
    BaseModel,
    find_base,
    load_described,
)
from runtime.model.base_tokenizer import BaseTokenizer, end_tokens, read_tokenizer
from runtime.model.json_object import read_json_object
from runtime.model.llama_source import LlamaSource, StoredLlama
from runtime.model.tensor_files import TensorFiles


@dataclass(frozen=True)
class StoredBase:
    """A base in its folder.

    Args:
        folder: where it lies.
        info: its identity and sizes.
        config: config.json.
        tokenizer: its fast tokenizer.
        eos_token_ids: tokens that end an answer; never empty.
    """

    folder: Path
    info: BaseInfo
    config: Mapping[str, Any]
    tokenizer: BaseTokenizer
    eos_token_ids: tuple[int, ...]

    def source(self, *, dtype: torch.dtype, device: torch.device) -> LlamaSource | None:
        """Its weights as they are read; None where `transformers` must load it.

        Raises:
            UnknownBaseError: the files are not what config.json says.
        """
        files = TensorFiles(self.folder)
        if not StoredLlama.can_read(self.config, files):
            return None
        return StoredLlama(files, self.config, dtype=dtype, device=device)

    def load(self, *, dtype: torch.dtype, device: torch.device) -> BaseModel:
        """All of it as a model of `transformers`; see `runtime.model.base.load_base`."""
        return load_described(self.folder, self.info, dtype=dtype, device=device)


def open_base(name_or_path: str, *, cache: Path) -> StoredBase:
    """Find a base and read all of it once for its digest, but load none of its weights.

    Raises:
        UnknownBaseError, InvalidInputError: see `runtime.model.base.find_base` and `read_tokenizer`.
    """
    folder, info = find_base(name_or_path, cache=cache)
    config = read_json_object(folder / "config.json")
    tokenizer = read_tokenizer(folder)
    generation = folder / "generation_config.json"
    told = (read_json_object(generation) if generation.is_file() else config).get("eos_token_id")
    return StoredBase(folder, info, config, tokenizer, end_tokens(folder, told, tokenizer.eos_token_id))
