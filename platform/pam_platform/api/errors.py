"""Errors as ``{"detail", "hint"}`` with the right status; no value that a caller sent is repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.core.exceptions import RequestDataTooBig
from django.db import OperationalError
from django.http import HttpRequest, HttpResponse
from ninja import NinjaAPI
from ninja.errors import AuthenticationError as NotAuthenticated
from ninja.errors import HttpError, ValidationError

from pam_common.errors import AuthenticationError, PamError, RefusedError, UnavailableError
from pam_common.logging import get_logger, kv
from pam_platform import audit
from pam_platform.access.errors import ConflictError, NotFoundError
from pam_platform.accounts.models import User
from pam_platform.fleet.models import Agent, Relay

log = get_logger("platform.api")

#: First match wins; what is not here is a fault of ours.
_STATUS: tuple[tuple[type[PamError], int], ...] = (
    (AuthenticationError, 401),
    (RefusedError, 403),
    (NotFoundError, 404),
    (ConflictError, 409),
    (UnavailableError, 503),
)


@dataclass(frozen=True)
class Answer:
    """What an exception becomes."""

    status: int
    detail: str
    hint: str = ""


def install(api: NinjaAPI) -> None:
    """Attach the answers to ``api``."""
    for kind, make in _ANSWERS.items():

        def answer(request: HttpRequest, error: Any, make: Callable[[Any], Answer] = make) -> HttpResponse:
            return _respond(api, request, make(error))

        api.add_exception_handler(kind, answer)


def _respond(api: NinjaAPI, request: HttpRequest, answer: Answer) -> HttpResponse:
    if answer.status in (403, 404) and not audit.refusal_recorded():
        _record_denial(request, answer.detail)
    body = {"detail": answer.detail}
    if answer.hint:
        body["hint"] = answer.hint
    response = api.create_response(request, body, status=answer.status)
    if answer.status == 401:
        response["WWW-Authenticate"] = "Bearer"
    return response


def _pam_error(error: PamError) -> Answer:
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return Answer(status, str(error), error.hint)
    log.error("request failed", extra=kv(error=error))
    return Answer(500, "the platform is not set up right; its log says why")


def _database_error(error: OperationalError) -> Answer:
    # Locked for too long, a deadlock, a server that is restarting: trying again helps.
    log.error("database failed", extra=kv(error=type(error).__name__))
    return Answer(503, "the platform's database does not answer", "try again in a moment")


def _validation_error(error: ValidationError) -> Answer:
    return Answer(422, "; ".join(map(_problem, error.errors)) or "the request is not valid")


_ANSWERS: dict[type[Exception], Callable[[Any], Answer]] = {
    PamError: _pam_error,
    NotAuthenticated: lambda error: Answer(401, "not logged in", "pam-client login"),
    HttpError: lambda error: Answer(error.status_code, str(error)),
    ValidationError: _validation_error,
    RequestDataTooBig: lambda error: Answer(413, "the request is too large"),
    OperationalError: _database_error,
}


def _record_denial(request: HttpRequest, reason: str) -> None:
    """Who was denied what: every denial of somebody known is on record, by the endpoint or here."""
    match getattr(request, "auth", None):
        case User() as user:
            actor = user.username
        case Agent() as agent:
            actor = f"agent {agent.name}"
        case Relay() as relay:
            actor = f"relay {relay.name}"
        case _:
            return
    audit.record(actor, "api", f"{request.method} {request.path}", "refused", reason=reason)


def _problem(item: dict[str, Any]) -> str:
    """``resource: String should match …``; never the value itself, which could be a secret."""
    where = ".".join(str(part) for part in item.get("loc", ())[1:])
    return f"{where}: {item.get('msg', 'not valid')}"[:300]
