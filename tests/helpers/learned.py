"""Learned step tables without a fit: those of dpm++ with other numbers."""

import torch

from fastprior.diffusion.learned_tables import Agreement, HeldOut, LearnedTable
from fastprior.diffusion.solvers import step_table
from fastprior.prior.learned import digests


def make_table(prior, evaluations: int = 5, scales=((1.0, 4.0),), seed: int = 0) -> LearnedTable:
    """A table that belongs to the weights of a prior, no number of which is round."""
    near = step_table(prior.noise_scheduler, "dpm++", evaluations, prior.prediction, spacing="logsnr")
    draw = torch.Generator().manual_seed(seed)
    change = 0.1 * torch.randn(evaluations, 6, generator=draw, dtype=torch.float64)
    change[:, [0, 1, 5]] = 0
    held_out = tuple(HeldOut(end, Agreement(1 - 1e-9, 0.1 + 0.2, -1 / 3), Agreement(0.9, 0.3, -1)) for end in scales[0])
    learned = dict(scales=scales, digests=digests(prior), held_out=held_out)
    return LearnedTable.of(near.times, near.rows + change, **learned)


def with_table(prior, *args, **kwargs):
    """The prior with such a table."""
    table = make_table(prior, *args, **kwargs)
    prior.learned_tables = {**prior.learned_tables, len(table): table}
    return prior


def assert_same_tables(ours, theirs) -> None:
    """Every number is the same to the last bit."""
    assert ours.keys() == theirs.keys()
    for key, own in ours.items():
        other = theirs[key]
        assert torch.equal(own.rows, other.rows) and own.rows.dtype == torch.float64
        assert (own.times, own.scales, own.held_out, own.draws_noise) == (
            other.times, other.scales, other.held_out, other.draws_noise,
        )  # fmt: skip
        assert dict(own.digests) == dict(other.digests) and own.solver == other.solver == "learned"
