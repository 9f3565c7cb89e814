"""Learned step tables in files: exact, beside weights that stay as they are, and checked as all else is."""

import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from fastprior.checkpoints.conversion import convert
from fastprior.checkpoints.dalle2 import load, save, save_peer
from fastprior.checkpoints.tables import add_table, check_keeps_tables
from fastprior.diffusion.learned_tables import read_tables
from fastprior.trainer import DiffusionPriorTrainer
from helpers.learned import assert_same_tables, make_table, with_table
from helpers.priors import make_prior, make_text, sample

RUN = dict(timesteps=5, solver="learned", cond_scale=2.5)


def make_file(path, **kwargs):
    prior = make_prior(timesteps=30)
    save(prior, path, metadata={"note": "é"}, **kwargs)
    return prior


def test_round_trip(tmp_path):
    prior = with_table(with_table(make_prior(timesteps=30)), 7, ((1.0, 1.0), (2.0, 1e3)))
    save(prior, tmp_path / "own.safetensors")
    other = load(tmp_path / "own.safetensors")
    assert_same_tables(other.learned_tables, prior.learned_tables)
    assert "learned table: 7 evaluations, cond_scale 1 and 2:1000" in other.load_report.notes
    text = make_text(2, 32)
    assert torch.equal(sample(other, text, **RUN), sample(prior, text, **RUN))
    in_bf16 = load(tmp_path / "own.safetensors", dtype=torch.bfloat16)
    assert sample(in_bf16, text, **RUN).isfinite().all()


def test_adding_leaves_all_else(tmp_path):
    path = tmp_path / "own.safetensors"
    prior = make_file(path)
    before = path.read_bytes()
    first, again, other = make_table(prior), make_table(prior, seed=1), make_table(prior, 3)
    for table in (first, other, again):
        add_table(path, table)
    after = path.read_bytes()
    sizes = [int.from_bytes(data[:8], "little") for data in (before, after)]
    assert before[8 + sizes[0] :] == after[8 + sizes[1] :] and sizes[1] % 8 == 0
    headers = [json.loads(data[8 : 8 + size]) for data, size in zip((before, after), sizes)]
    records = [json.loads(header.pop("__metadata__")["fastprior"]) for header in headers]
    assert headers[0] == headers[1] and len(records[1].pop("learned_tables")) == 2 and records[0] == records[1]
    loaded = load(path)
    assert_same_tables(loaded.learned_tables, {3: other, 5: again})
    assert loaded.load_report.metadata == {"note": "é"}
    assert [p.name for p in tmp_path.iterdir()] == ["own.safetensors"]


def test_converted_files_keep_them_and_the_peers_do_not(tmp_path):
    prior = with_table(make_prior(timesteps=30))
    prior.net.bfloat16()
    prior = with_table(prior)
    save(prior, tmp_path / "own.safetensors")
    convert(tmp_path / "own.safetensors", tmp_path / "again.safetensors")  # in fp32
    again = load(tmp_path / "again.safetensors")
    assert_same_tables(again.learned_tables, prior.learned_tables)
    assert again.net.learned_query.dtype == torch.float32 and sample(again, make_text(2, 32), **RUN).isfinite().all()
    report = convert(tmp_path / "own.safetensors", tmp_path / "peer.pth")
    assert "its learned tables were left out: dalle2-pytorch has none" in str(report)
    save_peer(prior, tmp_path / "other.pth")
    for name in ("peer.pth", "other.pth"):
        assert "fastprior" not in torch.load(tmp_path / name) and not load(tmp_path / name).learned_tables


