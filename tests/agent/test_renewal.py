"""When the agent renews what it is known by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pam_agent.api import REQUEST_LIFETIME, request_token
from pam_agent.renewal import LONGEST, SHORTEST, Renewal
from pam_common import tokens
from pam_common.errors import AuthenticationError
from pam_common.keys import SigningKey, VerifyKeys


@pytest.mark.parametrize(
    ("left", "shortest", "longest"),
    [(86400, 0.8 * LONGEST, LONGEST), (300, 80, 100), (1, 0.8 * SHORTEST, SHORTEST), (-99, 4, SHORTEST)],
)
def test_renewal_is_neither_too_late_nor_a_busy_loop(left: float, shortest: float, longest: float) -> None:
    standing = SimpleNamespace(certificate_expires=1000 + left, statement_expires=10**9)
    renewal = Renewal(
        api=SimpleNamespace(now=lambda: 1000.0),  # type: ignore[arg-type]
        state=SimpleNamespace(standing=standing),  # type: ignore[arg-type]
        renewed=lambda: None,
    )
    for _ in range(50):
        assert shortest <= renewal._next() <= longest


def test_a_requests_token_is_useless_when_found_later() -> None:
    key = SigningKey.generate()
    token = request_token(key, "dc1-a", "https://pam.test", 1000.0).removeprefix("Bearer ")

    def verify(now: float) -> object:
        return tokens.verify(
            token,
            VerifyKeys.of(key.public),
            tokens.AGENT_REQUEST,
            issuer="dc1-a",
            audience="https://pam.test",
            now=now,
        )

    assert verify(1000.0 + REQUEST_LIFETIME - 1)
    with pytest.raises(AuthenticationError, match="expired"):
        verify(1000.0 + REQUEST_LIFETIME)
