"""allauth's OAuth endpoints with what they lack: CSRF, rates, audit, and who is asking.

allauth 65.19.5 exempts its device approval from CSRF checks, reads and writes a device code's state
without a transaction, and puts no limit on how often codes and tokens may be asked for. Its
internals are used here on purpose; the exact version is pinned and a contract test runs the flow.
"""

from __future__ import annotations

import json
import time
from typing import Any

from allauth.core.internal import ratelimit
from allauth.core.internal.httpkit import extract_basic_auth
from allauth.idp.oidc import app_settings
from allauth.idp.oidc import views as allauth_views
from allauth.idp.oidc.forms import ConfirmCodeForm, DeviceAuthorizationForm
from allauth.idp.oidc.internal.oauthlib import device_codes
from django.contrib.auth.decorators import login_required
from django.core.cache import cache
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt, csrf_protect
from django.views.decorators.http import require_http_methods, require_POST

from pam_platform import audit
from pam_platform.accounts.oauth import delete_expired
from pam_platform.accounts.signals import address_of, known_name

_CLIENT_CREDENTIALS = "client_credentials"
# A token request holds a code, an id and a secret; Django's own cap of 2.5 MiB is for uploads.
_MAX_TOKEN_REQUEST = 16 * 1024


@csrf_exempt  # programs call it; it carries no cookie authority
@require_POST
def device_code(request: HttpRequest) -> HttpResponseBase:
    """Start a device authorization (RFC 8628 section 3.1); remembers where it was asked from."""
    if not _within_rate(request, "device_code"):
        return _too_often()
    if not request.POST.get("client_id"):  # oauthlib fails without one
        return JsonResponse({"error": "invalid_request"}, status=400)
    response = allauth_views.device_code(request)
    if response.status_code == 200:
        code = json.loads(response.content)["device_code"]
        origin = {"address": address_of(request), "at": time.time()}
        cache.set(_origin_key(code), origin, timeout=app_settings.DEVICE_CODE_EXPIRES_IN)
    return response  # type: ignore[no-any-return]


@csrf_exempt  # programs call it; it carries no cookie authority
@require_POST
def token(request: HttpRequest) -> HttpResponseBase:
    """Exchange a device code, refresh token or client secret for tokens (RFC 6749 section 3.2)."""
    if int(request.headers.get("Content-Length") or 0) > _MAX_TOKEN_REQUEST:
        return JsonResponse({"error": "invalid_request"}, status=413)
    by_secret = request.POST.get("grant_type") == _CLIENT_CREDENTIALS
    if not _within_rate(request, "client_credentials" if by_secret else "token"):
        return _too_often()
    response = allauth_views.token(request)
    if by_secret:
        delete_expired()
        _audit_client_credentials(request, response)
    elif response.status_code == 400:
        # Django warns of every 400; a client that polls for its user's answer gets one every 2 s.
        response._has_been_logged = True
    return response  # type: ignore[no-any-return]


@login_required
@csrf_protect
@never_cache
@require_http_methods(["GET", "POST"])
@transaction.atomic  # with SQLite's IMMEDIATE, a poll cannot overwrite the answer given here
def approve_device(request: HttpRequest) -> HttpResponse:
    """Ask for a user code, show what it would log in, and take the answer (section 3.3)."""
    form = ConfirmCodeForm(request.GET) if "code" in request.GET else ConfirmCodeForm()
    if not form.is_bound or not form.is_valid():
        return render(request, "idp/oidc/device_authorization_code_form.html", {"form": form})
    origin = cache.get(_origin_key(form.device_code)) or {}
    page = {
        "user_code": form.cleaned_data["code"],
        "client": form.client,
        "asked_from": origin.get("address", ""),
        "asked_ago": max(0, int(time.time() - origin["at"])) if origin else None,
        "your_address": address_of(request),
    }
    answer = DeviceAuthorizationForm(request.POST) if request.method == "POST" else None
    action = answer.cleaned_data["action"] if answer is not None and answer.is_valid() else ""
    if action not in ("confirm", "deny"):
        return render(request, "idp/oidc/device_authorization_confirm_form.html", page)
    return _answer(request, form, page, confirm=action == "confirm")


def _answer(request: HttpRequest, form: Any, page: dict[str, Any], *, confirm: bool) -> HttpResponse:
    """Store the answer; a code that ended meanwhile is refused rather than called approved."""
    stored = device_codes.confirm_or_deny_device_code(request.user, form.device_code, confirm=confirm)
    audit.record(
        request.user.get_username(),
        "device.approve" if confirm else "device.deny",
        form.client.id,
        "ok" if stored else "expired",
        address=page["your_address"],
        asked_from=page["asked_from"],
    )
    result = ("confirmed" if confirm else "denied") if stored else "expired"
    return render(request, f"idp/oidc/device_authorization_{result}.html", page)


def _audit_client_credentials(request: HttpRequest, response: HttpResponseBase) -> None:
    name = extract_basic_auth(request.headers)[0] or request.POST.get("client_id") or ""
    outcome = "ok" if response.status_code == 200 else "refused"
    audit.record(known_name(name), "token", "client credentials", outcome, address=address_of(request))


def _within_rate(request: HttpRequest, action: str) -> bool:
    return bool(ratelimit.consume(request, action=action, config=app_settings.RATE_LIMITS, limit_get=True))


def _too_often() -> HttpResponse:
    return JsonResponse(
        {"error": "slow_down", "error_description": "too many requests from this address"},
        status=429,
        headers={"Retry-After": "60"},
    )


def _origin_key(code: str) -> str:
    return f"pam.device_origin[{code}]"
