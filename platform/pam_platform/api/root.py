"""The API object: no endpoint without declared authentication, one shape of errors, all routers."""

from __future__ import annotations

from django.http import HttpRequest
from ninja import NinjaAPI

from pam_platform.accounts.api import router as accounts_router
from pam_platform.api import admin, agents, errors, people, relays
from pam_platform.recordings.api import router as recordings_router


def deny(request: HttpRequest) -> None:
    """Authenticates nobody: what an endpoint gets that declares nothing."""


api = NinjaAPI(title="pam-platform", version="1", auth=deny, docs_url=None, openapi_url="/openapi.json")
errors.install(api)
for _router in (
    accounts_router,
    people.router,
    admin.router,
    agents.router,
    relays.router,
    recordings_router,
):
    api.add_router("", _router)


@api.get("/health", auth=None, tags=["open"])
def health(request: HttpRequest) -> dict[str, str]:
    """Whether requests are answered."""
    return {"status": "ok"}
