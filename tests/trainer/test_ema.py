"""The moving average of a prior's weights, with ema-pytorch's surface and numbers, and who it is for."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("ema_pytorch")

import ema_pytorch as theirs

from fastprior.trainer import EMA
from helpers.trainer_cases import ToyClip, batch, make_trainer, run, small_prior

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def network():
    """Weights, and buffers that move: of floats and of integers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def moved(model, step):
    """Other weights and buffers, as a training step makes them."""
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=draw).abs())
            elif value.dtype == torch.int64:
                value.add_(1)


def close(ours, other, what="parameters"):
    for (name, value), (_, wanted) in zip(*(getattr(m, f"named_{what}")() for m in (ours, other)), strict=True):
        if value.is_floating_point():
            torch.testing.assert_close(value, wanted, msg=f"{name}: {value} {wanted}")


OPTIONS = {
    "schedule": dict(inv_gamma=2.0, power=0.5, min_value=0.1),
    "names": dict(param_or_buffer_names_no_ema={"0.bias", "1.running_var"}, ignore_names={"1.weight"},
                  ignore_startswith_names={"2."}),
    "switched": dict(update_model_with_ema_every=4),
    "nudged": dict(update_model_with_ema_every=5, update_model_with_ema_beta=0.7),
    "own copy": dict(ema_model=network, forward_method_names=("state_dict",)),
    "lazy": dict(lazy_init_ema=True),
    "foreach": dict(use_foreach=True, allow_different_devices=True, coerce_dtype=True, move_ema_to_online_device=True),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_updates_are_those_of_ema_pytorch(case):
    pairs = []
    for cls in (EMA, theirs.EMA):
        ema = cls(network(), beta=0.9, update_after_step=4, update_every=3, **OPTIONS[case])
        pairs.append(ema)
    ours, other = pairs
    for step in range(30):
        moved(ours.model, step), moved(other.model, step)
        ours.update(), other.update()
        assert ours.get_current_decay() == pytest.approx(other.get_current_decay(), abs=1e-6)
        for what in ("parameters", "buffers"):
            close(ours.model, other.model, what)
            close(ours.ema_model, other.ema_model, what)
        assert (int(ours.step), bool(ours.initted)) == (int(other.step), bool(other.initted)) == (step + 1, True)
    assert 0.1 < ours.get_current_decay() < 0.9
    assert torch.equal(ours.ema_model[1].num_batches_tracked, ours.model[1].num_batches_tracked) == (step % 3 == 0)
    for iterator in ("get_params_iter", "get_buffers_iter"):
        names = [[name for name, _ in getattr(ema, iterator)(ema.model)] for ema in pairs]
        assert names[0] == names[1] and len(names[0]) > 1
    x = torch.randn(5, 3)
    for found in (ours(x), ours.forward_eval(x)):
        torch.testing.assert_close(found, other.eval()(x))
    assert ours.eval() is ours.ema_model and ours.online_model is ours.model
    if case == "own copy":
        assert ours.state_dict().keys() == ours.ema_model.state_dict().keys()


def test_every_argument_and_method_of_ema_pytorch_is_here():
    wanted = inspect.signature(theirs.EMA.__init__).parameters
    assert not wanted.keys() - inspect.signature(EMA.__init__).parameters.keys()
    helpers = {"inplace_copy", "inplace_lerp"}  # tensors alone
    there = {name for name in dir(theirs.EMA(network())) if not name.startswith("_")} - helpers
    assert not there - set(dir(EMA(network())))


@pytest.mark.parametrize("decay", [None, 0.25])
def test_copies_either_way(decay):
    pairs = [cls(network(), beta=0.9) for cls in (EMA, theirs.EMA)]
    for ema in pairs:
        ema.update()
        moved(ema.model, 1)
        ema.update_moving_average(ema.ema_model, ema.model, 0.6)
        ema.update_model_with_ema(decay)
    close(pairs[0].model, pairs[1].model)
    assert torch.equal(pairs[0].model[0].weight, pairs[0].ema_model[0].weight) == (decay is None)
    for ema in pairs:
        moved(ema.model, 2)
        ema.copy_params_from_model_to_ema()
        assert torch.equal(ema.model[0].weight, ema.ema_model[0].weight)
        moved(ema.model, 3)
        ema.copy_params_from_ema_to_model()
    close(pairs[0].model, pairs[1].model, "buffers")
    close(pairs[0].model, pairs[1].model)
    assert pairs[0].model[0].weight.requires_grad and not pairs[0].ema_model[0].weight.requires_grad


def test_what_does_not_move_keeps_its_bits():
    """A mask of infinities makes ema-pytorch's average NaN."""
    model = network()
    model.register_buffer("mask", torch.tensor([0.1, -torch.inf, torch.inf]))
    ema = EMA(model, update_after_step=0, update_every=1)
    for step in range(4):
        moved(model[0], step)
        ema.update()
    assert torch.equal(ema.ema_model.mask, model.mask)
    ema.is_frozen, before = True, ema.ema_model[0].weight.clone()
    moved(model, 9)
    ema.update()
    assert torch.equal(ema.ema_model[0].weight, before)


def test_state_dicts_of_ema_pytorch():
    other = theirs.EMA(network(), update_after_step=0, update_every=1)
    for step in range(3):
        moved(other.model, step)
        other.update()
    ours, held = EMA(network()), EMA(network(), include_online_model=True)
    assert set(ours.state_dict()) == {key for key in other.state_dict() if not key.startswith("online_model.")}
    for ema in (ours, held):
        ema.load_state_dict(other.state_dict())
        close(ema.model, other.model), close(ema.ema_model, other.ema_model)
        assert int(ema.step) == 3 and ema.initted
    fresh = theirs.EMA(network())
    fresh.load_state_dict(held.state_dict())
    close(fresh.model, other.model)
    with pytest.raises(RuntimeError, match="online_model.0.weight"):
        ours.load_state_dict({key: v for key, v in other.state_dict().items() if key != "online_model.0.weight"})


def test_hook_of_an_optimizer():
    model = network()
    ema, optimizer = EMA(model), torch.optim.SGD(model.parameters(), lr=1.0)
    handle = ema.add_to_optimizer_post_step_hook(optimizer)
    optimizer.step(), optimizer.step()
    handle.remove()
    optimizer.step()
    assert int(ema.step) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema)),
                                    lambda ema: torch.load(saved(ema), weights_only=False)],
                         ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
