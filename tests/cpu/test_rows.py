"""Steps in C of rows that are each at a step of their own: the bits of each row alone, whatever else runs."""

import random as chance

import pytest
import torch

from fastprior.kernels import ops
from fastprior.kernels.cpu import library as cpu_library
from helpers.cpu_cases import BF16, FP32, NEEDS_KERNELS
from helpers.step_cases import CONFIGS, STEPS, conditioned, inputs, network, prepare

pytestmark = [NEEDS_KERNELS, pytest.mark.skipif(cpu_library.most_rows(FP32) < 32, reason="these steps have 32 tokens")]
PROMPTS = 7


@torch.no_grad()
def prepared(net, prompts=PROMPTS, places=PROMPTS, alike=True):
    """Rows behind the prefixes of several prompts; two solvers."""
    cond = conditioned(net, prompts, 1)
    rows = net.prepare_rows(cond, prompts=prompts, places=places, alike=alike)
    for prompt in range(prompts):
        rows.keep(prompt, cond.cache.k[:, prompt : prompt + 1], cond.cache.v[:, prompt : prompt + 1])
    _, _, null, table = inputs(net, 1)
    tables = [
        rows.table(cond.time_tokens, table * factor, null, clamp, 1.5)
        for factor, clamp in ((1, None), (0.7, "l2"), (0.5, "range"))
    ]
    return rows, tables


def step_of(net, tables, row, index):
    noise = inputs(net, PROMPTS)[1][(index + row) % STEPS]
    drawn = None if noise is None else noise[row]
    return ops.RowStep(row, PROMPTS - 1 - row, tables[row % 3], index, (1.0, 2.5)[row % 2], drawn)


def alone(net, rows, tables, row):
    rows.start(row, inputs(net, PROMPTS)[0][row])
    for index in range(STEPS):
        rows.step([step_of(net, tables, row, index)])
    return rows.x[row].clone()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_have_the_bits_that_each_has_alone(config, dtype):
    net = network(dtype, **config)
    rows, tables = prepared(net)
    wanted = [alone(net, rows, tables, row) for row in range(PROMPTS)]
    assert all(w.isfinite().all() for w in wanted) and not torch.equal(wanted[0], wanted[1])
    draw, waiting, index = chance.Random(0), list(range(PROMPTS)), {}
    while waiting or index:
        while waiting and (not index or draw.random() < 0.5):
            index[row := waiting.pop()] = 0
            rows.start(row, inputs(net, PROMPTS)[0][row])
        order = draw.sample(list(index), len(index))
        rows.step([step_of(net, tables, row, index[row]) for row in order])
        index = {row: at + 1 for row, at in index.items() if at + 1 < STEPS}
    assert all(map(torch.equal, rows.x, wanted))


def test_a_row_alone_is_a_run():
    net = network()
    rows, _ = prepared(net, prompts=2)
    x, noise, null, table = inputs(net, 2)
    tables = rows.table(conditioned(net, 2, 1).time_tokens, table, null, None, 1.5)
    run = prepare(net, 1)
    run.start(x)
    run(0, noise)
    for row in range(2):
        rows.start(row, x[row])
        for index in range(STEPS):
            drawn = None if noise[index] is None else noise[index][row]
            rows.step([ops.RowStep(row, row, tables, index, 2.5, drawn)])
    assert torch.equal(rows.x[:2], run.x)


def test_each_sample_of_a_run_has_a_scale_of_its_own():
    net, scales = network(), torch.linspace(0.5, 4, 8)
    runs = [prepare(net, scale=scale) for scale in (scales, *scales.tolist())]
    x, noise, *_ = inputs(net, 8)
    for run in runs:
        run.start(x)
        run(0, noise)
    for row, run in enumerate(runs[1:]):
        assert torch.equal(runs[0].x[row], run.x[row])
    assert not torch.equal(runs[1].x[1], runs[2].x[1])


def test_bad_arguments():
    net = network()
    rows, tables = prepared(net, places=3)
    one = ops.RowStep(0, 0, tables[0], 0, 1.0, None)
    for steps in ([], [one] * 2, [one._replace(place=place) for place in range(rows.most + 1)]):
        with pytest.raises(ValueError, match=rf"{len(steps)} rows; they must be 1 to {rows.most}, each in a place"):
            rows.step(steps)
    for change in (dict(place=3), dict(place=-1), dict(prompt=PROMPTS), dict(index=STEPS), dict(index=-1)):
        with pytest.raises(IndexError, match=rf"place .* of 3, prompt .* of {PROMPTS}, step .* of {STEPS}"):
            rows.step([one._replace(**change)])
    time, (_, _, null, table) = conditioned(net, 1, 1).time_tokens, inputs(net, 1)
    with pytest.raises(ValueError, match=r"null_table has shape \(4, 40\); it must be \(5, 40\)"):
        rows.table(time, table, null[:4], None, 1.0)
    with pytest.raises(ValueError, match="must be fp32 on the CPU"):
        rows.table(time.double(), table, null, None, 1.0)


@pytest.mark.parametrize("config", [dict(self_cond=True), dict(num_image_embeds=2)])
def test_left_to_others(config):
    net = network(**config)
    assert net.prepare_rows(conditioned(net, 1, 1), prompts=1, places=1) is None
    with ops.using("reference"):
        assert network().prepare_rows(conditioned(network(), 1, 1), prompts=1, places=1) is None
