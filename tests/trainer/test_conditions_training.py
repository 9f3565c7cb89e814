"""Extra conditions in training and on the command line: batches, data, configs."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastprior import train_diffusion_prior
from fastprior.checkpoints import dalle2 as checkpoint
from fastprior.cli import command_line as cli
from fastprior.dataloaders import EmbeddingShards, PairStream
from fastprior.trackers import read_metrics
from fastprior.train_configs import DiffusionPriorConfig
from fastprior.trainer import DiffusionPriorTrainer
from helpers.condition_cases import NETS, TOLERANCE, make_inputs
from helpers.priors import make_prior, relative_error

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

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


@pytest.mark.slow
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


@pytest.mark.slow
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


def spoil(name, **columns):
    """A change of the second shard's metadata."""

    def change(folder, config):
        table = pq.read_table(folder / "metadata/metadata_1.parquet").to_pydict() | columns
        write_table(folder, 1, **{column: values for column, values in table.items() if column != name})

    return change


def setting(path, value):
    """A change of a key of the config; None removes it."""

    def change(folder, config):
        *sections, key = path.split(".")
        for section in sections:
            config = config[section]
        config.pop(key) if value is None else config.update({key: value})

    return change


def save(name, array):
    return lambda folder, config: np.save(folder / name, np.asarray(array, np.float32))


