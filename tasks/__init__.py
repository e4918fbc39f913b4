"""Conversations to learn from and to be examined with, one file per source."""
