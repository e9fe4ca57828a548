"""People's own suites: tasks and systems in a file, asked of a running router, models in folders and other servers."""