SPEC = "prior.net.conditions"
WRONG = [
    (setting(f"{SPEC}.people.kind", "boolean"), r"prior.net.conditions: conditions\['people'\]=.*'scalar', 'category'"),
    (setting(f"{SPEC}.people.sise", 3), r"prior.net.conditions: .*unknown option 'sise'; the nearest is 'size'"),
    (setting(f"{SPEC}.people.size", None), r"prior.net.conditions: .*\['people'\] has no size; a category needs it"),
    (setting(f"{SPEC}.people.size", 0), r"\['people'\]: size=0; it must be at least 1"),
    (setting(f"{SPEC}.people.dropout", -0.1), r"\['people'\]: dropout=-0.1; it must be between 0 and 1"),
    (setting(f"{SPEC}.people.dropout", 1.5), r"\['people'\]: dropout=1.5; it must be between 0 and 1"),
    (setting(f"{SPEC}.aesthetic.std", 0), r"\['aesthetic'\]: std=0; it must be a finite number and more than 0"),
    (setting(f"{SPEC}.aesthetic.mean", "5"), r"\['aesthetic'\]: mean='5'; it must be a finite number"),
    (setting(f"{SPEC}.type", dict(kind="scalar")), "the name 'type'; it must be an identifier"),
    (setting("prior.net.text_dim", 0), "prior.net.text_dim: .* greater than or equal to 1"),
    (setting("prior.net.text_dim", 16), "data.encodings_url has text encodings of 12; prior.net.text_dim makes it 16"),
    (
        setting("prior.net.text_embed_dim", None),
        "data.text_url has text embeddings of 12; prior.net.text_embed_dim.*8",
    ),
    (setting("prior.condition_on_text_encodings", False), "text_dim=12; with condition_on_text_encodings=False"),
    (setting("data.conditions.peeple", "x"), "data.conditions has the unknown name 'peeple'; the nearest is 'people'"),
    (setting("data.conditions.people", None), "data.conditions has no 'people'; prior.net.conditions does"),
    (setting("data.conditions", None), "data.conditions has no 'people'"),
    (setting(SPEC, None), "data.conditions has the unknown name 'people'; the network has none"),
    (setting("data.meta_url", None), "data.meta_url is missing; data.conditions.people is a column"),
    (setting("data.conditions.aesthetic", "scores"), "conditions.aesthetic: has no column 'scores'; .* num_people"),
    (
        setting("data.conditions.aesthetic", "caption"),
        "conditions.aesthetic: column 'caption' holds string; .*numbers",
    ),
    (setting("data.conditions.people", "score"), "conditions.people: column 'score' holds double; .* hold integers"),
    (setting(f"{SPEC}.people.size", 2), "data.conditions.people holds 2; it must be below prior.net.*.people.size=2"),
    (setting(f"{SPEC}.style.size", 7), "data.conditions.style has vectors of 5; prior.net.conditions.style.size=7"),
    (spoil("score"), r"metadata_1.parquet: conditions.aesthetic: has no column 'score'"),
    (spoil("", score=[float("inf")] * ROWS), "data.conditions.aesthetic holds infinity"),
    (save("styles/styles_1.npy", np.ones((ROWS - 1, 5))), "styles_1.npy: 59 rows, and 60 in .*images_1.npy"),
    (save("styles/styles_1.npy", np.ones((ROWS, 4))), "conditions.style of the other shards are float32"),
    (lambda folder, config: (folder / "styles/styles_1.npy").unlink(), "no conditions.style of its number, 1, in"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_configs_and_data(folder, change, message):
    config = make_config(folder)
    change(folder, config)
    with pytest.raises(ValueError, match=message):
        train(folder, config)


@pytest.mark.parametrize("values", [[1, None, 3], [1.5, None, float("nan")], [True, None, False], [2**40, 3, None]])
def test_numbers_of_parquet_columns(tmp_path, values):
    """Of any type, in several row groups; what is missing is NaN, or -1."""
    (tmp_path / "metadata").mkdir()
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images/img_0.npy", np.eye(60, 4, dtype=np.float32))
    write_table(tmp_path, 0, caption=["a"] * 60, number=values * 20)
    fractions = any(isinstance(value, float) for value in values)
    for kind, lost in (("scalar", np.nan), ("category", -1)):
        urls = tmp_path / "images", tmp_path / "metadata"
        if fractions and kind == "category":
            with pytest.raises(ValueError, match="conditions.n: column 'number' holds double; it must hold integers"):
                EmbeddingShards.open(*urls, conditions=dict(n=(kind, "number")))
            continue
        shards = EmbeddingShards.open(*urls, conditions=dict(n=(kind, "number")))
        (batch,) = PairStream(shards, batch_size=60)
        assert batch["n"].dtype == (torch.float32 if kind == "scalar" else torch.int64)
        wanted = np.array([lost if value is None else value for value in values * 20], batch["n"].numpy().dtype)
        np.testing.assert_array_equal(batch["n"].numpy(), wanted)
        assert "20 conditions.n are missing" in shards.report()


def test_other_names_of_data_columns_are_refused(folder):
    urls = folder / "images", folder / "metadata"
    for conditions, message in (
        (dict(text=("scalar", "score")), "conditions has the name 'text', which is that of another column"),
        (
            dict(a=("number", "score")),
            r"conditions\['a'\] is a 'number'; it must be one of 'scalar', 'category'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddingShards.open(*urls, conditions=conditions)
    with pytest.raises(ValueError, match=r"meta_url=None; conditions\['a'\] is a column of its files"):
        EmbeddingShards.open(urls[0], conditions=dict(a=("scalar", "score")))


# the command line


def test_the_command_line(folder, capsys):
    torch.manual_seed(0)
    config = make_config(folder)["prior"]
    prior = DiffusionPriorConfig(**config).create().eval()
    checkpoint.save(prior, folder / "prior.safetensors")
    np.save(folder / "style.npy", np.ones((3, 5), np.float32))
    given = ["--checkpoint", str(folder / "prior.safetensors"), "--seed", "0"]
    text = ["--text-embed", str(folder / "text.npy"), "--text-encodings", str(folder / "encodings.npy")]
    inputs = dict(text_embed=torch.eye(3, 12), text_encodings=torch.eye(3, 12)[:, None])
    np.save(folder / "text.npy", inputs["text_embed"].numpy())
    np.save(folder / "encodings.npy", inputs["text_encodings"].numpy())
    values = ["--condition", "aesthetic=6.5", "--condition", "people=2", "--condition", f"style={folder / 'style.npy'}"]
    out = ["--out", str(folder / "out.npy"), "--steps", "5", "--samples-per-prompt", "1"]
    assert cli.main(["sample", *given, *text, *values, *out]) == 0
    conditions = dict(aesthetic=torch.full((3,), 6.5), people=torch.full((3,), 2), style=torch.ones(3, 5))
    wanted = prior.sample(**inputs, conditions=conditions, num_samples_per_batch=1, timesteps=5, progress=False,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert relative_error(torch.from_numpy(np.load(folder / "out.npy")), wanted) < TOLERANCE
    for value, message in (
        ("people=two", "--condition people=two: it must be an integer"),
        ("aesthetic=high", "--condition aesthetic=high: it must be a number"),
        ("peeple=2", "--condition has the unknown name 'peeple'; the nearest is 'people'"),
        ("people=3", "conditions['people'] holds 3; it must be below its size, 3"),
        ("style=6", "6 does not exist"),
    ):
        assert cli.main(["sample", *given, *text, *out, "--condition", value]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sample", *given, *text, *out, "--condition", "people"])
    assert "'people' is not NAME=VALUE" in capsys.readouterr().err

    urls = [f"--{name}={folder / path}" for name, path in
            dict(images="images", captions="metadata", texts="texts", encodings="encodings").items()]  # fmt: skip
    sources = ["--condition", "people=num_people", "--condition", f"style={folder / 'styles'}"]
    losses = []
    for extra in ([], ["--condition", "aesthetic=score"]):
        report = folder / "report.json"
        argv = ["evaluate", *given, *urls, *sources, *extra, "--timesteps", "3", "--out", str(report)]
        assert cli.main(argv) == 0
        losses.append(json.loads(report.read_text())["metrics"]["l2-loss"])
        assert ("note: no --condition for aesthetic" in capsys.readouterr().err) == (not extra)
    assert abs(losses[0] - losses[1]) > 1e-5 * losses[0]
