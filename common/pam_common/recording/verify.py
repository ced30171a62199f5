"""verify_part: is this file exactly what the agent signed? With public keys only.

The file is read once, in constant memory. Every finding is a sentence in the report; a part is right
only when there is none. A file without a signature is a finding, never "right so far".
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import jwt

from pam_common.errors import AuthenticationError
from pam_common.keys import VerifyKeys, is_label, key_id
from pam_common.recording.format import Head, Header, RecordingError, parse_part_name
from pam_common.recording.scan import Scan
from pam_common.tokens import AgentStatement


@dataclass(frozen=True)
class StatementTrust:
    """Whose signature under an agent statement counts. ``gateway`` None: any of that platform."""

    keys: VerifyKeys
    issuer: str
    gateway: str | None = None


@dataclass
class VerifyReport:
    """What was found. ``header`` is None when the file is no recording at all; ``head`` is the final
    head only when its signature is the agent's; ``chunks`` and ``length`` are what the chain covers."""

    problems: list[str] = field(default_factory=list)
    header: Header | None = None
    head: Head | None = None
    chunks: int = 0
    length: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def end(self) -> str | None:
        """How the part ended, if that is signed."""
        return self.head.end if self.head else None


def verify_part(
    source: Path | bytes | BinaryIO,
    *,
    agent_keys: Mapping[str, Sequence[bytes]] | None = None,
    trust: StatementTrust | None = None,
    witnesses: Sequence[Head] = (),
    session: str | None = None,
    part: int | None = None,
) -> VerifyReport:
    """Check one part: format, chain, signature, and that it extends every witnessed head.

    ``agent_keys`` maps agent names to their Ed25519 identity keys (32 bytes each, past ones too);
    ``trust`` checks the agent statement in the header instead, or as well. Without either nothing could
    be said: ValueError. ``session`` and ``part`` are what the file must be (default: what a path's name
    says). Raises OSError when the file cannot be read.
    """
    if agent_keys is None and trust is None:
        raise ValueError("verifying needs agent_keys or trust")
    report = VerifyReport()
    if isinstance(source, Path) and session is None and part is None:
        session, part = parse_part_name(source.name) or (None, None)
    with _opened(source) as file:
        try:
            scan = Scan(file)
        except RecordingError as error:
            report.problems.append(str(error))
            return report
        report.header = scan.header
        wanted = {witness.count for witness in witnesses}
        states = _states(scan, wanted)
    report.chunks, report.length = scan.count, scan.length
    _check_place(report, scan.header, session, part)
    identity = _identity(report, scan.header, agent_keys, trust)
    _check_end(report, scan, identity)
    for witness in sorted(witnesses, key=lambda head: head.count):
        _check_witness(report, witness, states, identity)
    return report


def chain_heads(source: Path | bytes | BinaryIO, counts: Iterable[int]) -> dict[int, tuple[int, bytes]]:
    """The chain's state after so many chunks: ``{count: (length, hash)}``, without those not reached.

    Raises RecordingError when the header is none. Reads the whole file up to the largest count.
    """
    with _opened(source) as file:
        return _states(Scan(file), set(counts), stop=True)


def _states(scan: Scan, wanted: set[int], *, stop: bool = False) -> dict[int, tuple[int, bytes]]:
    states = {0: (scan.length, scan.hash)} if 0 in wanted else {}
    last = max(wanted, default=0)
    if stop and last == 0:
        return states
    for _ in scan.chunks():
        if scan.count in wanted:
            states[scan.count] = (scan.length, scan.hash)
        if stop and scan.count >= last:
            break
    return states


@contextlib.contextmanager
def _opened(source: Path | bytes | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, Path):
        with source.open("rb") as file:
            yield file
    else:
        yield source


def _check_place(report: VerifyReport, header: Header, session: str | None, part: int | None) -> None:
    if session is not None and header.session != session:
        report.problems.append(f"the file is of session {header.session}, not {session}")
    if part is not None and header.part != part:
        report.problems.append(f"the file is part {header.part}, not {part}")


def _identity(
    report: VerifyReport,
    header: Header,
    agent_keys: Mapping[str, Sequence[bytes]] | None,
    trust: StatementTrust | None,
) -> bytes | None:
    """The agent's identity key when everything that was given agrees on it."""
    found: list[bytes] = []
    if agent_keys is not None:
        known = [key for key in agent_keys.get(header.agent, ()) if key_id(key) == header.identity_kid]
        if not known:
            report.problems.append(
                f"agent {header.agent} has no known identity key with id {header.identity_kid}"
            )
            return None
        found += known
    if trust is not None:
        try:
            found.append(_stated_identity(header, trust))
        except AuthenticationError as error:
            report.problems.append(f"the agent statement in the header does not hold: {error}")
            return None
    if any(key != found[0] for key in found):
        report.problems.append("the agent statement names another identity key than the one known")
        return None
    return found[0]


def _stated_identity(header: Header, trust: StatementTrust) -> bytes:
    try:
        unverified = jwt.decode(header.statement, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        # ValueError: the header's JSON can hold characters that have no encoding.
        raise AuthenticationError("it is not a token") from None
    # The file names its gateway only here; it counts once the signature holds.
    gateway = str(unverified.get("aud")).removeprefix("gateway:")
    if not is_label(gateway) or trust.gateway not in (None, gateway):
        raise AuthenticationError("it is of another gateway")
    statement = AgentStatement.parse(
        header.statement, trust.keys, issuer=trust.issuer, gateway=gateway, now=float(header.created)
    )
    if statement.agent != header.agent:
        raise AuthenticationError("it is of another agent")
    if key_id(statement.identity_key) != header.identity_kid:
        raise AuthenticationError("it names another identity key than the header")
    return statement.identity_key


def _check_end(report: VerifyReport, scan: Scan, identity: bytes | None) -> None:
    if scan.trailer is None:
        report.problems.append(scan.problem)
        return
    if identity is None:
        return  # already a finding
    try:
        scan.trailer.verify(identity)
    except AuthenticationError:
        report.problems.append("the trailer's signature is not the agent's")
        return
    report.head = scan.trailer


def _check_witness(
    report: VerifyReport, witness: Head, states: Mapping[int, tuple[int, bytes]], identity: bytes | None
) -> None:
    name = f"the head witnessed at chunk {witness.count}"
    header = report.header
    assert header is not None
    if (witness.session, witness.part) != (header.session, header.part):
        report.problems.append(f"{name} is of another part")
        return
    if identity is not None:
        try:
            witness.verify(identity)
        except AuthenticationError:
            report.problems.append(f"{name} is not signed by the agent")
            return
    if witness.count not in states:
        report.problems.append(f"{name} is missing: the file has only {report.chunks} chunks")
    elif states[witness.count] != (witness.length, witness.hash):
        report.problems.append(f"{name} is not in the file: it was rewritten")
