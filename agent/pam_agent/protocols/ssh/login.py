"""The agent's own SSH to the target: key exchange, host key, then the account's credential.

The host key is checked after the key exchange, which proves that the target holds it, and before anything of
the account's is sent. A credential is offered in the order certificate, private key, password; where the
target wants several, as many as it asks for.
"""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from pam_agent.protocols.base import Credential, Opening, SshIdentity, TargetLoginError
from pam_agent.protocols.ssh.hostkeys import HostKeys
from pam_common.errors import UnavailableError
from pam_common.fast_ssh.leg import LegacyTargetLeg, TargetLeg
from pam_common.ssh_certs import CertificateKey

#: Identification and key exchange; a target behind a slow link takes two or three.
EXCHANGE_SECONDS: Final = 20.0
#: One answer during the login: PAM waits a few seconds after a wrong password.
ANSWER_SECONDS: Final = 30.0
#: Questions of one keyboard-interactive round; one password is what can be answered.
MAX_PROMPTS: Final = 8
#: Ways to log in that are tried: sshd gives up after six.
MAX_TRIES: Final = 6

_PASSWORD = re.compile(r"pass(?:word|wort|phrase|e)|parol|contrase|senha|密码", re.IGNORECASE)
#: Questions that a stored password is no answer to: it would be sent where it does not belong.
_NOT_THAT = re.compile(r"new|retype|again|code|token|otp|verification", re.IGNORECASE)


def exchange_keys(leg: TargetLeg, keys: HostKeys, host: str) -> None:
    """Negotiate, and see that it is the right target. Raises TargetLoginError or UnavailableError."""
    done = threading.Event()
    leg.start_client(event=done)
    finished = done.wait(EXCHANGE_SECONDS)
    if not finished or not leg.is_active():
        raise _no_exchange(leg, finished)
    keys.check(leg.host_key_blob(), host, time.time())


def _no_exchange(leg: TargetLeg, finished: bool) -> UnavailableError:
    if not finished:
        return UnavailableError(f"the target did not finish the key exchange in {EXCHANGE_SECONDS:.0f} s")
    error = leg.get_exception()
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return UnavailableError(
            f"no ssh algorithm in common with the target: {_words(error)}",
            hint="an old target may need legacy_algorithms, a new host key another pinned one.",
        )
    if isinstance(error, paramiko.SSHException) and str(error):
        return UnavailableError(f"no ssh key exchange with the target: {_words(error)}")
    return UnavailableError("the target closed the connection during the key exchange")


def log_in(leg: TargetLeg, opening: Opening) -> str:
    """Log in with what the account has; returns how. Raises TargetLoginError or UnavailableError."""
    leg.auth_timeout = ANSWER_SECONDS
    attempt = _Login(leg, opening.credential)
    used = []
    for name, method in attempt.methods(opening.ssh)[:MAX_TRIES]:
        if attempt.allowed and name.partition(" ")[0] not in ("none", *attempt.allowed):
            continue
        try:
            attempt.allowed = list(method())
            used.append(name)
        except paramiko.BadAuthenticationType as error:
            attempt.allowed = list(error.allowed_types)
        except paramiko.AuthenticationException:
            _require_alive(leg)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise _cut(error) from None
        if leg.is_authenticated():
            return ", ".join(used)
    raise TargetLoginError(
        f"the target refused the account's credential{attempt.question}",
        hint="an administrator sees to the account; the target's own log says why.",
    )


def _require_alive(leg: TargetLeg) -> None:
    if not leg.is_active():
        raise UnavailableError("the target closed the connection during the login")


def _cut(error: Exception) -> UnavailableError:
    reason = f": {_words(error)}" if str(error) else ""
    return UnavailableError(f"the target ended the login{reason}")


class _Login:
    def __init__(self, leg: TargetLeg, credential: Credential) -> None:
        self._leg = leg
        self._credential = credential
        self._answered = False
        self.allowed: list[str] = []  # by what the target said last; empty: not known
        self.question = ""  # what it asked that cannot be answered

    def methods(self, identity: SshIdentity | None) -> list[tuple[str, Callable[[], Sequence[str]]]]:
        """Each way to log in, by the protocol's name of it and a word for the recording."""
        leg, credential = self._leg, self._credential
        user, password = credential.user, credential.password
        found: list[tuple[str, Callable[[], Sequence[str]]]] = []
        if identity is not None and identity.user_certificate is not None:
            certificate = CertificateKey(identity.user_seed, identity.user_certificate)
            found.append(("publickey certificate", lambda: leg.auth_publickey(user, certificate)))
        if "private_key" in credential.secrets:
            secrets = credential.secrets
            key = private_key(secrets["private_key"], secrets.get("passphrase"))
            found.append(("publickey", lambda: leg.auth_publickey(user, key)))
        if password is not None:
            word = password
            # What the target takes is asked first: each try counts against the account's lock.
            found.append(("none", lambda: leg.auth_none(user)))
            found.append(("password", lambda: leg.auth_password(user, word, fallback=False)))
            found.append(("keyboard-interactive", lambda: leg.auth_interactive(user, self._answer)))
        if not found:
            raise TargetLoginError("the account has nothing to log in to the target with")
        return found

    def _answer(self, title: str, instructions: str, prompts: Sequence[tuple[str, bool]]) -> list[str]:
        """The password for the one question that asks for it; nothing for any other."""
        if len(prompts) > MAX_PROMPTS:
            raise paramiko.SSHException("too many questions")
        return [self._answer_one(text, echo) for text, echo in prompts]

    def _answer_one(self, text: str, echo: bool) -> str:
        asks = _PASSWORD.search(text) is not None and _NOT_THAT.search(text) is None
        if echo or self._answered or not asks or self._credential.password is None:
            self.question = f": it asks {_printable(text)!r}"
            return ""
        self._answered = True
        return self._credential.password


def private_key(pem: str, passphrase: str | None) -> paramiko.PKey:
    """An Ed25519, ECDSA or RSA key in OpenSSH's or PEM form. Raises TargetLoginError, without the reason:
    it could quote what was parsed."""
    load = load_ssh_private_key if "BEGIN OPENSSH" in pem else load_pem_private_key
    try:
        loaded = load(pem.encode() + b"\n", passphrase.encode() if passphrase else None)
        plain = loaded.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TargetLoginError("the account's private key cannot be used") from None
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            return kind.from_private_key(io.StringIO(plain))
        except (paramiko.SSHException, ValueError, IndexError):
            continue
    raise TargetLoginError("the account's private key is of a kind that cannot be used")


def connect(sock: socket.socket, *, name: str, keys: HostKeys, legacy: bool) -> TargetLeg:
    """A leg towards the target behind ``sock``, not started yet; ``legacy``: without AES-GCM if need be."""
    kind = LegacyTargetLeg if legacy else TargetLeg
    return kind(sock, name=name, host_keys=keys.algorithms)


def _words(error: Exception) -> str:
    return _printable(str(error))


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:200])
