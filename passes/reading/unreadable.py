"""What a reader raises where it has no words for what the graph says."""

from __future__ import annotations


class Unreadable(Exception):
    """The graph says something the reader has no words for; the message names the node."""
