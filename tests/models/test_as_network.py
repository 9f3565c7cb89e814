"""Training and sampling a PriorTransformer as the network of a DiffusionPrior."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from fastprior import DiffusionPrior, DiffusionPriorTrainer, PriorTransformer, train_diffusion_prior
from fastprior.diffusion.diffusers_schedules import DiffusersSchedule
from fastprior.models.prior_transformer import cached_blocks
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.pipelines.prior_pipeline import PriorPipeline
from fastprior.pipelines.text_encoding import TextEncoding
from fastprior.serving.prior_sampler import PriorSampler
from helpers.priors import relative_error

ARCHITECTURE = dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=3, embedding_dim=24, num_embeddings=9,
    additional_embeddings=4,
)  # fmt: skip


def make(seed: int = 0, *, timesteps: int = 20, drop: float = 0.0, **architecture) -> DiffusionPrior:
    torch.manual_seed(seed)
    transformer = PriorTransformer(**ARCHITECTURE | architecture)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.normal_(std=0.15)
    net = PriorTransformerNet(transformer)
    net.set_statistics(torch.randn(50, 24) * 2 + 1)
    text = make_text(1, length=2)
    net.set_null_text(**text)
    return DiffusionPrior(net, image_embed_dim=24, timesteps=timesteps, cond_drop_prob=drop)


def make_text(prompts: int, length: int = 7, seed: int = 1) -> dict:
    """Captions of different lengths, one of them empty where there are three."""
    draw = torch.Generator().manual_seed(seed)
    encodings = torch.randn(prompts, length, 24, generator=draw)
    for row in range(prompts):
        encodings[row, max(0, length - 3 * row) :] = 0
    return dict(text_embed=torch.randn(prompts, 24, generator=draw), text_encodings=encodings)


def drawing(prior: DiffusionPrior, monkeypatch, times: torch.Tensor) -> None:
    monkeypatch.setattr(prior.noise_scheduler, "sample_random_times", lambda batch: times)


@pytest.mark.parametrize("dropped", [False, True])
def test_loss_is_that_of_diffusers_training(monkeypatch, dropped):
    """Its model and its scheduler, normalised embeddings, the mean squared error of x0."""
    diffusers = pytest.importorskip("diffusers")
    prior = make(drop=float(dropped), timesteps=1000)
    stock = diffusers.PriorTransformer(**ARCHITECTURE)
    stock.load_state_dict(prior.net.prior.state_dict())
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    text, image, noise = make_text(3), torch.randn(3, 24), torch.randn(3, 24)
    times = torch.tensor([3, 400, 999])
    drawing(prior, monkeypatch, times)
    image_before = image.clone()
    loss = prior(**text, image_embed=image, noise=noise)
    assert torch.equal(image, image_before)

    target = (image - stock.clip_mean) / stock.clip_std
    if dropped:
        text = {name: t.expand(3, *t.shape[1:]) for name, t in make_text(1, length=2).items()}
    encodings = torch.nn.functional.pad(text["text_encodings"], (0, 0, 0, 9 - text["text_encodings"].shape[1]))
    pred = stock(
        scheduler.add_noise(target, noise, times), times, text["text_embed"], encodings, encodings.ne(0).any(-1)
    ).predicted_image_embedding
    assert relative_error(loss, (pred - target).square().mean()) <= 1e-5


def test_the_loss_needs_statistics():
    net = PriorTransformerNet(PriorTransformer(**ARCHITECTURE))
    prior = DiffusionPrior(net, image_embed_dim=24)
    with pytest.raises(ValueError, match="clip_std holds zeros; it must be loaded, or taken from data by"):
        prior(**make_text(3), image_embed=torch.randn(3, 24))


@pytest.mark.parametrize("draws", [1, 3])
def test_packed_text_gives_the_gradients_of_the_whole_pass(monkeypatch, draws):
    """The text runs once for all draws, and padding not at all."""
    prior, image, noise = make(), torch.randn(3, 24), torch.randn(3 * draws, 24)
    text, tokens, plain = make_text(3), [], cached_blocks.projected

    def counted(linear, x, *args, **kwargs):
        tokens.append(x.numel() // x.shape[-1])
        return plain(linear, x, *args, **kwargs)

    monkeypatch.setattr(cached_blocks, "projected", counted)
    found = []
    for whole in (False, True):
        model = copy.deepcopy(prior)
        drawing(model, monkeypatch, torch.arange(3 * draws) * 2)
        if whole:
            model.net.enable_gradient_checkpointing()
        loss = model(**text, image_embed=image, noise=noise, draws=draws)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    # 7 + 4 + 1 real tokens and an embedding of each text; behind them, of each draw, time, x and the query
    assert max(tokens) == max(7 + 4 + 1 + 3, 3 * 3 * draws) and set(tokens) == {15, 9 * draws, 3 * draws}
    (loss, grads), (wanted_loss, wanted) = found
    assert relative_error(loss, wanted_loss) <= 1e-5
    assert grads.keys() == wanted.keys() and all(grad is not None for grad in grads.values())
    for name, grad in grads.items():
        if name.endswith("to_k.bias"):  # what is added to all logits of a softmax has no gradient
            assert grad.abs().max() <= 1e-6
        else:
            assert relative_error(grad, wanted[name]) <= 1e-4, name


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@pytest.mark.parametrize("timesteps", [20, 6])
def test_sampling_behind_the_prefix(monkeypatch, cond_scale, timesteps):
    """Equal to whole passes, with the empty text as the unconditional branch; and undone normalisation."""
    prior, text = make(drop=0.1).eval(), make_text(3)
    plan = prior.sampling_plan(timesteps, cond_scale)
    assert plan.path == "cached" and plan.guidance == ("none" if cond_scale == 1 else "second branch")
    given = dict(text_cond=text, cond_scale=cond_scale, timesteps=timesteps, progress=False)
    got = prior.p_sample_loop((6, 24), generator=torch.Generator().manual_seed(5), **given)
    monkeypatch.setattr(PriorTransformerNet, "obstacles", lambda self, dropout=False: ["so that it is not"])
    assert prior.sampling_plan(timesteps, cond_scale).path == "plain"
    wanted = prior.p_sample_loop((6, 24), generator=torch.Generator().manual_seed(5), **given)
    assert relative_error(got, wanted) <= 1e-5
    with torch.no_grad():
        prior.net.set_null_text(torch.ones(1, 24), torch.ones(1, 9, 24))
        other = prior.p_sample_loop((6, 24), generator=torch.Generator().manual_seed(5), **given)
        assert (relative_error(other, wanted) > 1e-2) == (cond_scale != 1)
        prior.net.prior.clip_mean += 7
        shifted = prior.p_sample_loop((6, 24), generator=torch.Generator().manual_seed(5), **given)
    assert relative_error(shifted, other + 7) <= 1e-5


@pytest.mark.slow
def test_equal_to_the_pipeline():
    """What is trained here is sampled by `PriorPipeline` as it is by `prior.sample`."""
    schedule = DiffusersSchedule("UnCLIPScheduler", clip_sample=False, prediction_type="sample")
    prior = make(drop=0.1, timesteps=1000).eval()
    text, null = make_text(2), make_text(1, length=2)
    text["text_encodings"] = torch.nn.functional.pad(text["text_encodings"], (0, 0, 0, 2))
    null["text_encodings"] = torch.nn.functional.pad(null["text_encodings"], (0, 0, 0, 7))
    conditions = [TextEncoding(*t.values(), t["text_encodings"].ne(0).any(-1)) for t in (text, null)]
    generator = torch.Generator().manual_seed(3)
    wanted = PriorPipeline(prior.net.prior, schedule)(
        conditions[0], conditions[1], num_inference_steps=1000, guidance_scale=2.0, generator=generator,
        zero_embed=torch.zeros(1, 24),
    ).image_embeds  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    got = prior.p_sample_loop((2, 24), text, cond_scale=2.0, generator=generator, progress=False)
    assert torch.cosine_similarity(got, wanted).min() > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(checkpoint_activations=True), dict(compile=dict(backend="aot_eager"))])
def test_training(tmp_path, options):
    """Through the trainer, to a folder that PriorTransformer (and diffusers) reads."""
    trainer = DiffusionPriorTrainer(make(drop=0.1), lr=5e-3, use_ema=False, accelerator_cpu=True, **options)
    text, image = make_text(8, seed=4), torch.randn(8, 24) + 1
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        losses.append(trainer(**text, image_embed=image))
        trainer.update()
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    trainer.prior.net.prior.save_pretrained(tmp_path)
    loaded = PriorTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded.clip_std, trainer.prior.net.prior.clip_std) and loaded.clip_std.all()
    x, times = torch.randn(8, 24), torch.full((8,), 3)
    encodings = torch.nn.functional.pad(text["text_encodings"], (0, 0, 0, 2))
    with torch.no_grad():
        wanted = trainer.prior.eval().net(x, times, **text)
        got = loaded(x, times, text["text_embed"], encodings, encodings.ne(0).any(-1)).predicted_image_embedding
    assert relative_error(got, wanted) <= 1e-5


def test_checkpoint_resumes(tmp_path):
    trainers = []
    for seed in (0, 1):
        trainers.append(DiffusionPriorTrainer(make(seed), accelerator_cpu=True))
    text, image = make_text(4), torch.randn(4, 24)

    def step(trainer):
        torch.manual_seed(9)
        trainer(**text, image_embed=image)
        trainer.update()

    step(trainers[0])
    trainers[0].save(tmp_path / "trainer.pth")
    trainers[1].load(tmp_path / "trainer.pth")
    for trainer in trainers:
        step(trainer)
    for ours, theirs in zip(trainers[0].state_dict().values(), trainers[1].state_dict().values()):
        assert torch.equal(ours, theirs)


@pytest.fixture
def config(tmp_path) -> dict:
    """A run on shards of image embeddings, text embeddings and text encodings, the image a rotation of the text."""
    draw = np.random.default_rng(0)
    rotation = np.linalg.qr(draw.normal(size=(24, 24)))[0]
    for name in ("images", "texts", "encodings"):
        (tmp_path / name).mkdir()
    for shard in range(2):
        text, encodings = draw.normal(size=(60, 24)), draw.normal(size=(60, 5, 24))
        encodings[:, 3:] = 0
        np.save(tmp_path / "texts" / f"text_emb_{shard}.npy", text.astype(np.float32))
        np.save(tmp_path / "encodings" / f"enc_{shard}.npy", encodings.astype(np.float32))
        np.save(tmp_path / "images" / f"img_emb_{shard}.npy", (text @ rotation * 3 + 1).astype(np.float32))
    net = ARCHITECTURE | dict(make="prior_transformer", num_layers=1)
    return dict(
        prior=dict(net=net, image_embed_dim=24, timesteps=50, cond_drop_prob=0.1),
        data=dict(
            image_url=str(tmp_path / "images"), text_url=str(tmp_path / "texts"),
            encodings_url=str(tmp_path / "encodings"), batch_size=20, splits=dict(train=0.8, val=0.2, test=0.0),
        ),
        train=dict(epochs=20, lr=1e-2, eval_timesteps=[8], draws=2, ema_update_after_step=1, ema_update_every=1),
        tracker=dict(
            data_path=str(tmp_path / "run"), overwrite_data_path=True, log=dict(log_type="console"),
            save=[dict(save_to="local", save_latest_to=str(tmp_path / "latest.pth"), save_type="checkpoint")],
        ),
    )  # fmt: skip


def run(config: dict, path) -> dict:
    """A whole run of the script: the last log line's metrics."""
    (path / "config.json").write_text(json.dumps(config))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_diffusion_prior.main(["--config_file", str(path / "config.json")]) == 0
    metrics = {}
    for line in (path / "run" / "metrics.jsonl").read_text().splitlines():
        metrics |= json.loads(line)
    return metrics


