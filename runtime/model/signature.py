"""Signatures of manifests: who made a generation (ed25519), and whom a reader trusts.

It knows nothing of files in a repertoire: bytes of a manifest and bytes of a signature come in.
Read first: a manifest names everything else by SHA-256, so one signature covers a whole generation. It does not cover
HEAD: who can write to the folder can still choose among signed generations. `cryptography` is imported only when used.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.errors import InvalidInputError, SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_MISSING_EXTRA = "signatures need the package cryptography: pip install 'greenroom[sign]'"


class Signature(BaseModel):
    """What a `.sig` file says; `signature` is base64 of the 64 bytes that ed25519 makes of the manifest's bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key_id: str
    algorithm: Literal["ed25519"]
    signature: str


class Signer:
    """Signs manifests with one private key.

    Args:
        key: an ed25519 private key.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.key_id = key_id(key.public_key())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an unencrypted private key in PEM (PKCS 8).

        Raises:
            InvalidInputError: the file is not there or holds no such key, or `cryptography` is not installed.
        """
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key

            key = load_pem_private_key(path.read_bytes(), password=None)
        except ImportError as error:
            raise InvalidInputError("key", str(path), _MISSING_EXTRA) from error
        except (OSError, ValueError, TypeError) as error:
            raise InvalidInputError("key", str(path), f"not a readable private key: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidInputError(
                "key", str(path), "not an ed25519 key; openssl genpkey -algorithm ed25519 makes one"
            )
        return cls(key)

    def sign(self, manifest: bytes) -> bytes:
        """Return the bytes of the `.sig` file that belongs to a manifest."""
        raw = base64.b64encode(self._key.sign(manifest)).decode()
        record = Signature(key_id=self.key_id, algorithm="ed25519", signature=raw)
        return record.model_dump_json(indent=2).encode() + b"\n"


@dataclass(frozen=True)
class TrustPolicy:
    """Whom a reader trusts, and whether it demands signatures.

    A signature that is there must be right and by a trusted key in any case.

    Args:
        keys: key id -> public key.
        require: an unsigned manifest is refused.
    """

    keys: Mapping[str, Ed25519PublicKey]
    require: bool = True

    @classmethod
    def load(cls, path: Path, *, require: bool = True) -> TrustPolicy:
        """Trust a public key in PEM, or every `*.pem` in a folder.

        Raises:
            InvalidInputError: nothing there, a file holds no ed25519 public key, or `cryptography` is not installed.
        """
        files = sorted(path.glob("*.pem")) if path.is_dir() else [path]
        if not files:
            raise InvalidInputError("trust", str(path), "the folder holds no *.pem")
        keys = [_load_public_key(file) for file in files]
        return cls({key_id(key): key for key in keys}, require)

    def check(self, manifest: bytes, signature: bytes | None, *, source: str) -> None:
        """Check a manifest's signature.

        Args:
            manifest: the bytes of the manifest, all of them.
            signature: the bytes of its `.sig` file, or None where there is none.
            source: what to call the manifest in messages.

        Raises:
            SignatureError: there is none and one is demanded, it is by a key that is not trusted, or it is wrong.
        """
        if signature is None:
            if self.require:
                raise SignatureError(f"{source}: not signed, and only signed manifests are accepted")
            return
        from cryptography.exceptions import InvalidSignature

        try:
            record = Signature.model_validate_json(signature)
            raw = base64.b64decode(record.signature, validate=True)
        except ValueError as error:  # pydantic's ValidationError is one
            raise SignatureError(f"{source}: the signature file cannot be read") from error
        if record.key_id not in self.keys:
            raise SignatureError(f"{source}: signed by {record.key_id[:16]}..., which is not trusted")
        try:
            self.keys[record.key_id].verify(raw, manifest)
        except InvalidSignature as error:
            raise SignatureError(f"{source}: the signature by {record.key_id[:16]}... is wrong") from error


def key_id(key: Ed25519PublicKey) -> str:
    """Return the name of a key: SHA-256 of its 32 raw bytes, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def signed_by(signature: bytes | None) -> str | None:
    """Return the key id that a signature file claims, unchecked; None where there is no readable one."""
    try:
        return None if signature is None else Signature.model_validate_json(signature).key_id
    except ValidationError:
        return None


def _load_public_key(path: Path) -> Ed25519PublicKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        key = load_pem_public_key(path.read_bytes())
    except ImportError as error:
        raise InvalidInputError("trust", str(path), _MISSING_EXTRA) from error
    except (OSError, ValueError) as error:
        raise InvalidInputError("trust", str(path), f"not a readable public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInputError("trust", str(path), "not an ed25519 public key")
    return key
