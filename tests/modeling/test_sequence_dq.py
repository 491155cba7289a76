import itertools
import math

import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_sampling import SlowImage

from dq_hf.modeling.constraints_dq import StreamState
from dq_hf.modeling.sequence_dq import StreamLayout

NUM_CODES = 5
PAD, END, START = NUM_CODES, NUM_CODES + 1, NUM_CODES + 2  # as contents; positions likewise behind their grid
ORDERS = ("row-first", "region-first")


def make_grids(rows, columns, num_granularities):
    return [[rows * 2**g, columns * 2**g] for g in range(num_granularities)]


def slow_stream(codes, grain_map, grids, order, label):
    """One image's elements (content, position, granularity), written from method.md section 6."""
    elements, image = [], SlowImage(grids, order, True)
    for granularity, (rows, columns) in enumerate(grids):
        elements.append((START + label, rows * columns + 2 + label, granularity))
        for cell in sorted(range(rows * columns), key=lambda cell: image.place(granularity, cell)):
            (row, column), side = divmod(cell, columns), 2**granularity
            if grain_map[row // side][column // side] == granularity:
                scale = grids[-1][0] // rows
                elements.append((codes[row * scale][column * scale], cell, granularity))
        elements.append((END, rows * columns + 1, granularity))
    return elements


def random_codes(grain_maps, grids, seed):
    """Codes that a tokenizer could give: a code of a coarser granularity fills all cells that it covers."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grids[-1]
    codes = torch.empty(len(grain_maps), rows, columns, dtype=torch.long)
    for image, grain_map in enumerate(grain_maps):
        for row, column in itertools.product(range(grids[0][0]), range(grids[0][1])):
            side, granularity = rows // grids[0][0], int(grain_map[row, column])
            own = torch.randint(NUM_CODES, (2**granularity, 2**granularity), generator=generator)
            filled = own.repeat_interleave(side // 2**granularity, 0).repeat_interleave(side // 2**granularity, 1)
            codes[image, row * side : (row + 1) * side, column * side : (column + 1) * side] = filled
    return codes


@st.composite
def batches(draw):
    """Grids, order, codes, grain maps and labels (or None) of a few images."""
    rows, columns, num_granularities = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    grids, batch = make_grids(rows, columns, num_granularities), draw(st.integers(1, 3))
    grain_map = torch.randint(num_granularities, (batch, rows, columns), generator=seeded(draw(st.integers(0, 2**31))))
    labels = draw(st.none() | st.lists(st.integers(0, 4), min_size=batch, max_size=batch).map(torch.tensor))
    codes = random_codes(grain_map, grids, draw(st.integers(0, 2**31)))
    return grids, draw(st.sampled_from(ORDERS)), codes, grain_map, labels


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_granularities", [1, 2, 3])
def test_codes_to_stream_to_codes_is_exact_for_every_grain_map_of_a_grid(num_granularities, order):
    grids = make_grids(2, 2, num_granularities)
    grain_map = torch.tensor(list(itertools.product(range(num_granularities), repeat=4))).view(-1, 2, 2)
    codes = random_codes(grain_map, grids, seed=1)
    layout = StreamLayout(grids, NUM_CODES, order)
    stream = layout.pack(codes, grain_map)
    assert all(map(torch.equal, layout.unpack(stream.contents, stream.positions, stream.lengths), (codes, grain_map)))


@settings(max_examples=120)
@given(batches())
def test_streams_are_those_of_the_slow_version_padded_at_the_end_and_give_the_codes_back(batch):
    grids, order, codes, grain_map, labels = batch
    layout = StreamLayout(grids, NUM_CODES, order)
    stream = layout.pack(codes, grain_map, labels)
    expected = [
        slow_stream(codes[i].tolist(), grain_map[i].tolist(), grids, order, 0 if labels is None else int(labels[i]))
        for i in range(len(codes))
    ]
    longest = max(map(len, expected))
    padding = (PAD, grids[-1][0] * grids[-1][1], len(grids) - 1)
    padded = [list(map(list, elements + [padding] * (longest - len(elements)))) for elements in expected]
    assert torch.stack([stream.contents, stream.positions, stream.granularities], -1).tolist() == padded
    assert stream.lengths.tolist() == list(map(len, expected))
    assert all(map(torch.equal, layout.unpack(stream.contents, stream.positions, stream.lengths), (codes, grain_map)))


def test_stream_of_a_picture_worked_out_by_hand():
    codes = torch.tensor([[[4, 4, 0, 1], [4, 4, 2, 3]]])
    stream = StreamLayout([[1, 2], [2, 4]], NUM_CODES).pack(codes, torch.tensor([[[0, 1]]]), torch.tensor([1]))
    assert stream.contents.tolist() == [[8, 4, 6, 8, 0, 1, 2, 3, 6]]  # 8: start of label 1, 6: end
    assert stream.positions.tolist() == [[5, 0, 3, 11, 2, 3, 6, 7, 9]]
    assert stream.granularities.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1]]
    for order, expected in zip(ORDERS, ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 2, 3, 6, 7])):
        stream = StreamLayout([[1, 2], [2, 4]], NUM_CODES, order).pack(codes, torch.tensor([[[1, 1]]]))
        assert stream.positions.tolist() == [[4, 3, 10, *expected, 9]]


# The stream of the picture by hand, unconditional: contents and positions.
WHOLE = ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, 0, 3, 10, 2, 3, 6, 7, 9])


@pytest.mark.parametrize(
    ("contents", "positions", "message"),
    [
        ([7, 6, 7, 0, 1, 2, 3, 6], [4, 3, 10, 2, 3, 6, 7, 9], "cover"),  # a region left out
        ([7, 4, 6, 7, 0, 1, 2, 6], [4, 0, 3, 10, 2, 3, 6, 9], "cover"),  # a fine cell left out
        ([7, 4, 6, 7, 0, 1, 2, 3, 3, 6], [4, 0, 3, 10, 2, 3, 6, 7, 7, 9], "cover"),  # one twice, none left out
        ([7, 4, 6, 7, 0, 1, 2, 3, 3, 6], [4, 0, 3, 10, 2, 3, 6, 7, 5, 9], "cover"),  # inside a coarse region
        ([4, 6, 7, 0, 1, 2, 3, 6], [0, 3, 10, 2, 3, 6, 7, 9], "in turn"),  # no start
        ([7, 4, 7, 0, 1, 2, 3, 6], [4, 0, 10, 2, 3, 6, 7, 9], "in turn"),  # no coarse end
        ([7, 4, 6, 0, 1, 2, 3, 6], [4, 0, 3, 2, 3, 6, 7, 9], "in turn"),  # no fine start
        ([7, 4, 6, 7, 0, 1, 2, 3, 6, 7, 6], [4, 0, 3, 10, 2, 3, 6, 7, 9, 10, 9], "in turn"),  # a third part
        ([7, 4, 6, 7, 0, 1, 2, 3, 6, 3], [4, 0, 3, 10, 2, 3, 6, 7, 9, 7], "in turn"),  # a code behind the end
        ([7, 4, 5, 6, 7, 0, 1, 2, 3, 6], [4, 0, 2, 3, 10, 2, 3, 6, 7, 9], "in turn"),  # padding inside
        ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, 2, 3, 10, 2, 3, 6, 7, 9], "in turn"),  # a position outside the grid
        ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, 0, 1, 10, 2, 3, 6, 7, 9], "in turn"),  # an end with a code's position
        ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, 0, 3, 11, 2, 3, 6, 7, 9], "in turn"),  # a start of another label
        ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, -2, 3, 10, 2, 3, 6, 7, 9], "in turn"),
        ([7, 4, 6, 7, 0, 1, 2, -3, 6], [4, 0, 3, 10, 2, 3, 6, 7, 9], "in turn"),
        ([], [], "in turn"),
    ],
)
def test_broken_streams_are_refused_by_number(contents, positions, message):
    layout = StreamLayout([[1, 2], [2, 4]], NUM_CODES)
    length = max(len(contents), len(WHOLE[0]))

    def padded(good, bad, pad):
        return torch.tensor([row + [pad] * (length - len(row)) for row in (good, bad)])

    rows = padded(WHOLE[0], contents, PAD), padded(WHOLE[1], positions, 8)
    layout.unpack(rows[0][:1], rows[1][:1], torch.tensor([len(WHOLE[0])]))
    with pytest.raises(ValueError, match=rf"stream\(s\) \[1\].*{message}"):
        layout.unpack(*rows, torch.tensor([len(WHOLE[0]), len(contents)]))


class SlowState:
    """One image's stream while it grows, written from method.md section 7."""

    def __init__(self, grids, order, label, fixed):
        self.image, self.label = SlowImage(grids, order, fixed), label
        self.granularity, self.next, self.length = 0, "start", 0

    @property
    def num_cells(self):
        return math.prod(self.image.grids[self.granularity])

    def allowed_positions(self):
        forced = {"padding": self.num_cells, "start": self.num_cells + 2 + self.label}
        return {forced[self.next]} if self.next in forced else set(self.image.allowed(self.granularity))

    def append(self, position, content):
        if self.next == "padding":
            return
        self.next, self.length = "any", self.length + 1
        if position < self.num_cells:
            self.image.write(self.granularity, position, content)
        elif position == self.num_cells + 1:
            finest = self.granularity == len(self.image.grids) - 1
            self.next = "padding" if finest else "start"
            self.granularity += not finest


def walk(grids, order, labels, fixed, pick):
    """Draw streams with `pick(allowed)`; at every step what is allowed is compared with the slow version."""
    layout = StreamLayout(grids, NUM_CODES, order, num_start_tokens=5)
    state = StreamState(layout, torch.tensor(labels), fixed)
    slow = [SlowState(grids, order, label, fixed) for label in labels]
    positions, contents = [], []
    while not state.finished.all():
        allowed = state.allowed_positions()
        assert [set(row.nonzero().flatten().tolist()) for row in allowed] == [one.allowed_positions() for one in slow]
        positions.append(torch.tensor([pick(row.nonzero().flatten().tolist()) for row in allowed]))
        allowed = state.allowed_contents(positions[-1])
        for one, position, row in zip(slow, positions[-1].tolist(), allowed):
            is_code = position < one.num_cells
            expected = list(range(NUM_CODES)) if is_code else [NUM_CODES + position - one.num_cells]
            assert row.nonzero().flatten().tolist() == expected
        contents.append(torch.tensor([pick(row.nonzero().flatten().tolist()) for row in allowed]))
        state.append(positions[-1], contents[-1])
        for one, position, content in zip(slow, positions[-1].tolist(), contents[-1].tolist()):
            one.append(position, content)
        assert state.lengths.tolist() == [one.length for one in slow]
    return layout, state, slow, torch.stack(contents, 1), torch.stack(positions, 1)


@settings(max_examples=60)
@given(
    num_granularities=st.integers(1, 3),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    order=st.sampled_from(ORDERS),
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    fixed=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_any_legal_walk_covers_every_cell_exactly_once(num_granularities, rows, columns, order, labels, fixed, random):
    grids = make_grids(rows, columns, num_granularities)
    layout, state, slow, contents, positions = walk(grids, order, labels, fixed, random.choice)
    codes, grain_map = state.grids()
    assert list(zip(codes.tolist(), grain_map.tolist())) == [one.image.grids_written() for one in slow]
    assert all(map(torch.equal, layout.unpack(contents, positions, state.lengths), (codes, grain_map)))


@pytest.mark.parametrize(
    ("pick", "grain", "expected"),  # special tokens are the largest
    [
        (max, 2, [START, END, START, END, START, *[NUM_CODES - 1] * 64, END]),
        (min, 0, [START, 0, 0, 0, 0, END, START, END, START, END]),
    ],
)
def test_end_may_come_first_and_must_come_when_no_cell_is_left(pick, grain, expected):
    _, state, _, contents, _ = walk(make_grids(2, 2, 3), "row-first", [0], True, pick)
    assert state.grids()[1].tolist() == [[[grain] * 2] * 2]
    assert contents[0].tolist() == expected


def test_a_step_works_on_any_device_and_never_waits_for_it():
    layout = StreamLayout(make_grids(2, 2, 3), NUM_CODES, "region-first")
    labels = torch.zeros(3, dtype=torch.long, device="meta")  # without values: whoever asks for one gets an error
    for fixed in (True, False):
        state = StreamState(layout, labels, fixed)
        allowed = state.allowed_positions()
        positions = allowed.long().argmax(1)
        contents = state.allowed_contents(positions).long().argmax(1)
        state.append(positions, contents)
        assert allowed.is_meta and state.allowed_positions().is_meta
        assert all(grid.is_meta for grid in state.grids())
