"""Silence for what other libraries log of themselves while they are imported."""

import logging
from contextlib import contextmanager

# torchao lists kernels of GPUs that this machine lacks; torch and diffusers warn of what torchao does when it is imported.
LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


@contextmanager
def quiet_imports():
    """While it lasts, these loggers tell errors only."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
