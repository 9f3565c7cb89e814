"""The trainer: parity with dalle2-pytorch's, its arguments, steps that are not taken, batches and sampling."""

import copy
import math

import pytest
import torch

import fastprior
from helpers.priors import relative_error

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from fastprior.optimizer import learning_rate_factor
from fastprior.trainer import DiffusionPriorTrainer, TrainingDiverged, split_args_and_kwargs
from helpers.trainer_cases import (
    BATCH,
    SCHEDULES,
    ToyClip,
    batch,
    differing,
    fixed_times,
    fp16_accelerator,
    lr_of,
    make_trainer,
    run,
    small_prior,
    tensors,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# against the peer


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_parity(peer, schedule):
    from dalle2_pytorch.trainer import DiffusionPriorTrainer as Peers

    steps, found = 40, []
    for module, cls in ((peer, Peers), (fastprior, DiffusionPriorTrainer)):
        trainer = make_trainer(small_prior(module=module), cls, eps=1e-6, ema_beta=0.8, **SCHEDULES[schedule])
        torch.manual_seed(0)
        losses, rates = [], []
        for step in range(steps):
            rates.append(lr_of(trainer))
            losses += run(trainer, 1, step)
        rates.append(lr_of(trainer))
        found.append((torch.tensor(losses), rates, trainer.ema_diffusion_prior.ema_model.net.learned_query))
    (theirs, their_rates, their_ema), (ours, rates, ema) = found
    assert type(losses[0]) is float and losses[-1] < 0.8 * losses[0]
    assert rates == pytest.approx(their_rates, rel=1e-6, abs=1e-9)
    assert relative_error(ours, theirs) < 1e-3 and relative_error(ema, their_ema) < 1e-3


# arguments


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="unknown argument warmup_step=5; did you mean 'warmup_steps'?"):
        make_trainer(warmup_step=5)
    with pytest.raises(TypeError, match="unknown argument ema_betta=0.5; did you mean 'ema_beta'?"):
        make_trainer(ema_betta=0.5)


def test_legacy_arguments_do_what_they_say():
    assert make_trainer(amp=True, device="cpu").accelerator.mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="amp=True, but the accelerator has mixed_precision='no'"):
        make_trainer(accelerator=accelerator, amp=True)
    with pytest.raises(ValueError, match="device='cuda:1'; it must be the accelerator's, 'cpu'"):
        make_trainer(accelerator=accelerator, device="cuda:1")
    with pytest.raises(ValueError, match="accelerator_cpu was given with accelerator="):
        make_trainer(accelerator=accelerator, accelerator_cpu=True)
    trainer = make_trainer(accelerator=accelerator, amp=False, device=accelerator.device)
    assert trainer.accelerator is accelerator and trainer.device == torch.device("cpu")


@pytest.mark.parametrize("name, value", [
    ("max_grad_norm", 0), ("warmup_steps", -1), ("cosine_decay_max_steps", 0), ("max_bad_steps", 0), ("draws", 0),
    ("draws", 2), ("ema_beta", 1.0), ("ema_update_every", 0), ("ema_update_after_step", -1),
])  # fmt: skip
def test_arguments_out_of_range(name, value):
    prior = small_prior()
    prior.forward = lambda *args, **kwargs: None  # takes no draws
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_trainer(prior, **{name: value})


def test_draws_reach_the_prior():
    trainer = make_trainer(draws=3)
    torch.manual_seed(0)
    loss = trainer(**batch())
    for draws, same in ((3, True), (1, False)):
        torch.manual_seed(0)
        assert (loss == trainer.prior(**batch(), draws=draws).item()) is same


def test_only_a_prior_is_trained():
    with pytest.raises(TypeError, match="diffusion_prior is a Linear"):
        make_trainer(torch.nn.Linear(2, 2))


def test_arguments_of_the_average_arrive():
    ema = make_trainer(ema_beta=0.5, ema_update_after_step=7, ema_update_every=3, ema_power=0.9).ema_diffusion_prior
    assert (ema.beta, ema.update_after_step, ema.update_every, ema.power) == (0.5, 7, 3, 0.9)
    ema = make_trainer(ema_beta=None, ema_update_after_step=None, ema_update_every=None).ema_diffusion_prior
    assert (ema.beta, ema.update_after_step, ema.update_every) == (0.9999, 100, 10)  # ema-pytorch's


