"""Images as bytes, and as tokens for other models."""

from .compress import compress, decompress, read_codes
from .rows import load_rows
from .tokens import DQTokens

__all__ = ["DQTokens", "compress", "decompress", "load_rows", "read_codes"]
