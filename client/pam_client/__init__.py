"""The workstation's side: log in, list what one may use, and bring a resource to a local port.

Nouns beyond those of the architecture:

- **Home** is the private folder with the configuration, the tokens and the remembered ports.
- **Login** gives the access token for each request and keeps it fresh.
- **Session** is what one ``connect`` was granted; **Dialer** opens a SecureChannel for it through a relay.
- **Listener** is the local end: it takes connections of this user only and pumps each into a channel.
- **Launch** says, per protocol, how a native program is told where the listener is.
"""
