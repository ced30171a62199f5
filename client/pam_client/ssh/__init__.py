"""SSH at the person's side.

The person's own ``ssh`` ends its connection in the agent, whose host key is certified for one session as
``<gateway>.pam``. So OpenSSH checks a host certificate, under one ``@cert-authority`` line per CA key, and
asks nobody anything: there is no fingerprint to accept and no reason to switch the check off. Nor is there
anything to log in with: the channel that carries the connection is the person's already.

===============  =======================================================================================
``known_hosts``  the file with the CA lines
``options``      how ``ssh`` must be called, as options and as lines of a configuration file
``native``       the system's ``ssh`` on a listener; or, without one, ``terminal``
``terminal``     a small client of our own
``config``       Host entries for ``~/.ssh/config``
``refusal``      why a connection cannot be carried, in SSH's own form
``splice``       stdin and stdout to a UNIX socket, as a ProxyCommand
===============  =======================================================================================
"""
