import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_hf.modeling.constraints_dq import StreamState
from dq_hf.modeling.sequence_dq import StreamLayout

NUM_CODES = 5
PAD, END, START = NUM_CODES, NUM_CODES + 1, NUM_CODES + 2  # as contents; positions likewise behind their grid
ORDERS = ("row-first", "region-first")


def make_grids(rows, columns, num_granularities):
    return [[rows * 2**g, columns * 2**g] for g in range(num_granularities)]


def cells_in_order(grids, granularity, order):
    """(row, column) of every cell of one grid, in training order."""
    rows, columns = grids[granularity]
    cells = list(itertools.product(range(rows), range(columns)))
    if order == "region-first":
        side = rows // grids[0][0]
        cells.sort(key=lambda cell: (cell[0] // side, cell[1] // side, cell[0], cell[1]))
    return cells


def slow_stream(codes, grain_map, grids, order, label):
    """One image's elements (content, position, granularity), written from method.md section 6."""
    elements = []
    for granularity, (rows, columns) in enumerate(grids):
        elements.append((START + label, rows * columns + 2 + label, granularity))
        for row, column in cells_in_order(grids, granularity, order):
            cells_a_region = 2**granularity
            if grain_map[row // cells_a_region][column // cells_a_region] == granularity:
                scale = grids[-1][0] // rows
                elements.append((codes[row * scale][column * scale], row * columns + column, granularity))
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
    num_granularities = draw(st.integers(1, 4))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    grids = make_grids(rows, columns, num_granularities)
    batch = draw(st.integers(1, 3))
    grains = draw(
        st.lists(
            st.integers(0, num_granularities - 1), min_size=batch * rows * columns, max_size=batch * rows * columns
        )
    )
    grain_map = torch.tensor(grains).view(batch, rows, columns)
    labels = draw(st.none() | st.lists(st.integers(0, 4), min_size=batch, max_size=batch).map(torch.tensor))
    codes = random_codes(grain_map, grids, draw(st.integers(0, 2**31)))
    return grids, draw(st.sampled_from(ORDERS)), codes, grain_map, labels


@settings(max_examples=120)
@given(batches())
def test_codes_to_stream_to_codes_is_exact(batch):
    grids, order, codes, grain_map, labels = batch
    layout = StreamLayout(grids, NUM_CODES, order)
    stream = layout.pack(codes, grain_map, labels)
    again, grain_map_again = layout.unpack(stream.contents, stream.positions, stream.lengths)
    assert torch.equal(again, codes)
    assert torch.equal(grain_map_again, grain_map)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_granularities", [1, 2, 3])
def test_codes_to_stream_to_codes_is_exact_for_every_grain_map_of_a_grid(num_granularities, order):
    grids = make_grids(2, 2, num_granularities)
    grain_map = torch.tensor(list(itertools.product(range(num_granularities), repeat=4))).view(-1, 2, 2)
    codes = random_codes(grain_map, grids, seed=1)
    layout = StreamLayout(grids, NUM_CODES, order)
    stream = layout.pack(codes, grain_map)
    again, grain_map_again = layout.unpack(stream.contents, stream.positions, stream.lengths)
    assert torch.equal(again, codes)
    assert torch.equal(grain_map_again, grain_map)


@given(batches())
def test_streams_are_those_of_the_slow_version_with_padding_at_the_end_only(batch):
    grids, order, codes, grain_map, labels = batch
    stream = StreamLayout(grids, NUM_CODES, order).pack(codes, grain_map, labels)
    expected = [
        slow_stream(codes[i].tolist(), grain_map[i].tolist(), grids, order, 0 if labels is None else int(labels[i]))
        for i in range(len(codes))
    ]
    longest = max(map(len, expected))
    padding = (PAD, grids[-1][0] * grids[-1][1], len(grids) - 1)
    padded = [elements + [padding] * (longest - len(elements)) for elements in expected]
    assert torch.stack([stream.contents, stream.positions, stream.granularities], -1).tolist() == [
        list(map(list, elements)) for elements in padded
    ]
    assert stream.lengths.tolist() == list(map(len, expected))


def test_stream_of_a_picture_worked_out_by_hand():
    codes = torch.tensor([[[4, 4, 0, 1], [4, 4, 2, 3]]])
    stream = StreamLayout([[1, 2], [2, 4]], NUM_CODES).pack(codes, torch.tensor([[[0, 1]]]), torch.tensor([1]))
    assert stream.contents.tolist() == [[8, 4, 6, 8, 0, 1, 2, 3, 6]]  # 8: start of label 1, 6: end
    assert stream.positions.tolist() == [[5, 0, 3, 11, 2, 3, 6, 7, 9]]
    assert stream.granularities.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1]]


def test_orders_differ_only_in_the_order_of_finer_cells():
    grids, grain_map = make_grids(1, 2, 2), torch.tensor([[[1, 1]]])
    codes = random_codes(grain_map, grids, seed=2)
    row_first, region_first = (StreamLayout(grids, NUM_CODES, order).pack(codes, grain_map) for order in ORDERS)
    assert row_first.positions[0, 3:-1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert region_first.positions[0, 3:-1].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(row_first.positions[0, :3], region_first.positions[0, :3])


# The stream of the picture by hand, unconditional: contents and positions.
WHOLE = ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, 0, 3, 10, 2, 3, 6, 7, 9])


