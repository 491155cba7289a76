"""The moving average of a model's weights, to measure and to save."""

from contextlib import contextmanager


@contextmanager
def averaged_weights(model, average):
    """The moving average of the weights in place of the present ones.

    Args:
        average: `diffusers.training_utils.EMAModel` of the model's parameters; None: they stay.
    """
    if average is None:
        yield
        return
    average.store(model.parameters())
    average.copy_to(model.parameters())
    try:
        yield
    finally:
        average.restore(model.parameters())
