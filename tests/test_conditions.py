"""Extra conditions and text encoders of another width: every path, nulls and dropout, data and configs."""

import copy
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_prior, make_text, relative_error, sample

from fastprior import checkpoint, train_diffusion_prior
from fastprior.conditions import Conditions
from fastprior.pair_stream import PairStream
from fastprior.sampler import repeat_rows
from fastprior.serving import PriorSampler
from fastprior.shards import EmbeddingShards
from fastprior.trackers import read_metrics
from fastprior.trainer import DiffusionPriorTrainer

TOLERANCE = 1e-4  # of scale, what a whole fp32 run may differ by: two orders of summation, amplified by the solver
SPECS = dict(
    style=dict(kind="vector", size=6),
    aesthetic=dict(kind="scalar", mean=5.0, std=1.5),
    people=dict(kind="category", size=4),
)
NETS = {
    "conditions": dict(conditions=SPECS),
    "self_cond": dict(conditions=SPECS, self_cond=True, num_timesteps=20, norm_in=True),
    "t5": dict(text_dim=24, text_embed_dim=12, num_text_embeds=2),
    "all": dict(conditions=SPECS, text_dim=24, max_text_len=3),
}


def make_values(prompts: int, seed: int = 0) -> dict:
    """Values of all conditions; of every third prompt, each is missing."""
    draw = torch.Generator().manual_seed(seed)
    values = dict(
        aesthetic=torch.randn(prompts, generator=draw) * 1.5 + 5,
        people=torch.randint(4, (prompts,), generator=draw),
        style=torch.randn(prompts, 6, generator=draw),
    )
    values["aesthetic"][0::3], values["people"][1::3], values["style"][2::3, 1] = torch.nan, -1, torch.nan
    return values


def make_inputs(net: dict, prompts: int) -> dict:
    """A text condition for a network of these arguments, with values where it has conditions."""
    text = make_text(prompts, net.get("text_dim", 32))
    text["text_embed"] = make_text(prompts, net.get("text_embed_dim", 32), seed=1)["text_embed"]
    return text | (dict(conditions=make_values(prompts)) if "conditions" in net else {})


def plain(prior):
    """The same prior on the plain path."""
    other = copy.deepcopy(prior)
    other.net.register_forward_pre_hook(lambda *args: None)
    assert other.sampling_plan(4).path == "plain" and prior.sampling_plan(4).path == "cached"
    return other


# one result on every path


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
@pytest.mark.parametrize("net", NETS)
def test_cached_equals_plain(net, cond_scale):
    prior, text = make_prior(NETS[net]), make_inputs(NETS[net], 3)
    kwargs = dict(rows=6, timesteps=8, cond_scale=cond_scale)
    wanted = sample(plain(prior), text, **kwargs)
    assert relative_error(sample(prior, text, **kwargs), wanted) < TOLERANCE
    if "conditions" in text:
        other = text | dict(conditions=text["conditions"] | dict(people=torch.tensor([3, 0, 2])))
        assert relative_error(sample(prior, other, **kwargs), wanted) > 1e-3


@pytest.mark.parametrize("net", NETS)
def test_steps_and_draws_equal_forward(net):
    """Behind a prefill, and with several draws to a prompt: outputs, and the gradient of every weight."""
    net = make_prior(NETS[net]).net
    text, rows, times = make_inputs(net.config, 3), 12, torch.arange(12)
    x, cotangent = torch.randn(rows, 32), torch.randn(rows, 32)
    repeated = net(x, times, **repeat_rows(text, rows))
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(repeated, parameters.values(), cotangent, allow_unused=True)
    cond = net.prefill(text["text_embed"], text["text_encodings"], times, conditions=text.get("conditions"))
    for got in (net(x, times, **text), net.step(x, torch.arange(rows), cond)):
        assert relative_error(got, repeated) < 1e-5
        for name, ours, theirs in zip(
            parameters, torch.autograd.grad(got, parameters.values(), cotangent, allow_unused=True), wanted
        ):
            assert ours is None or not theirs.any() or relative_error(ours, theirs) < 1e-4, name
    for name, gradient in zip(parameters, wanted):
        if "conditions." in name or "to_text" in name:
            assert gradient.isfinite().all() and gradient.any(), f"no gradient reaches {name}"


