"""``pam-platform``."""

from __future__ import annotations

from pam_common.cli import main_of
from pam_platform.commands import access, ending, fleet, init, keys, resources, serving, status
from pam_platform.commands.root import main as group

__all__ = ["access", "ending", "fleet", "init", "keys", "main", "resources", "serving", "status"]

main = main_of(group)

if __name__ == "__main__":
    main()
