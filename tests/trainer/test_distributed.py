"""Several real processes on the CPU: DDP and FSDP against one process, exact resumption, and what goes wrong."""

import math
import random
import time
import warnings

import pytest
import torch

from fastprior.optimizer import learning_rate_factor
from fastprior.prior.evaluate import evaluate
from fastprior.trainer.fsdp import local, without_clip
from helpers.priors import relative_error
from helpers.processes import MODES, SEVERAL, run_ranks, start_ranks
from helpers.trainer_cases import (
    BATCH,
    ToyClip,
    batch,
    differing,
    distributed_accelerator,
    fixed_times,
    fp16_accelerator,
    lr_of,
    make_trainer,
    run,
    small_prior,
    tensors,
)  # fmt: skip

RANDOM = dict(attn_dropout=0.1, ff_dropout=0.1, self_cond=True)


def whole_tensors(trainer):
    """Of all processes; the main one gets them whole."""
    with trainer.gathered():
        return tensors(trainer)


def same_everywhere(accelerator, *values):
    """Whether all processes have these values."""
    found = accelerator.gather(torch.tensor([values], dtype=torch.float64))
    return bool((found == found[0]).all())


# one process with the doubled batch


def train(path):
    """Four steps, of which one process spoils the second; weights are those of the first process."""
    accelerator = distributed_accelerator(gradient_accumulation_steps=2)
    rank, world = accelerator.process_index, accelerator.num_processes
    prior = fixed_times(small_prior(cond_drop_prob=0.0, seed=rank))
    trainer = make_trainer(prior, accelerator=accelerator, cosine_decay_max_steps=8, max_grad_norm=0.2)
    losses = []
    for step in range(8):
        data = batch(step, rows=2 * BATCH) | {"noise": batch(90 + step, rows=2 * BATCH)["text_embed"]}
        own = {key: value.chunk(world)[rank] for key, value in data.items()}
        if step == 3 and rank == world - 1:
            own["image_embed"] = own["image_embed"] * math.nan
        loss = torch.tensor(trainer(**own, max_batch_size=None if world == 1 else 3))
        losses.append(accelerator.reduce(loss, "mean").item())
        trainer.update()
    assert same_everywhere(accelerator, trainer.bad_steps, int(trainer.step), lr_of(trainer))
    with trainer.gathered():
        if accelerator.is_main_process:
            trainer.save(path, losses=losses, bad=trainer.bad_steps, lr=lr_of(trainer))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of one run in each mode."""
    paths = {}
    for mode, options in MODES.items():
        folder = tmp_path_factory.mktemp(mode)
        paths[mode] = folder / "checkpoint.pth"
        run_ranks(**options, function=train, arguments=(paths[mode],), folder=folder)
    return paths


@pytest.mark.parametrize("mode", SEVERAL)
def test_two_processes_are_one_with_the_doubled_batch(trained, mode):
    """Losses, weights, average, moments and learning rate, through chunks, accumulation and clipping."""
    one, two = (torch.load(trained[name], weights_only=True) for name in ("one", mode))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5, nan_ok=True)
    assert one["bad"] == two["bad"] == 1 and int(one["step"]) == int(two["step"]) == 3
    assert one["lr"] == pytest.approx(two["lr"]) == pytest.approx(1e-2 * learning_rate_factor(3, None, 8))
    assert one.keys() == two.keys() and len(two["rng"]) == 2
    for kind in ("model", "ema_model"):
        assert one[kind].keys() == two[kind].keys()
        for key, value in one[kind].items():
            torch.testing.assert_close(two[kind][key], value, atol=1e-5, rtol=1e-3, msg=key)
    for name, moments in one["optimizer"]["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(two["optimizer"]["state"][name][key], value, atol=1e-6, rtol=1e-3, msg=name)


# checkpoints


def resume(folder):
    """With everything that draws, on each process differently."""
    accelerator = distributed_accelerator()
    first = 10 * accelerator.process_index
    options = dict(accelerator=accelerator, warmup_steps=5, cosine_decay_max_steps=9, max_grad_norm=0.1)
    torch.manual_seed(first)
    random.seed(first)
    whole = make_trainer(small_prior(RANDOM), **options)
    run(whole, 4, first)
    with whole.gathered():
        whole.save(folder / "half.pth")
    accelerator.wait_for_everyone()
    wanted = run(whole, 4, first + 4)
    half = make_trainer(small_prior(RANDOM, seed=5), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        half.load(folder / "half.pth")
    assert run(half, 4, first + 4) == wanted
    ours, theirs = whole_tensors(half), whole_tensors(whole)
    assert not accelerator.is_main_process or not differing(ours, theirs)
    assert not same_everywhere(accelerator, torch.rand(()).item())


@pytest.mark.slow
@pytest.mark.parametrize("mode", SEVERAL)
def test_resumption_is_exact_on_every_rank(tmp_path, mode):
    run_ranks(**MODES[mode], function=resume, arguments=(tmp_path,), folder=tmp_path)


def load(paths, exported):
    """Every checkpoint, and save each as it was loaded."""
    accelerator = distributed_accelerator()
    trainer = make_trainer(small_prior(seed=7), accelerator=accelerator)
    for mode, path in paths.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = trainer.load(path)
        messages = [str(warning.message) for warning in caught if "random generators" in str(warning.message)]
        world, theirs = accelerator.num_processes, MODES[mode]["world"]
        assert len(messages) == (world != theirs and accelerator.is_main_process), messages
        if messages:
            assert f"{theirs} process(es), and this run has {world}: weights, average, moments" in messages[0]
        found = whole_tensors(trainer)
        if accelerator.is_main_process:
            named = {"model": state["model"], "ema": state["ema_model"], "moments": {
                f"{n}.{k}": v for n, kept in state["optimizer"]["state"].items() for k, v in kept.items()
            }}  # fmt: skip
            wanted = {f"{kind}.{key}": value for kind, own in named.items() for key, value in own.items()}
            assert not differing(found, wanted), mode
    trainer.export_for_peer(exported)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_loads_every_checkpoint(trained, tmp_path, mode):
    run_ranks(**MODES[mode], function=load, arguments=(trained, tmp_path / "peer.pth"), folder=tmp_path)
    peers = torch.load(tmp_path / "peer.pth", weights_only=True)
    ours = torch.load(list(trained.values())[-1], weights_only=True)
    assert all(torch.equal(peers["model"][key], value) for key, value in ours["model"].items())
    moments = list(peers["optimizer"]["state"].values())
    assert sum(kept["exp_avg"].numel() for kept in moments) == sum(
        kept["exp_avg"].numel() for kept in ours["optimizer"]["state"].values()
    )


# shards


def use_shards(folder):
    accelerator = distributed_accelerator()
    rank = accelerator.process_index
    trainer = make_trainer(small_prior(clip=ToyClip()), accelerator=accelerator, ema_beta=0.5)
    torch.manual_seed(rank)
    run(trainer, 3, 10 * rank)

    online, average = trainer.prior, trainer.ema_diffusion_prior.ema_model
    moments = [kept["exp_avg"] for kept in trainer.optimizer.state.values()]
    for kind in (*(without_clip(dict(prior.named_parameters())).values() for prior in (online, average)), moments):
        assert sum(local(value).numel() for value in kind) < 0.6 * sum(value.numel() for value in kind)
        assert sum(local(value).untyped_storage().nbytes() for value in kind) < 2.4 * sum(v.numel() for v in kind)

    assert trainer.embed_text(torch.ones(2, 4, dtype=torch.int64)).text_encodings.shape == (2, 4, 16)
    with trainer.whole_prior() as whole:
        assert whole.clip is online.clip and not any(p.is_meta for p in whole.parameters())

    # a loss without a backward must not keep the whole weights for the next step
    torch.manual_seed(0)
    trainer(**batch(5))
    trainer.eval()
    trainer(**batch(6))
    trainer.train()
    trainer.update()
    with trainer.gathered():
        trainer.save(folder / "shards.pth")
    accelerator.wait_for_everyone()
    state = torch.load(folder / "shards.pth", weights_only=True)
    single = {name: small_prior(seed=3).eval() for name in ("model", "ema_model")}
    for name, prior in single.items():
        prior.load_state_dict(state[name])
    torch.manual_seed(2)
    loss = trainer.eval()(**batch(7))
    torch.manual_seed(2)
    assert loss == pytest.approx(single["model"](**batch(7)).item(), rel=1e-6)

    text = dict(text_embed=batch()["text_embed"])
    options = dict(timesteps=4, progress=False)
    torch.manual_seed(4)
    found = trainer.p_sample_loop((BATCH, 16), text, cond_scale=2.0, **options)
    best = trainer.sample(**text, num_samples_per_batch=2, max_batch_size=3, **options)
    torch.manual_seed(4)
    assert torch.equal(found, single["ema_model"].p_sample_loop((BATCH, 16), text, cond_scale=2.0, **options))
    assert best.shape == found.shape and not torch.equal(best, found)

    # processes have unequal numbers of batches, one has none
    batches = [batch(seed, rows) for seed, rows in ((1, 5), (2, 3), (3, 8))]
    for shares in ([[0, 1], [2]], [[0, 1, 2], []]):
        mine = [batches[index] for index in shares[rank]]
        for name, prior in single.items():
            with trainer.whole_prior(online=name == "model") as whole:
                ours = evaluate(whole, mine, timesteps=[4], accelerator=accelerator)
            theirs = evaluate(prior, mine, timesteps=[4], accelerator=accelerator)
            assert ours == theirs and same_everywhere(accelerator, *ours.values())


@pytest.mark.slow
def test_shards_are_parts_and_are_whole_where_they_must(tmp_path):
    run_ranks(**MODES["fsdp"], function=use_shards, arguments=(tmp_path,), folder=tmp_path)


def overflow(folder):
    """In a part of the gradient that only the last process has."""
    accelerator = fp16_accelerator()
    trainer = make_trainer(accelerator=accelerator)
    run(trainer, 1)
    scale, before = accelerator.scaler.get_scale(), whole_tensors(trainer)
    assert scale > 1
    trainer(**batch())
    if accelerator.process_index == 1:
        local(trainer.prior.net.learned_query.grad)[0] = math.inf
    trainer.update()
    after = whole_tensors(trainer)
    assert trainer.bad_steps == 1 and not (accelerator.is_main_process and differing(before, after))
    assert accelerator.scaler.get_scale() == scale / 2
    run(trainer, 1)
    assert int(trainer.step) == 2


def test_fp16_overflow_in_one_shard_is_skipped_by_all(tmp_path):
    run_ranks(**MODES["fsdp"], function=overflow, arguments=(tmp_path,), folder=tmp_path)


# DeepSpeed


def train_in_bf16(wanted):
    """With the same data and noise on both processes, which then are as one."""
    trainer = make_trainer(accelerator=distributed_accelerator(mixed_precision="bf16"))
    torch.manual_seed(0)
    assert 0 < relative_error(torch.tensor(run(trainer, 10)), wanted) < 0.05
    assert {value.dtype for value in trainer.training_state()["model"].values()} == {torch.float32}


@pytest.mark.skipif("zero" not in MODES, reason="needs deepspeed")
def test_zero_in_bf16(tmp_path):
    trainer = make_trainer()
    torch.manual_seed(0)
    wanted = torch.tensor(run(trainer, 10))
    run_ranks(**MODES["zero"], function=train_in_bf16, arguments=(wanted,), folder=tmp_path)


def refuse(options, message):
    accelerator = distributed_accelerator(**options)
    with pytest.raises(ValueError, match=message):
        make_trainer(accelerator=accelerator)


@pytest.mark.skipif("zero" not in MODES, reason="needs deepspeed")
@pytest.mark.parametrize("stage, options, message", [
    (3, {}, "runs stage 3 of ZeRO; it must be 1 or 2, or FSDP"),
    (2, dict(mixed_precision="fp16"), "mixed_precision='fp16' under DeepSpeed; it must be 'no' or 'bf16'"),
])  # fmt: skip
def test_what_zero_does_not_cover(tmp_path, stage, options, message):
    run_ranks(2, refuse, (options, message), tmp_path, zero=stage)


# failures


def fail(folder):
    accelerator = distributed_accelerator()
    trainer = make_trainer(accelerator=accelerator)
    for step in range(10**6):
        run(trainer, 1, step)
        if step == 2 and accelerator.process_index == 1:
            raise RuntimeError("this process fails")


@pytest.mark.parametrize("mode", SEVERAL)
def test_a_process_that_fails_does_not_leave_the_other_hanging(tmp_path, mode):
    processes = start_ranks(**MODES[mode], function=fail, arguments=(tmp_path,), folder=tmp_path)
    deadline = time.monotonic() + 60
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    assert [process.exitcode not in (None, 0) for process in processes] == [True, True]
    assert "this process fails" in (tmp_path / "errors-1.txt").read_text()