def test_the_unconditional_branch_sees_no_condition():
    net, text = make_prior(NETS["conditions"]).net, make_inputs(NETS["conditions"], 3)
    x, times = torch.randn(3, 32), torch.tensor([3, 7, 11])
    drop = dict(text_cond_drop_prob=1.0, image_cond_drop_prob=1.0)
    null = net(x, times, **text, **drop)
    assert torch.equal(null, net(x, times, **(text | dict(conditions=None)), **drop))
    assert relative_error(net.null_table(times), null) < 1e-5


@pytest.mark.parametrize("net", NETS)
def test_served(net):
    """Padded to a batch size, in parts, best of n."""
    prior, text = make_prior(NETS[net]), make_inputs(NETS[net], 5)
    repeats = 3 if prior.can_compare_text else 1
    sampler = PriorSampler(prior, batch_sizes=(2, 4), timesteps=6, samples_per_prompt=repeats, compile=False)
    sampler.warmup()
    for prompts in (1, 5):
        given = {name: t[:prompts] for name, t in text.items() if name != "conditions"}
        if "conditions" in text:
            given["conditions"] = {name: t[:prompts] for name, t in text["conditions"].items()}
        kwargs = dict(cond_scale=2.0, timesteps=6, progress=False, num_samples_per_batch=repeats)
        wanted = prior.sample(**given, **kwargs, generator=torch.Generator().manual_seed(1))
        got = sampler(**given, cond_scale=2.0, generator=torch.Generator().manual_seed(1))
        assert relative_error(got, wanted) < TOLERANCE


def test_compiled_once_whatever_is_given():
    from torch._dynamo.utils import counters

    prior, text = make_prior(NETS["all"] | dict(depth=1)), make_inputs(NETS["all"], 2)
    sampler = PriorSampler(prior, batch_sizes=(2,), timesteps=4)
    sampler.warmup()
    counters.clear()
    for values in (text["conditions"], dict(people=text["conditions"]["people"]), None):
        given = text | dict(conditions=values)
        wanted = sample(prior, given, timesteps=4, generator=torch.Generator().manual_seed(1))
        got = sampler(**given, generator=torch.Generator().manual_seed(1))
        assert relative_error(got, wanted) < TOLERANCE
    assert not counters["stats"].get("unique_graphs"), "a call after warmup compiled something"


# nulls and dropout


@pytest.mark.parametrize("name", SPECS)
def test_what_is_missing_is_the_learned_null(name):
    net, text = make_prior(NETS["conditions"]).net, make_inputs(NETS["conditions"], 3)
    x, times, values = torch.randn(3, 32), torch.tensor([3, 7, 11]), text["conditions"]
    missing = torch.arange(3) == ["aesthetic", "people", "style"].index(name)
    before = net(x, times, **text)
    nowhere = net(x, times, **(text | dict(conditions={other: v for other, v in values.items() if other != name})))
    assert torch.equal(nowhere[missing], before[missing])
    assert ((nowhere - before)[~missing].abs().amax(dim=1) > 1e-4).all()
    with torch.no_grad():
        net.conditions[name].null.mul_(-1)
    after = net(x, times, **text)
    assert ((after - before)[missing].abs().amax(dim=1) > 1e-4).all()
    assert torch.equal(after[~missing], before[~missing])


