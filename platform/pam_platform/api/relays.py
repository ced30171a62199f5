"""What relays ask: enrolment and their bundle."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse
from ninja import Router, Schema

from pam_platform.access.bundles import bundle_tag, make_bundle
from pam_platform.api.fields import Key, Label, Token, Version
from pam_platform.fleet import enrolment
from pam_platform.fleet.auth import EnrolAuth, RelayAuth, calling_relay
from pam_platform.fleet.statements import trust_token

router = Router(auth=RelayAuth(), tags=["relays"])


class RelayEnrolment(Schema):
    token: Token
    name: Label
    identity_key: Key
    host_key: Key
    version: Version = ""


@router.post("/relay/enrol", auth=EnrolAuth())
def enrol(request: HttpRequest, body: RelayEnrolment) -> dict[str, Any]:
    """Enrol a relay with a one-time token; the request is signed by the key that it enrols."""
    public = body.dict(include={"identity_key", "host_key"})
    proof: str = request.auth  # type: ignore[attr-defined]
    relay = enrolment.enrol_relay(body.token, body.name, public, body.version, proof)
    return {
        "relay": relay.name,
        "issuer": settings.PAM_ISSUER,
        "trust": trust_token(),
        "bundle": make_bundle(relay),
    }


@router.get("/relay/bundle")
def get_bundle(request: HttpRequest) -> HttpResponse:
    """The trust list and the signed bundle; 304 while nothing has changed and nothing expires soon."""
    relay = calling_relay(request)
    tag = bundle_tag(relay)
    if request.headers.get("If-None-Match") == tag:
        response: HttpResponse = HttpResponse(status=304)
    else:
        response = JsonResponse({"trust": trust_token(), "bundle": make_bundle(relay)})
    response["ETag"] = tag
    return response
