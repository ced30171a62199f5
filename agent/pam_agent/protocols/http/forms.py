"""A login by form: finding the form in a page, and seeing whether it worked. No I/O.

GET page ──▶ hidden fields, action ──▶ POST ──▶ success?
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Final
from urllib.parse import urlencode, urljoin, urlsplit

from pam_agent.protocols.base import Credential, TargetLoginError
from pam_agent.protocols.http.options import Form, LoggedOut, Success, fill
from pam_agent.protocols.http.wire import Response

#: Inputs of one form; a login has a handful.
MAX_INPUTS: Final = 200
#: Forms of one page: the login, a search, a choice of language.
MAX_FORMS: Final = 50


@dataclass
class FoundForm:
    """A form of a page: where it is sent, what it holds without anybody typing, and what can be typed."""

    action: str = ""
    hidden: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.forms: list[FoundForm] = []
        self._open: FoundForm | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form" and len(self.forms) < MAX_FORMS:
            self._open = FoundForm(given.get("action", ""))
            self.forms.append(self._open)
        elif tag == "input" and self._open is not None and len(self._open.names) < MAX_INPUTS:
            name = given.get("name", "")
            self._open.names.add(name)
            if given.get("type", "").lower() == "hidden" and name:
                self._open.hidden[name] = given.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._open = None


def find_form(page: str, wanted: set[str]) -> FoundForm | None:
    """The form of ``page`` that has most of the ``wanted`` inputs, one at least."""
    parser = _Forms()
    parser.feed(page)
    best = max(parser.forms, key=lambda form: len(form.names & wanted), default=None)
    return best if best is not None and best.names & wanted else None


def within(own: str, base: str, reference: str) -> str:
    """The path and query of ``reference``, found in the answer for ``base``. Raises TargetLoginError when it
    leads out of the app: a password is posted nowhere else."""
    try:
        parts = urlsplit(urljoin(own + base, reference))
    except ValueError:
        parts = urlsplit("")
    default = {"http": ":80", "https": ":443"}
    same = f"{parts.scheme}://{parts.netloc.lower().removesuffix(default.get(parts.scheme, '-'))}" == own
    if not same or not (parts.path + parts.query).isascii():
        raise TargetLoginError("the app's login leads to another place than the app")
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def filled(form: Form, found: FoundForm | None, credential: Credential) -> bytes:
    """What is posted: the page's hidden fields, then the account's."""
    values = {"user": credential.user, "password": credential.password or ""}
    fields = dict(found.hidden) if found is not None else {}
    fields.update((name, fill(template, values)) for name, template in form.fields)
    return urlencode(fields).encode()


def succeeded(success: Success, form: Form, response: Response, own: str, cookies: set[str]) -> bool:
    """Whether the answer to the post is one of a login that worked; ``cookies``: names that it set."""
    location = leads_to(response, own, form.path)
    if success.cookie is None and not success.status and success.location is None:
        back = form.path.partition("?")[0]
        return 300 <= response.status < 400 and location is not None and not _below(location, back)
    return (
        (success.cookie is None or success.cookie in cookies)
        and (not success.status or response.status in success.status)
        and (success.location is None or (location is not None and _below(location, success.location)))
        and response.status < 500
    )


def logged_out(signs: LoggedOut, response: Response, own: str, path: str) -> bool:
    """Whether an answer for ``path`` says that the app does not know the login any more."""
    if response.status in signs.status:
        return True
    if signs.location is None or not 300 <= response.status < 400:
        return False
    location = leads_to(response, own, path)
    return location is not None and _below(location, signs.location)


def leads_to(response: Response, own: str, base: str) -> str | None:
    """The path of the answer's Location; None without one, and for one out of the app."""
    value = response.value(b"location")
    if value is None:
        return None
    try:
        return within(own, base, value.decode("latin-1")).partition("?")[0]
    except TargetLoginError:
        return None


def _below(path: str, prefix: str) -> bool:
    prefix = prefix.rstrip("/") or "/"
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")
