"""How positions and codes are drawn: one dataclass, which every API and command names its options by."""

import difflib
import inspect
import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real

# Beyond these, float32 logits overflow; long before them, nothing changes any more.
LEAST_TEMPERATURE = 1e-6
MOST_GUIDANCE = 1e6


@dataclass(frozen=True)
class SamplingOptions:
    """How positions and contents are drawn; None: not given, so that the configuration's `sampling_defaults` decide.

    Where those say nothing either, temperatures, top-p and the guidance scale are 1 and top-k does not restrict.

    Args:
        temperature: of contents, 1e-6 or more.
        top_k: as many contents as this, the likeliest, may be drawn; at least 1. The size of the codebook or more: all.
        top_p: contents are drawn from the likeliest ones that together have this probability, in (0, 1].
        position_temperature, position_top_k, position_top_p: the same for positions.
        guidance_scale: 1: none; above 1: logits are moved away from those of the hidden condition (classifier-free
            guidance, Ho & Salimans 2022); at most 1e6. Needs a model that was trained with a hidden condition.
        fine_positions: "fixed" (the finest codes fill what is left, in the training order) or "free" (drawn).

    Raises:
        TypeError, ValueError: options of another type or range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    position_temperature: float | None = None
    position_top_k: int | None = None
    position_top_p: float | None = None
    guidance_scale: float | None = None
    fine_positions: str = "fixed"

    def __post_init__(self):
        for prefix in ("", "position_"):
            check_kind(f"{prefix}temperature", getattr(self, f"{prefix}temperature"))
            check_kind(f"{prefix}top_k", getattr(self, f"{prefix}top_k"), Integral)
            check_kind(f"{prefix}top_p", getattr(self, f"{prefix}top_p"))
            temperature, top_k, top_p = (
                getattr(self, f"{prefix}{name}") for name in ("temperature", "top_k", "top_p")
            )
            if temperature is not None and not LEAST_TEMPERATURE <= temperature < math.inf:
                raise ValueError(
                    f"{prefix}temperature must be {LEAST_TEMPERATURE} or more and finite, got {temperature}; greedy is "
                    "do_sample=False"
                )
            if top_k is not None and top_k < 1:
                raise ValueError(f"{prefix}top_k must be at least 1, or None for no restriction; got {top_k}")
            if top_p is not None and not 0 < top_p <= 1:
                raise ValueError(f"{prefix}top_p must lie in (0, 1], got {top_p}")
        check_kind("guidance_scale", self.guidance_scale)
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= MOST_GUIDANCE:
            raise ValueError(f"guidance_scale must lie in [0, {MOST_GUIDANCE:g}], got {self.guidance_scale}")
        if self.fine_positions not in ("fixed", "free"):
            raise ValueError(f'fine_positions must be "fixed" or "free", got {self.fine_positions!r}')

    @classmethod
    def of(cls, options, others=()):
        """Options from a dictionary; TypeError at a name that is none. `others` can be given in the same call, too."""
        check_names(options, OPTION_NAMES, others)
        return cls(**options)

    def over(self, defaults):
        """These options, where they are not given those of a dictionary of defaults."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def greedy(self):
        """What is left of these options where nothing is drawn; ValueError at one that would have no effect."""
        given = [name for name in WARPED if getattr(self, name) not in (None, NO_EFFECT.get(name))]
        if given:
            raise ValueError(f"{', '.join(given)} have no effect with do_sample=False; leave them out")
        return SamplingOptions(guidance_scale=self.guidance_scale, fine_positions=self.fine_positions)


OPTION_NAMES = tuple(field.name for field in fields(SamplingOptions))
DEFAULT_NAMES = tuple(name for name in OPTION_NAMES if name != "fine_positions")  # that a configuration may decide
WARPED = tuple(name for name in DEFAULT_NAMES if name != "guidance_scale")
NO_EFFECT = {"temperature": 1, "top_p": 1, "position_temperature": 1, "position_top_p": 1}


def check_names(given, known, others=(), elsewhere=None):
    """Raise TypeError at a name of an argument that is not known.

    Args:
        given, known: names.
        others: of arguments that the call takes besides, for the message.
        elsewhere: {name: what the call has in its place}, of arguments of the model's `generate`.
    """
    elsewhere = elsewhere or {}
    for name in given:
        if name in elsewhere:
            raise TypeError(f"{name} is of the model's generate; here it is {elsewhere[name]}")
    if unknown := sorted(set(given) - set(known)):
        names = [name for name in dict.fromkeys([*known, *others]) if name not in {*elsewhere, *unknown}]
        close = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise TypeError(f"unknown argument(s) {', '.join(unknown)}; {hint}")


def argument_names(function):
    """Names of a function's or method's arguments, but for `self` and what it takes by any name."""
    arguments = inspect.signature(function).parameters.values()
    return [each.name for each in arguments if each.kind != each.VAR_KEYWORD and each.name != "self"]


def check_kind(name, value, kind=Real):
    """Raise TypeError unless an option is a number, of kind Integral a whole one, or not given."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise TypeError(f"{name} must be a {'whole ' if kind is Integral else ''}number, got {value!r}")


def check_count(name, count):
    """Raise TypeError or ValueError unless this is a whole number of at least 1, or not given."""
    check_kind(name, count, Integral)
    if count is not None and count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
