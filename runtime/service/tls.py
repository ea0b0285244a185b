"""TLS for the server: its certificate, and for mTLS whose clients it takes.

It knows nothing of tokens, which say what a client may do once it is connected.
Read first: with `client_ca` every client must show a certificate that it signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from runtime.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files.

    Args:
        certificate: chain of the server's certificate, its own first.
        key: private key of it.
        client_ca: certificates that sign those of clients; None asks for no client certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """What a gRPC port needs.

        Raises:
            InvalidInputError: a file cannot be read or is no PEM.
        """
        certificate, key = _pem("tls.certificate", self.certificate), _pem("tls.key", self.key)
        roots = _pem("tls.client_ca", self.client_ca) if self.client_ca is not None else None
        return grpc.ssl_server_credentials([(key, certificate)], roots, require_client_auth=roots is not None)


def _pem(field: str, path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(field, str(path), f"cannot be read: {error.strerror}") from error
    if b"-----BEGIN " not in data:
        raise InvalidInputError(field, str(path), "is no PEM file")
    return data