@pytest.mark.slow
@pytest.mark.parametrize("peer", [False, True])
def test_a_trainers_checkpoint(tmp_path, peer):
    """A table of the moving average, which is what `load` takes; everything else in it is what it was."""
    path = tmp_path / "checkpoint.pth"
    trainer = DiffusionPriorTrainer(make_prior(timesteps=30), device="cpu", ema_update_after_step=0, ema_update_every=1)
    pairs = dict(**make_text(4, 32), image_embed=torch.randn(4, 32))
    for _ in range(3):
        trainer(**pairs)
        trainer.update()
    (trainer.export_for_peer if peer else trainer.save)(path)
    before = torch.load(path)
    averaged = load(path)
    add_table(path, make_table(averaged))
    loaded, after = load(path), torch.load(path)
    assert_same_tables(loaded.learned_tables, {5: make_table(averaged)})
    assert sample(loaded, make_text(2, 32), **RUN).isfinite().all()
    with pytest.raises(ValueError, match="was learned for other weights"):
        sample(load(path, weights="model"), make_text(2, 32), **RUN)
    assert len(after["fastprior"].pop("learned_tables")) == 1
    assert_equal(before, after)
    if not peer:
        trainer.load(path)


def assert_equal(one, other):
    assert type(one) is type(other)
    if torch.is_tensor(one):
        assert torch.equal(one, other) and one.dtype == other.dtype
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_equal(*pair)
    else:
        assert one == other