def test_each_is_dropped_at_its_own_rate_independently():
    rates = dict(aesthetic=0.2, people=0.5, style=0.8)
    torch.manual_seed(0)
    conditions = Conditions(8, {name: spec | dict(dropout=rates[name]) for name, spec in SPECS.items()})
    prompts = 6000
    values = dict(aesthetic=torch.zeros(prompts), people=torch.zeros(prompts).long(), style=torch.zeros(prompts, 6))
    keep = torch.arange(prompts)[:, None] % 4 > 0
    nulls = torch.stack([conditions[name].null for name in rates])
    dropped = (conditions(values, keep) == nulls).all(dim=-1)
    assert dropped[::4].all(), "with the text, everything is dropped"
    own = dropped[keep[:, 0]].double()
    assert own.mean(dim=0).tolist() == pytest.approx(list(rates.values()), abs=4 * (0.25 / len(own)) ** 0.5)
    assert (torch.corrcoef(own.T) - torch.eye(3)).abs().max() < 4 / len(own) ** 0.5
    assert not (conditions.eval()(values, keep | True) == nulls).all(dim=-1).any()


def test_sampling_drops_nothing():
    net = dict(conditions={name: spec | dict(dropout=0.9) for name, spec in SPECS.items()})
    prior, text = make_prior(net), make_inputs(net, 3)
    wanted = sample(prior, text, timesteps=4)
    assert "dropout is active" in prior.train().sampling_plan(4).reasons[0]
    torch.manual_seed(1)
    got = prior.sample(**text, timesteps=4, num_samples_per_batch=1, progress=False)
    assert relative_error(got, wanted) < TOLERANCE and prior.training


def test_other_weights_are_drawn_as_without_conditions():
    without, extended = make_prior().net, make_prior(NETS["conditions"]).net
    state = extended.state_dict()
    assert {name for name in state if name not in without.state_dict()} == {
        name for name in state if name.startswith("conditions.")
    }
    for name, weight in without.state_dict().items():
        assert torch.equal(weight, state[name]), name
    assert "conditions" not in without.config and "text_dim" not in without.config
    renamed = dict(conditions=dict(reversed(SPECS.items())))
    assert list(make_prior(renamed).net.state_dict()) == list(state), "the order in the config does not matter"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    prior, text = make_prior(NETS["all"]), make_inputs(NETS["all"], 6)
    wanted = sample(prior, text, timesteps=6, cond_scale=2.0)
    prior.net.to(dtype)
    got = sample(prior, text, timesteps=6, cond_scale=2.0)
    assert torch.cosine_similarity(got, wanted).median() > (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)


def test_the_prior_follows_a_condition_that_alone_tells():
    """One text for all; the image is of the category, turned by the scalar."""
    torch.manual_seed(0)
    specs = dict(people=dict(kind="category", size=3, dropout=0.1), angle=dict(kind="scalar", mean=1.0, std=0.5))
    prior = make_prior(dict(dim=16, depth=2, conditions=specs, max_text_len=1), condition_on_text_encodings=False)
    axes = torch.linalg.qr(torch.randn(16, 6))[0].T.view(3, 2, 16)

    def image_of(people, angle):
        return axes[people, 0] * angle.cos()[:, None] + axes[people, 1] * angle.sin()[:, None]

    def pairs(count):
        values = dict(people=torch.randint(3, (count,)), angle=torch.rand(count) * 1.5)
        text = torch.eye(16)[:1].expand(count, -1)
        return dict(text_embed=text, conditions=values), image_of(**values)

    optimizer = torch.optim.Adam(prior.net.parameters(), lr=3e-3)
    prior.train()
    for _ in range(250):
        text, image = pairs(64)
        prior(**text, image_embed=image, draws=4).backward()
        optimizer.step()
        optimizer.zero_grad()
    text, image = pairs(64)
    sampled = prior.eval().p_sample_loop((64, 16), text, timesteps=10, solver="dpm++", progress=False)
    similarity = torch.cosine_similarity(sampled, image)
    assert similarity.mean() > 0.9
    for name in specs:
        shuffled = text["conditions"] | {name: text["conditions"][name].roll(1)}
        sampled = prior.p_sample_loop((64, 16), text | dict(conditions=shuffled), timesteps=10, progress=False)
        assert torch.cosine_similarity(sampled, image).mean() < similarity.mean() - 0.05


