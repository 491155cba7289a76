"""What comes with the package: the embedded model."""

from pathlib import Path

DEFAULT_MODEL = str(Path(__file__).parent / "dq-emoji")
"""Folder of the embedded model: DQ-VAE, DQ-Transformer and text encoder for emoji of 64x64 pixels from prompts."""
