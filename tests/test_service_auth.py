"""Tokens, scopes, tenants and quotas: who may call, what, and how much; over a real connection where it can be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_engine import ScriptedEngine
from serving import LIMIT_S, Serving

import greenroom
from greenroom import Client, Done
from runtime.errors import InvalidInputError, PermissionDeniedError, QuotaError, UnauthenticatedError
from runtime.service.auth import ADMIN_SERVICE, Auth
from runtime.service.call import ANONYMOUS, Call, Method, Principal, surround
from runtime.service.guard import Guard
from runtime.service.quota import Quotas
from runtime.service.tokens import MAX_TOKEN_CHARS, TenantLimits, TokenEntry, Tokens, digest_of, new_secret

INFER, ADMIN = new_secret(), new_secret()


def entry(name: str, secret: str, *scopes: str, tenant: str | None = None) -> TokenEntry:
    return TokenEntry(name=name, sha256=digest_of(secret), scopes=list(scopes), tenant=tenant)  # type: ignore[arg-type]


def tokens(*tenants: TenantLimits) -> Tokens:
    entries = [entry("front", INFER, "infer", tenant="search"), entry("operator", ADMIN, "admin")]
    return Tokens(entries, list(tenants))


def call_of(*, service: str = "greenroom.v1.Greenroom", token: str | None = None, message: object = None) -> Call:
    metadata = {} if token is None else {"authorization": f"Bearer {token}"}
    return Call(
        method=Method(service, "Any", "unary"), message=message, metadata=metadata, peer="test", remaining_s=None
    )


def pass_through(auth: Auth, call: Call) -> Call:
    async def innermost(inside: Call) -> Call:
        return inside

    return asyncio.run(surround(innermost, (auth,))(call))  # type: ignore[arg-type]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def serving(engine: ScriptedEngine) -> Iterator[Serving]:
    limits = TenantLimits(name="search", max_in_flight=1, tokens_per_minute=600)
    with Serving(engine, guard=Guard.of(tokens(limits))) as server:
        yield server


def test_a_known_token_is_let_in(serving: Serving) -> None:
    with Client(serving.target, token=INFER) as client:
        assert client.generate("one two").text == "one two"


@pytest.mark.parametrize(
    "token",
    [None, "", "wrong", INFER + "x", INFER[:-1], "x" * (MAX_TOKEN_CHARS + 1)],
    ids=["none", "empty", "wrong", "longer", "shorter", "too-long"],
)
def test_no_token_or_an_unknown_one_is_unauthenticated(
    serving: Serving, engine: ScriptedEngine, token: str | None
) -> None:
    with Client(serving.target, token=token) as client:
        for call in (lambda: client.generate("x"), lambda: client.locate("x"), client.describe):
            with pytest.raises(greenroom.UnauthenticatedError) as caught:
                call()
            assert caught.value.reason == "UNAUTHENTICATED"
            assert INFER not in str(caught.value)
    assert not engine.requests


def test_a_token_without_the_scope_is_denied(serving: Serving, engine: ScriptedEngine) -> None:
    with Client(serving.target, token=ADMIN) as client, pytest.raises(greenroom.PermissionDeniedError) as caught:
        client.generate("x")
    assert caught.value.reason == "PERMISSION_DENIED"
    assert not engine.requests


def test_health_needs_no_token(serving: Serving) -> None:
    with grpc.insecure_channel(serving.target) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="")).status
    assert status == health_pb2.HealthCheckResponse.SERVING


def test_only_the_admin_scope_reaches_the_admin_service() -> None:
    auth = Auth(tokens())
    assert pass_through(auth, call_of(service=ADMIN_SERVICE, token=ADMIN)).principal.name == "operator"
    with pytest.raises(PermissionDeniedError):
        pass_through(auth, call_of(service=ADMIN_SERVICE, token=INFER))


def test_without_tokens_everybody_may_infer_and_nobody_may_administer() -> None:
    assert pass_through(Auth(None), call_of()).principal is ANONYMOUS
    with pytest.raises(PermissionDeniedError):
        pass_through(Auth(None), call_of(service=ADMIN_SERVICE))


def test_a_request_in_the_name_of_another_tenant_is_denied() -> None:
    auth = Auth(tokens())
    for tenant in ("", "search"):
        assert pass_through(auth, call_of(token=INFER, message=SimpleNamespace(tenant=tenant))).principal.name
    with pytest.raises(PermissionDeniedError):
        pass_through(auth, call_of(token=INFER, message=SimpleNamespace(tenant="operator")))


def test_the_engine_is_told_the_tokens_tenant_and_no_other(serving: Serving, engine: ScriptedEngine) -> None:
    with Client(serving.target, token=INFER) as client:
        client.generate("own")
        client.generate("named", tenant="search")
        for call in (client.generate, client.locate):
            with pytest.raises(greenroom.PermissionDeniedError):
                call("foreign", tenant="operator")
    assert [(request.text, request.tenant) for request in engine.requests] == [("own", "search"), ("named", "search")]


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {INFER}", INFER],
    ids=["none", "empty", "scheme", "scheme-and-space", "basic", "no-scheme"],
)
def test_a_header_that_is_no_bearer_token_is_unauthenticated(header: str | None) -> None:
    with pytest.raises(UnauthenticatedError):
        tokens().principal(header)


def test_the_scheme_is_read_in_any_case() -> None:
    assert tokens().principal(f"bEaReR {INFER}") == Principal("front", "search", frozenset({"infer"}))


def test_fresh_secrets_differ_and_their_digests_do_not_tell_them() -> None:
    first, second = new_secret(), new_secret()
    assert first != second
    assert first not in digest_of(first)
    assert len(digest_of(first)) == 64


# ---- the file


FILE = """
[[tenant]]
name = "search"
max_in_flight = 2

