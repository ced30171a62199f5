"""Web applications at the local end.

============  ==========================================================================================
``origin``    the name under which a browser or a program reaches an account, and how the agent is told
``opening``   the browser, led to the one-time link without anybody else seeing it
``refusal``   telling a browser why its request cannot be carried
============  ==========================================================================================

HTTP itself is the agent's: every check of a request is made there, and this side stays a pipe.
"""
