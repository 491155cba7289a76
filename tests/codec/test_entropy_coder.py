"""The entropy coder gives back what it was given, in as many bytes as the frequencies say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq_hf.codec.entropy_coder import EntropyDecoder, EntropyEncoder

TABLES = st.lists(st.integers(1, 2**20), min_size=1, max_size=9).map(np.array)


@given(st.lists(st.tuples(TABLES, st.integers(0, 8)), max_size=60))
def test_symbols_come_back_and_cost_their_information(message):
    message = [(table, symbol % len(table)) for table, symbol in message]
    encoder = EntropyEncoder()
    for table, symbol in message:
        encoder.encode(symbol, table)
    data = encoder.to_bytes()
    decoder = EntropyDecoder(data)
    assert [decoder.decode(table)[0] for table, _ in message] == [symbol for _, symbol in message]
    bits = sum(math.log2(table.sum() / table[symbol]) for table, symbol in message)
    assert len(data) <= bits / 8 * 1.001 + 1.1  # a symbol of 1 in 9 million may cost a little more than it should
    assert not data.endswith(b"\0")


@pytest.mark.parametrize("seed", range(3))
def test_every_carry_is_resolved(seed):
    """Many short messages: with this many some end while a carry is pending."""
    source = np.random.default_rng(seed)
    tables = [np.array([1, 2**24, 1]), np.array([5, 3]), np.arange(1, 300)]
    for _ in range(700):
        message = [
            (table, source.choice(len(table), p=table / table.sum())) for table in tables * source.integers(1, 9)
        ]
        encoder = EntropyEncoder()
        for table, symbol in message:
            encoder.encode(symbol, table)
        decoder = EntropyDecoder(encoder.to_bytes())
        assert all(decoder.decode(table)[0] == symbol for table, symbol in message)


def test_an_array_shares_a_table_and_one_symbol_alone_is_free():
    encoder, symbols = EntropyEncoder(), np.arange(40) % 4
    encoder.encode(0, np.array([7]))
    encoder.encode(symbols, np.array([1, 1, 1, 1]))
    encoder.encode(np.zeros(9), np.array([7]))
    data = encoder.to_bytes()
    assert len(data) <= 11
    decoder = EntropyDecoder(data)
    assert decoder.decode(np.array([7])) == [0]
    assert decoder.decode(np.array([1, 1, 1, 1]), 40).tolist() == symbols.tolist()
    assert decoder.decode(np.array([7]), 9).tolist() == [0] * 9


def test_bytes_that_no_encoder_writes_are_an_error_or_other_symbols():
    with pytest.raises(ValueError, match="damaged"):
        decoder = EntropyDecoder(b"\xff" * 99)
        for _ in range(200):
            decoder.decode(np.array([1, 2, 3]))
