"""What comes with the package: the embedded model."""

from pathlib import Path

DEFAULT_MODEL = str(Path(__file__).parent / "dq-emoji")
"""Folder of the embedded model: DQ-VAE and a class-conditional DQ-Transformer for 64x64 emoji."""
