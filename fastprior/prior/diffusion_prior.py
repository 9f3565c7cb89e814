"""The diffusion prior: CLIP text embeddings to CLIP image embeddings. Training loss, sampling, best-of-n."""

from __future__ import annotations

import contextlib
import random
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastprior.batches import repeat_rows
from fastprior.checks import check_count, check_number
from fastprior.clip import as_clip_adapter, freeze_and_eval
from fastprior.diffusion.schedule import NoiseScheduler
from fastprior.diffusion.solvers import LEARNED, check_spacing, choose_solver, step_table
from fastprior.draws import randn_like
from fastprior.engine.steps import Noise
from fastprior.models import snapshot
from fastprior.models.dalle2.layers import l2norm
from fastprior.models.dalle2.network import DiffusionPriorNetwork
from fastprior.models.loading import NoticesForeignStates
from fastprior.models.weight_lock import reads_weights
from fastprior.prior import graphs as prior_graphs
from fastprior.prior.arguments import check_arguments, check_models
from fastprior.prior.learned import NO_TABLES, find_table
from fastprior.prior.loop import sample_loop
from fastprior.prior.plan import SamplingPlan, is_overridden, make_plan, network_obstacles, overridden, remember
from fastprior.prior.text_condition import TextConditioned, check_conditions, check_tensors
from fastprior.utils import in_eval_mode

LOOPS = "p_sample_loop", "p_sample_loop_ddpm", "p_sample_loop_ddim"
UNSAVED = "self", "__class__", "net", "clip", "image_size", "cond_drop_prob", "clip_adapter_overrides"
RESOLVED = "image_embed_dim", "text_cond_drop_prob", "image_cond_drop_prob", "image_embed_scale"  # of what was given


