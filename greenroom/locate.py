"""Which task a prompt is of, without torch: tokenizer, the base's lower layers and the locator in onnxruntime.

It knows neither experts nor servers and writes nothing; `greenroom export onnx-features onnx-locator` makes its files.
Read first: a `PromptLocator` opens one generation's exports once and then answers from any thread. Weights are mapped
from disk and embeddings read row by row, so that a gateway can afford one per process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers

FEATURES, LOCATOR = "onnx-features", "onnx-locator"


class LocatorFilesError(Exception):
    """The exported files are missing, incomplete, or not made for one another."""


class PromptError(ValueError):
    """A prompt that cannot be located: not valid Unicode, or longer than the base reads."""


@dataclass(frozen=True)
class Location:
    """What the locator says of one prompt.

    Args:
        task: the nearest task; None where even that is too far.
        margin: score of the second best task minus that of the best; 0 if there is only one.
        scores: (task, score) of all tasks, nearest first; lower is nearer.
        num_tokens: of the prompt with its template.
    """

    task: str | None
    margin: float
    scores: tuple[tuple[str, float], ...]
    num_tokens: int


class PromptLocator:
    """Locates prompts with the exported files of one generation.

    Args:
        folder: `exports/000003` of a repertoire, with `onnx-features` and `onnx-locator`, or a copy of it.
        num_threads: for one prompt.

    Raises:
        LocatorFilesError: see there.
    """

    def __init__(self, folder: Path, *, num_threads: int = 1) -> None:
        reading, deciding = (_manifest(folder / target) for target in (FEATURES, LOCATOR))
        for field in ("generation", "base_digest", "source_sha256"):
            if reading[field] != deciding[field]:
                raise LocatorFilesError(f"{folder}: {FEATURES} and {LOCATOR} are of different repertoires: {field}")
        facts, decision_facts = (manifest["files"][0]["facts"] for manifest in (reading, deciding))
        if any(facts[field] != decision_facts[field] for field in ("feature", "layer")):
            raise LocatorFilesError(f"{folder}: {FEATURES} gives other features than {LOCATOR} takes")
        self.generation: int = reading["generation"]
        self.tasks: tuple[str, ...] = tuple(decision_facts["tasks"])
        self._prefix_ids: list[int] = facts["prefix_ids"]
        self._suffix_ids: list[int] = facts["suffix_ids"]
        self._max_tokens: int = facts["max_tokens"]
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / FEATURES / "tokenizer.json"))
            self._tokenizer.encode_special_tokens = True  # "<|im_end|>" in a user's text stays plain text
            self._embedding: Any = np.load(folder / FEATURES / "embedding.npy", mmap_mode="r")
            self._features = _session(folder / FEATURES / "features.onnx", num_threads)
            self._locator = _session(folder / LOCATOR / "locator.onnx", num_threads)
        except Exception as error:
            raise LocatorFilesError(f"{folder}: the exported files do not load: {error}") from error

    def locate(self, prompts: Sequence[str]) -> tuple[Location, ...]:
        """Locate every prompt, in their order; what a prompt gets does not depend on the others.

        Memory grows with the square of the longest prompt's tokens: `heads * T * T * 4` bytes, a few times.

        Raises:
            PromptError: see there; none is located then.
        """
        if not prompts:
            return ()
        ids = [self._ids(prompt) for prompt in prompts]
        features = np.concatenate([self._feature(one) for one in ids])
        _, scores, indices, margins = self._locator.run(None, {"features": features})
        return tuple(
            Location(
                task=self.tasks[index] if index >= 0 else None,
                margin=float(margin),
                scores=tuple((self.tasks[i], float(row[i])) for i in np.argsort(row, kind="stable")),
                num_tokens=len(tokens),
            )
            for tokens, row, index, margin in zip(ids, scores, indices, margins, strict=True)
        )

    def _ids(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode at character {error.start}") from error
        own = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = [*self._prefix_ids, *own, *self._suffix_ids]
        if not 0 < len(ids) <= self._max_tokens:
            raise PromptError(f"the prompt has {len(ids)} tokens, the base reads 1 to {self._max_tokens}")
        return ids

    def _feature(self, ids: list[int]) -> Any:  # noqa: ANN401 - onnxruntime is not typed
        (feature,) = self._features.run(None, {"embeddings": self._embedding[ids].astype(np.float32)})
        return feature


def exports_folder(repertoire: Path, generation: int | None = None) -> Path:
    """Where the exports of a generation lie, the current one by default; the folder need not exist.

    Raises:
        LocatorFilesError: nothing was ever published here.
    """
    try:
        number = int((repertoire / "HEAD").read_text()) if generation is None else generation
    except (OSError, ValueError) as error:
        raise LocatorFilesError(f"{repertoire}: no repertoire, its HEAD cannot be read") from error
    return repertoire / "exports" / f"{number:06d}"


def is_exported(folder: Path) -> bool:
    """Whether both exports are there; they appear whole or not at all."""
    return all((folder / target / "manifest.json").is_file() for target in (FEATURES, LOCATOR))


def _manifest(folder: Path) -> dict[str, Any]:
    """An export's manifest, its files present in the right size; digests were checked when they were written."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        for file in manifest["files"]:
            size = (folder / file["name"]).stat().st_size
            if size != file["bytes"]:
                raise LocatorFilesError(f"{folder / file['name']}: {size} bytes, the manifest says {file['bytes']}")
    except FileNotFoundError as error:
        command = f"greenroom export {FEATURES} {LOCATOR}"
        raise LocatorFilesError(f"{error.filename} is not there; `{command}` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LocatorFilesError(f"{folder}: the manifest cannot be read: {error}") from error
    return manifest


def _session(path: Path, num_threads: int) -> Any:  # noqa: ANN401 - onnxruntime is not typed
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
