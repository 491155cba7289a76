"""What visitors of the web demo send: numbers, prompts, paintings and files, checked before anything is done with them."""

from pathlib import Path

from PIL import Image

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none of them runs a program of its own
MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 25_000_000  # a camera's picture; 300 MB as float32
MAX_ASPECT_RATIO = 16  # the shorter side is scaled to the model's, the longer one grows with it
MAX_DEMO_SEED = 2**31 - 1
MAX_PROMPT = 500  # characters


def check_prompt(prompt):
    """Raise TypeError or ValueError unless this is one text that is not endless."""
    if not isinstance(prompt, str):
        raise TypeError(f"the prompt must be one text, got {kind_of(prompt)}")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"the prompt may have {MAX_PROMPT} characters, got {len(prompt)}")


def read_number(name, value, low, high, whole=False):
    """The number from `low` to `high` that was sent, an int if `whole`; TypeError or ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be one number, got {kind_of(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low} ... {high}, got {value}")
    if whole and value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")
    return int(value) if whole else value


def check_painting(painting):
    """Raise TypeError or ValueError unless this is the editor's value, with its one layer, or None."""
    if painting is None:
        return
    layers = painting.get("layers") if isinstance(painting, dict) else painting
    if not isinstance(layers, (list, type(None))):
        raise TypeError(f"the painting must hold a list of layers, got {kind_of(layers)}")
    if len(layers or ()) > 1:
        raise ValueError(f"the painting must have one layer, got {len(layers)}")


def count_values(value):
    """How many values there are in a list, an object or another value of JSON, itself included."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count_values, children))


def kind_of(value):
    """What a visitor sent, in few words however large it is."""
    return {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )


def read_upload(path):
    """The image in an uploaded file, or ValueError with a message for who uploaded it."""
    name = Path(path).name
    if Path(path).stat().st_size > MAX_UPLOAD_BYTES:
        raise ValueError(f"{name} is larger than {MAX_UPLOAD_BYTES // 2**20} MB; make it smaller")
    too_many_pixels = f"has more than {MAX_UPLOAD_PIXELS // 10**6} million pixels; make it smaller"
    try:
        with Image.open(path, formats=UPLOAD_FORMATS) as file:
            width, height = file.size
            if width * height > MAX_UPLOAD_PIXELS:
                problem = too_many_pixels
            elif max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                problem = (
                    f"is {width}x{height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other; crop it"
                )
            else:
                return file.copy()
    except Image.DecompressionBombError:
        problem = too_many_pixels
    except Exception:  # Pillow's decoders raise almost any kind on damaged data
        formats = f"{', '.join(UPLOAD_FORMATS[:-1])} or {UPLOAD_FORMATS[-1]}"
        problem = f"is damaged, or no image; expected {formats}"
    raise ValueError(f"{name} {problem}")
