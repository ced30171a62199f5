"""What the platform says of an app and of an account on it, checked. No I/O.

Whatever is not understood is refused when the session opens: a rule with a misspelt key must not be a rule
that is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pam_agent.protocols.base import Credential, Opening
from pam_agent.protocols.http.paths import Pattern
from pam_agent.protocols.http.rewrite import HOP_BY_HOP
from pam_agent.protocols.http.rules import Rule, Rules
from pam_common.errors import ProtocolError

How = Literal["none", "basic", "bearer", "header", "form"]

#: Of each body in the recording, unless the account says otherwise.
RECORD_BODIES: Final = 64 << 10
#: A recording is for a person to read; larger bodies are counted and hashed.
MAX_RECORD: Final = 16 << 20
#: Rules, patterns, form fields, identity headers: lists that somebody wrote by hand.
MAX_ENTRIES: Final = 256

#: Written by the agent itself, or about one connection only.
_RESERVED: Final = HOP_BY_HOP | {"host", "cookie", "content-length", "expect", "origin", "referer"}
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}")
_HOST: Final = re.compile(
    r"[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9_])?(?::[0-9]{1,5})?|\[[0-9a-f:.]+\](?::[0-9]{1,5})?"
)


@dataclass(frozen=True)
class Success:
    """How a form login is seen to have worked: all that is named must hold; nothing named: a redirect that
    does not lead back to the form."""

    cookie: str | None = None
    status: tuple[int, ...] = ()
    location: str | None = None


@dataclass(frozen=True)
class LoggedOut:
    """How an answer is seen to come from an app that no longer knows the login: any of these."""

    status: tuple[int, ...] = ()
    location: str | None = None


@dataclass(frozen=True)
class Form:
    """A login page. ``fields`` may hold ``{user}`` and ``{password}``."""

    path: str
    fields: tuple[tuple[str, str], ...]
    hidden: bool = True
    success: Success = Success()
    logged_out: LoggedOut = LoggedOut()


@dataclass(frozen=True)
class Options:
    """Everything but the target and the secrets."""

    host: str  #: the app's own name, with its port if that is not the usual one
    secure: bool  #: whether the app is spoken to by TLS
    login: How = "none"
    header: str = ""  #: for the login ``header``
    form: Form | None = None
    #: Which of the app's cookies stay in the agent: all, none, or those named.
    hide_cookies: bool | frozenset[str] = False
    identity_headers: tuple[tuple[str, str], ...] = ()
    rules: Rules = field(default_factory=Rules)
    record_bodies: int = RECORD_BODIES

    @property
    def origin(self) -> str:
        """The app's own origin."""
        return f"{'https' if self.secure else 'http'}://{self.host}"

    @property
    def host_name(self) -> str:
        """The app's name without port and brackets, for TLS and cookies."""
        return re.sub(r":[0-9]+$", "", self.host).strip("[]")


def parse(opening: Opening) -> Options:
    """Raises ProtocolError naming what is wrong."""
    options = dict(opening.options)
    account = _mapping(options.pop("account", {}), "account")
    secure = opening.target.tls.mode != "disable"
    host = _text(options.pop("host", None) or _default_host(opening, secure), "host", 260).lower()
    if not _HOST.fullmatch(host):
        raise ProtocolError("the app's host is not a host name")
    _none_left(options, "the app's options")
    known = {
        "login": _choice(account.pop("login", "none")),
        "header": account.pop("header", ""),
        "form": _form(account.pop("form", None)),
        "hide_cookies": _hide(account.pop("hide_cookies", False)),
        "identity_headers": _identity(account.pop("identity_headers", {}), opening),
        "rules": _rules(account.pop("rules", {})),
        "record_bodies": _number(account.pop("record_bodies", RECORD_BODIES), "record_bodies", MAX_RECORD),
    }
    _none_left(account, "the account's options")
    parsed = Options(host=host, secure=secure, **known)
    _check_login(parsed, opening.credential)
    return parsed


def _default_host(opening: Opening, secure: bool) -> str:
    host, port = opening.target.host, opening.target.port
    host = f"[{host}]" if ":" in host else host
    return host if port == (443 if secure else 80) else f"{host}:{port}"


def _check_login(options: Options, credential: Credential) -> None:
    """What the login needs must be there: else a user would reach the app as nobody."""
    token = credential.secrets.get("token")
    if options.login in ("basic", "form") and credential.password is None:
        raise ProtocolError(f"the account has no password for its login {options.login}")
    if options.login in ("bearer", "header") and not token:
        raise ProtocolError(f"the account has no token for its login {options.login}")
    if options.login == "header" and not _is_settable(options.header):
        raise ProtocolError("the account's header is not the name of one")
    if (options.login == "form") != (options.form is not None):
        raise ProtocolError("the account's login is form without one, or has one without being so")
    for secret in (token, credential.user if options.login == "basic" else None):
        if secret and not secret.isprintable():
            raise ProtocolError("the account's user or token cannot stand in a header")


