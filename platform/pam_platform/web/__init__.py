"""Web pages for people: sign in, approve a device, look at sessions and recordings."""
