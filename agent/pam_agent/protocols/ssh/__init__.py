"""SSH 2.0, for any client: shells, commands, SFTP, SCP, rsync, git, forwarded ports.

Phases of a connection::

    client                     interceptor                       target
      | identification, keys        |                              |
      |<--------------------------->|  1. our host key: made for   |
      |                             |     this session, certified  |
      |                             |     for <gateway>.pam        |
      | login "none"                |                              |
      |---------------------------->|  2. dial, keys, host key     |
      |                             |     pinned or certified      |
      |                             |<---------------------------->|
      |                             |  3. certificate, key or      |
      |                             |     password of the account  |
      |                             |<---------------------------->|
      |                             |  4. "ssh_login" is recorded  |
      | success                     |                              |
      |<----------------------------|                              |
      | channels, requests, data    |  5. each message is checked, |
      |<===========================>|     recorded, then sent on   |
      | disconnect                  |                              |

Who the person is, the grant has shown before the first byte: any user name is accepted (and recorded), no
key or password of the user's program is ever asked for. Messages go on as they came, with the channel's
number changed: terminal modes, the order of exit status, EOF and CLOSE, extended data are what they were.

Specification: RFC 4251-4254, https://cvsweb.openbsd.org/src/usr.bin/ssh/PROTOCOL, RFC 8308, 8731.

Refused, and why:

* agent and X11 forwarding: they hand the target a way back into the user's workstation;
* forwarding to UNIX sockets and tunnel devices: no rule could say where they lead;
* destinations and bound ports that the account does not list, ports of another connection to be cancelled,
  channels from the target that nobody asked for;
* a command, a shell or a subsystem without the right to it; a second one on the same channel;
* variables that the account does not list;
* a target with another host key than the pinned or certified one: nothing is ever learned by connecting;
* a user's program without strict key exchange (CVE-2023-48795); ciphers other than AES-GCM;
* data beyond the window, after EOF, for channels that are not open;
* SFTP that cannot be followed: handles that were not given out, an id of a request that is under way, what is
  asked before the version is known, another version later.

What they cannot do: with a shell or ``exec`` the account does whatever the target lets its user do, an SFTP
server by hand included; ``sftp`` alone is the only right that a recording follows file by file.

Threads: four per connection, whatever its number of channels: the session's own and ``…-up`` carry bytes
between the Stream and a socket pair, ``…-user`` and ``…-target`` read the two SSH connections and pass on. A
jump host takes three more (sshtunnel's).

Events are described in ``docs/recording-format.md``.

Modules: ``codec``, ``policy``, ``channel``, ``watch``, ``session_channel``, ``terminal``, ``sftp`` and
``forwards`` do no I/O and have no clock. ``switchboard`` and ``requests`` join the legs; ``bridge``,
``login``, ``hostkeys``, ``jump``, ``farewell`` and ``interceptor`` do the talking.
"""

from pam_agent.protocols.ssh.interceptor import SshInterceptor

__all__ = ["SshInterceptor"]