# learning rate


def test_schedule():
    trainer = make_trainer(lr=0.1, cosine_decay_max_steps=4)
    rates = []
    for step in range(6):
        rates.append(lr_of(trainer))
        run(trainer, 1, step)
    assert rates == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)] + [0, 0])
    assert [learning_rate_factor(step, 4, None) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1, 1]


# steps that are not taken


def spoil(batch, name="image_embed", value=math.nan):
    batch[name][0, 0] = value
    return batch


def test_a_bad_step_changes_nothing():
    trainer = make_trainer(warmup_steps=10)
    run(trainer, 3)
    before, lr = tensors(trainer), lr_of(trainer)
    assert math.isnan(trainer(**spoil(batch())))
    trainer.update()
    assert not differing(before, tensors(trainer))
    assert (int(trainer.step), int(trainer.ema_diffusion_prior.step), trainer.bad_steps) == (3, 3, 1)
    assert lr_of(trainer) == lr
    run(trainer, 1)
    assert int(trainer.step) == 4 and differing(before, tensors(trainer))


def test_a_loss_that_overflows_with_a_finite_gradient_is_a_bad_step():
    trainer = make_trainer()
    before = tensors(trainer)
    assert trainer(**spoil(batch(), value=5e18)) == math.inf  # whose square, but not itself, overflows
    trainer.update()
    assert trainer.bad_steps == 1 and not differing(before, tensors(trainer))


def test_a_bad_gradient_with_a_finite_loss_is_a_bad_step():
    trainer = make_trainer(max_grad_norm=0.5)
    before = tensors(trainer)
    assert math.isfinite(trainer(**batch()))
    trainer.prior.net.learned_query.grad[3] = math.inf
    trainer.update()
    assert trainer.bad_steps == 1 and not differing(before, tensors(trainer))


def test_divergence_is_raised():
    trainer = make_trainer(max_bad_steps=3)
    for data in (spoil(batch()), spoil(batch()), batch(), spoil(batch()), spoil(batch())):
        trainer(**data)
        trainer.update()
    trainer(**spoil(batch()))
    with pytest.raises(TrainingDiverged, match="3 steps in a row after step 1 had a non-finite loss") as caught:
        trainer.update()
    assert caught.value.bad_steps == 3 and trainer.bad_steps == 5


@pytest.mark.parametrize("by_caller", [False, True], ids=["own", "caller's"])
def test_accumulation(by_caller):
    """Two batches of an accumulated step are one of twice the size, and the average follows steps, not batches."""

    def trained(rows, **accumulation):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, **accumulation)
        trainer = make_trainer(fixed_times(small_prior(cond_drop_prob=0.0)), accelerator=accelerator)
        data = {key: torch.cat([batch(seed)[key] for seed in range(4)]) for key in batch()}
        data["noise"] = torch.randn(len(data["text_embed"]), 16, generator=torch.Generator().manual_seed(9))
        for _, (_, part) in split_args_and_kwargs(split_size=rows, **data):
            if by_caller:
                with accelerator.accumulate(trainer.diffusion_prior):
                    trainer(**part)
                    trainer.update()
            else:
                trainer(**part)
                trainer.update()
        return trainer

    halves, wholes = trained(BATCH, gradient_accumulation_steps=2), trained(2 * BATCH)
    assert int(halves.step) == int(wholes.step) == int(halves.ema_diffusion_prior.step) == 2
    for key, value in tensors(wholes).items():
        torch.testing.assert_close(tensors(halves)[key], value, atol=1e-4, rtol=1e-3, msg=key)


# precision, memory, speed


def test_bf16_trains_fp32_weights():
    curves = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = make_trainer(accelerator=Accelerator(cpu=True, mixed_precision=precision), lr=1e-3)
        torch.manual_seed(0)
        curves[precision] = torch.tensor(run(trainer, 10))
        assert {value.dtype for value in trainer.training_state()["model"].values()} == {torch.float32}
    assert 0 < relative_error(curves["bf16"], curves["no"]) < 0.05


