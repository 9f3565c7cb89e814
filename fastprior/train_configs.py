"""Training configurations as JSON files, in dalle2-pytorch's format.

The files that dalle2-pytorch 1.15.6 reads are read unchanged, and `config.prior.create()` builds the prior. A key that
no constructor knows is an error which names the nearest one that exists.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, ClassVar, Literal

try:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Discriminator,
        Field,
        Tag,
        ValidationError,
        field_validator,
        model_validator,
    )
except ImportError as error:
    raise ImportError('pydantic 2 is not installed: pip install "fastprior[train]"') from error

import torch

from fastprior.checks import MOST
from fastprior.clip import BaseClipAdapter, make_adapter
from fastprior.models.dalle2.conditions import Conditions, find
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.prior_transformer.as_network import PriorTransformerNet
from fastprior.models.prior_transformer.model import PriorTransformer
from fastprior.prior.diffusion_prior import DiffusionPrior
from fastprior.reading import quoted, read_json
from fastprior.trackers import BaseLoader, BaseLogger, BaseSaver, Tracker, create_loader, create_logger, create_saver
from fastprior.utils import nearest

FAULTS = 20  # that one message names
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, le=MOST)]
Depth = Annotated[int, Field(ge=1, le=2**12)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section in which every key is known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if unknown:
            hints = (f"unknown key {quoted(key)}, {nearest(str(key), cls.model_fields)}" for key in unknown[:FAULTS])
            raise ValueError("; ".join([*hints, "…"][: len(unknown)]))
        return data


class AdapterConfig(Section):
    """A CLIP adapter.

    Attributes:
        make: "openai", "open_clip", "x-clip" or "coca".
        model: its name, for the first two.
        base_model_kwargs: arguments of the x-clip or CoCa model, or further ones of the adapter, such as `pretrained`.
            Without it, open_clip takes the last of the model's tags that it lists.
    """

    make: Literal["openai", "open_clip", "x-clip", "coca"] = "openai"
    model: str = "ViT-L/14"
    base_model_kwargs: dict[str, Any] | None = None

    def create(self, **overrides: Any) -> BaseClipAdapter:
        """The adapter; `overrides` are kept by those of x-clip and CoCa models."""
        return make_adapter(self.make, self.model, self.base_model_kwargs, **overrides)


class DiffusionPriorNetworkConfig(Section):
    """The arguments of `DiffusionPriorNetwork`; `max_text_len` null or left out is the network's default."""

    dim: Size
    depth: Depth
    max_text_len: Annotated[int, Field(ge=0, le=MOST)] | None = None
    num_timesteps: Size | None = None
    num_time_embeds: Size = 1
    num_image_embeds: Size = 1
    num_text_embeds: Size = 1
    self_cond: bool = False
    text_dim: Size | None = None
    text_embed_dim: Size | None = None
    conditions: dict[str, dict[str, Any]] | None = None
    dim_head: Size = 64
    heads: Size = 8
    ff_mult: Annotated[float, Field(gt=0, le=2**10)] = 4
    norm_in: bool = False
    norm_out: bool = True
    attn_dropout: Share = 0.0
    ff_dropout: Share = 0.0
    final_proj: bool = True
    normformer: bool = False
    rotary_emb: bool = True
    cosine_sim: bool = True
    dot_scale: Positive | None = None

    @field_validator("conditions")
    @classmethod
    def _fit(cls, conditions: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        with torch.device("meta"):
            Conditions(1, conditions or {})  # has no effect, but for the errors
        return conditions

    def create(self) -> DiffusionPriorNetwork:
        return DiffusionPriorNetwork(**self.model_dump(exclude_none=True))


class PriorTransformerConfig(Section):
    """A `PriorTransformer` to train, as a `PriorTransformerNet`; its arguments, or where to load it from.

    Attributes:
        make: "prior_transformer", which tells it from a `DiffusionPriorNetwork`.
        pretrained, subfolder, variant: what `PriorTransformer.from_pretrained` loads, to be trained further; then no
            other argument is given.
    """

    make: Literal["prior_transformer"]
    pretrained: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    num_attention_heads: Size = 32
    attention_head_dim: Size = 64
    num_layers: Depth = 20
    embedding_dim: Size = 768
    num_embeddings: Size = 77
    additional_embeddings: Literal[4] = 4
    dropout: Share = 0.0
    time_embed_act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    norm_in_type: Literal["layer"] | None = None
    embedding_proj_norm_type: Literal["layer"] | None = None
    time_embed_dim: Size | None = None
    embedding_proj_dim: Size | None = None

    conditions: ClassVar[None] = None
    _SOURCE: ClassVar[set[str]] = {"make", "pretrained", "subfolder", "variant"}

    @model_validator(mode="after")
    def _either(self) -> PriorTransformerConfig:
        arguments = self.model_fields_set - self._SOURCE
        if self.pretrained is not None and arguments:
            raise ValueError(f"{min(arguments)} was given with pretrained; it must be what the folder says")
        return self

    def create(self) -> PriorTransformerNet:
        if self.pretrained is None:
            return PriorTransformerNet(PriorTransformer(**self.model_dump(exclude=self._SOURCE)))
        options = dict(subfolder=self.subfolder, variant=self.variant)
        return PriorTransformerNet(PriorTransformer.from_pretrained(self.pretrained, **options).train())


NETS = "dalle2", "prior_transformer"


def _make_of(net: Any) -> str:
    """Which of `NETS` a network's section is of: with the key `make`, a PriorTransformer."""
    return NETS["make" in net if isinstance(net, dict) else isinstance(net, PriorTransformerConfig)]


class DiffusionPriorConfig(Section):
    """The arguments of `DiffusionPrior`."""

    clip: AdapterConfig | None = None
    net: Annotated[
        Annotated[DiffusionPriorNetworkConfig, Tag(NETS[0])] | Annotated[PriorTransformerConfig, Tag(NETS[1])],
        Discriminator(_make_of),
    ]
    image_embed_dim: Size
    image_size: Size | None = None
    image_channels: Size = 3
    timesteps: Size = 1000
    sample_timesteps: Size | None = None
    cond_drop_prob: Share = 0.0
    text_cond_drop_prob: Share | None = None
    image_cond_drop_prob: Share | None = None
    loss_type: Literal["l1", "l2", "huber"] = "l2"
    predict_x_start: bool = True
    predict_v: bool = False
    beta_schedule: Literal["cosine", "linear", "quadratic", "jsd", "sigmoid"] = "cosine"
    condition_on_text_encodings: bool = True
    sampling_clamp_l2norm: bool = False
    sampling_final_clamp_l2norm: bool = False
    training_clamp_l2norm: bool = False
    init_image_embed_l2norm: bool = False
    image_embed_scale: Positive | None = None
    clip_adapter_overrides: dict[str, Any] | None = None
    clamp: Positive | Literal["default", "l2"] | None = "default"

    def create(self) -> DiffusionPrior:
        """The prior, with fresh weights."""
        clip = self.clip and self.clip.create(**(self.clip_adapter_overrides or {}))
        rest = self.model_dump(exclude={"clip", "net", "clip_adapter_overrides"})
        return DiffusionPrior(net=self.net.create(), clip=clip, **rest)


class TrainSplitConfig(Section):
    """Shares of the data; they sum to 1, and the last may be empty."""

    train: Amount = 0.75
    val: Amount = 0.15
    test: Amount = 0.1

    @model_validator(mode="after")
    def _whole(self) -> TrainSplitConfig:
        total = math.fsum((self.train, self.val, self.test))
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, val and test sum to {total}; they must sum to 1")
        return self


class DiffusionPriorTrainConfig(Section):
    """How to train.

    Attributes:
        lr, wd, max_grad_norm, use_ema, ema_beta, ema_update_after_step, ema_update_every, amp, warmup_steps,
        cosine_decay_max_steps, draws, compile, checkpoint_activations, max_bad_steps: see `DiffusionPriorTrainer`.
        save_every_seconds: of training, between checkpoints.
        eval_timesteps: the numbers of sampling steps to evaluate with.
        eval_cond_scale: guidance of that sampling.
        gradient_accumulation_steps: batches to a step.
        max_batch_size: run each batch in chunks of at most this.
        log_every_steps: between lines of the log; on several processes also between looks at the clock and at signals.
        best_validation_loss, current_epoch, num_samples_seen: where a resumed run stands.
        random_seed: of torch.
    """

    epochs: Count = 1
    lr: Positive = 1.1e-4
    wd: Amount = 6.02e-2
    max_grad_norm: Positive | None = 0.5
    use_ema: bool = True
    ema_beta: float = Field(0.99, ge=0, lt=1)
    ema_update_after_step: int | None = Field(None, ge=0)
    ema_update_every: Count | None = None
    amp: bool = False
    warmup_steps: int | None = Field(None, ge=0)
    save_every_seconds: Amount = 3600
    eval_timesteps: list[Size] = [64]
    eval_cond_scale: float = 1.0
    cosine_decay_max_steps: Count | None = None
    draws: Size = 1
    compile: bool = False
    checkpoint_activations: bool = False
    max_bad_steps: Count = 20
    gradient_accumulation_steps: Count = 1
    max_batch_size: Size | None = None
    log_every_steps: Count = 10
    best_validation_loss: Amount = 1e9
    current_epoch: int = Field(0, ge=0)
    num_samples_seen: int = Field(0, ge=0)
    random_seed: int = Field(0, ge=0, lt=2**32)


class DiffusionPriorDataConfig(Section):
    """What to train on.

    Attributes:
        image_url: folder of the image embeddings.
        meta_url, text_url, encodings_url: of their captions, or of text embeddings and text encodings made before.
        conditions: where the values of each of `prior.net.conditions` are: a scalar's or category's column of the
            parquet files of `meta_url`, a vector's folder of .npy files.
        splits: shares for training, validation and test.
        batch_size: per process.
        num_data_points: how many to use.
        eval_every_seconds: of training, between evaluations.
        max_eval_pairs: how many pairs an evaluation looks at; null is all of the split.
        shuffle_seed: of the order of the training pairs; null keeps that of the files.
        on_problem, on_bad_rows: about files missing or damaged, and rows not finite; see `EmbeddingShards.open`.
        workers, prefetch: threads that read, and batches made ahead.
    """

    image_url: str
    meta_url: str | None = None
    text_url: str | None = None
    encodings_url: str | None = None
    conditions: dict[str, str] | None = None
    splits: TrainSplitConfig
    batch_size: Size
    num_data_points: Count = 250_000_000
    eval_every_seconds: Amount = 3600
    max_eval_pairs: Count | None = 10_000
    shuffle_seed: int | None = Field(0, ge=0)
    on_problem: Literal["error", "skip"] = "error"
    on_bad_rows: Literal["error", "skip"] | None = None
    workers: Annotated[int, Field(ge=1, le=2**10)] = 1
    prefetch: int = Field(4, ge=0, le=MOST)

    @model_validator(mode="after")
    def _has_text(self) -> DiffusionPriorDataConfig:
        if self.meta_url is None and self.text_url is None:
            raise ValueError("meta_url and text_url are both missing; one must be given")
        return self


class PartSection(BaseModel):
    """A section with further keys: the options of the logger, loader or saver that it names."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _fits(self):
        self.create(".")  # has no effect, but for the errors
        return self


class TrackerLogConfig(PartSection):
    """A logger; its other options are the fields of `ConsoleLogger`, `WandbLogger` or `TensorboardLogger`.

    Attributes:
        log_type: "console", "wandb" or "tensorboard".
        resume, auto_resume, verbose: see `fastprior.trackers.loggers.BaseLogger`.
    """

    log_type: str = "console"
    resume: bool = False
    auto_resume: bool = False
    verbose: bool = False

    def create(self, data_path: str | os.PathLike[str]) -> BaseLogger:
        return create_logger(self.log_type, data_path, **self.model_dump(exclude={"log_type"}))


class TrackerLoadConfig(PartSection):
    """A loader; its other options are the fields of `LocalLoader`, `UrlLoader`, `WandbLoader` or `HuggingfaceLoader`.

    Attributes:
        load_from: "local", "url", "wandb" or "huggingface"; null loads nothing.
        only_auto_resume: load in runs that go on after an interruption only.
    """

    load_from: str | None = None
    only_auto_resume: bool = False

    def create(self, data_path: str | os.PathLike[str]) -> BaseLoader | None:
        if self.load_from is None:
            return None
        return create_loader(self.load_from, data_path, **self.model_dump(exclude={"load_from"}))


class TrackerSaveConfig(PartSection):
    """A saver; its other options are the fields of `LocalSaver`, `WandbSaver` or `HuggingfaceSaver`.

    Attributes:
        save_to: "local", "wandb" or "huggingface".
        save_all, save_latest, save_best: see `fastprior.trackers.storage.BaseSaver`.
    """

    save_to: str = "local"
    save_all: bool = False
    save_latest: bool = True
    save_best: bool = True

    def create(self, data_path: str | os.PathLike[str]) -> BaseSaver:
        return create_saver(self.save_to, data_path, **self.model_dump(exclude={"save_to"}))


class TrackerConfig(Section):
    """Where a run logs to, loads from and saves to: one saver, or a list of them."""

    data_path: str = ".tracker_data"
    overwrite_data_path: bool = False
    log: TrackerLogConfig
    load: TrackerLoadConfig | None = None
    save: list[TrackerSaveConfig] = Field(min_length=1)

    @field_validator("save", mode="before")
    @classmethod
    def _listed(cls, save: Any) -> Any:
        return save if isinstance(save, list) else [save]

    def create(self, full_config: BaseModel, extra_config: dict[str, Any], dummy_mode: bool = False) -> Tracker:
        """The tracker, begun; `dummy_mode` is for all processes but the main one. See `Tracker.init`."""
        tracker = Tracker(self.data_path, overwrite_data_path=self.overwrite_data_path, dummy_mode=dummy_mode)
        tracker.add_logger(self.log.create(self.data_path))
        tracker.add_loader(self.load and self.load.create(self.data_path))
        for saver in self.save:
            tracker.add_saver(saver.create(self.data_path))
        tracker.init(full_config, extra_config)
        return tracker


class TrainDiffusionPriorConfig(Section):
    """A whole training run."""

    prior: DiffusionPriorConfig
    data: DiffusionPriorDataConfig
    train: DiffusionPriorTrainConfig
    tracker: TrackerConfig

    @model_validator(mode="after")
    def _conditions_have_data(self) -> TrainDiffusionPriorConfig:
        known, sources = self.prior.net.conditions or {}, self.data.conditions or {}
        for name in sources:
            find(known, name, "data.conditions")
        for name in known:
            if name not in sources:
                raise ValueError(f"data.conditions has no {name!r}; prior.net.conditions does, and needs its values")
            if known[name]["kind"] != "vector" and self.data.meta_url is None:
                raise ValueError(f"data.meta_url is missing; data.conditions.{name} is a column of its files")
        return self

    @classmethod
    def from_json_path(cls, json_path: str | os.PathLike[str]) -> TrainDiffusionPriorConfig:
        """Read a file. Raises ValueError naming the file and each key that is wrong."""
        try:
            content = read_json(json_path, constants=True)  # of which each key says what it takes
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; it must be the JSON file of a training") from None
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            faults = error.errors()
            wrong = [f"{_key(fault['loc'])}: {_message(fault)}" for fault in faults[:FAULTS]]
            more = [f"and {len(faults) - FAULTS} more"] if len(faults) > FAULTS else []
            raise ValueError(f"{os.fspath(json_path)}: " + "; ".join(wrong + more)) from None


def _key(location: tuple[str | int, ...]) -> str:
    return ".".join(str(part)[:100] for part in location if part not in NETS) or "top level"


def _message(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] in ("value_error", "missing") else f"{message} (it is {quoted(error['input'])})"
