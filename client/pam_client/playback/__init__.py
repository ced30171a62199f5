"""Terminal sessions, shown again.

==============  ========================================================================================
``frames``      a recording's events to what one terminal showed, with times
``keys``        keys that are pressed meanwhile
``player``      frames on this terminal, at their times: pause, seek, speed
``transcript``  the same as lines of text, for a pipe
==============  ========================================================================================
"""