def test_fp16_overflow_is_a_skipped_step_of_a_scale_too_large(tmp_path):
    trainer = make_trainer(accelerator=fp16_accelerator())
    run(trainer, 2)
    scaler, before = trainer.accelerator.scaler, tensors(trainer)
    scaler._scale.fill_(1e30)
    trainer(**batch())
    trainer.update()
    assert not differing(before, tensors(trainer)) and trainer.bad_steps == 1
    assert scaler.get_scale() == pytest.approx(5e29)
    assert (int(trainer.step), int(trainer.ema_diffusion_prior.step)) == (2, 2)
    trainer.save(tmp_path / "fp16.pth")
    scaler._scale.fill_(256.0)
    run(trainer, 1)
    assert int(trainer.step) == 3 and scaler.get_scale() == 256 and differing(before, tensors(trainer))
    trainer.load(tmp_path / "fp16.pth")
    assert scaler.get_scale() == pytest.approx(5e29)


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
SWAPPED = pytest.mark.skipif(
    OLD, reason="torch 2.11 draws the masks of text and image in another order when it compiles"
)


@pytest.mark.slow
@pytest.mark.parametrize("cond_drop_prob", [0.0, pytest.param(0.2, marks=SWAPPED)])
def test_compiled_loss_is_the_same(cond_drop_prob):
    curves = []
    for options in ({}, dict(compile=dict(backend="aot_eager"))):
        trainer = make_trainer(small_prior(cond_drop_prob=cond_drop_prob), **options)
        torch.manual_seed(0)
        curves.append(torch.tensor(run(trainer, 4)))
    compiled, plain = curves[1], curves[0]
    assert relative_error(compiled, plain) < 1e-5
    assert trainer.prior.net._compiled_call_impl is not None
    assert trainer.ema_diffusion_prior.ema_model.net._compiled_call_impl is None


def test_activation_checkpointing_saves_memory_and_nothing_else():
    kept, found = [], []
    for flag in (False, True):
        prior = small_prior(dict(attn_dropout=0.1, ff_dropout=0.1, depth=4))
        trainer = make_trainer(prior, checkpoint_activations=flag)
        torch.manual_seed(0)
        sizes = {}

        def pack(t, sizes=sizes):
            if not t.is_leaf or not t.requires_grad:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = trainer(**batch())
        kept.append(sum(sizes.values()))
        trainer.update()
        found.append((loss, tensors(trainer)))
    assert found[0][0] == found[1][0] and not differing(found[0][1], found[1][1])
    assert kept[1] < 0.3 * kept[0]


def test_loss_tensor_is_the_loss():
    trainer = make_trainer()
    torch.manual_seed(0)
    loss = trainer.loss_tensor(**batch())
    torch.manual_seed(0)
    assert loss.shape == () and not loss.requires_grad and trainer(**batch()) == loss.item()


# batches


def test_chunks_weigh_their_share():
    prior = fixed_times(small_prior(cond_drop_prob=0.0))
    noise = torch.randn(BATCH, 16)
    gradients, losses = [], []
    for size in (None, 3):
        trainer = make_trainer(copy.deepcopy(prior))
        fixed_times(trainer.prior)
        losses.append(trainer(**batch(), noise=noise, max_batch_size=size))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.prior.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and relative_error(gradients[1], gradients[0]) < 1e-4


def test_split_args_and_kwargs():
    rows = torch.arange(5)
    chunks = list(split_args_and_kwargs(rows, split_size=2, text=list("abcde"), name="xy", none=None, scale=2.0))
    assert [share for share, _ in chunks] == [0.4, 0.4, 0.2]
    assert [args[0].tolist() for _, (args, _) in chunks] == [[0, 1], [2, 3], [4]]
    assert chunks[2][1][1] == dict(text=["e"], name="xy", none=None, scale=2.0)
    with pytest.raises(ValueError, match="sizes {0: 5, 'other': 4}"):
        list(split_args_and_kwargs(rows, split_size=2, other=rows[:4]))
    with pytest.raises(ValueError, match="max_batch_size=0"):
        list(split_args_and_kwargs(rows, split_size=0))


def test_numpy_batches_and_evaluation():
    trainer = make_trainer().eval()
    torch.manual_seed(0)
    loss = trainer(**{name: value.numpy() for name, value in batch().items()})
    torch.manual_seed(0)
    assert trainer(**batch()) == loss
    assert all(p.grad is None for p in trainer.parameters())


