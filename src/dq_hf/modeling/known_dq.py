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
    num_granularities, region_grid, fine_grid = len(config.grid_sizes), config.grid_sizes[0], config.grid_sizes[-1]
    if grain_map is None:
        if codes is not None:
            raise ValueError("codes are known only with their granularities: give grain_map, too")
        grain_map = torch.full((1, *region_grid), UNKNOWN)
    grain_map = as_batch("grain_map", grain_map)
    grain_map = check_indices("grain_map", grain_map, ("B", *region_grid), num_granularities, device, UNKNOWN)
    batch = len(grain_map)
    if batch == 0:
        raise ValueError("grain_map must hold at least one map, got a batch of 0")
    if codes is None:
        codes = torch.full((1, *fine_grid), UNKNOWN)
    codes = as_batch("codes", codes)
    codes = check_indices("codes", codes, ("B", *fine_grid), config.codebook_size, device, UNKNOWN)
    if len(codes) not in (1, batch):
        raise ValueError(f"codes must be of one image or of each of {batch} grain maps, got {len(codes)}")
    codes = codes.expand(batch, -1, -1)
    if ((codes != UNKNOWN) & (expand_grain_map(grain_map, num_granularities) == UNKNOWN)).any():
        raise ValueError("codes are known only with their granularities: grain_map is -1 where codes are not")
    check_cells(codes, grain_map.clamp(min=0), num_granularities)
    counts = None if fine_ratio is None else region_counts(fine_ratio, grain_map, num_granularities)
    return Known(codes.flatten(1), grain_map.flatten(1), counts)


