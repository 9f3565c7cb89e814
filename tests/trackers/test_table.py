"""What the console shows of a run: lines to read, and no dicts."""

import re

import pytest
import torch

from fastprior.trackers.table import Table
from helpers.tracker_cases import tracker

TRAINING = {"training/l2-loss": 0.65, "lr": 1.1e-4, "epoch": 0, "samples_seen": 160_000, "bad_steps": 0}
EVALUATION = {
    "validation/online l2-loss": 0.0957, "validation/ema l2-loss": 0.0917,
    "validation/ema similarity with text [steps=16]": 0.5, "validation/ema similarity with text [steps=64]": 0.75,
    "validation/ema median rank [steps=64]": 12345.6, "test/ema median rank [steps=64]": float("nan"),
}  # fmt: skip


def columns(line):
    return re.split(r"\s{2,}", line.strip())


def test_training_is_a_table_with_a_header_now_and_then():
    table = Table()
    lines = [line for step in range(60) for line in table.lines(TRAINING, step)]
    assert len(lines) == 60 + 3 and len(set(map(len, lines))) == 1
    assert columns(lines[0]) == ["step", "l2-loss", "lr", "epoch", "samples seen", "bad steps"]
    assert columns(lines[1]) == ["0", "0.6500", "0.00011", "0", "160,000", "0"]
    for title, cell in zip(re.finditer(r"\S+(?: \S+)?", lines[0]), re.finditer(r"\S+", lines[1])):
        assert title.end() == cell.end()
    other = table.lines({**TRAINING, "samples_per_second": torch.tensor(2e6)}, 60)
    assert columns(other[0])[-1] == "samples per second" and columns(other[1])[-1] == "2,000,000"


def test_an_evaluation_is_a_block():
    table = Table()
    table.lines(TRAINING, 9)
    lines = table.lines(EVALUATION, 1000)
    assert lines[0] == "step 1,000"
    assert [columns(line) for line in lines[1:]] == [
        ["validation", "online", "ema", "ema, 16 steps", "ema, 64 steps"],
        ["l2-loss", "0.09570", "0.09170"],
        ["similarity with text", "0.5000", "0.7500"],
        ["median rank", "12,346"],
        ["test", "ema, 64 steps"],
        ["median rank", "nan"],
    ]
    ends = [
        line.rindex(cell) + len(cell) for line, cell in zip(lines[1:5], ("64 steps", "0.09170", "0.7500", "12,346"))
    ]
    assert ends[0] == ends[2] == ends[3] > ends[1]
    assert len(table.lines(TRAINING, 10)) == 2  # with a header again


@pytest.mark.parametrize("log, step, line", [
    ({"tracking/epoch": 3}, 5, "step 5  tracking/epoch 3"), ({"loss": torch.tensor([0.25])}, None, "loss 0.2500"),
    ({}, 7, "step 7"), ({"a": None, "b": True}, 1, "step 1  a None, b True"),
])  # fmt: skip
def test_one_or_two_values_are_a_line(log, step, line):
    assert Table().lines(log, step) == [line]


def test_loggers_print_tables(tmp_path, capsys):
    run = tracker(tmp_path, log_type="console")
    for step in (1, 2):
        run.log(TRAINING, step=step)
    run.log(EVALUATION, step=2)
    out = capsys.readouterr().out
    assert out.count("samples seen") == 1 and "ema, 64 steps" in out and "{" not in out
