"""Images as bytes, as tokens for other models, and what they cost."""

from .compress import compress, decompress, read_codes

__all__ = ["compress", "decompress", "read_codes"]
