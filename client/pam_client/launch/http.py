"""How browsers and HTTP programs are told where the listener is."""

from __future__ import annotations

from pam_client.launch.base import Launch, Place
from pam_client.web.origin import Origin
from pam_client.web.refusal import HEAD, HttpRefusal, starts_http


def _origin(account: str, port: int, programs: bool) -> Origin:
    return Origin.for_programs(port) if programs else Origin.for_browser(account, port)


def _url(place: Place) -> str:
    assert place.origin is not None
    return place.origin.url


HTTP = Launch(
    program="web",
    variables=lambda place: {"PAM_URL": _url(place)},
    removed=frozenset(),
    usage=lambda place: f"{_url(place)}/",
    # Browsers know no UNIX sockets: none is made.
    socket_name=lambda port: f"http.{port}",
    socket_port=lambda name: None,
    default_port=80,
    head=HEAD,
    accepts=starts_http,
    refusal=HttpRefusal,
    origin=_origin,
    direct=True,
)
