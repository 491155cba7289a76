"""dq_hf: dynamic vector quantisation for Hugging Face (arXiv 2305.11718).

Importing it registers the Auto classes and the task "dq-generation".
"""

import itertools
import sys
from pathlib import Path

from .assets import DEFAULT_MODEL
from .quiet import quiet_imports

__version__ = "0.1.0"


def is_command():
    """Whether this process is `dq-hf` or `python -m dq_hf`, which imports torch only once its arguments are right."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    is_starting = program == "-m" and ("-m", "dq_hf") in itertools.pairwise(sys.orig_argv)  # still looked for
    return program in ("dq-hf", "dq-hf.exe") or is_starting


if is_command():

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import public  # quietly, see `commands.main`

        return getattr(public, name)

else:
    with quiet_imports():
        from .public import (
            DQConfig,
            DQForImageGeneration,
            DQGenerationPipeline,
            DQImageProcessor,
            DQInpaintPipeline,
            DQPipeline,
            DQTransformerConfig,
            DQTransformerForImageGeneration,
            DQVAEConfig,
            DQVAEModel,
        )

__all__ = [
    "DEFAULT_MODEL",
    "DQConfig",
    "DQForImageGeneration",
    "DQGenerationPipeline",
    "DQImageProcessor",
    "DQInpaintPipeline",
    "DQPipeline",
    "DQTransformerConfig",
    "DQTransformerForImageGeneration",
    "DQVAEConfig",
    "DQVAEModel",
]
