"""Requests that nothing here ever needs are refused before any part of the platform sees them.

- A body above the cap, unless it is a recording's, whose endpoint has a cap of its own. Django caps what it
  parses into memory, but would write a form's files, of any size and from anybody, to the disk.
- A NUL character in query, form, cookies or a client's credentials. No name or text has one, and PostgreSQL
  cannot store it: it would come back from the database as a fault of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from allauth.core.internal.httpkit import extract_basic_auth
from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse, QueryDict
from django.http.response import HttpResponseBase
from django.shortcuts import render

API = "/api/v1/"
#: Read as a stream by :mod:`pam_platform.recordings.agent_api`, after it knows the agent.
RECORDINGS = "/api/v1/agent/recordings/"

_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


class RequestLimits:
    """Middleware; stands before all that reads a request's body, query or cookies."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        limit = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        if _length(request) > limit and not request.path_info.startswith(RECORDINGS):
            return _refuse(request, 413, "the request is too large")
        if any("\0" in text for text in _texts(request)):
            return _refuse(request, 400, "the request has a NUL character")
        return self._get_response(request)


def _length(request: HttpRequest) -> int:
    text = request.META.get("CONTENT_LENGTH") or "0"
    return int(text) if text.isdecimal() else 0


def _texts(request: HttpRequest) -> Iterable[str]:
    """Every key and value that was decoded from outside; JSON bodies are held to their schemas instead."""
    yield request.path_info
    # A quoted cookie may carry any character by its octal code.
    yield from request.COOKIES.values()
    yield from filter(None, extract_basic_auth(request.headers))
    yield from _flat(request.GET)
    if request.content_type in _FORMS and not request.path_info.startswith(API):
        yield from _flat(request.POST)


def _flat(fields: QueryDict) -> Iterable[str]:
    for name, values in fields.lists():
        yield name
        yield from map(str, values)


def _refuse(request: HttpRequest, status: int, detail: str) -> HttpResponse:
    if request.path_info.startswith((API, "/identity/o/api/")):
        return JsonResponse({"detail": detail}, status=status)
    return render(request, "400.html", status=status)