@remember
class DiffusionPrior(TextConditioned, NoticesForeignStates, nn.Module):
    """Gaussian diffusion over image embeddings, conditioned on text (unCLIP, Ramesh et al. 2022, section 2.2).

    Args:
        net: a `DiffusionPriorNetwork`, or any module with `dim`, `self_cond`, `forward` and `forward_with_cond_scale`.
        clip: an adapter from `fastprior.clip`, or an x-clip or CoCa model; needed only to embed raw text and images.
        image_embed_dim: width of the embeddings; taken from `clip` by default.
        image_channels: checked against `clip`.
        timesteps: length of the schedule.
        sample_timesteps: default number of steps of `sample`.
        cond_drop_prob: chance of dropping text, and of dropping the image, in training; > 0 allows guidance.
        text_cond_drop_prob, image_cond_drop_prob: override `cond_drop_prob` for each.
        loss_type: "l2", "l1" or "huber".
        predict_x_start: the network predicts x0; with False, the noise.
        predict_v: the network predicts v; takes precedence.
        beta_schedule: see `NoiseScheduler`.
        condition_on_text_encodings: whether text encodings are part of the condition.
        sampling_clamp_l2norm: scale each predicted x0 to length `image_embed_scale`.
        sampling_final_clamp_l2norm, training_clamp_l2norm, init_image_embed_l2norm: the same for the result, for the
            prediction in training, and for the initial noise.
        image_embed_scale: diffusion runs on embeddings times this; default sqrt(image_embed_dim), or 1 where the
            network normalises them.
        clip_adapter_overrides: passed to the adapter made of an x-clip or CoCa model.
        clamp: how a predicted x0 is clamped in sampling: None, a float radius for ± clamping, or "l2". By default as
            DALLE2-pytorch: "l2" with `sampling_clamp_l2norm`, nothing for x0 and v, ±1 where `predict_x_start=False`
            (which is too tight for embeddings scaled by sqrt(dim)).
        image_size: accepted for old configs, and not used.

    Attributes:
        graphs: whether runs on CUDA replay CUDA graphs of the prefill and the step, with the same result. None, the
            default: from the second run of a shape (of the text and the rows) on, or at once in one of 256 steps or
            more; True: from the first; False: never. They serve any solver and up to 64 steps (128, …), and are
            captured again for other weights or modules. Runs by graphs wait for each other. Where a capture fails, a
            warning says why, and runs go on without. See `sampling_plan`, and `sample` for threads.
        graph_memory: bytes that these graphs may hold; those of shapes that were not used for longest go. By default
            1 GiB, by an estimate ten shapes of few prompts or one of 64; None for no limit.
        learned_tables: of `solver="learned"` by evaluations, as `fastprior.tune` makes and `fastprior.save` keeps them.
        can_compare_text: whether text embeddings lie in the space of the image embeddings, as a CLIP's do.
        config: the constructor's arguments without `net` and `clip`, for saving.
    """

    # of the class, so that neither constructors nor what was pickled before must know of them
    graphs: bool | None = None
    graph_memory: int | None = 2**30
    learned_tables = NO_TABLES

    def __init__(
        self,
        net: nn.Module,
        *,
        clip: nn.Module | None = None,
        image_embed_dim: int | None = None,
        image_size: int | None = None,
        image_channels: int = 3,
        timesteps: int = 1000,
        sample_timesteps: int | None = None,
        cond_drop_prob: float = 0.0,
        text_cond_drop_prob: float | None = None,
        image_cond_drop_prob: float | None = None,
        loss_type: str = "l2",
        predict_x_start: bool = True,
        predict_v: bool = False,
        beta_schedule: str = "cosine",
        condition_on_text_encodings: bool = True,
        sampling_clamp_l2norm: bool = False,
        sampling_final_clamp_l2norm: bool = False,
        training_clamp_l2norm: bool = False,
        init_image_embed_l2norm: bool = False,
        image_embed_scale: float | None = None,
        clip_adapter_overrides: dict | None = None,
        clamp: str | float | None = "default",
    ):
        arguments = {name: value for name, value in locals().items() if name not in UNSAVED}
        super().__init__()
        check_arguments(arguments | dict(cond_drop_prob=cond_drop_prob))
        self.noise_scheduler = NoiseScheduler(beta_schedule=beta_schedule, timesteps=timesteps, loss_type=loss_type)
        if clip is not None:
            clip = freeze_and_eval(as_clip_adapter(clip, **(clip_adapter_overrides or {})))
            if image_channels != clip.image_channels:
                raise ValueError(f"image_channels={image_channels}; the CLIP given takes {clip.image_channels}")
        elif image_embed_dim is None:
            raise ValueError("image_embed_dim=None; it must be given where no clip is")
        self.clip, self.net = clip, net
        self.image_embed_dim = clip.dim_latent if image_embed_dim is None else image_embed_dim
        check_models(net, clip, self.image_embed_dim, condition_on_text_encodings)
        self.channels = image_channels
        self.text_cond_drop_prob = cond_drop_prob if text_cond_drop_prob is None else text_cond_drop_prob
        self.image_cond_drop_prob = cond_drop_prob if image_cond_drop_prob is None else image_cond_drop_prob
        self.can_classifier_guidance = self.text_cond_drop_prob > 0 and self.image_cond_drop_prob > 0
        self.condition_on_text_encodings = condition_on_text_encodings
        self.can_compare_text = not isinstance(net, DiffusionPriorNetwork) or net.text_embed_dim == net.dim
        self.predict_x_start, self.predict_v = predict_x_start, predict_v
        if image_embed_scale is None:
            image_embed_scale = 1.0 if hasattr(net, "normalize") else self.image_embed_dim**0.5
        self.image_embed_scale = image_embed_scale
        self.init_image_embed_l2norm, self.training_clamp_l2norm = init_image_embed_l2norm, training_clamp_l2norm
        self.sampling_clamp_l2norm = sampling_clamp_l2norm
        self.sampling_final_clamp_l2norm = sampling_final_clamp_l2norm
        self.clamp, self.sample_timesteps = clamp, sample_timesteps
        self.config = arguments | {name: getattr(self, name) for name in RESOLVED}
        self.register_buffer("_dummy", torch.tensor([True], device=self.device), persistent=False)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.clip is not None:
            self.clip.eval()  # frozen: it must give the same embeddings in training
        return self

    def _apply(self, *args, **kwargs):
        before = self.device
        super()._apply(*args, **kwargs)
        if self.device != before:
            prior_graphs.forget(self)
        return self

    @property
    def device(self) -> torch.device:
        return self.noise_scheduler.betas.device  # which a load assigns, too

    @property
    def prediction(self) -> str:
        """What the network predicts: "v", "x0" or "noise"."""
        return "v" if self.predict_v else "x0" if self.predict_x_start else "noise"

    def normalize(self, image_embed: Tensor) -> Tensor:
        """What diffusion runs on: `image_embed * image_embed_scale`, unless the network has a way of its own."""
        if hasattr(self.net, "normalize"):
            image_embed = self.net.normalize(image_embed)
        return image_embed * self.image_embed_scale

    def denormalize(self, image_embed: Tensor) -> Tensor:
        """Undo `normalize`."""
        image_embed = image_embed / self.image_embed_scale
        return self.net.denormalize(image_embed) if hasattr(self.net, "denormalize") else image_embed

    def l2norm_clamp_embed(self, image_embed: Tensor) -> Tensor:
        """Scale to length `image_embed_scale`."""
        return l2norm(image_embed) * self.image_embed_scale

    # one step, method by method: what subclasses override and call

    def sampling_clamp(self) -> tuple[str | None, float]:
        """How a predicted x0 is clamped in sampling, see `SamplingPlan`."""
        clamp = self.clamp
        if clamp == "default":
            clamp = 1.0 if not self.predict_x_start else "l2" if self.sampling_clamp_l2norm else None
        if clamp == "l2":
            return "l2", self.image_embed_scale
        return (None, 0.0) if clamp is None else ("range", float(clamp))

    def x_start_from(self, x: Tensor, t: Tensor, pred: Tensor, clip_denoised: bool = True) -> Tensor:
        """The clean embedding that a prediction at time t (batch,) stands for, clamped: the shape of x."""
        x_start = pred
        if self.predict_v:
            x_start = self.noise_scheduler.predict_start_from_v(x, t=t, v=pred)
        elif not self.predict_x_start:
            x_start = self.noise_scheduler.predict_start_from_noise(x, t=t, noise=pred)
        clamp, radius = self.sampling_clamp()
        if clamp == "l2":
            return self.l2norm_clamp_embed(x_start)
        return x_start.clamp(-radius, radius) if clamp == "range" and clip_denoised else x_start

    def _check_guidance(self, cond_scale: float) -> None:
        check_number("cond_scale", cond_scale)
        if cond_scale != 1 and not self.can_classifier_guidance:
            why = "was built without conditional dropout (cond_drop_prob > 0): it has no unconditional branch"
            raise ValueError(f"cond_scale={cond_scale}; this prior {why}, and cond_scale must be 1")

    def p_mean_variance(
        self,
        x: Tensor,
        t: Tensor,
        text_cond: dict,
        self_cond: Tensor | None = None,
        clip_denoised: bool = False,
        cond_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of p(x_{t-1} | x_t), and the predicted x0."""
        self._check_guidance(cond_scale)
        pred = self.net.forward_with_cond_scale(x, t, cond_scale=cond_scale, self_cond=self_cond, **text_cond)
        x_start = self.x_start_from(x, t, pred, clip_denoised)
        return *self.noise_scheduler.q_posterior(x_start=x_start, x_t=x, t=t), x_start

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        t: Tensor,
        text_cond: dict | None = None,
        self_cond: Tensor | None = None,
        clip_denoised: bool = True,
        cond_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """One ancestral step from x at time t (batch,): the next x, and the predicted x0."""
        mean, _, log_variance, x_start = self.p_mean_variance(
            x=x, t=t, text_cond=text_cond, self_cond=self_cond, clip_denoised=clip_denoised, cond_scale=cond_scale
        )
        noise = randn_like(x)
        is_last = (t == 0).view(-1, *(1,) * (x.ndim - 1))
        return torch.where(is_last, mean, mean + (0.5 * log_variance).exp() * noise), x_start

    # whole runs

    def sampling_plan(
        self,
        timesteps: int | None = None,
        cond_scale: float = 1.0,
        solver: str | None = None,
        eta: float | None = None,
        *,
        spacing: str | None = None,
        rows: int | None = None,
    ) -> SamplingPlan:
        """Say how a run with these arguments goes, and why: print it. ValueError where they do not fit the prior.

        Args:
            timesteps, cond_scale, solver, eta, spacing: see `p_sample_loop`.
            rows: of embeddings, on which depends whether CUDA graphs are used; by default that of few.
        """
        learned = find_table(self, timesteps, eta, spacing, cond_scale) if solver == LEARNED else None
        table = learned or step_table(self.noise_scheduler, solver, timesteps, self.prediction, eta, spacing)
        self._check_guidance(cond_scale)
        plan = make_plan(self, table, cond_scale, *self.sampling_clamp())
        return replace(plan, graph_reasons=prior_graphs.graph_obstacles(self, plan.path, len(table.times), rows))

    def _run(
        self, shape, text_cond, cond_scale, timesteps, solver, *, generator=None, progress=True, **options
    ) -> Tensor:
        with snapshot.running(self.net) if isinstance(self.net, NoticesForeignStates) else contextlib.nullcontext():
            plan = self.sampling_plan(timesteps, cond_scale, solver, rows=shape[0], **options)
            self.check_text_condition(shape, text_cond)
            if self.graphs is False:
                prior_graphs.forget(self)
            if not plan.table.times:
                warnings.warn(f"timesteps={timesteps}: the {solver} solver makes no evaluation, the result is noise")
            run = self, plan, shape[0], text_cond, cond_scale, Noise(shape, self.device, generator), progress
            embeds = None if plan.graph_reasons else prior_graphs.graphs_of(self).run(*run)
            return sample_loop(*run) if embeds is None else embeds

    @torch.no_grad()
    @reads_weights
    def p_sample_loop_ddpm(self, shape, text_cond, cond_scale=1.0) -> Tensor:
        """DDPM over the whole schedule. See `p_sample_loop`; the result is scaled by `image_embed_scale`."""
        return self._run(shape, text_cond, cond_scale, self.noise_scheduler.num_timesteps, "ddpm")

    @torch.no_grad()
    @reads_weights
    def p_sample_loop_ddim(self, shape, text_cond, *, timesteps, eta=1.0, cond_scale=1.0) -> Tensor:
        """DDIM on DALLE2-pytorch's grid. See `p_sample_loop`; the result is scaled by `image_embed_scale`."""
        return self._run(shape, text_cond, cond_scale, timesteps, "ddim", eta=eta)

    @torch.no_grad()
    @reads_weights
    def p_sample_loop(
        self,
        shape: tuple[int, ...],
        text_cond: dict,
        cond_scale: float = 1.0,
        timesteps: int | None = None,
        *,
        solver: str | None = None,
        spacing: str | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
        **kwargs,
    ) -> Tensor:
        """Sample image embeddings.

        Args:
            shape: (rows, image_embed_dim); rows is a multiple of the prompts, and the samples of a prompt lie together.
            text_cond: `text_embed` (prompts, dim) and, where conditioned on, `text_encodings` (prompts, length, dim);
                and `conditions`, a dict of the values of extra conditions, of which any may be left out.
            cond_scale: classifier-free guidance; 1 is none.
            timesteps: number of steps; all of the schedule by default.
            solver, spacing: see `fastprior.diffusion.solvers.step_table`; the solver is by default "ddpm" over the
                whole schedule, else "ddim". "learned" takes a table of `learned_tables`.
            generator: on the prior's device; the global one by default.
            progress: show a bar.
            **kwargs: `eta` for the DDIM solvers; anything else goes to an overridden loop.
        Returns:
            (rows, image_embed_dim) in fp32 or wider, not scaled.
        Raises:
            ValueError: for arguments that do not fit, with the argument, its value and the rule.
        """
        total = self.noise_scheduler.num_timesteps
        timesteps = total if timesteps is None else timesteps
        solver = choose_solver(solver, total, timesteps)
        loop = {"ddpm": "p_sample_loop_ddpm", "ddim": "p_sample_loop_ddim"}.get(solver)
        if loop and is_overridden(self, loop):
            check_count("timesteps", timesteps, most=total)
            check_spacing(solver, spacing)
            if generator is not None:
                kwargs["generator"] = generator
            if solver == "ddim":
                kwargs["timesteps"] = timesteps
            embeds = getattr(self, loop)(shape, repeat_rows(text_cond, shape[0]), cond_scale=cond_scale, **kwargs)
        else:
            options = dict(spacing=spacing, generator=generator, progress=progress, **kwargs)
            embeds = self._run(shape, text_cond, cond_scale, timesteps, solver, **options)
        return self.denormalize(embeds)

    @torch.no_grad()
    @in_eval_mode
    def sample_batch_size(self, batch_size: int, text_cond: dict, cond_scale: float = 1.0) -> Tensor:
        """DDPM samples (batch_size, image_embed_dim) for given conditions, still scaled by `image_embed_scale`."""
        return self.p_sample_loop_ddpm((batch_size, self.image_embed_dim), text_cond, cond_scale=cond_scale)

    @torch.no_grad()
    @in_eval_mode
    def sample(
        self,
        text: Tensor | str | list[str] | None = None,
        num_samples_per_batch: int = 2,
        cond_scale: float = 1.0,
        timesteps: int | None = None,
        *,
        text_embed: Tensor | None = None,
        text_encodings: Tensor | None = None,
        mask: Tensor | None = None,
        conditions: dict[str, Tensor] | None = None,
        n_samples_per_batch: int | None = None,
        **kwargs,
    ) -> Tensor:
        """Sample `num_samples_per_batch` embeddings per prompt and keep the one most similar to its text embedding.

        Args:
            text: (prompts, length) int64 tokens, or strings; both need a CLIP adapter.
            num_samples_per_batch: candidates per prompt; `n_samples_per_batch` is the same.
            cond_scale, timesteps: see `p_sample_loop`; timesteps defaults to `sample_timesteps`.
            text_embed: (prompts, dim), instead of `text`.
            text_encodings: (prompts, length, dim), with `text_embed`.
            mask: (prompts, length) bool, False where `text_encodings` is padding.
            conditions: see `p_sample_loop`.
            **kwargs: solver, spacing, eta, generator, progress: see `p_sample_loop`.
        Returns:
            (prompts, image_embed_dim).

        On CUDA a run may capture graphs, see `graphs` of the class. With torch 2.11 what other threads of yours draw
        from the device's default generator meanwhile fails (what fastprior draws waits): give them generators of their
        own, or run each shape twice before.
        """
        repeats = num_samples_per_batch if n_samples_per_batch is None else n_samples_per_batch
        self.check_best_of(repeats, "num_samples_per_batch")
        timesteps = self.sample_timesteps if timesteps is None else timesteps
        text_cond = self.text_condition(text, text_embed, text_encodings, mask, conditions)
        prompts = len(text_cond["text_embed"])
        shape = prompts * repeats, self.image_embed_dim
        if overridden(self, LOOPS):
            text_cond = repeat_rows(text_cond, shape[0]) if prompts else text_cond
        embeds = self.p_sample_loop(shape, text_cond=text_cond, cond_scale=cond_scale, timesteps=timesteps, **kwargs)
        wanted = text_cond["text_embed"].view(prompts, -1, text_cond["text_embed"].shape[-1])[:, 0]
        return self.best_of(embeds.view(prompts, repeats, -1), wanted)

    # training

    def p_losses(self, image_embed: Tensor, times: Tensor, text_cond: dict, noise: Tensor | None = None) -> Tensor:
        """The loss at given times (rows,) for scaled image embeddings (rows, dim): a 0-d tensor."""
        noise = randn_like(image_embed) if noise is None else noise
        noisy = self.noise_scheduler.q_sample(x_start=image_embed, t=times, noise=noise)
        self_cond = None
        if self.net.self_cond and random.random() < 0.5:
            with torch.no_grad():
                self_cond = self.net(noisy, times, **text_cond)
        drop = dict(text_cond_drop_prob=self.text_cond_drop_prob, image_cond_drop_prob=self.image_cond_drop_prob)
        pred = self.net(noisy, times, self_cond=self_cond, **drop, **text_cond)
        if self.predict_x_start and self.training_clamp_l2norm:
            pred = self.l2norm_clamp_embed(pred)
        target = image_embed if self.predict_x_start else noise
        if self.predict_v:
            target = self.noise_scheduler.calculate_v(image_embed, times, noise)
        dtype = torch.promote_types(pred.dtype, target.dtype)  # torch 2.11 has no gradient of a loss between two
        return self.noise_scheduler.loss_fn(pred.to(dtype), target.to(dtype))

    def forward(
        self,
        text: Tensor | None = None,
        image: Tensor | None = None,
        text_embed: Tensor | None = None,
        image_embed: Tensor | None = None,
        text_encodings: Tensor | None = None,
        *args,
        draws: int = 1,
        conditions: dict[str, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        """The training loss at random times.

        Args:
            text: (batch, length) int64 tokens, or text_embed (batch, dim) with text_encodings (batch, length, dim).
            image: (batch, channels, height, width) in 0..1, or image_embed (batch, dim), which is not modified.
            draws: times and noises per pair. The text runs once for all of them, so that 8 draws cost much less than 8
                steps; the loss has the same mean and a smaller variance. Dropped text is dropped for all draws of a
                pair.
            conditions: see `p_sample_loop`.
            *args, **kwargs: go to `p_losses`, such as `noise`, of (batch * draws, dim).
        Returns:
            0-d tensor.
        """
        check_count("draws", draws)
        if (image is None) == (image_embed is None):
            raise ValueError("exactly one of image and image_embed must be given")
        check_tensors(image=image, image_embed=image_embed)
        if image is not None:
            image_embed, _ = self.clip.embed_image(image)
        text_cond = self.text_condition(text, text_embed, text_encodings, conditions=conditions)
        check_conditions(self.net, text_cond)
        if draws > 1:
            image_embed = image_embed.repeat_interleave(draws, dim=0)
            if network_obstacles(self.net, dropout=True):
                text_cond = repeat_rows(text_cond, len(image_embed))
        times = self.noise_scheduler.sample_random_times(len(image_embed))
        return self.p_losses(self.normalize(image_embed), times, *args, text_cond=text_cond, **kwargs)