def test_files_that_keep_no_tables(tmp_path):
    prior = make_prior(timesteps=30)
    table = make_table(prior)
    safetensors.torch.save_model(prior, tmp_path / "foreign.safetensors")
    save_peer(prior, tmp_path / "peer.pth")
    torch.save({"model": prior.state_dict(), "fastprior": {"format": 1}, "odd": {1, 2}}, tmp_path / "odd.pth")
    torch.save({"fastprior": {"format": 1}, "deep": nested(100)}, tmp_path / "deep.pth")
    torch.save([{"fastprior": {}}], tmp_path / "list.pth")
    header = json.dumps({"__metadata__": 3}).encode()
    (tmp_path / "damaged.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for name, message in (("foreign.safetensors", "does not record"), ("peer.pth", "does not record"),
                          ("odd.pth", "odd.pth holds a set"), ("deep.pth", "deep.pth holds a foreign object"),
                          ("list.pth", "does not record"), ("damaged.safetensors", "does not record")):  # fmt: skip
        before = (tmp_path / name).read_bytes()
        for refuse in (check_keeps_tables, lambda path: add_table(path, table)):
            with pytest.raises(ValueError, match=message):
                refuse(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(FileNotFoundError):
        add_table(tmp_path / "none.safetensors", table)


def nested(depth):
    inner = [frozenset()]
    for _ in range(depth):
        inner = [inner]
    return inner


def test_damaged_tables_in_a_file(tmp_path):
    prior = make_prior(timesteps=30)
    for tables in (3, {"a": 1}, [1]):
        torch.save({"model": prior.state_dict(), "fastprior": {"learned_tables": tables}}, tmp_path / "own.pth")
        with pytest.raises(ValueError, match="its learned_tables are .*; it must be a list of tables"):
            add_table(tmp_path / "own.pth", make_table(prior))


def broken(**changes):
    return lambda entry: {**entry, **changes}


def with_row(*row):
    return lambda entry: {**entry, "rows": [*entry["rows"][:-1], list(row)]}


def with_judged(**changes):
    return lambda entry: {**entry, "held_out": [{**entry["held_out"][0], **changes}]}


BROKEN = [
    (lambda entry: 3, "=3; it must have the entries evaluations, times"),
    (lambda entry: {**entry, "more": 1}, " has digests, evaluations, held_out, more, rows"),
    (lambda entry: {"times": []}, " has times; it must"),
    (lambda entry: {**dict.fromkeys(map(str, range(99))), "times": []}, " has 0, 1, 10, 11"),
    (broken(evaluations=0), "evaluations=0; it must be at least 1"),
    (broken(evaluations=31), "evaluations=31; it must be at most 30"),
    (broken(evaluations=5.0), "evaluations=5.0"),
    (broken(evaluations=True), "evaluations=True"),
    (broken(evaluations=4), "times=[28, "),
    (broken(times=[29, 20, 20, 5, 0]), "times=20; it must be at most 19"),
    (broken(times=[30, 20, 10, 5, 0]), "times=30; it must be at most 29"),
    (broken(times=[29, 20, 10, 5, -1]), "times=-1; it must be at least 0"),
    (broken(times=[29, 20, 10, 5.5, 0]), "times=5.5"),
    (broken(times="29, 2"), "times='29, 2'"),
    (broken(times=None), "times=None; it must be a list of 5"),
    (broken(rows=[[0.0] * 6] * 4), "it must be a list of 5"),
    (broken(rows=[0.0] * 5), "rows=0.0; it must be a list of 6"),
    (with_row(0, 1, 0, 1, 0), "it must be a list of 6"),
    (with_row(0, 1, 0, 1, 0, 0.1), "the noise=0.1"),
    (with_row(0, 1, 0, float("nan"), 0, 0), "rows=nan"),
    (with_row(0, 1, 0, float("inf"), 0, 0), "rows=inf"),
    (with_row(0, 1, 0, -2e9, 0, 0), "rows=-2000000000.0"),
    (with_row(0, 1, 0, 10**400, 0, 0), "rows=an integer of"),
    (with_row(0, 1, 0, "1", 0, 0), "rows='1'"),
    (with_row(0, 1, 0, None, 0, 0), "rows=None"),
    (broken(scales=[]), "scales=[]; it must be 1 to 16 pairs"),
    (broken(scales=[[2.0, 1.0]]), "scales=1.0; it must be a finite number and at least 2.0"),
    (broken(scales=[[1.0]]), "pairs (least, most)"),
    (broken(scales=[[1.0, float("inf")]]), "scales=inf"),
    (broken(scales=[[1, 1]] * 17), "1 to 16 pairs"),
    (broken(scales={"a": 1}), "pairs (least, most)"),
    (broken(digests={}), "digests={}; it must be of 64 letters"),
    (broken(digests={"float32": "0"}), "64 letters"),
    (broken(digests={"int8": "0" * 64}), "64 letters"),
    (broken(digests=[1]), "64 letters"),
    (broken(held_out=None), "held_out=None; it must be a list"),
    (broken(held_out=[0] * 65), "it must be a list of 64 entries"),
    (broken(held_out=[1]), "held_out=1; it must have the entries cond_scale, learned, dpm++"),
    (with_judged(learned=[1, 2]), "learned=[1, 2]; it must be a list of 3"),
    (with_judged(**{"dpm++": [1, 2, 3]}), "dpm++=2; it must be a finite number"),
    (with_judged(cond_scale="1"), "cond_scale='1'"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BROKEN, ids=[message for _, message in BROKEN])
def test_broken_tables_are_refused(tmp_path, change, message):
    path, prior = tmp_path / "own.safetensors", make_prior(timesteps=30)
    save(with_table(prior), path)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["fastprior"])
    (entry,) = record["learned_tables"]
    assert len(read_tables([entry], 30)) == 1
    record["learned_tables"] = [change(entry)]
    for name, write in (
        ("own.safetensors", lambda p: safetensors.torch.save_file(
            dict(safetensors.torch.load_file(path)), p, metadata={"fastprior": json.dumps(record)})),
        ("own.pth", lambda p: torch.save({"model": prior.state_dict(), "fastprior": record}, p)),
    ):  # fmt: skip
        write(tmp_path / name)
        with pytest.raises(ValueError) as error:
            load(tmp_path / name)
        text = str(error.value)
        assert text.startswith(f"{tmp_path / name}: learned_tables[0]") and message in text and len(text) < 1000


@pytest.mark.parametrize("tables, message", [
    (3, "learned_tables=3; it must be a list"), (None, "learned_tables=None"), ({}, "learned_tables={}"),
    ([0] * 65, "at most 64 tables"),
])  # fmt: skip
def test_broken_lists_of_tables(tables, message):
    with pytest.raises(ValueError) as error:
        read_tables(tables, 30)
    assert message in str(error.value)


def test_two_of_one_number():
    entry = make_table(make_prior(timesteps=30)).to_json()
    with pytest.raises(ValueError, match="learned_tables has two of 5 evaluations"):
        read_tables([entry, entry], 30)
