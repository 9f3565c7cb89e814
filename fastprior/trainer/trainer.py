"""Training a prior: loss and backward, steps, moving average and checkpoints, with dalle2-pytorch's calls."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastprior.batches import prior_sample_in_chunks, split_args_and_kwargs
from fastprior.optimizer import get_optimizer, learning_rate_factor
from fastprior.peer import check_fits_peer
from fastprior.prior.diffusion_prior import DiffusionPrior, in_eval_mode
from fastprior.trainer.agree import together
from fastprior.trainer.ema import EMA
from fastprior.trainer.fsdp import Frame, equalize, shard, wants_shards
from fastprior.trainer.options import check_ranges, checked_accelerator, recompute_activations, sort_options
from fastprior.trainer.state import capture, check, check_plain, restore, rng_state, to_peer
from fastprior.trainer.stepper import Stepper
from fastprior.trainer.zero import Zero
from fastprior.utils import atomic
from fastprior.weight_files.safe import read_file


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient; `bad_steps` says how many."""

    def __init__(self, bad_steps: int, step: int):
        super().__init__(f"{bad_steps} steps in a row after step {step} had a non-finite loss or gradient")
        self.bad_steps = bad_steps


class DiffusionPriorTrainer(nn.Module):
    """Train a prior: `loss = trainer(text_embed=…, image_embed=…)`, then `trainer.update()`.

    One process, or several under DDP, FSDP or DeepSpeed's ZeRO, as the accelerator was set up. With its
    `gradient_accumulation_steps`, each call counts as one batch, and `update` does nothing until the last of them; call
    `accelerator.accumulate` yourself, or leave it.

    A step with a non-finite loss or gradient on any process is skipped on all: weights, moments, average and learning
    rate stay. So are overflows of fp16.

    Args:
        diffusion_prior: moved to the accelerator's device, and trained in place.
        accelerator: from accelerate, with precision and accumulation; made of the `accelerator_…` arguments by default.
        use_ema: keep an `EMA`, which then is what samples.
        lr, wd, eps, betas: of AdamW (of Adam with wd=0).
        max_grad_norm: clip the gradient's norm to this.
        group_wd_params: decay only matrices.
        warmup_steps: steps of linear warm-up.
        cosine_decay_max_steps: steps until the learning rate is 0, on a cosine; it stays there.
        ema_beta, ema_update_after_step, ema_update_every: see `EMA`; None is its default.
        draws: draws of time and noise per caption; others than 1 need a prior whose `forward` takes `draws`.
        compile: compile the network; a dict is torch.compile's arguments. Dropout, that of conditions too, then draws
            other numbers than it does eagerly.
        checkpoint_activations: trade time for memory, layer by layer.
        max_bad_steps: so many skipped steps in a row raise `TrainingDiverged`.
        **kwargs: `ema_…` and `accelerator_…` for the rest of their arguments, and what older scripts pass: amp=True is
            mixed precision (fp16 on a GPU, else bf16), device= where to train.

    Attributes:
        step: (1,) int64, steps done.
        bad_steps: steps skipped.
        text_conditioned: whether the prior is conditioned on text encodings.

    Raises:
        TypeError: an unknown argument, or no DiffusionPrior.
        ValueError: an argument out of range, or one against the accelerator.
    """

    def __init__(
        self,
        diffusion_prior: DiffusionPrior,
        accelerator: Accelerator | None = None,
        use_ema: bool = True,
        lr: float = 3e-4,
        wd: float = 1e-2,
        eps: float = 1e-6,
        max_grad_norm: float | None = None,
        group_wd_params: bool = True,
        warmup_steps: int | None = None,
        cosine_decay_max_steps: int | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        ema_beta: float | None = None,
        ema_update_after_step: int | None = None,
        ema_update_every: int | None = None,
        draws: int = 1,
        compile: bool | dict = False,
        checkpoint_activations: bool = False,
        max_bad_steps: int = 20,
        **kwargs,
    ):
        super().__init__()
        if not isinstance(diffusion_prior, DiffusionPrior):
            raise TypeError(f"diffusion_prior is a {type(diffusion_prior).__name__}; it must be a DiffusionPrior")
        check_ranges(
            diffusion_prior, draws, max_grad_norm=(max_grad_norm, 0), warmup_steps=(warmup_steps, -1),
            cosine_decay_max_steps=(cosine_decay_max_steps, 0), max_bad_steps=(max_bad_steps, 0),
        )  # fmt: skip
        signature = inspect.signature(DiffusionPriorTrainer).parameters
        average, accelerator_options, legacy = sort_options(kwargs, signature)
        average |= dict(beta=ema_beta, update_after_step=ema_update_after_step, update_every=ema_update_every)
        self.accelerator = checked_accelerator(accelerator, accelerator_options, **legacy)
        self.device = self.accelerator.device
        self.text_conditioned = diffusion_prior.condition_on_text_encodings
        self.use_ema, self.max_grad_norm, self.lr, self.draws = use_ema, max_grad_norm, lr, draws
        self.max_bad_steps, self.bad_steps, self._bad_in_a_row = max_bad_steps, 0, 0
        self.cosine_decay_max_steps = cosine_decay_max_steps
        self._batches_counted = self.accelerator.step
        self._gathered: tuple[dict, DiffusionPrior] | None = None

        diffusion_prior.to(self.device)
        self._frame: Frame | None = None  # where weights are in shards
        if wants_shards(self.accelerator):
            equalize(diffusion_prior)
            self._frame = Frame(diffusion_prior)
        average = {name: value for name, value in average.items() if value is not None}
        self.ema_diffusion_prior = EMA(diffusion_prior, **average) if use_ema else None  # before anything is wrapped
        self._wrap(diffusion_prior, compile, checkpoint_activations)
        optimizer = get_optimizer(
            diffusion_prior.parameters(), lr=lr, wd=wd, betas=betas, eps=eps, filter_by_requires_grad=True,
            group_wd_params=group_wd_params, fused=True if self.device.type in ("cpu", "cuda") else None,
        )  # fmt: skip
        # not prepared: accelerate would step it once per process
        self.scheduler = LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, warmup_steps, cosine_decay_max_steps)
        )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.stepper = Zero(self.accelerator, diffusion_prior, optimizer, max_grad_norm)
        else:
            self.stepper = Stepper(self.accelerator, diffusion_prior, optimizer)
        self.diffusion_prior = self.stepper.model
        if use_ema:
            self.ema_diffusion_prior.copy_params_from_model_to_ema()  # DDP has made the ranks' weights equal
        self.register_buffer("step", torch.tensor([0], device=self.device))

    def _wrap(self, prior: DiffusionPrior, compile: bool | dict, checkpoint_activations: bool) -> None:
        if checkpoint_activations:
            recompute_activations(prior)
        if compile:
            prior.net.compile(**{"fullgraph": True, **(compile if isinstance(compile, dict) else {})})
        if self._frame is not None:
            shard(prior, self.accelerator)
            if self.use_ema:
                self.ema_diffusion_prior.shard()

    @property
    def prior(self) -> DiffusionPrior:
        """The prior that is trained, without wrappers."""
        return self.accelerator.unwrap_model(self.diffusion_prior)

    @property
    def optimizer(self) -> Optimizer:
        """The one that steps, in accelerate's wrapper; another may be put in its place."""
        return self.stepper.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self.stepper.optimizer = optimizer

    @property
    def sampling_prior(self) -> DiffusionPrior:
        """The prior that samples: the average where there is one. In shards, see `whole_prior`."""
        if self._gathered is not None:
            return self._gathered[1]
        return self.ema_diffusion_prior.ema_model if self.use_ema else self.prior

    def whole_prior(self, online: bool = False) -> AbstractContextManager[DiffusionPrior]:
        """The prior that samples, or the online one, to be called as any other for as long as the context lasts.

        Under FSDP every process must enter, and gets a copy in eval mode.
        """
        prior = self.prior if online else self.sampling_prior
        if self._frame is None or prior is self._frame.prior:
            return nullcontext(prior)
        return self._frame.filled(prior)

    # training

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, dict):
            return {key: self._on_device(item) for key, item in value.items()}
        return value.to(self.device, non_blocking=True) if torch.is_tensor(value) else value

    def _accumulate(self) -> AbstractContextManager:
        """Count a batch of gradient accumulation, unless the caller is within `accelerator.accumulate`, which did."""
        if self.accelerator.step != self._batches_counted:
            return nullcontext()
        return self.accelerator.accumulate(self.diffusion_prior)

    def loss_tensor(self, *args, max_batch_size: int | None = None, **kwargs) -> Tensor:
        """The loss that calling the trainer returns, as a detached 0-d tensor for which the host does not wait."""
        args, kwargs = map(self._on_device, args), self._on_device(kwargs)
        if self.draws != 1:
            kwargs["draws"] = self.draws
        chunks = list(split_args_and_kwargs(*args, split_size=max_batch_size, **kwargs))
        if not self.training:
            with torch.no_grad():
                loss = sum(self.diffusion_prior(*args, **kwargs) * share for share, (args, kwargs) in chunks)
            if self._frame is not None:
                self.diffusion_prior.reshard()  # what backward does: an update would not reach the whole weights
            return loss
        total = 0.0
        with self._accumulate():
            for index, (share, (args, kwargs)) in enumerate(chunks):
                is_last = index == len(chunks) - 1
                with self.stepper.syncing(is_last):
                    with self.stepper.autocast():
                        loss = self.diffusion_prior(*args, **kwargs) * share
                    # a non-finite loss makes the gradient NaN, of all ranks when they add theirs up: `update` sees it
                    poison = torch.where(loss.detach().isfinite(), 1.0, math.nan)
                    self.stepper.backward(loss * poison, is_last)
                total = total + loss.detach()
        self._batches_counted = self.accelerator.step
        return total

    def forward(self, *args, max_batch_size: int | None = None, **kwargs) -> float:
        """The loss of a batch, and in training mode its backward.

        Args:
            *args, **kwargs: see `DiffusionPrior.forward`: text or text_embed (batch, dim) and text_encodings, image or
                image_embed (batch, dim); tensors on any device, or numpy arrays.
            max_batch_size: run the batch in chunks of at most this; each weighs as much as its share of the batch.
        Returns:
            This process's mean loss, possibly not finite: then `update` skips the step.
        """
        return self.loss_tensor(*args, max_batch_size=max_batch_size, **kwargs).item()

    def update(self) -> None:
        """Take a step with the accumulated gradient; nothing happens while batches are still being accumulated.

        Raises:
            TrainingDiverged: this step was skipped, as were the `max_bad_steps - 1` before it.
        """
        if not self.accelerator.sync_gradients:
            return
        if not self.stepper.step(self.max_grad_norm):
            self._skip()
            return
        self.scheduler.step()
        self.step += 1
        if self.use_ema:
            self.ema_diffusion_prior.update()
            if self.ema_diffusion_prior.update_model_with_ema_every:
                self.stepper.weights_changed()
        self._bad_in_a_row = 0

    def _skip(self) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.bad_steps += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self.max_bad_steps:
            raise TrainingDiverged(self._bad_in_a_row, int(self.step))

    # checkpoints

    def training_state(self) -> dict:
        """All that `load` needs, in plain types and tensors, which are not copied; the CLIP is left out.

        Keys: step, model, ema_model and ema (with `use_ema`), optimizer (by name of the parameter), scheduler, rng (of
        each process; outside `gathered`, of this one), scaler (in fp16), bad_steps, fastprior_version, and fastprior:
        how to build the prior, where its network and itself know. Under FSDP and ZeRO every process must call, and the
        main one gets the tensors whole.
        """
        return capture(self, [rng_state(self.device)]) if self._gathered is None else self._gathered[0]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every process must enter; in the context the main one alone can `save`, and has what the others hold.

        Those are their random generators, without which a resumed run of several processes draws other noise, and
        under FSDP and ZeRO their parts of the moments, and of the weights.
        """
        state = capture(self, gather_object([rng_state(self.device)]))
        with self.whole_prior() as prior:
            self._gathered = state, prior
            try:
                yield
            finally:
                self._gathered = None

    def save(self, path: str | os.PathLike, overwrite: bool = True, **kwargs) -> None:
        """Write a checkpoint, on the main process alone. Atomic; folders are made.

        Of several processes, call it within `gathered`, or under FSDP and ZeRO on every process. Gradients are no part
        of it: save after an `update` that took a step, not among batches being accumulated.

        Args:
            overwrite: replace an existing file; FileExistsError otherwise.
            **kwargs: further entries, of tensors and plain values.
        """
        if not (self.accelerator.is_main_process or (self._in_parts and self._gathered is None)):
            return
        state = self.training_state()
        for name, value in kwargs.items():
            if name in state or name == "version":
                raise ValueError(f"{name}={value!r}; this entry is the trainer's own")
            check_plain(value, name)
        self._write({**state, **kwargs}, path, overwrite)

    @property
    def _in_parts(self) -> bool:
        """Whether the processes hold parts of what a checkpoint holds."""
        return self._frame is not None or isinstance(self.stepper, Zero)

    def export_for_peer(self, path: str | os.PathLike, overwrite: bool = True) -> None:
        """Write a checkpoint that the trainer of dalle2-pytorch 1.15.6 loads, with the CLIP where there is one.

        That trainer must be made with the same arguments; what it saves, `load` reads. Under FSDP and ZeRO every
        process must call, outside `gathered`.
        """
        check_fits_peer(getattr(self.prior.net, "config", {}))
        if self.accelerator.is_main_process or self._in_parts:
            self._write(to_peer(self), path, overwrite)

    def _write(self, state: dict, path: str | os.PathLike, overwrite: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; overwrite=True replaces it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            torch.save(state, temporary)

    def load(
        self,
        path_or_state: str | os.PathLike | Mapping,
        overwrite_lr: bool = True,
        strict: bool = True,
        *,
        restore_rng: bool = True,
    ) -> Mapping:
        """Go on from a checkpoint, ours or that of dalle2-pytorch's trainer, on every process.

        The run continues as if it had never stopped; of the optimizer, only the moments come from the file. A file of
        one process, of DDP or of FSDP loads into any of these; where it has not the random generators of as many
        processes, a warning says what will differ.

        Args:
            path_or_state: a file, or what one holds.
            overwrite_lr: keep this trainer's learning rate; False takes the file's.
            strict: weights, average and moments must all fit; with False, what the file lacks stays, and an average
                that it lacks starts from its model.
            restore_rng: put the global random generators where they were, if the file says so.
        Returns:
            What the file holds.
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, unsafe, no trainer's checkpoint, or does not fit: every entry is looked at
                first, and numbers that are not finite are refused. Nothing is loaded then, on any process.
        """
        is_file = not isinstance(path_or_state, Mapping)
        source = str(path_or_state) if is_file else "the state given"
        with together(self.accelerator):
            payload = read_file(Path(path_or_state))[0] if is_file else path_or_state
            checked = check(self, payload, source, overwrite_lr, strict, restore_rng)
        restore(self, checked)
        self._bad_in_a_row = 0
        return payload

    # sampling and embedding

    @torch.no_grad()
    @in_eval_mode
    def p_sample_loop(
        self, shape: tuple[int, ...], text_cond: dict, *args, max_batch_size: int | None = None, **kwargs
    ) -> Tensor:
        """See `DiffusionPrior.p_sample_loop`, at most `max_batch_size` rows at a time (but one prompt at least)."""
        text_cond = self._on_device(text_cond)
        if max_batch_size is None:
            with self.whole_prior() as prior:
                return prior.p_sample_loop(shape, text_cond, *args, **kwargs)
        prompts = next(len(value) for value in text_cond.values() if torch.is_tensor(value))
        if shape[0] % prompts:
            raise ValueError(f"shape={tuple(shape)}; its rows must be a multiple of the prompts, {prompts}")
        repeats = shape[0] // prompts
        chunks = split_args_and_kwargs(split_size=max(1, max_batch_size // repeats), **text_cond)
        shares = ((round(share * prompts) * repeats, part) for share, (_, part) in chunks)
        with self.whole_prior() as prior:
            return torch.cat([prior.p_sample_loop((rows, *shape[1:]), part, *args, **kwargs) for rows, part in shares])

    @torch.no_grad()
    @in_eval_mode
    @prior_sample_in_chunks
    def sample(self, *args, **kwargs) -> Tensor:
        """See `DiffusionPrior.sample`; `max_batch_size` prompts at a time."""
        with self.whole_prior() as prior:
            return prior.sample(*map(self._on_device, args), **self._on_device(kwargs))

    @torch.no_grad()
    def sample_batch_size(self, *args, **kwargs) -> Tensor:
        """See `DiffusionPrior.sample_batch_size`."""
        with self.whole_prior() as prior:
            return prior.sample_batch_size(*map(self._on_device, args), **self._on_device(kwargs))

    def _clip_adapter(self) -> nn.Module:
        if self.prior.clip is None:
            raise ValueError("this prior has no clip; give embeddings instead of raw text and images")
        return self.prior.clip

    @torch.no_grad()
    @prior_sample_in_chunks
    def embed_text(self, text: Tensor) -> tuple:
        """The CLIP adapter's `embed_text` of tokens (batch, length), `max_batch_size` at a time."""
        return self._clip_adapter().embed_text(self._on_device(text))

    @torch.no_grad()
    @prior_sample_in_chunks
    def embed_image(self, image: Tensor) -> tuple:
        """The CLIP adapter's `embed_image` of images (batch, channels, height, width), `max_batch_size` at a time."""
        return self._clip_adapter().embed_image(self._on_device(image))