# checkpoints


@pytest.mark.parametrize("net", NETS)
def test_saved_and_loaded(net, tmp_path):
    prior, text = make_prior(NETS[net]), make_inputs(NETS[net], 3)
    wanted = sample(prior, text, timesteps=4)
    checkpoint.save(prior, tmp_path / "prior.safetensors")
    loaded = checkpoint.load(tmp_path / "prior.safetensors")
    assert loaded.net.config == prior.net.config
    assert torch.equal(sample(loaded, text, timesteps=4), wanted)
    with pytest.raises(ValueError, match="the network has (conditions|text_dim)=.*; dalle2-pytorch's has no such arg"):
        checkpoint.save_peer(prior, tmp_path / "prior.pt")


def test_of_bare_weights_widths_are_seen_and_conditions_must_be_told(tmp_path):
    for net in ("t5", "all"):
        prior, text = make_prior(NETS[net]), make_inputs(NETS[net], 3)
        torch.save(prior.state_dict(), tmp_path / "prior.pt")
        config = dict(net=dict(conditions=SPECS)) if net == "all" else None
        loaded = checkpoint.load(tmp_path / "prior.pt", config=config)
        assert torch.equal(sample(loaded, text, timesteps=4), sample(prior, text, timesteps=4))
    with pytest.raises(ValueError, match="has the conditions aesthetic, people, style, .* give config="):
        checkpoint.load(tmp_path / "prior.pt")


# the trainer


