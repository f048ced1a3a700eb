"""What the command line prints as one line."""

from __future__ import annotations


class BenchError(Exception):
    """Wrong input or a missing requirement; the message stands alone as one line."""