@pytest.mark.slow
def test_script(config, tmp_path):
    """From scratch, with statistics of the data; then further from a folder, with that folder's."""
    metrics = run(config, tmp_path)
    original, text = (
        metrics[f"validation/ema similarity with {what} [steps=8]"] for what in ("original image", "text")
    )
    assert original > text + 0.2
    images = np.concatenate([np.load(path) for path in sorted((tmp_path / "images").iterdir())])
    state = torch.load(tmp_path / "latest.pth", weights_only=True)["model"]
    assert np.allclose(state["net.prior.clip_mean"], images.mean(axis=0), atol=1e-5)
    assert np.allclose(state["net.prior.clip_std"], images.std(axis=0, ddof=1), atol=1e-4)

    start = PriorTransformer(**ARCHITECTURE)
    with torch.no_grad():
        start.clip_std.fill_(2.5)
    start.save_pretrained(tmp_path / "start" / "prior")
    config["prior"]["net"] = dict(make="prior_transformer", pretrained=str(tmp_path / "start"), subfolder="prior")
    config["train"]["epochs"] = 1
    run(config, tmp_path)
    state = torch.load(tmp_path / "latest.pth", weights_only=True)["model"]
    assert (state["net.prior.clip_std"] == 2.5).all() and len(state) > 50


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_layer=2), "prior.net: unknown key 'num_layer', the nearest is 'num_layers'"),
        (dict(num_layers=0), "prior.net.num_layers: "),
        (dict(pretrained="x"), "prior.net: additional_embeddings was given with pretrained; it must be what"),
        (dict(make="other"), "prior.net.make: "),
        (dict(embedding_dim=32), "image_embed_dim=24; it must be the network's dim, 32"),
    ],
)
def test_wrong_configs(config, tmp_path, change, message):
    config["prior"]["net"] |= change
    with pytest.raises(ValueError) as raised:
        run(config, tmp_path)
    assert message in str(raised.value)