def test_trainer_splits_conditions_with_the_batch():
    text, image = make_inputs(NETS["conditions"], 7), torch.randn(7, 32)
    gradients, seen = [], []
    for size in (None, 3):
        prior = make_prior(NETS["conditions"], cond_drop_prob=0.0)
        trainer = DiffusionPriorTrainer(prior, device="cpu", use_ema=False)
        prior.noise_scheduler.sample_random_times = lambda count: torch.full((count,), 3)
        prior.net.conditions["style"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        noise = torch.arange(7 * 32).view(7, 32).sin()
        trainer(**text, image_embed=image, noise=noise, max_batch_size=size)
        gradients.append(torch.cat([p.grad.flatten() for p in prior.net.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < 1e-5
    assert [len(style) for style in seen] == [7, 3, 3, 1]
    assert torch.equal(torch.cat(seen[1:]).nan_to_num(), seen[0].nan_to_num())


def test_compiled_training_is_one_graph():
    losses = []
    for compile in (False, dict(backend="eager", fullgraph=True)):
        prior, text = make_prior(NETS["all"] | dict(depth=1)), make_inputs(NETS["all"], 4)
        trainer = DiffusionPriorTrainer(prior, device="cpu", use_ema=False, compile=compile, draws=2)
        torch.manual_seed(0)
        losses.append(trainer(**text, image_embed=torch.randn(4, 32)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# data and configs

DIM, ROWS = 8, 60


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def write_table(folder, shard, **columns):
    pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{shard}.parquet", row_group_size=13)


@pytest.fixture
def folder(tmp_path):
    """Two shards of pairs whose images are told by the metadata and the style alone; the second lacks some values."""
    draw = np.random.default_rng(0)
    axes = np.linalg.qr(draw.normal(size=(DIM, DIM)))[0]
    for name in ("images", "texts", "encodings", "styles", "metadata"):
        (tmp_path / name).mkdir()
    for shard in range(2):
        people, score = draw.integers(3, size=ROWS), draw.uniform(0, 10, ROWS)
        style = draw.normal(size=(ROWS, 5))
        image = axes[people] + score[:, None] / 10 * axes[3] + 0.3 * style[:, :1] * axes[4]
        image /= np.linalg.norm(image, axis=1, keepdims=True)
        text = np.eye(12)[:1].repeat(ROWS, axis=0)
        arrays = dict(images=image, texts=text, encodings=text[:, None].repeat(2, axis=1), styles=style)
        for name, array in arrays.items():
            np.save(tmp_path / name / f"{name}_{shard}.npy", array.astype(np.float32))
        lost = [shard and row % 10 == 0 for row in range(ROWS)]
        write_table(
            tmp_path, shard, caption=["a photo"] * ROWS,
            num_people=pa.array(people, pa.int32(), mask=np.array(lost, bool)),
            score=pa.array(score, mask=np.array(lost, bool)),
        )  # fmt: skip
    return tmp_path


def make_config(folder, **sections) -> dict:
    conditions = dict(
        people=dict(kind="category", size=3, dropout=0.1), style=dict(kind="vector", size=5),
        aesthetic=dict(kind="scalar", mean=5, std=3, dropout=0.1),
    )  # fmt: skip
    config = dict(
        prior=dict(
            net=dict(dim=DIM, depth=2, heads=2, dim_head=8, max_text_len=2, text_dim=12, text_embed_dim=12,
                     conditions=conditions),
            image_embed_dim=DIM, timesteps=20, cond_drop_prob=0.1,
        ),
        data=dict(
            image_url=str(folder / "images"), meta_url=str(folder / "metadata"), text_url=str(folder / "texts"),
            encodings_url=str(folder / "encodings"), batch_size=32, splits=dict(train=0.9, val=0.1, test=0),
            conditions=dict(people="num_people", aesthetic="score", style=str(folder / "styles")),
        ),
        train=dict(epochs=60, lr=1e-2, wd=0.0, draws=4, max_batch_size=20, ema_beta=0.9, ema_update_after_step=1,
                   ema_update_every=1, eval_timesteps=[4]),
        tracker=dict(
            data_path=str(folder / "run"), overwrite_data_path=True, log=dict(log_type="console"),
            save=[dict(save_to="local", save_type="checkpoint", save_latest_to=str(folder / "run/latest.pth"))],
        ),
    )  # fmt: skip
    for section, changes in sections.items():
        config[section] |= changes
    return config


def train(folder, config) -> int:
    (folder / "config.json").write_text(json.dumps(config))
    return train_diffusion_prior.main(["--config_file", str(folder / "config.json")])


def test_a_run_on_metadata_columns_and_vectors(folder):
    assert train(folder, make_config(folder)) == 0
    records = read_metrics(folder / "run/metrics.jsonl")
    last = next(r for r in reversed(records) if "validation/ema similarity with original image [steps=4]" in r)
    assert last["validation/ema similarity with original image [steps=4]"] > 0.85
    assert not any("text" in name for name in last), "a text of another width cannot be compared"
    prior = checkpoint.load(folder / "run/latest.pth", config=folder / "config.json")
    shards = EmbeddingShards.open(
        folder / "images", folder / "metadata", folder / "texts", folder / "encodings",
        conditions=dict(people=("category", "num_people"), aesthetic=("scalar", "score"),
                        style=("vector", folder / "styles")),
    )  # fmt: skip
    (batch,) = PairStream(shards, batch_size=2 * ROWS)
    assert (batch["people"][ROWS:] < 0).sum() == 6 == batch["aesthetic"].isnan().sum()
    given = ~batch["aesthetic"].isnan()
    text = {name: batch[name][given] for name in ("text_embed", "text_encodings")}
    values = {name: batch[name][given] for name in ("people", "aesthetic", "style")}
    for change, low, high in (({}, 0.9, 1), (dict(people=(values["people"] + 1) % 3), -1, 0.7)):
        kwargs = dict(num_samples_per_batch=1, timesteps=8, progress=False)
        sampled = prior.sample(**text, conditions=values | change, **kwargs)
        assert low < torch.cosine_similarity(sampled, batch["image_embed"][given]).mean() < high
