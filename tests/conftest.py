"""Fixtures that several test files share: a tiny random base model, and the real one.

It does not know any test.
Read first: `tiny_base` answers nonsense but has every part of a real base and loads in milliseconds; `real_base_folder`
costs a download and half a minute the first time and nothing afterwards.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from runtime.model.base import BaseModel, load_base
from runtime.model.smollm2 import get_smollm2

pytest_plugins = ("repertoires", "engines", "triton_process", "native", "chromium", "ray_cluster")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("Ġ", "t"), ("h", "e"), ("i", "n"), ("e", "r"), ("o", "n"), ("Ġ", "a"), ("Ġt", "he"), ("in", "g"))
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure() -> None:
    """One thread per operation: on tiny tensors several threads only wait for one another."""
    torch.set_num_threads(1)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; special tokens are 0, 1, 2 as in SmolLM2; a few merges make token borders matter."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    end_of_text, start, end = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, pad_token=end, unk_token=end_of_text
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers, D 64, FFN 128, 4 heads / 2 KV heads, vocabulary 267, saved as a base folder."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_base_folder: Path) -> BaseModel:
    """The tiny base, float32 on the CPU; frozen, so that tests may share it."""
    return load_base(tiny_base_folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def real_base_folder() -> Path:
    """SmolLM2-135M-Instruct in the user's cache; fetched and converted there if it is not there yet."""
    cache = Path(os.environ.get("GREENROOM_CACHE") or Path.home() / ".cache" / "greenroom")
    return get_smollm2(cache, progress=print)
