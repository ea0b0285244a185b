"""TLS and mTLS over real connections: who has the right certificates talks, nobody else does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from certificates import Authority, Pair
from scripted_engine import ScriptedEngine
from serving import Serving

import greenroom
from greenroom import AsyncClient, Client, Tls
from runtime.errors import InvalidInputError
from runtime.service.tls import TlsFiles


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> TlsFiles:
    return written(authority.sign("server"), authority.certificate, tmp_path)


def written(pair: Pair, client_ca: bytes | None, folder: Path) -> TlsFiles:
    for name, data in {"certificate": pair.certificate, "key": pair.key, "ca": client_ca or b""}.items():
        (folder / name).write_bytes(data)
    ca = folder / "ca" if client_ca else None
    return TlsFiles(certificate=folder / "certificate", key=folder / "key", client_ca=ca)


def test_a_client_that_knows_the_authority_talks_over_tls(authority: Authority, tmp_path: Path) -> None:
    tls = Tls(roots=authority.certificate)
    with Serving(ScriptedEngine(), tls=written(authority.sign("server"), None, tmp_path)) as serving:
        with Client(serving.target, tls=tls) as client:
            assert client.generate("one two").text == "one two"

        async def ask() -> str:
            async with AsyncClient(serving.target, tls=tls) as other:
                return (await other.generate("three")).text

        assert asyncio.run(ask()) == "three"


@pytest.mark.parametrize("tls", [None, Tls(roots=Authority().certificate)], ids=["in the clear", "other authority"])
def test_a_client_without_the_authority_does_not_talk(authority: Authority, tmp_path: Path, tls: Tls | None) -> None:
    engine = ScriptedEngine()
    with (
        Serving(engine, tls=written(authority.sign("server"), None, tmp_path)) as serving,
        Client(serving.target, tls=tls, timeout_s=5.0) as client,
        pytest.raises(greenroom.UnavailableError),
    ):
        client.generate("x")
    assert not engine.requests


def test_a_certificate_for_another_name_needs_that_name(authority: Authority, files: TlsFiles) -> None:
    mine = authority.sign("client")
    tls = Tls(roots=authority.certificate, certificate=mine.certificate, key=mine.key, server_name="elsewhere.example")
    with (
        Serving(ScriptedEngine(), tls=files) as serving,
        Client(serving.target, tls=tls, timeout_s=5.0) as client,
        pytest.raises(greenroom.UnavailableError),
    ):
        client.generate("x")


def test_with_a_client_authority_only_its_clients_talk(authority: Authority, files: TlsFiles) -> None:
    mine, stranger = authority.sign("client"), Authority().sign("client")
    engine = ScriptedEngine()
    with Serving(engine, tls=files) as serving:
        known = Tls(roots=authority.certificate, certificate=mine.certificate, key=mine.key)
        with Client(serving.target, tls=known) as client:
            assert client.generate("in").text == "in"
        for tls in (
            Tls(roots=authority.certificate),
            Tls(roots=authority.certificate, certificate=stranger.certificate, key=stranger.key),
        ):
            with (
                Client(serving.target, tls=tls, timeout_s=5.0) as client,
                pytest.raises(greenroom.UnavailableError),
            ):
                client.generate("out")
    assert [request.text for request in engine.requests] == ["in"]


@pytest.mark.parametrize("field", ["certificate", "key", "client_ca"])
@pytest.mark.parametrize("content", [None, b"no pem"])
def test_a_file_that_is_no_pem_is_refused_by_its_field(
    files: TlsFiles, tmp_path: Path, field: str, content: bytes | None
) -> None:
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    fields = {"certificate": files.certificate, "key": files.key, "client_ca": files.client_ca, field: bad}
    with pytest.raises(InvalidInputError, match=rf"tls\.{field}="):
        TlsFiles(**fields).credentials()  # type: ignore[arg-type]


def test_a_private_key_is_not_shown() -> None:
    assert "secret" not in repr(Tls(key=b"secret"))
