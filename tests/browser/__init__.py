"""The playground as people see it, in a real browser: `make browser-test`."""
