"""Builds the .deb and .rpm packages: ``python -m pam_packages build`` (``make packages``).

    lock/*.txt ──▶ wheels (fetched, hash-checked) ─┐
    source tree ───────────────────────────────────┼─▶ stage/<package>/ ──▶ nfpm ──▶ .deb, .rpm
    systemd/, files/, manual pages, completion ────┘                      └──▶ SHA256SUMS, sbom/

The same commit gives the same bytes: times are the commit's, names are sorted, modes are set here.
"""
