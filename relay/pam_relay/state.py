"""What a relay keeps in ``state_dir``: two keys, and what the platform last signed for it.

    identity.key  host.key    32 raw bytes each, 0600, made here, never sent anywhere
    relay.json                relay, issuer: its presence says "enrolled"
    trust  bundle             the trust list and the last bundle, as signed tokens

The cached bundle lets a relay start while its platform is away.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from pam_common.errors import AuthenticationError, PamError
from pam_common.files import make_private_dir, read_private, write_private
from pam_common.keys import SigningKey, is_label
from pam_common.ssh_certs import verify_host_certificate
from pam_relay.bundle import MAX_BUNDLE, Bundle, Trust

_KEY_SIZE = 32
_ANEW = "empty the state folder and enrol the relay anew with a fresh token."


@dataclass(frozen=True)
class RelayKeys:
    """The relay's two private keys (32 raw bytes each)."""

    identity_seed: bytes = field(repr=False)
    host_seed: bytes = field(repr=False)

    @property
    def identity(self) -> SigningKey:
        return SigningKey(self.identity_seed)

    @property
    def host(self) -> SigningKey:
        return SigningKey(self.host_seed)


@dataclass(frozen=True)
class RelayState:
    """Who this relay is and what it works from; replaced whole when the platform sends something new."""

    folder: Path
    keys: RelayKeys
    relay: str
    issuer: str
    trust: Trust
    bundle: Bundle

    @classmethod
    def load(cls, folder: Path) -> RelayState:
        """Raises PamError when the relay is not enrolled or a file is not as it must be."""
        keys = load_keys(folder)
        try:
            about = json.loads(_read(folder / "relay.json"))
            relay, issuer = str(about["relay"]), str(about["issuer"])
        except (ValueError, TypeError, KeyError):
            raise PamError(f"{folder / 'relay.json'} is damaged", hint=_ANEW) from None
        trust = Trust.stored(_read(folder / "trust").decode("ascii", "replace"))
        token = _read(folder / "bundle").decode("ascii", "replace")
        bundle = Bundle.stored(token, trust, relay=relay, issuer=issuer)
        return cls(folder, keys, relay, issuer, trust, bundle)

    def renewed(self, trust_token: str, bundle_token: str, now: float) -> RelayState:
        """This state with a newer trust list and bundle, each verified against what is stored, and saved.

        Raises AuthenticationError, and then nothing has changed.
        """
        trust = self.trust
        if trust_token != trust.token:
            trust = trust.successor(trust_token, self.issuer, now)
        bundle = Bundle.parse(bundle_token, trust, relay=self.relay, issuer=self.issuer, now=now)
        if bundle.serial < self.bundle.serial:
            raise AuthenticationError(
                f"the platform's bundle has serial {bundle.serial}, older than {self.bundle.serial} here"
            )
        state = replace(self, trust=trust, bundle=bundle)
        state.check_host_certificate(now)
        if (trust.token, bundle.token) != (self.trust.token, self.bundle.token):
            state.save()
        return state

    def check_host_certificate(self, now: float) -> None:
        """Raise AuthenticationError when nobody would take this relay's host certificate."""
        found = verify_host_certificate(
            self.bundle.host_certificate, self.trust.relay_host_ca, hostname=self.relay, now=now
        )
        if found.public_key != self.keys.host.public:
            raise AuthenticationError("the host certificate is for another key")

    def save(self) -> None:
        """Write it; ``relay.json`` last, since its presence is what says "enrolled"."""
        write_private(self.folder / "trust", self.trust.token.encode())
        write_private(self.folder / "bundle", self.bundle.token.encode())
        about = {"relay": self.relay, "issuer": self.issuer}
        write_private(self.folder / "relay.json", json.dumps(about, indent=1).encode())


def load_keys(folder: Path) -> RelayKeys:
    """Raises PamError when one is missing or not private."""
    keys = [_read(folder / f"{name}.key") for name in ("identity", "host")]
    if any(len(key) != _KEY_SIZE for key in keys) or keys[0] == keys[1]:
        raise PamError(f"a key in {folder} is damaged", hint=_ANEW)
    return RelayKeys(*keys)


def make_keys(folder: Path) -> RelayKeys:
    """The keys in ``folder``, made first where they are missing: an enrolment repeats with the same."""
    make_private_dir(folder)
    for name in ("identity", "host"):
        path = folder / f"{name}.key"
        if not path.exists():
            write_private(path, SigningKey.generate().seed())
    return load_keys(folder)


def check_name(name: str) -> None:
    """Raise PamError when ``name`` cannot be a relay's."""
    if not is_label(name):
        raise PamError(f'"{name}" is not a relay name', hint="use a lower-case label such as relay-1.")


def _read(path: Path) -> bytes:
    try:
        return read_private(path, max_size=MAX_BUNDLE)
    except FileNotFoundError:
        raise PamError(
            f"this relay is not enrolled ({path} is missing)", hint="run `pam-relay enrol` first."
        ) from None
