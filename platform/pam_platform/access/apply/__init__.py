"""``apply``: make the database say what access.yml says.

============  ==========================================================================================
``document``  the file: schema, references, secrets it points to; no database
``changes``   what was added, changed and removed, and how that is shown
``hashes``    passwords, compared and hashed before the transaction
``sync``      one kind of thing at a time: compare and write
``run``       all kinds in one transaction, then end what is no longer allowed
============  ==========================================================================================
"""
