"""A conversation on a terminal: what is typed (`keyboard`), what is said (`session`), what slash commands do."""
