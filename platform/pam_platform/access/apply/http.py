"""access.yml about web applications: what they call themselves, how an account logs in, what it may ask for.

What is not secret becomes the ``options`` that the agent gets with the opening, the rest goes to the vault.
"""

from __future__ import annotations

import re
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

from pam_platform.access.apply.source import At, Source

#: Of each request's and each answer's body in the recording, in bytes: a page of text, most JSON whole.
DEFAULT_RECORD_BODIES = 64 << 10
#: A recording is for a person to read; larger bodies are counted and hashed.
MAX_RECORD_BODIES = 16 << 20
#: What the agent takes at most; no web server accepts a larger request.
MAX_REQUEST_SIZE = 1 << 50

#: Which secrets each login needs; any other that is given would never be used.
_NEEDS = {
    "none": (),
    "basic": ("password",),
    "bearer": ("token",),
    "header": ("token",),
    "form": ("password",),
}
#: The agent writes these itself, or they are about one connection only.
_RESERVED_HEADERS = frozenset(
    (
        *("host", "cookie", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer"),
        *("expect", "keep-alive", "origin", "referer", "proxy-authorization", "proxy-connection"),
    )
)
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def resource(item: dict[str, Any], at: At, source: Source) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The resource's options; it has no secrets."""
    tls = item.get("tls", {})
    if "client_cert" in tls:
        source.problem(
            (*at, "tls", "client_cert"), "a web application's accounts have client certificates of their own"
        )
    if tls.get("mode") == "disable":
        for index, account in enumerate(item["accounts"]):
            if "client_cert" in account:
                where = (*at, "accounts", index, "client_cert")
                source.problem(where, "tls mode disable shows no certificate to the application")
    host = item.get("http", {}).get("host")
    port = re.search(r":([0-9]+)$", host or "")
    if port and int(port[1]) > 65535:
        source.problem((*at, "http", "host"), "expected a port within 1-65535")
    return {"host": host.lower()} if host else {}, {}


def account(item: dict[str, Any], at: At, source: Source) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The account's options, and its secrets by name besides the password."""
    given = item.get("http", {})
    here = (*at, "http")
    login = given.get("login", "none")
    secrets = source.secrets(item, ("token", "client_cert"), at)
    _check_login(item, login, at, source)
    _check_secrets(item, login, secrets, at, source)
    options: dict[str, Any] = {
        "login": login,
        "hide_cookies": given.get("hide_cookies", False),
        "identity_headers": given.get("identity_headers", {}),
        "rules": _rules(given.get("rules", {}), (*here, "rules"), source),
        "record_bodies": source.size(
            given.get("record_bodies", DEFAULT_RECORD_BODIES),
            (*here, "record_bodies"),
            limit=MAX_RECORD_BODIES,
            shown="16MiB",
        ),
    }
    _check_identity(options["identity_headers"], given.get("header", ""), (*here, "identity_headers"), source)
    if "header" in given:
        options["header"] = given["header"]
    if "form" in given:
        options["form"] = {"hidden": True, **given["form"]}
        _check_fields(given["form"]["fields"], (*here, "form", "fields"), source)
    return options, secrets


def _check_login(item: dict[str, Any], login: str, at: At, source: Source) -> None:
    """Everything the login needs is there, and nothing that would be ignored."""
    given = item.get("http", {})
    for key in ("password", "token"):
        needed = key in _NEEDS[login]
        if needed and key not in item:
            source.problem(at, f"http.login {login} needs a {key}")
        elif not needed and key in item:
            source.problem((*at, key), f"http.login {login} has no use for it")
    for key in ("form", "header"):
        if login == key and key not in given:
            source.problem((*at, "http"), f"login {login} needs {key}:")
        elif login != key and key in given:
            source.problem((*at, "http", key), f"goes together with login: {key}")
    if login == "header" and given.get("header", "").lower() in _RESERVED_HEADERS:
        source.problem((*at, "http", "header"), f"{given['header']} is the agent's own to set")


def _check_secrets(
    item: dict[str, Any], login: str, secrets: dict[str, bytes], at: At, source: Source
) -> None:
    """What no header could carry and no server would take is told here, and not to the first who connects."""
    token = secrets.get("token", b"")
    if token and not re.fullmatch(rb"[!-~]([ -~]*[!-~])?", token):
        source.problem((*at, "token"), "cannot stand in a header: expected printable ASCII characters")
    if login == "basic" and ":" in item.get("user", item["name"]):
        source.problem((*at, "user"), "basic authentication has no user with a colon")
    if secrets.get("client_cert"):
        _check_certificate(secrets["client_cert"], (*at, "client_cert"), source)


def _check_certificate(pem: bytes, at: At, source: Source) -> None:
    try:
        # Without its last newline, which was taken off as from any secret, a PEM file is still complete.
        certificate = load_pem_x509_certificate(pem + b"\n")
        key = load_pem_private_key(pem + b"\n", None)
    except TypeError:
        source.problem(at, "its private key has a passphrase, which nobody could type")
        return
    except (ValueError, UnsupportedAlgorithm):
        # The reason is not told: it could quote what was parsed.
        source.problem(at, "cannot be read as a PEM file with a certificate and its private key")
        return
    shown = [
        one.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for one in (certificate.public_key(), key.public_key())
    ]
    if shown[0] != shown[1]:
        source.problem(at, "the private key is not that of the certificate")


def _check_identity(headers: dict[str, str], credential: str, at: At, source: Source) -> None:
    seen: set[str] = set()
    for name, template in headers.items():
        lower = name.lower()
        if lower in _RESERVED_HEADERS or lower in (credential.lower(), "authorization"):
            source.problem((*at, name), "is the agent's own to set")
        if lower in seen:
            source.problem((*at, name), "is given twice")
        seen.add(lower)
        _check_placeholders(template, ("person", "user", "session"), (*at, name), source)


def _check_fields(fields: dict[str, str], at: At, source: Source) -> None:
    for name, template in fields.items():
        _check_placeholders(template, ("user", "password"), (*at, name), source)
    if not any("{password}" in template for template in fields.values()):
        source.problem(at, 'none of them is "{password}"')


def _check_placeholders(template: str, known: tuple[str, ...], at: At, source: Source) -> None:
    for name in _PLACEHOLDER.findall(template):
        if name not in known:
            shown = ", ".join(f"{{{word}}}" for word in known)
            source.problem(at, f"{{{name}}} stands for nothing; expected {shown}")


def _rules(given: dict[str, Any], at: At, source: Source) -> dict[str, Any]:
    rules: dict[str, Any] = {key: given[key] for key in ("allow", "deny") if key in given}
    if "max_request" in given:
        rules["max_request"] = source.size(
            given["max_request"], (*at, "max_request"), limit=MAX_REQUEST_SIZE, shown="1048576GiB"
        )
    return rules
