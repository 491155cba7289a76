"""Seeds, as users give them."""

MAX_SEED = 2**64 - 1


def check_seed(seed):
    """Raise ValueError if torch cannot take this integer, or takes it for another one, as all below 0."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must lie in 0 ... {MAX_SEED}, got {seed}")
