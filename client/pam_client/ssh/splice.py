"""``python -m pam_client.ssh.splice SOCKET``: stdin and stdout to a UNIX socket, as ssh's ProxyCommand.

For systems that do not tell who connects to a local TCP port.
"""

from __future__ import annotations

import socket
import sys

from pam_client.stdio import Splice
from pam_common.stream import SocketStream


def main(path: str) -> int:
    """Until the socket's end; 0, or 1 when nobody listens there."""
    with socket.socket(socket.AF_UNIX) as local:
        try:
            local.connect(path)
            Splice(SocketStream(local), 0, 1).run()
        except OSError as error:
            sys.stderr.write(f"error: {path}: {error.strerror}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