def region_counts(fine_ratio, grain_map, num_granularities):
    """How many regions of each granularity `fine_ratio` means, (K,) long; ValueError if more are known in (B, h, w)."""
    num_regions = grain_map[0].numel()
    counts = share_counts(check_shares("fine_ratio", fine_ratio, num_granularities), num_regions)
    for granularity, count in enumerate(counts):
        most = int((grain_map == granularity).flatten(1).sum(1).max())
        if most > count:
            raise ValueError(
                f"fine_ratio {fine_ratio} means {count} of {num_regions} regions of granularity {granularity}, but "
                f"grain_map, or what stays of the image, has {most}"
            )
    return torch.tensor(counts, device=grain_map.device)


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

    def select(self, rows):
        """As in `StreamState`."""
        chosen = super().select(rows)
        chosen.known = replace(self.known, codes=self.known.codes[rows], grain_map=self.known.grain_map[rows])
        return chosen

    def allowed_cells_and_end(self):
        """As in `StreamState`, of those what agrees with what is known."""
        cells, end = self._agreeing_with_grain_map()
        return (cells, end) if self.known.counts is None else self._agreeing_with_counts(cells, end)

    def allowed_contents(self, positions):
        """As in `StreamState`; a code that is known is allowed alone."""
        is_cell = self._special(positions) < 0
        cells = torch.where(is_cell, positions, 0).view(len(positions), -1)
        code = self.known.codes.gather(1, self.tables.top_left[self.granularity].gather(1, cells)).view_as(positions)
        is_known = is_cell & (code != UNKNOWN)
        return torch.where(
            is_known[..., None], self.content_ids == code[..., None], super().allowed_contents(positions)
        )

    def steer(self, logits):
        """Position logits (B, V) that keep the counts from being used up by the first rows.

        One factor multiplies the odds of every region ahead that it begins rather than is passed over, such that of the
        next ones, as many as a row of regions has, the share that is still wanted is to be expected. So the model decides
        which regions come.
        """
        if self.known.counts is None:
            return logits
        order, end = self.tables.order[self.granularity], self.tables.num_cells[self.granularity][:, None] + 1
        allowed_cells, allowed_end = self._agreeing_with_grain_map()
        scores = logits.float()
        cell_scores = scores[:, : order.shape[1]].masked_fill(~allowed_cells, -torch.inf).gather(1, order)
        end_scores = scores.gather(1, end).masked_fill(~allowed_end[:, None], -torch.inf)
        log_odds = choosing_log_odds(torch.cat([cell_scores, end_scores], dim=1))  # of cells in the training order

        known, unknown, room = self._regions_ahead()
        next_row = unknown & (cell_scores > -torch.inf)
        next_row &= next_row.cumsum(1) <= self.layout.grid_sizes[0][1]
        share = (room - known.sum(1, keepdim=True)) / unknown.sum(1, keepdim=True).clamp(min=1)
        log_probs = choosing_log_probs(log_odds + unknown * log_factor(log_odds, next_row, share))

        steered = torch.full_like(scores, -torch.inf).scatter(1, order, log_probs[:, :-1])
        steered = steered.scatter(1, end, log_probs[:, -1:])
        return torch.where((self.is_finest | self.start_is_next)[:, None], logits, steered)

    def _agreeing_with_grain_map(self):
        """What `allowed_cells_and_end` gives where there are no counts."""
        cells, end = super().allowed_cells_and_end()
        rank, is_finest = self.tables.rank[self.granularity], self.is_finest  # (B, F), (B,)
        wanted = self.known.grain_map.gather(1, self.tables.region[self.granularity])
        is_wanted = wanted == self.granularity[:, None]
        due = torch.where(self._free_cells() & is_wanted, rank, rank.shape[1]).amin(1)  # the next one that is known
        fits = (is_wanted | (wanted == UNKNOWN)) & (rank <= due[:, None])
        return cells & (fits | is_finest[:, None]), end & ((due == rank.shape[1]) | is_finest)

    def _agreeing_with_counts(self, cells, end):
        """Which of these cells and ends leave the counts within reach."""
        known, unknown, room = self._regions_ahead()
        known_behind, unknown_behind = (each.flip(1).cumsum(1).flip(1) - each.long() for each in (known, unknown))
        left = room - (known | unknown).long() - known_behind
        in_reach = (left >= 0) & (left <= unknown_behind)
        fits = torch.zeros_like(in_reach).scatter(1, self.tables.order[self.granularity], in_reach)
        is_finest = self.is_finest
        return cells & (fits | is_finest[:, None]), end & ((room[:, 0] == 0) | is_finest)

    def _regions_ahead(self):
        """Cells (B, F) in the training order that begin a region which is known to get this granularity, or may get it,
        and for how many regions of this granularity there is room (B, 1)."""
        tables, granularity, order = self.tables, self.granularity[:, None], self.tables.order[self.granularity]
        top_left = tables.top_left[self.granularity].gather(1, order)
        begins = tables.opens_region[self.granularity].gather(1, order)
        wanted = self.known.grain_map.gather(1, tables.region[self.granularity].gather(1, order))
        taken = self.taken.gather(1, top_left)
        num_here = (begins & taken & (self.fine_grain_map.gather(1, top_left) == granularity)).sum(1, keepdim=True)
        behind_last = torch.arange(order.shape[1], device=order.device) > self.last_rank()[:, None]
        begins = begins & ~taken & behind_last
        room = self.known.counts[granularity] - num_here
        return begins & (wanted == granularity), begins & (wanted == UNKNOWN), room


def choosing_log_odds(scores):
    """Log odds (B, N) that each of N options is chosen rather than one behind it, drawn by the softmax of N + 1 scores."""
    behind = scores[:, 1:].flip(1).logcumsumexp(1).flip(1)
    scores = scores[:, :-1]
    return torch.where(scores == -torch.inf, scores, scores - behind)


def choosing_log_probs(log_odds):
    """The inverse: log-probabilities (B, N + 1) of the options."""
    passed = torch.nn.functional.logsigmoid(-log_odds).cumsum(1)  # up to each option, itself included
    chosen = torch.nn.functional.logsigmoid(log_odds) + torch.nn.functional.pad(passed[:, :-1], (1, 0))
    return torch.cat([chosen, passed[:, -1:]], dim=1)


def log_factor(log_odds, counted, share):
    """Logarithm (B, 1) of the factor of odds (B, N) with which this share (B, 1) of those that are counted is to be expected."""
    low, high = torch.full_like(share, -40), torch.full_like(share, 40)
    wanted = share * counted.sum(1, keepdim=True)
    for _ in range(20):  # halvings
        middle = (low + high) / 2
        too_many = ((log_odds + middle).sigmoid() * counted).sum(1, keepdim=True) > wanted
        low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
    return middle
