"""Checkpoints that a trainer refuses: one clear error, and nothing of it has changed, on any process."""

import copy
import math
import random

import pytest
import torch

pytest.importorskip("accelerate")

from fastprior.trainer.ema import EMA
from fastprior.trainer.fsdp import local
from helpers.processes import MODES, SEVERAL, run_ranks
from helpers.trainer_cases import batch, distributed_accelerator, fp16_accelerator, make_trainer, run, small_prior

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
WEIGHT = "net.causal_transformer.project_out.weight"
NAN, INF = math.nan, math.inf


def everything(trainer):
    """A copy of all that loading changes."""
    state = copy.deepcopy(trainer.training_state())
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in trainer.optimizer.param_groups
    ]
    schedule = trainer.scheduler.base_lrs, trainer.scheduler.last_epoch, trainer.scheduler.get_last_lr()
    return state, copy.deepcopy((groups, schedule, trainer._bad_in_a_row))


def same(one, other) -> bool:
    if torch.is_tensor(one):
        return torch.equal(local(one), local(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def trained():
    """A trainer some steps on, and the state that it had before them."""
    trainer = make_trainer(warmup_steps=3)
    run(trainer, 2)
    state = copy.deepcopy(trainer.training_state())
    run(trainer, 2, 2)
    trainer._bad_in_a_row = 1
    return trainer, state


def peers(trainer, tmp_path):
    trainer.export_for_peer(tmp_path / "peer.pth")
    return torch.load(tmp_path / "peer.pth", weights_only=True)


def entry(*path, value):
    """A change of a payload: what stands at a path becomes a value, or what a function makes of it."""

    def change(payload):
        for key in path[:-1]:
            payload = payload[key]
        payload[path[-1]] = value(payload[path[-1]]) if callable(value) else value

    return change


def weight(value, kind="model"):
    return entry(kind, WEIGHT, value=value)


def moment(key, value):
    return entry("optimizer", "state", WEIGHT, key, value=value)


def poisoned(number):
    def change(tensor):
        tensor.view(-1)[-1] = number
        return tensor

    return change


CASES = {
    "model a list": (entry("model", value=[1]), "model is a list; it must be a dict"),
    "model with numbers as names": (entry("model", value={5: 1}), "keys must be strings"),
    "model of ints": (weight(1), "model: .*project_out.weight is a int; it must be a tensor"),
    "NaN weight": (weight(poisoned(NAN)), "model: .*project_out.weight holds NaN or infinity"),
    "infinite weight": (weight(poisoned(-INF)), "model: .*project_out.weight holds NaN or infinity"),
    "complex weight": (weight(lambda w: w.to(torch.complex64)), "dtype torch.complex64; it must be of floating point"),
    "int8 weight": (weight(lambda w: w.to(torch.int8)), "dtype torch.int8; it must be of floating point"),
    "meta weight": (weight(lambda w: w.to("meta")), "is a meta tensor; it must be a dense tensor"),
    "sparse weight": (weight(lambda w: w.to_sparse()), "layout torch.sparse_coo"),
    "CSR weight": (weight(lambda w: w.to_sparse_csr()), "layout torch.sparse_csr"),
    "nested weight": (weight(lambda w: torch.nested.nested_tensor([w])), "nested or quantized; it must be a dense"),
    "quantized weight": (
        weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), "nested or quantized; it must be a dense"
    ),
    "transposed weight": (weight(lambda w: w[:-1]), r"has shape \(15, 16\); it must be \(16, 16\)"),
    "NaN buffer": (entry("model", "noise_scheduler.betas", value=poisoned(NAN)), "model: noise_scheduler.betas holds"),
    "NaN average": (weight(poisoned(NAN), "ema_model"), "ema_model: .* holds NaN or infinity"),
    "sparse average": (weight(lambda w: w.to_sparse(), "ema_model"), "ema_model: .* layout torch.sparse_coo"),
    "average a list": (entry("ema_model", value=[1]), "ema_model is a list; it must be a dict"),
    "ema a list": (entry("ema", value=[1]), "ema is a list; it must be a dict"),
    "ema step a word": (entry("ema", "step", value="x"), "ema: step is 'x'; it must be an integer of at least 0"),
    "ema step negative": (entry("ema", "step", value=torch.tensor(-1)), "ema: step is -1"),
    "initted a list": (entry("ema", "initted", value=[True]), r"ema: initted is \[True\]"),
    "step a word": (entry("step", value="x"), "step is 'x'; it must be an integer"),
    "two steps": (entry("step", value=torch.tensor([1, 2])), r"step is a tensor of shape \(2,\)"),
    "step negative": (entry("step", value=torch.tensor([-5])), "step is -5; it must be an integer of at least 0"),
    "step NaN": (entry("step", value=NAN), "step is nan"),
    "step infinite": (entry("step", value=INF), "step is inf"),
    "step a half": (entry("step", value=2.5), "step is 2.5"),
    "step of 2**64": (entry("step", value=2**64), "step is 18446744073709551616"),
    "step complex": (entry("step", value=torch.tensor([1j])), "step is 1j"),
    "step on meta": (entry("step", value=torch.zeros(1, device="meta")), "step is a tensor"),
    "step None": (entry("step", value=None), "step is None"),
    "optimizer None": (entry("optimizer", value=None), "optimizer is a NoneType; it must be a dict"),
    "optimizer empty": (entry("optimizer", value={}), "optimizer has no 'state'"),
    "moments a list": (entry("optimizer", "state", value=[1]), "optimizer is a list; it must be a dict"),
    "moments of a weight a list": (entry("optimizer", "state", WEIGHT, value=[1]), "the entry of .* is a list"),
    "no moments of a weight": (entry("optimizer", "state", WEIGHT, value={}), "has no step; it must have step"),
    "NaN moment": (moment("exp_avg", poisoned(NAN)), "exp_avg of .* holds NaN or infinity"),
    "infinite square": (moment("exp_avg_sq", poisoned(INF)), "exp_avg_sq of .* holds NaN or infinity"),
    "negative square": (moment("exp_avg_sq", poisoned(-1.0)), "exp_avg_sq of .* holds -1; it must be at least 0"),
    "complex moment": (moment("exp_avg", lambda m: m.to(torch.complex64)), "exp_avg of .* dtype torch.complex64"),
    "sparse moment": (moment("exp_avg", lambda m: m.to_sparse()), "exp_avg of .* layout torch.sparse_coo"),
    "moment a word": (moment("exp_avg", "x"), "exp_avg of .* is a str; it must be a tensor or a number"),
    "moment's step a word": (moment("step", "x"), "optimizer: step of .* is 'x'"),
    "moment's step negative": (moment("step", torch.tensor(-3.0)), "optimizer: step of .* is -3.0"),
    "scheduler None": (entry("scheduler", value=None), "scheduler is a NoneType"),
    "bad steps a word": (entry("bad_steps", value="x"), "bad_steps is 'x'"),
    "bad steps negative": (entry("bad_steps", value=-1), "bad_steps is -1"),
    "header a number": (entry("fastprior", value=5), "fastprior is a int; it must be a dict"),
    "header's net a list": (entry("fastprior", "net", value=[1]), "fastprior: net is a list"),
    "no generators": (entry("rng", value=[]), "rng is empty"),
    "rng a number": (entry("rng", value=3), "rng is a int; it must be a dict"),
    "rng of torch alone": (entry("rng", value=[{"torch": torch.get_rng_state()}]), "rng has no 'python'"),
    "rng of python alone": (entry("rng", value={"python": random.getstate()}), "rng has no 'torch'"),
    "rng cut short": (entry("rng", 0, "torch", value=lambda s: s[:9]), r"rng\['torch'\] is no state of a generator: E"),
    "rng of zeros": (entry("rng", 0, "torch", value=torch.zeros_like), "torch'] is no state .* Invalid mt19937"),
    "rng of floats": (entry("rng", 0, "torch", value=lambda s: s.float()), "torch'] is no state"),
    "rng of python cut": (entry("rng", 0, "python", value=(3, (1, 2), None)), "python'] is no state .* wrong size"),
    "rng of python of words": (entry("rng", 0, "python", value=(3, ("x",) * 625, None)), "python'] is no state"),
    "rng of python: next": (entry("rng", 0, "python", value=lambda s: (*s[:2], "x")), "no state .* ends in 'x'"),
}  # fmt: skip


def refused(trainer, payload, match, **options):
    before = everything(trainer)
    with pytest.raises(ValueError, match=f"^the state given:? .*{match}"):
        trainer.load(payload, **options)
    assert same(before, everything(trainer))


@pytest.mark.parametrize("change, match", CASES.values(), ids=CASES)
def test_nothing_is_loaded(trained, change, match):
    trainer, state = trained
    payload = copy.deepcopy(state)
    change(payload)
    refused(trainer, payload, match)


def test_what_is_right_is_loaded(trained):
    """As the cases change one entry each, that is what they are refused for."""
    trainer, state = trained
    before = everything(trainer)
    trainer.load(copy.deepcopy(state))
    assert int(trainer.step) == 2 and same(everything(trainer)[0], state)
    trainer.load(before[0])
    trainer._bad_in_a_row = 1
    assert same(before, everything(trainer))


@pytest.mark.parametrize("rates, match", [
    ([NAN], r"base_lrs\[0\] is nan; it must be a fin"), (["a"], r"base_lrs\[0\] is 'a'"), ([], r"is \[\]; it"),
    ([-1.0], r"base_lrs\[0\] is -1.0"), ([INF], "is inf"), (0.1, "is 0.1; it must list"), (None, "is None"),
], ids=str)  # fmt: skip
def test_learning_rates(trained, rates, match):
    """They are read where they are taken: an own rate does not need the file's."""
    trainer, state = trained
    payload = {**state, "scheduler": {"base_lrs": rates, "last_epoch": 2}}
    refused(trainer, payload, match, overwrite_lr=False)
    refused(trainer, {**state, "scheduler": {}}, "base_lrs is None", overwrite_lr=False)


@pytest.mark.parametrize("change, match", [
    (entry("optimizer", "param_groups", value=None), "it must be a dict, in 1 or 2 groups|in 1 or 2 groups"),
    (entry("optimizer", "param_groups", value=[]), "in 1 or 2 groups"),
    (entry("optimizer", "param_groups", value=lambda groups: groups + groups), "in 1 or 2 groups"),
    (entry("optimizer", "param_groups", 0, value=[1]), "a group of optimizer is a list"),
    (entry("optimizer", "param_groups", 0, value={}), "has no list of numbers as its params"),
    (entry("optimizer", "param_groups", 0, "params", value=["x"] * 99), "has no list of numbers as its params"),
    (entry("optimizer", "param_groups", 0, "params", value=[0]), "has 1 parameters in a group"),
    (entry("optimizer", "state", value=[1]), "its state must be a dict"),
    (entry("optimizer", "state", 0, value="x"), "the entry of .* is a str"),
    (entry("optimizer", "state", 0, "exp_avg", value=poisoned(NAN)), "exp_avg of .* holds NaN or infinity"),
    (entry("ema", "step", value=torch.tensor([NAN])), "ema: step is nan"),
    (entry("step", value=torch.tensor([-1])), "step is -1"),
])  # fmt: skip
def test_those_of_the_peer(trained, tmp_path, change, match):
    trainer, _ = trained
    payload = peers(trainer, tmp_path)
    change(payload)
    refused(trainer, payload, match)


@pytest.mark.parametrize(
    "key, value", [("scale", NAN), ("scale", "x"), ("growth_factor", None), ("_growth_tracker", 0.5)]
)
def test_the_scaler_of_fp16(key, value):
    trainer = make_trainer(accelerator=fp16_accelerator())
    run(trainer, 1)
    state = copy.deepcopy(trainer.training_state())
    scaler = trainer.accelerator.scaler.state_dict()
    refused(trainer, {**state, "scaler": {**state["scaler"], key: value}}, f"scaler: {key} is ")
    refused(trainer, {**state, "scaler": {"scale": 1.0}}, "scaler has no ")
    assert trainer.accelerator.scaler.state_dict() == scaler


def test_without_strict_values_are_looked_at_too(trained):
    trainer, state = trained
    payload = copy.deepcopy(state)
    for kind in ("model", "ema_model"):
        payload[kind] = {WEIGHT: payload[kind][WEIGHT], "another": "word"}
    payload["optimizer"]["state"] = {WEIGHT: payload["optimizer"]["state"][WEIGHT], "another": 3}
    poisoned(NAN)(payload["ema_model"][WEIGHT])
    refused(trainer, payload, "ema_model: .* holds NaN or infinity", strict=False)


def test_a_buffer_may_be_infinite_where_it_must(tmp_path):
    """The jsd schedule's tables are."""
    one, other = (make_trainer(small_prior(beta_schedule="jsd", seed=seed)) for seed in (0, 1))
    run(one, 1)
    one.save(tmp_path / "x.pth")
    other.load(tmp_path / "x.pth")
    assert not all(value.isfinite().all() for value in other.prior.state_dict().values())


def test_an_average_is_loaded_whole_or_not_at_all():
    torch.manual_seed(0)
    ema = EMA(torch.nn.Linear(2, 2), include_online_model=True)
    before = copy.deepcopy(ema.state_dict())
    good = {key: value + 1 for key, value in before.items() if key != "initted"} | {"initted": torch.tensor(True)}
    for change, kind, match in [
        ({"ema_model.bias": torch.full((2,), NAN)}, ValueError, "ema_model.bias holds NaN"),
        ({"ema_model.bias": torch.zeros(3)}, ValueError, r"ema_model.bias has shape \(3,\)"),
        ({"online_model.bias": torch.zeros(2).to_sparse()}, ValueError, "online_model.bias is of layout"),
        ({"step": torch.tensor(-1)}, ValueError, "step is -1"),
        ({"other": torch.tensor(1)}, RuntimeError, "unexpected keys: other"),
    ]:
        with pytest.raises(kind, match=match):
            ema.load_state_dict(good | change)
        assert same(before, ema.state_dict())
    ema.load_state_dict(good)
    assert same(good, dict(ema.state_dict()))


# several processes


def load_on_ranks(folder):
    """One process finds another file than the others: none loads, and none waits."""
    accelerator = distributed_accelerator()
    rank = accelerator.process_index
    trainer = make_trainer(small_prior(), accelerator=accelerator)
    run(trainer, 2)
    with trainer.gathered():
        trainer.save(folder / "good.pth")
    accelerator.wait_for_everyone()
    run(trainer, 1, 2)
    payload = torch.load(folder / "good.pth", weights_only=True)
    if rank == 1:
        poisoned(NAN)(payload["optimizer"]["state"][WEIGHT]["exp_avg"])
    for given, match in (
        (payload, "exp_avg of .* holds NaN"),
        (folder / ("gone" if rank == 1 else "good.pth"), "gone"),
    ):
        before = everything(trainer)
        with pytest.raises((ValueError, OSError), match=match if rank == 1 else f"process 1: .*{match}"):
            trainer.load(given)
        assert all(map(same, before, everything(trainer))) and int(trainer.step) == 3
    trainer.load(folder / "good.pth")
    assert int(trainer.step) == 2
    trainer(**batch(3))
    trainer.update()


@pytest.mark.slow
@pytest.mark.parametrize("mode", SEVERAL)
def test_what_one_process_refuses_none_loads(tmp_path, mode):
    run_ranks(**MODES[mode], function=load_on_ranks, arguments=(tmp_path,), folder=tmp_path)
