"""Symbols and their frequencies to bytes and back: a thin layer over the range coder of `constriction`."""

import numpy as np
from constriction import stream  # its own modules cannot be imported by name

STATE_BYTES = 8  # what the coder still holds behind its last whole word of 4


class EntropyEncoder:
    """Writes symbols, each with the table of frequencies that `EntropyDecoder` will be given at that place.

    A table holds positive whole numbers below 2^53, at most 2^24 of them; a symbol costs log2(sum / its own) bits, and
    nothing where it is the only one. Both sides calculate on them in IEEE double precision, operation by operation the
    same on every machine.
    """

    def __init__(self):
        self.coder = stream.queue.RangeEncoder()

    def encode(self, symbols, frequencies):
        """Append one symbol, or an array of symbols that share a table (V,)."""
        if len(frequencies) > 1:
            self.coder.encode(np.atleast_1d(symbols).astype(np.int32), model(frequencies))

    def to_bytes(self):
        """The shortest bytes in the coder's final interval; zeros at the end are left out."""
        words = self.coder.get_compressed()
        num_words, (lower, size) = self.coder.pos()
        # The words so far, as one whole number. Those that are final already come with the carry of their own ending.
        carry = (lower + 2**32 - 1) >> 64
        prefix = int.from_bytes(words[:num_words].astype(">u4").tobytes()) - carry
        lower += prefix << 64
        for step in range(8 * STATE_BYTES, -1, -8):
            value = -(-lower >> step) << step  # rounded up
            if value < lower + size:
                return value.to_bytes(4 * num_words + STATE_BYTES).rstrip(b"\0")


class EntropyDecoder:
    """Reads what `EntropyEncoder` wrote.

    Raises:
        ValueError: while decoding, bytes that no encoder writes with these tables. Most damage just gives other symbols.
    """

    def __init__(self, data):
        padded = data + bytes(STATE_BYTES + -len(data) % 4)
        self.coder = stream.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))

    def decode(self, frequencies, count=1):
        """The next symbols, (count,) int32, which share a table (V,)."""
        if len(frequencies) == 1:
            return np.zeros(count, np.int32)
        try:
            return self.coder.decode(model(frequencies), count)
        except AssertionError as error:  # how constriction says it
            raise ValueError("the coded data is damaged") from error


def model(frequencies):
    """The distribution of a table of frequencies (V,)."""
    return stream.model.Categorical(np.asarray(frequencies, np.float64), perfect=False)