def _is_settable(name: object) -> bool:
    return isinstance(name, str) and bool(_TOKEN.fullmatch(name)) and name.lower() not in _RESERVED


def _choice(value: Any) -> How:
    if value not in ("none", "basic", "bearer", "header", "form"):
        raise ProtocolError("the account's login is not one of none, basic, bearer, header, form")
    how: How = value
    return how


def _form(value: object) -> Form | None:
    if value is None:
        return None
    given = _mapping(value, "form")
    fields = _mapping(given.pop("fields", {}), "form.fields")
    form = Form(
        path=_path(given.pop("path", None), "form.path"),
        fields=tuple((name, _text(text, "form.fields", 1000)) for name, text in fields.items()),
        hidden=given.pop("hidden", True) is True,
        success=_success(_mapping(given.pop("success", {}), "form.success")),
        logged_out=_logged_out(_mapping(given.pop("logged_out", {}), "form.logged_out")),
    )
    _none_left(given, "the account's form")
    if not form.fields:
        raise ProtocolError("the account's form has no fields")
    return form


def _success(given: dict[str, Any]) -> Success:
    cookie, location = given.pop("cookie", None), given.pop("location", None)
    status = _statuses(given.pop("status", []))
    _none_left(given, "form.success")
    return Success(
        None if cookie is None else _text(cookie, "form.success.cookie", 256),
        status,
        None if location is None else _path(location, "form.success.location"),
    )


def _logged_out(given: dict[str, Any]) -> LoggedOut:
    location = given.pop("location", None)
    status = _statuses(given.pop("status", []))
    _none_left(given, "form.logged_out")
    return LoggedOut(status, None if location is None else _path(location, "form.logged_out.location"))


def _hide(value: object) -> bool | frozenset[str]:
    if isinstance(value, bool):
        return value
    return frozenset(_text(name, "hide_cookies", 256) for name in _list(value, "hide_cookies"))


def _identity(value: object, opening: Opening) -> tuple[tuple[str, str], ...]:
    headers = []
    for name, template in _mapping(value, "identity_headers").items():
        if not _is_settable(name):
            raise ProtocolError("an identity header's name is not one that can be set")
        text = fill(
            _text(template, "identity_headers", 1000),
            {"person": opening.user, "user": opening.credential.user, "session": opening.session},
        )
        if not text.isprintable():
            raise ProtocolError("an identity header's value cannot stand in a header")
        headers.append((name, text))
    return tuple(headers)


def fill(template: str, values: Mapping[str, str]) -> str:
    """``{name}`` replaced by its value, once: what a value holds is not looked at again."""
    return re.sub(r"\{([a-z_]+)\}", lambda found: values.get(found[1], found[0]), template)


def _rules(value: object) -> Rules:
    given = _mapping(value, "rules")
    allow, deny, size = given.pop("allow", None), given.pop("deny", []), given.pop("max_request", None)
    _none_left(given, "the account's rules")
    return Rules(
        allow=None if allow is None else tuple(_rule(entry) for entry in _list(allow, "rules.allow")),
        deny=tuple(_rule(entry) for entry in _list(deny, "rules.deny")),
        max_request=None if size is None else _number(size, "rules.max_request", 1 << 50),
    )


def _rule(value: object) -> Rule:
    given = _mapping(value, "a rule")
    methods, paths = given.pop("methods", None), given.pop("paths", None)
    _none_left(given, "a rule of the account")
    try:
        return Rule(
            None if methods is None else frozenset(_method(name) for name in _list(methods, "methods")),
            None
            if paths is None
            else tuple(Pattern(_text(text, "paths", 1000)) for text in _list(paths, "paths")),
        )
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _method(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Z]{1,32}", value):
        raise ProtocolError("a rule's method is not one in capital letters")
    return value


def _path(value: object, name: str) -> str:
    text = _text(value, name, 1000)
    if not re.fullmatch(r"/[\x21-\x7e]*", text) or text.startswith("//"):
        raise ProtocolError(f"the account's {name} is not a path")
    return text


def _statuses(value: object) -> tuple[int, ...]:
    found = tuple(_number(entry, "status", 599) for entry in _list(value, "status"))
    if any(status < 200 for status in found):
        raise ProtocolError("a status of the account's form is not one of an answer")
    return found


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or len(value) > MAX_ENTRIES:
        raise ProtocolError(f"the app's or account's {name} is not a mapping of at most {MAX_ENTRIES}")
    return dict(value)


def _list(value: object, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ENTRIES:
        raise ProtocolError(f"the account's {name} is not a list of at most {MAX_ENTRIES}")
    return value


def _text(value: object, name: str, limit: int) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= limit or not value.isprintable():
        raise ProtocolError(f"the app's or account's {name} is not text of 1 to {limit} characters")
    return value


def _number(value: object, name: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ProtocolError(f"the account's {name} is not a number of at most {most}")
    return value


def _none_left(given: Mapping[str, Any], where: str) -> None:
    if given:
        raise ProtocolError(
            f"{where} hold {', '.join(sorted(map(str, given)))[:200]}, which this agent does not know",
            hint="the agent may need an update.",
        )