[[token]]
name = "front"
sha256 = "{digest}"
scopes = ["infer", "admin"]
tenant = "search"

[[token]]
name = "own"
sha256 = "{other}"
scopes = ["infer"]
"""


def token_file(folder: Path, text: str = FILE) -> Path:
    path = folder / "tokens.toml"
    path.write_text(text.replace("{digest}", digest_of(INFER)).replace("{other}", digest_of(ADMIN)))
    return path


def test_a_file_of_tokens_is_read(tmp_path: Path) -> None:
    read = Tokens.load(token_file(tmp_path))
    assert read.principal(f"Bearer {INFER}") == Principal("front", "search", frozenset({"infer", "admin"}))
    assert read.principal(f"Bearer {ADMIN}").tenant == "own"
    assert read.tenants == (TenantLimits(name="search", max_in_flight=2),)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("max_in_flight", "max_inflight", "max_inflight"),
        ("= 2", "= 0", "max_in_flight"),
        ("= 2", '= "2"', "max_in_flight"),
        ('"infer", "admin"', '"everything"', "scopes"),
        ('"infer", "admin"', "", "scopes"),
        ("{digest}", "secret", "sha256"),
        ('"front"', '"../front"', "name"),
        ("{other}", "{digest}", "is there twice"),
        ('"own"', '"front"', "is there twice"),
        ("[[tenant]]", "[[tenant", "cannot be read"),
        (FILE, "", "token"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_its_field(tmp_path: Path, old: str, new: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        Tokens.load(token_file(tmp_path, FILE.replace(old, new)))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read"):
        Tokens.load(tmp_path / "none")


# ---- quotas


def test_requests_in_flight_are_bounded_per_tenant(serving: Serving, engine: ScriptedEngine) -> None:
    with Client(serving.target, token=INFER, timeout_s=LIMIT_S) as client:
        held = client.stream("hold on")
        next(held)
        with pytest.raises(greenroom.ExhaustedError) as caught:
            client.generate("x")
        assert (caught.value.reason, caught.value.retry_after_s) == ("QUOTA_EXCEEDED", 1.0)
        engine.release()
        assert isinstance(list(held)[-1], Done)
        assert client.generate("x").text == "x"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_tokens_of_a_minute_may_be_overdrawn_once_and_are_paid_back() -> None:
    clock = Clock()
    quotas = Quotas([TenantLimits(name="search", tokens_per_minute=60)], clock=clock)
    principal = Principal("front", "search", frozenset())
    with quotas.enter(principal) as account:
        assert account is not None
        account.charge(90)
    with pytest.raises(QuotaError) as caught, quotas.enter(principal):
        pass
    assert caught.value.retry_after_s == 31.0
    clock.now += caught.value.retry_after_s
    with quotas.enter(principal):
        pass


def test_a_pause_fills_the_minute_and_no_more() -> None:
    clock = Clock()
    quotas = Quotas([TenantLimits(name="search", tokens_per_minute=60)], clock=clock)
    principal = Principal("front", "search", frozenset())
    clock.now += 3600
    with quotas.enter(principal) as account:
        assert account is not None
        account.charge(60)
    with pytest.raises(QuotaError), quotas.enter(principal):
        pass


def test_a_tenant_without_limits_is_not_counted() -> None:
    with Quotas().enter(Principal("a", "b", frozenset())) as account:
        assert account is None


def test_what_a_request_used_is_charged_when_it_ends_even_if_nobody_reads_it(engine: ScriptedEngine) -> None:
    guard = Guard.of(tokens(TenantLimits(name="search", tokens_per_minute=8)))
    with Serving(engine, guard=guard) as serving, Client(serving.target, token=INFER) as client:
        assert client.generate("a b c").usage.prompt_tokens == 7
        with pytest.raises(greenroom.ExhaustedError) as caught:
            client.generate("x")
        assert caught.value.reason == "QUOTA_EXCEEDED"
        assert caught.value.retry_after_s is not None
        assert 1.0 < caught.value.retry_after_s <= 22.5
