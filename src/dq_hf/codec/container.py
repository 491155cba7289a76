"""The file of a compressed image: what surrounds the entropy-coded payload.

In order: "DQ"; format version, 1 byte; flags, 1 byte; fingerprint of the model, 8 bytes; height and width before padding;
where the flags say so the model's name, the class label and the prompt; the payload; the check, 4 bytes. A file of the
generator prior ends with 4 bytes more, the CRC-32 of all before: whoever cannot decode it knows whether it is damaged.
Numbers are little-endian, those without a stated length in groups of 7 bits, the lowest first (LEB128); texts are UTF-8
behind their length in bytes. The check is the CRC-32 of all bytes before it, then the grain map (1 byte a region) and the
codes of the finest grid (4 bytes each), row by row.
"""

import zlib
from dataclasses import dataclass

import numpy as np

MAGIC = b"DQ"
FORMAT_VERSION = 1
STATIC, GENERATOR = 0, 1  # the lowest flag: the prior
HAS_MODEL, HAS_CLASS, HAS_PROMPT = 2, 4, 8
CHECK_BYTES = 4
MOST_SIDE = 2**20  # pixels
DAMAGED = "this file is damaged or cut off; get it again"


@dataclass
class Header:
    """What a file says about itself.

    Args:
        fingerprint: 8 bytes, of the weights that decoding depends on.
        height, width: pixels, before padding.
        flag: STATIC or GENERATOR, the prior.
        model_id: repository of the model; None: not named.
        class_label: id of the generator prior's class.
        prompt: of the generator prior.
    """

    fingerprint: bytes
    height: int
    width: int
    flag: int = STATIC
    model_id: str | None = None
    class_label: int | None = None
    prompt: str | None = None


def write_file(header, payload, codes, grain_map):
    """The bytes of a file; codes (H, W) and grain map (h, w) are those that the payload holds."""
    optional = [
        (HAS_MODEL, header.model_id, write_text),
        (HAS_CLASS, header.class_label, write_number),
        (HAS_PROMPT, header.prompt, write_text),
    ]
    given = [(flag, write(value)) for flag, value, write in optional if value is not None]
    flags = header.flag | sum(flag for flag, _ in given)
    data = MAGIC + bytes([FORMAT_VERSION, flags]) + header.fingerprint
    data += write_number(header.height) + write_number(header.width)
    data += b"".join(field for _, field in given)
    data += payload
    data += checksum(data, codes, grain_map)
    return data + crc(data) if header.flag == GENERATOR else data


def read_file(data):
    """(`Header`, payload, whether codes (H, W) and grain map (h, w) are those of the file: a function).

    Raises:
        TypeError: not bytes.
        ValueError: no such file, one of a newer format, or one that is cut off or damaged, as far as can be said before
            decoding.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"a compressed image must be bytes, got {type(data).__name__}")
    data = bytes(data)
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("this is no compressed image of dq-hf: it does not begin with DQ")
    reader = Reader(data, len(MAGIC))
    version, flags = reader.take(2)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this file has format version {version}, newer than {FORMAT_VERSION}, the last one known here; upgrade dq_hf"
        )
    if version == 0 or flags >= 16:
        raise ValueError(DAMAGED)
    header = Header(reader.take(8), reader.number(), reader.number(), flags & GENERATOR)
    if header.flag == GENERATOR:
        data, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
        if crc(data) != check:
            raise ValueError(DAMAGED)
        reader.data = data
    if not (1 <= header.height <= MOST_SIDE and 1 <= header.width <= MOST_SIDE):
        raise ValueError(DAMAGED)
    header.model_id = reader.text() if flags & HAS_MODEL else None
    header.class_label = reader.number() if flags & HAS_CLASS else None
    header.prompt = reader.text() if flags & HAS_PROMPT else None
    payload = reader.take(len(data) - CHECK_BYTES - reader.place)
    head, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
    return header, payload, lambda codes, grain_map: checksum(head, codes, grain_map) == check


def crc(data):
    """CRC-32 in 4 bytes."""
    return zlib.crc32(data).to_bytes(CHECK_BYTES, "little")


def checksum(data, codes, grain_map):
    """CRC-32, in 4 bytes, of bytes, grain map (h, w) and codes (H, W)."""
    grids = np.asarray(grain_map).astype("u1").tobytes() + np.asarray(codes).astype("<u4").tobytes()
    return crc(data + grids)


def write_number(number):
    """A whole number from 0 on, 7 bits a byte."""
    data = bytearray()
    while number >= 128:
        data.append(number % 128 + 128)
        number //= 128
    return bytes(data) + bytes([number])


def write_text(text):
    """A text and its length."""
    data = text.encode()
    return write_number(len(data)) + data


class Reader:
    """Reads bytes from a place on; ValueError where there are none."""

    def __init__(self, data, place):
        self.data, self.place = data, place

    def take(self, count):
        """So many bytes."""
        if not 0 <= count <= len(self.data) - self.place:
            raise ValueError(DAMAGED)
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self):
        """As `write_number` wrote it."""
        number = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1)
            number += byte % 128 << shift
            if byte < 128:
                return number
        raise ValueError(DAMAGED)

    def text(self):
        """As `write_text` wrote it."""
        try:
            return self.take(self.number()).decode()
        except UnicodeDecodeError as error:
            raise ValueError(DAMAGED) from error
