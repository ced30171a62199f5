"""People and programs: who they are, how they prove it, which roles they hold."""
