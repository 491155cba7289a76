"""Images as bytes, as tokens for other models, and what they cost."""

from .compress import compress, decompress, read_codes
from .rows import load_rows
from .tokens import DQTokens

__all__ = ["DQTokens", "compress", "decompress", "load_rows", "read_codes"]
