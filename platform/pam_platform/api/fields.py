"""Types of request fields. Every text has a pattern or a length."""

from __future__ import annotations

from typing import Annotated

from ninja import Path
from pydantic import AfterValidator, Field, StringConstraints

from pam_common.keys import KEY_SIZE, b64decode
from pam_platform.access.hostkeys import MAX_LINE

_LABEL = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"


def _key(text: str) -> str:
    b64decode(text, KEY_SIZE)  # its ValueError names no content
    return text


Label = Annotated[str, StringConstraints(pattern=_LABEL, max_length=63)]
UserName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._@-]{0,63}$", max_length=64)]
#: 32 raw bytes in base64url.
Key = Annotated[str, StringConstraints(min_length=43, max_length=43), AfterValidator(_key)]
#: One printable line for the audit trail.
Reason = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Version = Annotated[str, StringConstraints(max_length=40, pattern=r"^[0-9A-Za-z.+~_-]*$")]
Token = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=0, le=(1 << 62))]
PartNumber = Annotated[int, Field(ge=1, le=999_999_999)]

#: A public SSH key; what it says is checked where it is used.
KeyLine = Annotated[str, StringConstraints(max_length=MAX_LINE, pattern=r"^[ -~]+$")]

ScanPath = Annotated[str, Path(pattern=r"^k-[a-z2-7]{26}$")]
SessionPath = Annotated[str, Path(pattern=r"^s-[a-z2-7]{26}$")]
LabelPath = Annotated[str, Path(pattern=_LABEL, max_length=63)]
UserPath = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._@-]{0,63}$", max_length=64)]