def test_copies_stand_alone(copied):
    """A copy has its own online prior, and one CLIP for both."""
    ema = EMA(small_prior(clip=ToyClip()), update_after_step=0, update_every=1, forward_method_names=("p_sample_loop",))
    ema.update()
    before, other = ema.ema_model.net.learned_query.clone(), copied(ema)
    moved(other.model, 1)
    other.update(), other.update()
    assert other.model is not ema.model and other.ema_model.clip is other.model.clip is not ema.model.clip
    assert torch.equal(ema.ema_model.net.learned_query, before)
    assert not torch.equal(other.ema_model.net.learned_query, before)
    assert other.p_sample_loop.__self__ is other.ema_model and int(ema.step) == 1


def saved(ema):
    file = io.BytesIO()
    torch.save(ema, file)
    file.seek(0)
    return file


def test_the_trainer_hands_its_arguments_on():
    """A prior that goes back to its average now and then, and keeps training."""
    trainer = make_trainer(ema_beta=0.5, ema_update_model_with_ema_every=3, ema_param_or_buffer_names_no_ema={
        "net.learned_query"})  # fmt: skip
    run(trainer, 3)
    ema = trainer.ema_diffusion_prior
    (weight, average), (query, copied) = (
        [prior.net.get_parameter(name) for prior in (trainer.prior, ema.ema_model)]
        for name in ("causal_transformer.project_out.weight", "learned_query")
    )
    assert not torch.equal(weight, average) and torch.equal(query, copied)
    run(trainer, 1, 3)
    assert torch.equal(weight, average)
    run(trainer, 1, 4)
    assert not torch.equal(weight, average)
    text = dict(text_embed=batch()["text_embed"])
    ema.copy_params_from_ema_to_model()
    found = []
    for prior in (ema.eval(), trainer.prior.eval()):
        torch.manual_seed(0)
        found.append(prior.p_sample_loop((8, 16), text, timesteps=3, progress=False))
    assert torch.equal(*found)
