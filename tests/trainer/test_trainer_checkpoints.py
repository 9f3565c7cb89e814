"""Checkpoints of the trainer: exact resumption, those of dalle2-pytorch's, and what cannot be saved or loaded."""

import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

import fastprior
from helpers.priors import relative_error

pytest.importorskip("accelerate")

from fastprior.optimizer import learning_rate_factor
from helpers.trainer_cases import (
    SCHEDULES,
    ToyClip,
    differing,
    lr_of,
    make_trainer,
    run,
    small_prior,
    tensors,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# against the peer


@pytest.mark.slow
@pytest.mark.parametrize("with_clip", [False, True], ids=["embeddings", "clip"])
@pytest.mark.parametrize("schedule", ["warm-up", "adam"])
def test_the_peers_checkpoint_goes_on(peer, tmp_path, monkeypatch, schedule, with_clip):
    from dalle2_pytorch.trainer import DiffusionPriorTrainer as Peers

    options = SCHEDULES[schedule]
    prior = dict(clip=peer_clip(peer) if with_clip else None)
    theirs = make_trainer(small_prior(module=peer, **prior), Peers, **options)
    run(theirs, 6)
    theirs.save(tmp_path / "peer.pth")
    ours = make_trainer(small_prior(seed=5, clip=ToyClip() if with_clip else None), **options)
    ours.load(tmp_path / "peer.pth")
    assert int(ours.step) == 6 and int(ours.ema_diffusion_prior.step) == 6
    assert lr_of(ours) == pytest.approx(lr_of(theirs))
    wanted = continued(theirs)
    assert relative_error(continued(ours), wanted) < 1e-4
    # and without the moments the curve is another
    fresh = make_trainer(small_prior(seed=5, clip=ToyClip() if with_clip else None), **options)
    fresh.prior.load_state_dict(torch.load(tmp_path / "peer.pth", weights_only=False)["model"], strict=False)
    assert relative_error(continued(fresh), wanted) > 1e-3


def peer_clip(peer):
    from dalle2_pytorch.dalle2_pytorch import BaseClipAdapter as Base

    class PeersToyClip(Base):
        dim_latent, image_size, image_channels = ToyClip.dim_latent, ToyClip.image_size, ToyClip.image_channels
        max_text_len = ToyClip.max_text_len

    return PeersToyClip(torch.nn.Embedding(4000, 16))


def continued(trainer):
    """Ten losses, and the average's weights after them."""
    torch.manual_seed(3)
    losses = torch.tensor(run(trainer, 10, start=50))
    return torch.cat((losses, trainer.ema_diffusion_prior.ema_model.net.learned_query))


@pytest.mark.parametrize("schedule", ["warm-up", "adam", "both"])
def test_export_for_the_peer(peer, tmp_path, schedule):
    from dalle2_pytorch.trainer import DiffusionPriorTrainer as Peers

    ours = make_trainer(**SCHEDULES[schedule])
    run(ours, 6)
    ours.export_for_peer(tmp_path / "ours.pth")
    theirs = make_trainer(small_prior(module=peer, seed=5), Peers, **SCHEDULES[schedule])
    theirs.load(str(tmp_path / "ours.pth"), overwrite_lr=False)
    assert theirs.step.item() == 6 and theirs.ema_diffusion_prior.step.item() == 6
    assert lr_of(theirs) == pytest.approx(lr_of(ours))
    if schedule != "both":  # after a resumption the peer's cosine starts anew
        assert relative_error(continued(ours), continued(theirs)) < 1e-4
    back = make_trainer(small_prior(seed=6), **SCHEDULES[schedule])
    back.load(tmp_path / "ours.pth")
    theirs.save(tmp_path / "theirs.pth")
    assert "net.learned_query" in back.load(tmp_path / "theirs.pth")["model"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_overwrite_lr_holds(tmp_path, overwrite):
    schedule = dict(warmup_steps=4, cosine_decay_max_steps=20)
    old = make_trainer(lr=0.1, **schedule)
    run(old, 2)
    old.save(tmp_path / "old.pth")
    new = make_trainer(lr=0.3, **schedule)
    new.load(tmp_path / "old.pth", overwrite_lr=overwrite)
    base = 0.3 if overwrite else 0.1
    for step in range(2, 7):
        assert lr_of(new) == pytest.approx(base * learning_rate_factor(step, 4, 20))
        run(new, 1, step)


# checkpoints


def test_checkpoint_holds_nothing_twice(tmp_path):
    trainer = make_trainer(small_prior(dict(depth=4, dim_head=32, heads=8), clip=ToyClip()))
    run(trainer, 2)
    trainer.save(tmp_path / "x.pth", epoch=3, best=[0.5, None])
    own = sum(v.nbytes for name, v in trainer.prior.state_dict().items() if not name.startswith("clip."))
    assert 4 * own < (tmp_path / "x.pth").stat().st_size < 4.2 * own + 150_000  # names and generators
    payload = torch.load(tmp_path / "x.pth", weights_only=True)
    assert payload["epoch"] == 3 and payload["best"] == [0.5, None] and "version" not in payload
    assert not [key for key in (*payload["model"], *payload["ema_model"]) if key.startswith("clip.")]
    again = make_trainer(small_prior(dict(depth=4, dim_head=32, heads=8), clip=ToyClip(), seed=3))
    assert again.load(tmp_path / "x.pth")["epoch"] == 3
    assert not differing(tensors(trainer), tensors(again))
    loaded = fastprior.load(tmp_path / "x.pth", config=dict(timesteps=10, condition_on_text_encodings=False))
    assert torch.equal(loaded.net.learned_query, trainer.sampling_prior.net.learned_query)


@pytest.mark.parametrize("kind", ["str", "path", "state"])
def test_load_takes(tmp_path, kind):
    trainer = make_trainer()
    run(trainer, 2)
    trainer.save(tmp_path / "x" / "y.pth")
    source = dict(str=str(tmp_path / "x" / "y.pth"), path=Path(tmp_path / "x" / "y.pth"))
    source["state"] = trainer.training_state()
    again = make_trainer(small_prior(seed=3))
    again.load(source[kind])
    before = tensors(trainer)
    assert not differing(before, tensors(again)) and int(again.step) == 2
    run(again, 2)
    assert not differing(before, tensors(trainer))  # nothing is shared


def test_resumption_is_exact(tmp_path):
    """With everything that draws: times, noise, dropout, dropped conditions, self-conditioning."""
    net = dict(attn_dropout=0.1, ff_dropout=0.1, self_cond=True)
    options = dict(warmup_steps=5, cosine_decay_max_steps=9, max_grad_norm=0.1)
    torch.manual_seed(7)
    random.seed(7)
    whole = make_trainer(small_prior(net), **options)
    run(whole, 4)
    whole.save(tmp_path / "half.pth")
    wanted = run(whole, 4, 4)
    torch.manual_seed(8)
    random.seed(8)
    half = make_trainer(small_prior(net, seed=5), **options)
    half.load(tmp_path / "half.pth")
    assert run(half, 4, 4) == wanted
    assert not differing(tensors(whole), tensors(half)) and lr_of(whole) == lr_of(half)


def test_what_cannot_be_saved(tmp_path):
    trainer = make_trainer()
    with pytest.raises(TypeError, match=r"extra\['a'\]\[0\] is a PosixPath"):
        trainer.save(tmp_path / "x.pth", extra={"a": [Path()]})
    with pytest.raises(TypeError, match="loss is a float64"):
        trainer.save(tmp_path / "x.pth", loss=np.float64(1))
    for name in ("version", "model"):
        with pytest.raises(ValueError, match=f"{name}='1'; this entry is the trainer's own"):
            trainer.save(tmp_path / "x.pth", **{name: "1"})
    assert not list(tmp_path.iterdir())
    trainer.save(tmp_path / "x.pth")
    with pytest.raises(FileExistsError, match="x.pth exists"):
        trainer.save(tmp_path / "x.pth", overwrite=False)


def test_a_disk_that_is_full_leaves_the_last_checkpoint(tmp_path):
    trainer = make_trainer()
    trainer.save(tmp_path / "x.pth")
    before = (tmp_path / "x.pth").read_bytes()
    run(trainer, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"x\.pth could not be written"):
            trainer.save(tmp_path / "x.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.pth", before)]
    trainer.save(tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", weights_only=True)["step"].item() == 1


def test_what_cannot_be_loaded(tmp_path):
    trainer = make_trainer()
    run(trainer, 2)
    trainer.save(tmp_path / "x.pth")
    before = tensors(trainer)

    def refused(match, change=None, net=None):
        payload = torch.load(tmp_path / "x.pth")
        if change:
            change(payload)
        torch.save(payload, tmp_path / "bad.pth")
        other = trainer if net is None else make_trainer(small_prior(net))
        with pytest.raises(ValueError, match=match):
            other.load(tmp_path / "bad.pth")

    refused("has no entry 'optimizer'", lambda p: p.pop("optimizer"))
    refused("model: missing keys: net.learned_query", lambda p: p["model"].pop("net.learned_query"))
    refused("ema_model: .* unexpected keys: x", lambda p: p["ema_model"].update(x=torch.zeros(1)))
    refused("model: net.learned_query has shape", lambda p: p["model"].update({"net.learned_query": torch.zeros(3)}))
    refused("only this trainer trains net.learned_query", lambda p: p["optimizer"]["state"].pop("net.learned_query"))
    moments = dict(step=torch.tensor(2.0), exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))
    refused(
        "exp_avg of net.learned_query has shape",
        lambda p: p["optimizer"]["state"].update({"net.learned_query": moments}),
    )
    refused("missing keys: net.causal_transformer.layers.2", net=dict(depth=3))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.pth cannot be read"):
        trainer.load(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        trainer.load(tmp_path / "gone.pth")
    assert not differing(before, tensors(trainer)) and int(trainer.step) == 2