def test_without_an_average(tmp_path):
    trainer = make_trainer(small_prior(dict(ff_dropout=0.5)), use_ema=False)
    run(trainer, 2)
    trainer.save(tmp_path / "x.pth")
    assert trainer.ema_diffusion_prior is None and trainer.sampling_prior is trainer.prior
    text = dict(text_embed=batch()["text_embed"])
    once, again = (
        trainer.p_sample_loop((BATCH, 16), text, generator=torch.Generator().manual_seed(0), progress=False)
        for _ in range(2)
    )
    assert torch.equal(once, again) and trainer.prior.training  # without dropout
    again = make_trainer(use_ema=False, prior=small_prior(seed=4))
    again.load(tmp_path / "x.pth")
    assert not differing(tensors(trainer), tensors(again))
    with pytest.raises(ValueError, match="has no 'ema_model'"):
        make_trainer().load(tmp_path / "x.pth")
    averaging = make_trainer()
    averaging.load(tmp_path / "x.pth", strict=False)
    assert torch.equal(averaging.sampling_prior.net.learned_query, trainer.prior.net.learned_query)


# sampling


def test_the_average_samples():
    trainer = make_trainer(small_prior(dict(ff_dropout=0.5)), ema_beta=0.5)
    run(trainer, 3)
    text = batch()["text_embed"]
    torch.manual_seed(0)
    found = trainer.p_sample_loop((BATCH, 16), text_cond=dict(text_embed=text), timesteps=4, progress=False)
    assert trainer.training and trainer.prior.training
    torch.manual_seed(0)
    average = trainer.ema_diffusion_prior.ema_model
    assert torch.equal(found, average.p_sample_loop((BATCH, 16), dict(text_embed=text), timesteps=4, progress=False))
    torch.manual_seed(0)
    online = trainer.prior.eval().p_sample_loop((BATCH, 16), dict(text_embed=text), timesteps=4, progress=False)
    assert relative_error(found, online) > 1e-3
    best = trainer.sample(text_embed=text, num_samples_per_batch=3, timesteps=4, max_batch_size=3, progress=False)
    assert best.shape == (BATCH, 16) and best.isfinite().all()


def test_sampling_in_chunks(monkeypatch):
    trainer, rows = make_trainer(), []

    def loop(shape, text_cond, **kwargs):
        rows.append(shape[0])
        return text_cond["text_embed"].repeat_interleave(shape[0] // len(text_cond["text_embed"]), 0)

    monkeypatch.setattr(trainer.sampling_prior, "p_sample_loop", loop)
    text = batch()["text_embed"]
    cond = dict(text_embed=text, text_encodings=None)
    found = trainer.p_sample_loop((3 * BATCH, 16), cond, max_batch_size=10)
    assert rows == [9, 9, 6] and torch.equal(found, text.repeat_interleave(3, 0))
    with pytest.raises(ValueError, match="rows must be a multiple of the prompts, 8"):
        trainer.p_sample_loop((9, 16), cond, max_batch_size=10)


def test_embedding_in_chunks():
    trainer = make_trainer(small_prior(clip=ToyClip()))
    tokens = torch.randint(1, 9, (5, 4))
    wanted = trainer.embed_text(tokens)
    for found in (trainer.embed_text(tokens, max_batch_size=2), trainer.embed_text(tokens.numpy())):
        assert torch.equal(found.text_embed, wanted.text_embed)
        assert torch.equal(found.text_encodings, wanted.text_encodings)
    with pytest.raises(ValueError, match="has no clip"):
        make_trainer().embed_image(torch.zeros(1, 3, 8, 8))


def test_another_optimizer_takes_the_place_of_the_first():
    trainer = make_trainer()
    trainer.optimizer = trainer.accelerator.prepare_optimizer(torch.optim.SGD(trainer.prior.parameters(), lr=0.5))
    weight = trainer.prior.net.learned_query
    before = weight.detach().clone()
    trainer(**batch())
    gradient = weight.grad.clone()
    trainer.update()
    assert gradient.abs().max() > 0
    torch.testing.assert_close(weight.detach(), before - 0.5 * gradient)
