"""Seeds, as users give them."""

MAX_SEED = 2**64 - 1


def check_seed(seed):
    """Raise ValueError unless torch takes this integer as a seed, and not, as all below 0, for another one.

    Torch's generator on the CPU uses the low 32 bits of a seed alone, so that 0 and 2**32 give the same image.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must lie in 0 ... {MAX_SEED}, got {seed}")