NET = make().net
TEXT = make_text(2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PriorTransformerNet(PriorTransformer(**ARCHITECTURE, added_emb_type=None)), "prior must have a 'prd'"),
        (lambda: PriorTransformerNet(PriorTransformer(**ARCHITECTURE, clip_embed_dim=7)), "clip_embed_dim=7; it must"),
        (lambda: NET.set_statistics(torch.zeros(1, 24)), "image_embed has shape (1, 24); it must be (2 or more, 24)"),
        (lambda: NET.set_null_text(torch.zeros(1, 5), TEXT["text_encodings"]), "text_embed has shape (1, 5); it must"),
        (
            lambda: NET(torch.zeros(2, 24), torch.zeros(2), text_embed=TEXT["text_embed"], text_encodings=None),
            "text_encodings=None; a PriorTransformer is conditioned on text encodings",
        ),
        (
            lambda: NET(torch.zeros(2, 24), torch.zeros(2), **TEXT | dict(text_encodings=torch.zeros(2, 10, 24))),
            "text_encodings has shape (2, 10, 24); it must be (2, at most 9, 24)",
        ),
        (lambda: NET(torch.zeros(3, 24), torch.zeros(3), **TEXT), "image_embed has 3 rows; they must be a multiple"),
        (lambda: PriorSampler(make().eval(), timesteps=4), "this prior cannot be served by PriorSampler: net is"),
    ],
)  # fmt: skip
def test_messages(call, message):
    with pytest.raises(ValueError) as raised:
        call()
    assert message in str(raised.value)