@pytest.mark.parametrize(
    ("contents", "positions", "message"),
    [
        ([7, 6, 7, 0, 1, 2, 3, 6], [4, 3, 10, 2, 3, 6, 7, 9], "cover"),  # a region left out
        ([7, 4, 6, 7, 0, 1, 2, 6], [4, 0, 3, 10, 2, 3, 6, 9], "cover"),  # a fine cell left out
        ([7, 4, 6, 7, 0, 1, 2, 2, 6], [4, 0, 3, 10, 2, 3, 6, 6, 9], "cover"),  # one twice, one left out
        ([7, 4, 6, 7, 0, 1, 2, 3, 3, 6], [4, 0, 3, 10, 2, 3, 6, 7, 7, 9], "cover"),  # one twice, none left out
        ([7, 4, 6, 7, 0, 1, 2, 3, 3, 6], [4, 0, 3, 10, 2, 3, 6, 7, 5, 9], "cover"),  # inside a coarse region
        ([4, 6, 7, 0, 1, 2, 3, 6], [0, 3, 10, 2, 3, 6, 7, 9], "in turn"),  # no start
        ([7, 4, 7, 0, 1, 2, 3, 6], [4, 0, 10, 2, 3, 6, 7, 9], "in turn"),  # no coarse end
        ([7, 4, 6, 7, 0, 1, 2, 3], [4, 0, 3, 10, 2, 3, 6, 7], "in turn"),  # no fine end
        ([7, 4, 6, 0, 1, 2, 3, 6], [4, 0, 3, 2, 3, 6, 7, 9], "in turn"),  # no fine start
        ([7, 4, 6, 7, 0, 1, 2, 3, 6, 7, 6], [4, 0, 3, 10, 2, 3, 6, 7, 9, 10, 9], "in turn"),  # a third part
        ([7, 4, 6, 7, 0, 1, 2, 3, 6, 3], [4, 0, 3, 10, 2, 3, 6, 7, 9, 7], "in turn"),  # a code behind the end
        ([7, 4, 5, 6, 7, 0, 1, 2, 3, 6], [4, 0, 2, 3, 10, 2, 3, 6, 7, 9], "in turn"),  # padding inside
        ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, 2, 3, 10, 2, 3, 6, 7, 9], "in turn"),  # a position outside the grid
        ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, 0, 1, 10, 2, 3, 6, 7, 9], "in turn"),  # an end with a code's position
        ([7, 4, 6, 7, 0, 1, 2, 3, 6], [4, 0, 3, 11, 2, 3, 6, 7, 9], "in turn"),  # a start of another label
        ([7, 4, 6, 8, 0, 1, 2, 3, 6], [4, 0, 3, 11, 2, 3, 6, 7, 9], "in turn"),  # likewise
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
        self.grids, self.order, self.label, self.fixed = grids, order, label, fixed
        self.granularity, self.taken, self.next, self.elements = 0, {}, "start", []

    def fine_cells(self, row, column):
        """Cells of the finest grid that a cell of the present granularity covers."""
        scale = self.grids[-1][0] // self.grids[self.granularity][0]
        return list(
            itertools.product(range(row * scale, (row + 1) * scale), range(column * scale, (column + 1) * scale))
        )

    def allowed_positions(self):
        rows, columns = self.grids[self.granularity]
        num_cells = rows * columns
        if self.next == "padding":
            return {num_cells}
        if self.next == "start":
            return {num_cells + 2 + self.label}
        finest = self.granularity == len(self.grids) - 1
        free = [
            cell
            for cell in cells_in_order(self.grids, self.granularity, self.order)
            if not any(fine in self.taken for fine in self.fine_cells(*cell))
        ]
        if self.fixed and finest:
            free = free[:1]
        allowed = {row * columns + column for row, column in free}
        side = self.grids[-1][0] // self.grids[0][0]
        in_regions = {}
        for row, column in self.taken:
            in_regions[row // side, column // side] = in_regions.get((row // side, column // side), 0) + 1
        whole_regions = all(count == side**2 for count in in_regions.values())
        everything = len(self.taken) == self.grids[-1][0] * self.grids[-1][1]
        if everything if finest else whole_regions:
            allowed.add(num_cells + 1)
        return allowed

    def append(self, position, content):
        rows, columns = self.grids[self.granularity]
        if self.next == "padding":
            return
        self.elements.append((content, position))
        self.next = "any"
        if position < rows * columns:
            for cell in self.fine_cells(position // columns, position % columns):
                assert cell not in self.taken
                self.taken[cell] = (content, self.granularity)
        elif position == rows * columns + 1:
            finest = self.granularity == len(self.grids) - 1
            self.next = "padding" if finest else "start"
            self.granularity += not finest


def walk(grids, order, labels, fixed, pick):
    """Draw streams with `pick(allowed)`; at every step what is allowed is compared with the slow version."""
    layout = StreamLayout(grids, NUM_CODES, order, num_start_tokens=5)
    state = StreamState(layout, torch.tensor(labels), fixed)
    slow = [SlowState(grids, order, label, fixed) for label in labels]
    positions, contents, together = [], [], set()
    while not state.finished.all():
        allowed = state.allowed_positions()
        assert [set(row.nonzero().flatten().tolist()) for row in allowed] == [one.allowed_positions() for one in slow]
        positions.append(torch.tensor([pick(row.nonzero().flatten().tolist()) for row in allowed]))
        allowed = state.allowed_contents(positions[-1])
        for one, position, row in zip(slow, positions[-1].tolist(), allowed):
            num_cells = layout.num_cells[one.granularity]
            codes_only = list(range(NUM_CODES))
            expected = codes_only if position < num_cells else [NUM_CODES + position - num_cells]
            assert row.nonzero().flatten().tolist() == expected
        contents.append(torch.tensor([pick(row.nonzero().flatten().tolist()) for row in allowed]))
        together.add(tuple(state.granularity.tolist()))
        state.append(positions[-1], contents[-1])
        for one, position, content in zip(slow, positions[-1].tolist(), contents[-1].tolist()):
            one.append(position, content)
        assert state.lengths.tolist() == [len(one.elements) for one in slow]
    return layout, state, slow, torch.stack(contents, 1), torch.stack(positions, 1), together


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
    layout, state, slow, contents, positions, _ = walk(grids, order, labels, fixed, random.choice)
    codes, grain_map = state.grids()
    for image, one in enumerate(slow):
        assert len(one.taken) == grids[-1][0] * grids[-1][1]
        side = grids[-1][0] // grids[0][0]
        for (row, column), (code, granularity) in one.taken.items():
            assert codes[image, row, column] == code
            assert grain_map[image, row // side, column // side] == granularity
    unpacked = layout.unpack(contents, positions, state.lengths)
    assert torch.equal(unpacked[0], codes)
    assert torch.equal(unpacked[1], grain_map)


def test_end_may_come_first_and_then_everything_is_finer():
    grids = make_grids(1, 2, 3)
    _, state, slow, contents, _, _ = walk(grids, "row-first", [0], True, pick=max)  # special tokens are the largest
    assert state.grids()[1].tolist() == [[[2, 2]]]
    assert contents[0, :5].tolist() == [START, END, START, END, START]
    assert len(slow[0].elements) == 32 + 6


def test_end_is_forced_when_no_cell_is_left_and_finer_parts_are_empty():
    _, state, slow, contents, _, _ = walk(make_grids(2, 2, 3), "row-first", [0], False, pick=min)
    assert state.grids()[1].unique().tolist() == [0]
    assert contents[0].tolist() == [START, 0, 0, 0, 0, END, START, END, START, END]


def test_end_waits_while_a_region_is_half_covered():
    layout = StreamLayout(make_grids(1, 2, 3), NUM_CODES)
    state = StreamState(layout, torch.zeros(1, dtype=torch.long))
    end_allowed = []
    for position, content in ((4, START), (3, END), (10, START), (0, 1), (5, 1), (4, 1), (1, 1)):
        assert state.allowed_positions()[0, position]
        state.append(torch.tensor([position]), torch.tensor([content]))
        end_allowed.append(bool(state.allowed_positions()[0, 9]) and int(state.granularity) == 1)
    assert end_allowed[2:] == [True, False, False, False, True]  # none, one, two, three and all four cells of a region


@pytest.mark.parametrize("order", ORDERS)
def test_fixed_fine_positions_are_those_of_the_training_stream(order):
    grids = make_grids(2, 3, 2)
    choices = iter([4, 1, 7])  # two coarse cells, end; afterwards no position is left to choose
    codes = itertools.cycle(range(NUM_CODES))

    def pick(allowed):
        if len(allowed) == 1:
            return allowed[0]
        choice = next(codes if len(allowed) == NUM_CODES and max(allowed) < NUM_CODES else choices)
        assert choice in allowed
        return choice

    layout, state, _, contents, positions, _ = walk(grids, order, [0], True, pick)
    codes, grain_map = state.grids()
    assert grain_map.tolist() == [[[1, 0, 1], [1, 0, 1]]]
    stream = layout.pack(codes, grain_map)
    assert torch.equal(positions[0, 4:], stream.positions[0, 4:])
    assert torch.equal(contents[0, 4:], stream.contents[0, 4:])


def test_images_advance_on_their_own_clocks():
    grids = make_grids(2, 2, 2)
    first = iter([True])

    def pick(allowed):  # the first image ends its coarse part at once, the second one fills it
        return max(allowed) if max(allowed) == 5 and next(first, False) else min(allowed)

    _, state, slow, contents, _, together = walk(grids, "row-first", [0, 0], True, pick)
    assert (1, 0) in together
    assert state.lengths.tolist() == [16 + 4, 4 + 4]
    assert contents[1, 8:].tolist() == [PAD] * 12


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
