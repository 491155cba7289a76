"""Images as bytes, as tokens for other models, and what they cost."""

from .compress import compress, decompress, read_codes
from .tokens import DQTokens

__all__ = ["DQTokens", "compress", "decompress", "read_codes"]
