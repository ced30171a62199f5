"""access.yml about SSH: host keys, jump hosts, ways to log in, what an account may do.

What is not secret becomes the ``options`` that the agent gets with the opening, the rest goes to the vault.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from pam_platform.access.apply.source import At, Source
from pam_platform.access.hostkeys import public_line

#: What an account may do unless it says otherwise: no way into the network behind the target.
DEFAULT_ALLOW = ("shell", "exec", "sftp")
#: Content of transferred files that a recording keeps per file; sizes and hashes are always kept.
MAX_TRANSFER_BUDGET = 16 << 20


def resource(item: dict[str, Any], at: At, source: Source) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The resource's options, and its secrets by name."""
    given = item.get("ssh", {})
    here = (*at, "ssh")
    options: dict[str, Any] = {
        "host_keys": _keys(given, "host_keys", here, source),
        "host_ca": _keys(given, "host_ca", here, source),
        "legacy_algorithms": given.get("legacy_algorithms", False),
    }
    if options["host_keys"] and options["host_ca"]:
        source.problem((*here, "host_ca"), "give host_keys or host_ca, not both")
    secrets: dict[str, bytes] = {}
    if "jump" in given:
        jump, there = given["jump"], (*here, "jump")
        options["jump"] = {
            "host": jump["host"],
            "port": jump.get("port", 22),
            "user": jump["user"],
            "host_keys": _keys(jump, "host_keys", there, source),
        }
        found = source.secrets(jump, ("password", "private_key"), there)
        if not found:
            source.problem(there, "needs a password or a private_key")
        _check_key(found.get("private_key"), None, (*there, "private_key"), source)
        secrets = {f"jump_{name}": value for name, value in found.items()}
    return options, secrets


def account(item: dict[str, Any], at: At, source: Source) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The account's options, and its secrets by name besides the password."""
    given = item.get("ssh", {})
    here = (*at, "ssh")
    if not {"password", "private_key", "certificate"} & set(item):
        source.problem(at, "needs a password, a private_key or a certificate to log in with")
    if "passphrase" in item and "private_key" not in item:
        source.problem((*at, "passphrase"), "there is no private_key that it could open")
    secrets = source.secrets(item, ("private_key", "passphrase"), at)
    _check_key(secrets.get("private_key"), secrets.get("passphrase"), (*at, "private_key"), source)
    options: dict[str, Any] = {
        "allow": sorted(given.get("allow", DEFAULT_ALLOW)),
        "env": given.get("env", []),
        "transfer_budget": source.size(
            given.get("transfer_budget", 0),
            (*here, "transfer_budget"),
            limit=MAX_TRANSFER_BUDGET,
            shown="16MiB",
        ),
    }
    for key, right in (("forward_to", "local-forward"), ("remote_bind", "remote-forward")):
        options[key] = given.get(key, [])
        if (right in options["allow"]) != (key in given):
            source.problem((*here, key), f"goes together with {right} in allow")
        for index, place in enumerate(options[key]):
            _check_place(place, (*here, key, index), source)
    if "certificate" in item:
        options["certificate"] = {"principals": item["certificate"]["principals"]}
    return options, secrets


def _keys(item: dict[str, Any], key: str, at: At, source: Source) -> list[str]:
    found = []
    for index, line in enumerate(item.get(key, [])):
        try:
            found.append(public_line(line))
        except ValueError as error:
            source.problem((*at, key, index), str(error))
    return found


def _check_key(key: bytes | None, passphrase: bytes | None, at: At, source: Source) -> None:
    """A key that no agent could use is told here, and not to the first who connects."""
    if not key:
        return
    load = load_ssh_private_key if b"BEGIN OPENSSH" in key else load_pem_private_key
    try:
        # Without its last newline, which was taken off as from any secret, a PEM file is still complete.
        load(key + b"\n", passphrase or None)
    except TypeError:
        wrong = "a passphrase is given, but the key has none" if passphrase else "it needs its passphrase"
        source.problem(at, wrong)
    except (ValueError, UnsupportedAlgorithm):
        # The reason is not told: it could quote what was parsed.
        source.problem(at, "cannot be read as an OpenSSH or PEM private key, or its passphrase is another")


def _check_place(place: str, at: At, source: Source) -> None:
    """Beyond what the schema's pattern says: networks and ports that exist."""
    host, _, ports = place.rpartition(":")
    if ports != "*":
        numbers = [int(number) for number in ports.split("-")]
        if not 1 <= numbers[0] <= numbers[-1] <= 65535:
            source.problem(at, "expected ports within 1-65535, the lower one first")
    if host.startswith("[") or "/" in host:
        try:
            ipaddress.ip_network(host.strip("[]"))
        except ValueError:
            source.problem(at, f"{host} is not an address or network (are host bits set?)")
