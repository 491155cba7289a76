"""What is known of images before they are drawn: codes, granularities, or how many regions have which (our own addition).

Editing gives the codes and the grain map of what stays, steering a grain map or a share of fine regions.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from .constraints_dq import StreamState
from .grain_map_dq import check_cells, check_shares, expand_grain_map, share_counts
from .modeling_utils_dq import check_indices

UNKNOWN = -1  # in codes and grain maps: the model decides


@dataclass(frozen=True)
class Known:
    """What is known of a batch of images, B images, K granularities, F fine cells, R regions.

    Args:
        codes: (B, F) long, `UNKNOWN` where the model decides.
        grain_map: (B, R) long, likewise.
        counts: (K,) long, regions of each granularity, or None.
    """

    codes: torch.Tensor
    grain_map: torch.Tensor
    counts: torch.Tensor | None = None

    def __len__(self):
        return len(self.grain_map)

    def rows(self, batch, repeats=1):
        """The same of `batch` images, each `repeats` times in turn."""
        codes, grain_map = (
            each.expand(batch, -1).repeat_interleave(repeats, dim=0) for each in (self.codes, self.grain_map)
        )
        return Known(codes, grain_map, self.counts)

    @property
    def anything(self):
        """Of which images something is known, (B,) bool."""
        return (self.grain_map != UNKNOWN).any(1) | (self.counts is not None)


def known_elements(config, device, codes=None, grain_map=None, fine_ratio=None) -> Known | None:
    """What the options of `generate` say is known, of one image or of each; None if they say nothing.

    Args:
        config: `DQTransformerConfig`.
        device: of the result.
        codes, grain_map, fine_ratio: as in `DQTransformerForImageGeneration.generate_steps`.

    Raises:
        TypeError, ValueError: of another type, shape or range; codes without a granularity, or several in one cell;
            more regions of a granularity than `fine_ratio` has.
    """
    if codes is None and grain_map is None and fine_ratio is None:
        return None
    num_granularities, (rows, columns) = len(config.grid_sizes), config.grid_sizes[0]
    if grain_map is None:
        if codes is not None:
            raise ValueError("codes are known only with their granularities: give grain_map, too")
        grain_map = torch.full((1, rows, columns), UNKNOWN)
    grain_map = as_batch("grain_map", grain_map)
    grain_map = check_indices("grain_map", grain_map, (None, rows, columns), num_granularities, device, UNKNOWN)
    if len(grain_map) == 0:
        raise ValueError("grain_map must hold at least one map, got a batch of 0")
    if codes is None:
        codes = torch.full((1, *config.grid_sizes[-1]), UNKNOWN)
    codes = as_batch("codes", codes)
    codes = check_indices("codes", codes, (None, *config.grid_sizes[-1]), config.codebook_size, device, UNKNOWN)
    if len(codes) not in (1, len(grain_map)):
        raise ValueError(f"codes must be of one image or of each of {len(grain_map)} grain maps, got {len(codes)}")
    codes = codes.expand(len(grain_map), -1, -1)
    if ((codes != UNKNOWN) & (expand_grain_map(grain_map, num_granularities) == UNKNOWN)).any():
        raise ValueError("codes are known only with their granularities: grain_map is -1 where codes are not")
    check_cells(codes, grain_map.clamp(min=0), num_granularities)
    codes, grain_map = codes.flatten(1), grain_map.flatten(1)
    if fine_ratio is None:
        return Known(codes, grain_map)
    shares = check_shares("fine_ratio", fine_ratio, num_granularities)
    counts = torch.tensor(share_counts(shares, rows * columns), device=device)
    for granularity, count in enumerate(counts.tolist()):
        most = int((grain_map == granularity).sum(1).max())
        if most > count:
            raise ValueError(
                f"fine_ratio {fine_ratio} means {count} of {rows * columns} regions of granularity {granularity}, but "
                f"grain_map, or what stays of the image, has {most}"
            )
    return Known(codes, grain_map, counts)


def as_batch(name, values):
    """A tensor of a tensor, an array or lists; one of two dimensions is a batch of one image."""
    if not isinstance(values, torch.Tensor):
        try:
            values = torch.as_tensor(np.array(values, order="C"))  # torch has no negative strides
        except (TypeError, ValueError, RuntimeError):  # strings, None, ragged lists
            raise TypeError(f"{name} must be integers, got {values!r}") from None
    return values[None] if values.dim() == 2 else values


class KnownState(StreamState):
    """Streams of which something is known.

    Where something is, cells come in the training order. A position is then drawn among the free cells behind the last
    one up to the next that is known to have this granularity; a granularity ends once none is left. Counts of regions
    are kept in the same way: no region may come without room for it, or be passed over if those behind do not suffice.
    What `StreamState` allows and this does not is what contradicts what is known.
    """

    def __init__(self, layout, labels, known, fixed_fine_positions=True):
        """
        Args:
            layout, labels, fixed_fine_positions: as in `StreamState`.
            known: `Known`, of as many images as there are labels.
        """
        super().__init__(layout, labels, fixed_fine_positions, ascending=known.anything)
        self.known = known
        self.order = self.tables.rank.argsort(1)  # (K, F): cells in the training order

    def select(self, rows):
        """As in `StreamState`."""
        chosen = super().select(rows)
        chosen.known = replace(self.known, codes=self.known.codes[rows], grain_map=self.known.grain_map[rows])
        return chosen

    def allowed_positions(self):
        """As in `StreamState`, of those what agrees with what is known."""
        allowed = super().allowed_positions() & self._agrees_with_grain_map()
        return allowed if self.known.counts is None else allowed & self._agrees_with_counts()

    def allowed_contents(self, positions):
        """As in `StreamState`; a code that is known is allowed alone."""
        num_cells = self.tables.num_cells[self.granularity]
        is_cell = (positions.t() < num_cells).t()[..., None]
        cells = torch.where(is_cell[..., 0], positions, 0).view(len(positions), -1)
        code = self.known.codes.gather(1, self.tables.top_left[self.granularity].gather(1, cells))
        code = code.view_as(positions)[..., None]
        is_known = is_cell & (code != UNKNOWN)
        return torch.where(is_known, self.content_ids == code, super().allowed_contents(positions))

    def steer(self, logits):
        """Position logits (B, V) that keep the counts from being used up by the first rows.

        One factor multiplies the odds of every region ahead that it begins rather than is passed over, such that of the
        next ones, as many as a row of regions has, the share that is still wanted is to be expected. So the model decides
        which regions come.
        """
        if self.known.counts is None:
            return logits
        order, num_cells = self.order[self.granularity], self.tables.num_cells[self.granularity][:, None]
        known, unknown, room = self._regions_ahead()
        options = super().allowed_positions() & self._agrees_with_grain_map()
        scores = logits.float().masked_fill(~options, -torch.inf)
        end = scores.gather(1, num_cells + 1)
        cells = scores[:, : order.shape[1]].masked_fill(~self.tables.is_cell[self.granularity], -torch.inf)
        cells = cells.gather(1, order)
        behind = torch.cat([cells[:, 1:], end], dim=1).flip(1).logcumsumexp(1).flip(1)
        log_odds = torch.where(cells == -torch.inf, cells, cells - behind)
        next_row = unknown & (cells > -torch.inf)
        next_row &= next_row.cumsum(1) <= self.layout.grid_sizes[0][1]
        share = (room - known.sum(1, keepdim=True)) / unknown.sum(1, keepdim=True).clamp(min=1)
        log_odds = log_odds + unknown * log_factor(log_odds, next_row, share)

        passed = torch.nn.functional.logsigmoid(-log_odds).cumsum(1)
        cells = torch.nn.functional.logsigmoid(log_odds) + torch.nn.functional.pad(passed[:, :-1], (1, 0))
        steered = scores.scatter(1, order, cells).scatter(1, num_cells + 1, passed[:, -1:])
        return torch.where((self._is_finest() | self.start_is_next)[:, None], logits, steered)

    def _is_finest(self):
        return self.granularity == self.layout.num_granularities - 1

    def _agrees_with_grain_map(self):
        """Which positions contradict no known granularity, (B, V) bool."""
        tables, granularity = self.tables, self.granularity[:, None]
        rank, region = tables.rank[self.granularity], tables.region[self.granularity]  # (B, F)
        wanted = self.known.grain_map.gather(1, region)
        free = ~self.taken.gather(1, tables.top_left[self.granularity]) & tables.is_cell[self.granularity]
        due = torch.where(free & (wanted == granularity), rank, rank.shape[1]).amin(1, keepdim=True)
        fits = (wanted == UNKNOWN) | (wanted == granularity)
        return self._with_end(fits & (rank <= due), due == rank.shape[1])

    def _agrees_with_counts(self):
        """Which positions leave the counts within reach, (B, V) bool."""
        known, unknown, room = self._regions_ahead()
        known_behind, unknown_behind = (each.flip(1).cumsum(1).flip(1) - each.long() for each in (known, unknown))
        left = room - (known | unknown).long() - known_behind
        fits = (left >= 0) & (left <= unknown_behind)
        return self._with_end(torch.zeros_like(fits).scatter(1, self.order[self.granularity], fits), room == 0)

    def _with_end(self, cells, end):
        """What of all positions is allowed (B, V), from what of the cells (B, F) and whether the end (B, 1) is."""
        num_cells = self.tables.num_cells[self.granularity][:, None]
        allowed = torch.nn.functional.pad(cells, (0, len(self.position_ids) - cells.shape[1]))
        allowed |= self.position_ids >= num_cells
        allowed &= (self.position_ids != num_cells + 1) | end
        return allowed | self._is_finest()[:, None]

    def _regions_ahead(self):
        """Cells (B, F) in the training order that begin a region which is known to get this granularity, or may get it,
        and for how many regions of this granularity there is room (B, 1)."""
        tables, granularity, order = self.tables, self.granularity[:, None], self.order[self.granularity]
        top_left = tables.top_left[self.granularity].gather(1, order)
        begins = tables.opens_region[self.granularity].gather(1, order)
        wanted = self.known.grain_map.gather(1, tables.region[self.granularity].gather(1, order))
        taken = self.taken.gather(1, top_left)
        num_here = (begins & taken & (self.fine_grain_map.gather(1, top_left) == granularity)).sum(1, keepdim=True)
        behind_last = torch.arange(order.shape[1], device=order.device) > self.last_rank()[:, None]
        begins = begins & ~taken & behind_last
        room = self.known.counts[granularity] - num_here
        return begins & (wanted == granularity), begins & (wanted == UNKNOWN), room


def log_factor(log_odds, counted, share):
    """Logarithm (B, 1) of the factor of odds (B, N) with which this share (B, 1) of those that are counted is to be expected."""
    low, high = torch.full_like(share, -40), torch.full_like(share, 40)
    wanted = share * counted.sum(1, keepdim=True)
    for _ in range(20):  # halvings
        middle = (low + high) / 2
        too_many = ((log_odds + middle).sigmoid() * counted).sum(1, keepdim=True) > wanted
        low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
    return middle
