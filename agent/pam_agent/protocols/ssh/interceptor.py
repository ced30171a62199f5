"""One SSH session: its connections, from the first byte of each to the last."""

from __future__ import annotations

import contextlib
import threading
from contextlib import ExitStack
from typing import Final

import paramiko
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL

from pam_agent.protocols.base import Conversation, Event, Opening
from pam_agent.protocols.ssh import farewell, jump, login
from pam_agent.protocols.ssh.bridge import Bridge
from pam_agent.protocols.ssh.channel import TARGET, USER
from pam_agent.protocols.ssh.codec import BY_APPLICATION
from pam_agent.protocols.ssh.hostkeys import HostKeys
from pam_agent.protocols.ssh.policy import Policy
from pam_agent.protocols.ssh.switchboard import Switchboard
from pam_common import fast_ssh
from pam_common.errors import PamError, ProtocolError, RefusedError, UnavailableError
from pam_common.fast_ssh.leg import Leg, TargetLeg, serve_leg
from pam_common.secure_channel import deadline
from pam_common.ssh_certs import CertificateKey
from pam_common.stream import SocketStream, Stream

#: For the whole login to the target, as long as two minutes of sshd's LoginGraceTime would be too long.
LOGIN_SECONDS: Final = 60.0
#: For the user's program to finish its key exchange and ask to be let in.
START_SECONDS: Final = 30.0


class SshInterceptor:
    """The :class:`~pam_agent.protocols.base.Interceptor` for SSH 2.0."""

    def __init__(self, opening: Opening) -> None:
        if opening.ssh is None:
            raise ProtocolError("the opening has no keys for an ssh session")
        account = opening.options.get("account", {})
        if not isinstance(account, dict):
            raise ProtocolError("the opening's account options are not a mapping")
        self._opening = opening
        self._policy = Policy.parse(account)
        self._keys = HostKeys.parse(opening.options)
        self._host_key = CertificateKey(opening.ssh.host_seed, opening.ssh.host_certificate)

    def serve(self, client: Stream, conversation: Conversation) -> None:
        connection = Connection(self._opening, self._policy, self._keys, conversation)
        connection.run(client, self._host_key)

    @staticmethod
    def refuse(client: Stream, message: str, hint: str) -> None:
        farewell.refuse(client, message, hint)


class Connection(paramiko.ServerInterface):
    """One connection: the user's leg, the target's, and the switchboard between them.

    The person was authenticated by the grant that opened the stream, so no more is asked of the program.
    The target is logged in to before it is told that it is in.
    """

    def __init__(self, opening: Opening, policy: Policy, keys: HostKeys, conversation: Conversation) -> None:
        self._opening = opening
        self._keys = keys
        self._conversation = conversation
        self._name = f"session-{opening.session}-{conversation.number}"
        self._switchboard = Switchboard(conversation, policy, opening.rows_bytes, self._ended)
        self._stack = ExitStack()  # what was opened towards the target
        self._user: Leg | None = None
        self._target: TargetLeg | None = None
        self._failure: PamError | None = None
        self._logged_in = False
        self._starting = threading.Timer(START_SECONDS, self._too_slow)

    def run(self, client: Stream, host_key: CertificateKey) -> None:
        """Carry the connection to its end. Raises PamError for what the user's program was told."""
        bridge = Bridge(client, f"{self._name}-up")
        try:
            self._user = serve_leg(bridge.far, name=f"{self._name}-user", host_key=host_key, server=self)
            self._switchboard.attach(USER, self._user)
            self._switchboard.follow(USER)
            self._starting.daemon = True
            self._starting.start()
            bridge.start()
            fast_ssh.start(self._user, self)
            bridge.run()
        finally:
            self._starting.cancel()
            self._close(bridge)
        if self._failure is not None:
            raise self._failure

    def _close(self, bridge: Bridge) -> None:
        for leg in (self._user, self._target):
            if leg is not None:
                leg.close()
        bridge.finish()
        for leg in (self._user, self._target):
            if leg is not None and leg.is_alive():
                leg.join()
        self._stack.close()
        self._record_end()

    # -- the user's login; in the reader thread of the user's leg ---------------------------------------

    def check_auth_none(self, username: str) -> int:
        self._starting.cancel()
        if self._logged_in:
            return AUTH_SUCCESSFUL
        try:
            method = self._log_in()
            self._conversation.record([self._login_event(username, method)])
        except (PamError, OSError) as error:
            self._switchboard.end(USER, self._reason(error))
            return AUTH_FAILED
        self._logged_in = True
        return AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "none"

    def _log_in(self) -> str:
        opening = self._opening
        if "jump" in opening.options:
            sock = self._stack.enter_context(jump.through(opening, self._conversation))
        else:
            sock = self._conversation.dial()
            self._stack.callback(sock.close)
        legacy = opening.options.get("legacy_algorithms") is True
        leg = login.connect(sock, name=f"{self._name}-target", keys=self._keys, legacy=legacy)
        self._target = leg
        self._switchboard.attach(TARGET, leg)
        with deadline(SocketStream(sock), LOGIN_SECONDS, "the login to the target"):
            login.exchange_keys(leg, self._keys, opening.target.host)
            method = login.log_in(leg, opening)
        leg.watch()
        self._switchboard.follow(TARGET)
        return method

    def _login_event(self, username: str, method: str) -> Event:
        assert self._user is not None
        assert self._target is not None
        return {
            "kind": "ssh_login",
            "user": self._opening.credential.user,
            "asked_user": username,
            "login": method,
            "client_version": self._user.peer_version,
            "server_version": self._target.peer_version,
            "cipher": self._target.cipher,
        }

    # -- the end; in any thread -------------------------------------------------------------------------

    def _too_slow(self) -> None:
        self._switchboard.end(USER, UnavailableError(f"no ssh login within {START_SECONDS:.0f} s"))

    def _ended(self, side: int, failure: PamError | None) -> None:
        """Called once: tell the user why, then let both legs close."""
        if failure is None and side == TARGET:
            failure = self._targets_end()
        self._failure = failure
        if failure is not None and self._user is not None and self._user.is_active():
            self._user.say_goodbye(BY_APPLICATION, farewell.explain(failure))
        if self._target is not None and self._target.is_active():
            self._target.say_goodbye(BY_APPLICATION, "")
        for leg in (self._user, self._target):
            if leg is not None and leg.is_active():
                leg.packets.when_drained(leg.close)

    def _targets_end(self) -> PamError | None:
        """Why the target's end is one to tell. Some servers hang up after the last channel: the program has
        its exit status then, which a message would take from it."""
        if self._switchboard.finished and self._conversation.end_reason is None:
            return None
        return self._reason(UnavailableError("the target closed the connection"))

    def _reason(self, error: PamError | OSError) -> PamError:
        ended = self._conversation.end_reason
        if ended is not None:
            return RefusedError(ended)
        if isinstance(error, PamError):
            return error
        return UnavailableError(f"the target cannot be used: {error.strerror or type(error).__name__}")

    def _record_end(self) -> None:
        """The last event. Nothing is forwarded after it, so a recording that failed is no matter here."""
        event: Event = {"kind": "end" if self._logged_in else "refused"}
        event["reason"] = str(self._failure) if self._failure else "client closed"
        if self._logged_in:
            event.update(bytes_up=self._switchboard.bytes_up, bytes_down=self._switchboard.bytes_down)
        with contextlib.suppress(PamError):
            self._conversation.record([event])
