"""The account's login to its app, shared by all connections of a session."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Final, cast

from pam_agent.protocols.base import Conversation, Credential, Opening, Target, TargetLoginError
from pam_agent.protocols.http import forms
from pam_agent.protocols.http.cookies import Jar
from pam_agent.protocols.http.options import Form, Options
from pam_agent.protocols.http.redact import Redactor, basic
from pam_agent.protocols.http.rewrite import RequestRewriter
from pam_agent.protocols.http.target_side import TargetSide
from pam_agent.protocols.http.wire import Fields, Response
from pam_agent.target_tls import PlainTarget, TargetStream, TlsTarget, make_context
from pam_common.errors import PamError
from pam_common.secure_channel import deadline
from pam_common.stream import Stream

#: A page, a post, a redirect or two, of an app that was asleep.
LOGIN_SECONDS: Final = 30.0
#: After a login by form that failed: the app is not asked again for each request of a page, lest it locks the
#: account.
LOGIN_INTERVAL: Final = 10.0
#: Logins by form within a minute: enough for a user who logs out of the app now and then, and an end to it
#: where every answer looks like a logout.
MAX_LOGINS: Final = 5
#: A login page.
MAX_PAGE: Final = 1 << 20
#: On the way to a login page.
MAX_REDIRECTS: Final = 4

_KEY: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)
_PAGE_FIELDS: Final[Fields] = [
    (b"Accept", b"text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"),
    (b"Accept-Encoding", b"identity"),
    (b"User-Agent", b"Mozilla/5.0 (pam-agent)"),
]


class Account:
    """Injects the credential: fields into every request, or the cookies of a login by form."""

    def __init__(
        self, opening: Opening, options: Options, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises TargetLoginError for certificates that cannot be loaded."""
        self.options = options
        self._credential = opening.credential
        self._clock = clock
        self.jar = Jar(options.host_name, secure=options.secure, hide=options.hide_cookies)
        injected = _injected(options, opening.credential)
        self.injects = bool(injected)
        credential = opening.credential
        certified = "client_cert" in credential.secrets or credential.client_key_pem is not None
        self.rewriter = RequestRewriter(
            options.origin,
            options.identity_headers,
            injected,
            identified=options.login != "none" or certified or bool(options.identity_headers),
            restricted=options.rules.restrict,
        )
        self.redactor = Redactor(
            _secrets(opening.credential), [name.lower() for name, _ in injected], self.jar.values
        )
        self._server_name = opening.target.tls.server_name or options.host_name
        self._context = None
        if options.secure:
            target, key = _with_certificate(opening.target, opening.credential)
            self._context = make_context(target, key)
            self._context.set_alpn_protocols(["http/1.1"])
        self._lock = threading.Lock()
        self._logins = 0
        self._attempts: deque[float] = deque(maxlen=MAX_LOGINS)
        self._failure: TargetLoginError | None = None

    def secure(self, sock: socket.socket) -> TargetStream:
        """What the target's TLS policy makes of a fresh socket."""
        return (
            PlainTarget(sock) if self._context is None else TlsTarget(sock, self._context, self._server_name)
        )

    # -- login by form -------------------------------------------------------------------------------

    def ensure(self, target: TargetSide, conversation: Conversation) -> int:
        """Be logged in; returns which login it is. Raises TargetLoginError, PamError, OSError."""
        form = self.options.form
        if form is None:
            return 0
        with self._lock:
            if not self._logins:
                self._attempt(form, target, conversation)
            return self._logins

    def renewable(self, seen: int) -> bool:
        """Whether it makes sense to log in again, as the app does not know the login ``seen`` any more."""
        if self.options.form is None:
            return False
        full = len(self._attempts) == MAX_LOGINS and self._clock() - self._attempts[0] < 60
        return self._logins != seen or not full

    def renew(self, seen: int, target: TargetSide, conversation: Conversation) -> int:
        """Log in again, once for all who noticed; returns which login it is then. Raises as ``ensure``."""
        form = self.options.form
        assert form is not None
        with self._lock:
            if self._logins == seen:
                self._attempt(form, target, conversation)
            return self._logins

    def logged_out(self, response: Response, path: str) -> bool:
        form = self.options.form
        return form is not None and forms.logged_out(form.logged_out, response, self.options.origin, path)

    def _attempt(self, form: Form, target: TargetSide, conversation: Conversation) -> None:
        if self._failure is not None and self._clock() - self._attempts[-1] < LOGIN_INTERVAL:
            raise TargetLoginError(str(self._failure), hint=self._failure.hint)
        self._attempts.append(self._clock())
        self._failure = None
        try:
            status = self._log_in(form, target)
        except (PamError, OSError) as error:
            target.close()
            if conversation.end_reason is None:
                conversation.record([_event(False, self._credential.user, reason=str(error))])
            if isinstance(error, TargetLoginError):
                self._failure = error
            raise
        self._logins += 1
        conversation.record([_event(True, self._credential.user, status=status)])

    def _log_in(self, form: Form, target: TargetSide) -> int:
        self.jar.begin_login()
        target.ready()
        # Of a Stream it uses ``abort`` alone, which here ends whatever connection is in use by then.
        with deadline(cast(Stream, target), LOGIN_SECONDS, "the login to the app"):
            path, page = self._page(form, target)
            found = forms.find_form(page, {name for name, _ in form.fields}) if form.hidden else None
            action = forms.within(self.options.origin, path, found.action) if found and found.action else path
            body = forms.filled(form, found, self._credential)
            fields = [
                (b"Content-Type", b"application/x-www-form-urlencoded"),
                (b"Content-Length", str(len(body)).encode()),
                (b"Origin", self.options.origin.encode()),
                (b"Referer", (self.options.origin + path).encode()),
            ]
            response, _, cookies = self._ask(target, "POST", action, fields, body)
        if not forms.succeeded(form.success, form, response, self.options.origin, cookies):
            raise TargetLoginError(
                f"the app did not accept the account's login (it answered {response.status})",
                hint="ask an administrator to check the account's password and its form settings.",
            )
        return response.status

    def _page(self, form: Form, target: TargetSide) -> tuple[str, str]:
        """The login page's path, after redirects, and its text."""
        path = form.path
        for _ in range(MAX_REDIRECTS + 1):
            response, body, _ = self._ask(target, "GET", path, [], b"")
            location = response.value(b"location")
            if not 300 <= response.status < 400 or location is None:
                if response.status >= 400:
                    raise TargetLoginError(f"the app's login page cannot be had ({response.status})")
                return path, body.decode("utf-8", "replace")
            path = forms.within(self.options.origin, path, location.decode("latin-1"))
        raise TargetLoginError("the app's login page redirects without end")

    def _ask(
        self, target: TargetSide, method: str, path: str, more: Fields, body: bytes
    ) -> tuple[Response, bytes, set[str]]:
        fields: Fields = [(b"Host", self.options.host.encode()), *_PAGE_FIELDS, *more]
        cookie = self.jar.header(path, [])
        if cookie is not None:
            fields.append((b"Cookie", cookie))
        response, answer = target.ask(method, path, fields, body, MAX_PAGE)
        set_now = set()
        for value in response.values(b"set-cookie"):
            header = value.decode("latin-1")
            self.jar.take(header, path, login=True)
            set_now.add(header.partition("=")[0].strip())
        return response, answer, set_now & self.jar.names()


def _event(ok: bool, user: str, **more: object) -> dict[str, object]:
    return {"kind": "login", "ok": ok, "how": "form", "user": user, **more}


def _injected(options: Options, credential: Credential) -> tuple[tuple[str, str], ...]:
    token = credential.secrets.get("token", "")
    if options.login == "basic":
        return (("Authorization", f"Basic {basic(credential.user, credential.password or '')}"),)
    if options.login == "bearer":
        return (("Authorization", f"Bearer {token}"),)
    if options.login == "header":
        return ((options.header, token),)
    return ()


def _secrets(credential: Credential) -> list[str]:
    password = credential.password or ""
    return [
        text
        for text in (password, password and basic(credential.user, password), *credential.secrets.values())
        if text
    ]


def _with_certificate(target: Target, credential: Credential) -> tuple[Target, str | None]:
    """The target with the account's client certificate, if it has one, and that one's key."""
    both = credential.secrets.get("client_cert")
    if both is None:
        return target, credential.client_key_pem
    key = _KEY.search(both)
    if key is None:
        raise TargetLoginError("the account's client certificate has no private key with it")
    certificate = _KEY.sub("", both).strip()
    return replace(target, tls=replace(target.tls, client_cert_pem=certificate)), key[0]
