"""Opening a session: ask the platform, check its answer, start the recording, make the Interceptor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pam_agent.api import AgentApi
from pam_agent.config import AllowedRecipient
from pam_agent.credentials import SshKeys, allowed_recipients, parse_opening
from pam_agent.protocols.base import Interceptor, Opening
from pam_agent.session import Part
from pam_agent.state import AgentState
from pam_common.errors import AuthenticationError, PamError, RefusedError, UnavailableError
from pam_common.recording.format import Recipient
from pam_common.tokens import Grant


class Recorder(Protocol):
    """Starts recordings: :class:`pam_agent.recorder.Recorder`."""

    def start_part(
        self,
        opening: Opening,
        recipients: Sequence[Recipient],
        statement: str,
        *,
        on_failure: Callable[[PamError], None],
    ) -> Part:
        """Create the part's file with its header. Raises PamError: no recorder, no session."""


class SessionOpener:
    """Callable by the registry, once per session."""

    def __init__(
        self,
        api: AgentApi,
        state: AgentState,
        recorder: Recorder,
        protocols: Mapping[str, type[Interceptor]],
        *,
        recipients: Callable[[], tuple[AllowedRecipient, ...] | None],
        report: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._api = api
        self._state = state
        self._recorder = recorder
        self._protocols = protocols
        self._recipients = recipients
        self._report = report

    def __call__(
        self, grant: Grant, on_failure: Callable[[PamError], None]
    ) -> tuple[Opening, Interceptor, Part]:
        asked = self._api.now()
        keys = SshKeys.generate() if grant.protocol == "ssh" else None
        body = self._ask(grant, keys)
        try:
            return self._begin(grant, keys, body, asked, on_failure)
        except Exception:
            # The platform counts the session as open here; what failed after that is told.
            self._report(grant.session, _nothing_happened(body))
            raise

    def _ask(self, grant: Grant, keys: SshKeys | None) -> dict[str, Any]:
        try:
            return self._api.open(grant.session, None if keys is None else keys.public())
        except AuthenticationError:
            raise RefusedError(
                "the platform does not accept this agent any more", hint="tell your administrator."
            ) from None
        except UnavailableError:
            raise UnavailableError(
                "the session cannot be authorised: the agent does not reach the platform",
                hint="sessions that run already go on; try again in a moment.",
            ) from None

    def _begin(
        self,
        grant: Grant,
        keys: SshKeys | None,
        body: dict[str, Any],
        asked: float,
        on_failure: Callable[[PamError], None],
    ) -> tuple[Opening, Interceptor, Part]:
        standing = self._state.standing
        opened = parse_opening(
            body,
            grant,
            agent=standing.agent,
            sealing=self._state.keys.sealing,
            allowed=allowed_recipients(self._recipients(), standing.trust),
            ssh_keys=keys,
        )
        if opened.opening.part == 1:
            # Later parts go on where another agent, or this one before a crash, was: only the platform knows.
            grant.require_openable(asked)
        interceptor = self._protocols[grant.protocol](opened.opening)
        part = self._recorder.start_part(
            opened.opening, opened.recipients, standing.statement, on_failure=on_failure
        )
        return opened.opening, interceptor, part


def _nothing_happened(body: dict[str, Any]) -> dict[str, Any]:
    part = body.get("part")
    return {
        "part": part if isinstance(part, int) else 1,
        "reason": "failed",
        "connections": 0,
        "bytes_up": 0,
        "bytes_down": 0,
    }
