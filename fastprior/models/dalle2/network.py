"""The prior network: a causal transformer over text encodings, text embedding, time, noisy image embedding, query.

Extra conditions stand in front of the text. So they are part of what is run once per prompt, the text is read in their
light, and the distances between all other tokens, which the position bias and the rotation see, are those of a prior
without conditions, from whose weights training may begin.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprior.checks import check_count
from fastprior.draws import prob_mask_like
from fastprior.kernels import ops
from fastprior.models import snapshot
from fastprior.models.dalle2.conditions import Conditions, find
from fastprior.models.dalle2.layers import MLP, SinusoidalPosEmb
from fastprior.models.dalle2.transformer import CausalTransformer, KVCache
from fastprior.models.linears import Projections, dtype_of
from fastprior.models.loading import NoticesForeignStates
from fastprior.models.patches import are_called_as_they_are
from fastprior.models.shared_rows import row_layout
from fastprior.models.weight_lock import weights_locked

NULL_TABLE_ROWS = 256  # timesteps of the null table computed at once: bounds its memory


class NetworkConditioning(NamedTuple):
    """The text, run once, and the times: all that the steps of one run share.

    Attributes:
        cache: keys and values of the prefix, per prompt.
        time_tokens: (steps, num_time_embeds, dim).
        null_rows: how many of the prompts, counted from the last, are the unconditional branch; their rows see the
            null image embedding.
    """

    cache: KVCache
    time_tokens: Tensor
    null_rows: int


class DiffusionPriorNetwork(NoticesForeignStates, nn.Module):
    """Predict a clean image embedding (or v, or noise) from a noisy one, a time, and the text.

    Args:
        dim: width of the tokens and of the embeddings.
        num_timesteps: number of discrete times, each with a learned embedding; None embeds continuous times.
        num_time_embeds, num_image_embeds, num_text_embeds: tokens made of each.
        max_text_len: length that text encodings are padded or cut to.
        self_cond: feed the last x0 estimate back as a token (Analog Bits, Chen et al. 2022).
        text_dim: width of the text encodings; another than `dim`, such as T5's, is projected. `dim` by default.
        text_embed_dim: the same of the text embedding, for text encoders without a CLIP embedding: the mean of their
            encodings will do. It cannot be compared with image embeddings then, so there is no best-of-n.
        conditions: names and options of extra conditions, see `Conditions`.
        **kwargs: depth, dim_head, heads, ff_mult, norm_in, norm_out, attn_dropout, ff_dropout, final_proj, normformer,
            rotary_emb, cosine_sim, dot_scale: see `CausalTransformer`.

    Attributes:
        config: the constructor's arguments, for saving.
    """

    def __init__(
        self,
        dim: int,
        num_timesteps: int | None = None,
        num_time_embeds: int = 1,
        num_image_embeds: int = 1,
        num_text_embeds: int = 1,
        max_text_len: int = 256,
        self_cond: bool = False,
        text_dim: int | None = None,
        text_embed_dim: int | None = None,
        conditions: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        super().__init__()
        for name in ("dim", "num_time_embeds", "num_image_embeds", "num_text_embeds"):
            check_count(name, arguments[name])
        for name in ("num_timesteps", "text_dim", "text_embed_dim"):
            if arguments[name] is not None:
                check_count(name, arguments[name])
        check_count("max_text_len", max_text_len, 0)
        further = "text_dim", "text_embed_dim", "conditions"  # files from before them have none of these
        arguments = {name: value for name, value in arguments.items() if value or name not in further}
        self.config = dict(copy.deepcopy(arguments), **kwargs)
        self.text_dim, self.text_embed_dim = text_dim or dim, text_embed_dim or dim
        self.dim, self.max_text_len, self.self_cond, self.num_timesteps = dim, max_text_len, self_cond, num_timesteps
        self.num_time_embeds, self.num_image_embeds = num_time_embeds, num_image_embeds
        self.num_text_embeds = num_text_embeds
        self.continuous_embedded_time = num_timesteps is None

        def tokens(count: int, source: nn.Module) -> nn.Sequential:
            return Projections(source, nn.Unflatten(-1, (count, dim)))

        def projection(width: int, count: int = 1) -> nn.Module:
            return nn.Identity() if width == dim and count == 1 else nn.Linear(width, dim * count)

        self.to_text_encodings = Projections(projection(self.text_dim))
        self.to_text_embeds = tokens(num_text_embeds, projection(self.text_embed_dim, num_text_embeds))
        time_width = dim * num_time_embeds
        if self.continuous_embedded_time:
            embed_time = nn.Sequential(SinusoidalPosEmb(dim), MLP(dim, time_width))
        else:
            embed_time = nn.Embedding(num_timesteps, time_width)
        self.to_time_embeds = tokens(num_time_embeds, embed_time)
        self.to_image_embeds = tokens(num_image_embeds, projection(dim, num_image_embeds))
        self.learned_query = nn.Parameter(torch.randn(dim))
        self.causal_transformer = CausalTransformer(dim=dim, **kwargs)
        self.null_text_encodings = nn.Parameter(torch.randn(1, max_text_len, dim))
        self.null_text_embeds = nn.Parameter(torch.randn(1, num_text_embeds, dim))
        self.null_image_embed = nn.Parameter(torch.randn(1, dim))
        self.conditions = Conditions(dim, conditions) if conditions else None

    @property
    def null_sees_image(self) -> bool:
        """Whether the unconditional prediction depends on the noisy image, so that there is no `null_table`."""
        return self.self_cond

    @property
    def prefix_tokens(self) -> int:
        return len(self.conditions or ()) + self.max_text_len + self.num_text_embeds

    @property
    def suffix_tokens(self) -> int:
        return self.num_time_embeds + self.num_image_embeds + bool(self.self_cond) + 1

    @property
    def stream_dtype(self) -> torch.dtype:
        """dtype of the residual stream: that of the weights, but at least fp32."""
        return torch.promote_types(self.learned_query.dtype, torch.float32)

    def _embed(self, to_tokens: nn.Module, x: Tensor) -> Tensor:
        """Embed in the weights' dtype unless x is left as it is, and return in the stream's."""
        first = next(to_tokens.children(), to_tokens)
        return to_tokens(x if type(first) is nn.Identity else x.to(dtype_of(first, self))).to(self.stream_dtype)

    def time_tokens(self, times: Tensor) -> Tensor:
        """The tokens of times (steps,): (steps, num_time_embeds, dim), in the stream's dtype."""
        if self.continuous_embedded_time:  # a perceptron, which several threads compute
            return self.to_time_embeds(times.to(self.stream_dtype)).to(self.stream_dtype)
        with ops.one_thread(times):
            return self.to_time_embeds(times.long()).to(self.stream_dtype)

    def _prefix(self, text_embed, text_encodings, conditions, keep: Tensor) -> Tensor:
        """The tokens (batch, prefix_tokens, dim); padding and rows not kept (batch, 1, 1) get the learned nulls."""
        dtype = self.stream_dtype
        encodings = self.null_text_encodings.to(dtype).expand(text_embed.shape[0], -1, -1)
        if text_encodings is not None:
            text_encodings = text_encodings[:, : self.max_text_len]
            length, real = text_encodings.shape[1], keep & text_encodings.ne(0).any(dim=-1, keepdim=True)
            text = torch.where(real, self._embed(self.to_text_encodings, text_encodings), encodings[:, :length])
            encodings = torch.cat((text, encodings[:, length:]), dim=1)
        text_tokens = torch.where(keep, self._embed(self.to_text_embeds, text_embed), self.null_text_embeds.to(dtype))
        extra = [] if self.conditions is None else [self.conditions(conditions, keep[:, 0]).to(dtype)]
        return torch.cat((*extra, encodings, text_tokens), dim=1)

    def _suffix(self, time_tokens: Tensor, image_tokens: Tensor, self_cond: Tensor | None, samples: int = 1) -> Tensor:
        """Tokens (rows, suffix, dim) of image tokens (all samples, any, dim), in the order of `RowLayout`."""
        if self.self_cond:
            if self_cond is None:
                self_cond = torch.zeros_like(image_tokens[:, 0])
            image_tokens = torch.cat((image_tokens, self_cond[:, None].to(image_tokens.dtype)), dim=1)
        rows = image_tokens.shape[0] // samples
        query = self.learned_query.to(image_tokens.dtype).expand(rows, samples, -1)
        image_tokens = image_tokens.reshape(rows, -1, self.dim)
        return torch.cat((time_tokens.expand(rows, -1, -1), image_tokens, query), dim=1)

    def check_inputs(self, text_embed, text_encodings, conditions, image_embed=None) -> None:
        """Raise ValueError or TypeError unless shapes and dtypes are as `forward` says."""
        batch = text_embed.shape[0]  # len() of a tensor would make it a constant of exported programs
        wanted = {"text_embed": (text_embed, (batch, self.text_embed_dim))}
        if image_embed is not None:
            rows = image_embed.shape[0]
            if rows != batch and rows % max(batch, 1):
                raise ValueError(f"image_embed has {rows} rows; they must be a multiple of the {batch} of text_embed")
            wanted["image_embed"] = image_embed, (rows, self.dim)
        if text_encodings is not None:
            wanted["text_encodings"] = text_encodings, (batch, *text_encodings.shape[1:2], self.text_dim)
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape} for this network")
            if not tensor.is_floating_point():
                raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating point tensor")
        if conditions:
            find(self.conditions, next(iter(conditions)))  # raises where the network has none
            self.conditions.check(conditions, batch)

    def _apply(self, *args, **kwargs):
        with weights_locked(self):
            before = self.learned_query.data_ptr()
            super()._apply(*args, **kwargs)
            if self.learned_query.data_ptr() != before:
                snapshot.forget(self)
        return self

    def forward(
        self,
        image_embed: Tensor,
        diffusion_timesteps: Tensor,
        *,
        text_embed: Tensor,
        text_encodings: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        self_cond: Tensor | None = None,
        text_cond_drop_prob: float = 0.0,
        image_cond_drop_prob: float = 0.0,
    ) -> Tensor:
        """Predict from noisy embeddings.

        There may be several per prompt, whose rows lie together: the text then runs once for all of them.

        Args:
            image_embed: (rows, dim), the noisy image embeddings; rows is a multiple of prompts.
            diffusion_timesteps: (rows,), integers below `num_timesteps`, or real times for a continuous network.
            text_embed: (prompts, text_embed_dim).
            text_encodings: (prompts, length, text_dim); all-zero rows are padding. Positions beyond `max_text_len` are
                cut.
            conditions: values of extra conditions by name, (prompts,) or (prompts, size); those left out are missing.
            self_cond: (rows, dim), the last x0 estimate; zeros by default. Ignored without `self_cond=True`.
            text_cond_drop_prob, image_cond_drop_prob: chance per prompt of replacing the text and all conditions by
                nulls, and per row of replacing the image. Besides, each condition has a dropout of its own in training
                mode.
        Returns:
            (rows, dim), in the weights' dtype.
        """
        self.check_inputs(text_embed, text_encodings, conditions, image_embed)
        prompts, rows, device = text_embed.shape[0], image_embed.shape[0], image_embed.device
        keep_text = prob_mask_like((prompts, 1, 1), 1 - text_cond_drop_prob, device)
        keep_image = prob_mask_like((rows, 1, 1), 1 - image_cond_drop_prob, device)
        image_tokens = self._embed(self.to_image_embeds, image_embed)
        image_tokens = torch.where(keep_image, image_tokens, self.null_image_embed.to(image_tokens.dtype))
        prefix = self._prefix(text_embed, text_encodings, conditions, keep_text)
        suffix = self._suffix(self.time_tokens(diffusion_timesteps), image_tokens, self_cond)
        transformer = self.causal_transformer
        whole = type(transformer) is not CausalTransformer or bool(transformer.obstacles())
        if rows > prompts:
            if not whole:
                return transformer.step(suffix, transformer.prefill(prefix, suffix.shape[1]))
            prefix = prefix.repeat_interleave(rows // prompts, dim=0)
        tokens = torch.cat((prefix, suffix), dim=1)
        return transformer(tokens)[:, -1] if whole else transformer.last(tokens)

    def forward_with_cond_scale(self, *args, cond_scale: float = 1.0, **kwargs) -> Tensor:
        """`forward` with classifier-free guidance (Ho & Salimans 2022): null + (conditional - null) * cond_scale.

        The null branch drops the text, all conditions and the image.
        """
        pred = self.forward(*args, **kwargs)
        if cond_scale == 1:
            return pred
        null = self.forward(*args, **{**kwargs, "text_cond_drop_prob": 1.0, "image_cond_drop_prob": 1.0})
        return null + (pred - null) * cond_scale

    def prefill(
        self,
        text_embed: Tensor,
        text_encodings: Tensor | None,
        times: Tensor,
        null_rows: int = 0,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> NetworkConditioning:
        """Run the text once, for any number of steps.

        Args:
            text_embed, text_encodings, conditions: see `forward`.
            times: (steps,), the times that `step` will be asked for, by index; or their `time_tokens`.
            null_rows: 0, or `prompts` to append as many unconditional prompts.
        """
        self.check_inputs(text_embed, text_encodings, conditions)
        keep = torch.ones(len(text_embed), 1, 1, dtype=torch.bool, device=text_embed.device)
        transformer, nulls = self.causal_transformer, self.null_text_encodings.expand(len(text_embed), -1, -1)
        with ops.one_thread(nulls if text_encodings is None else max(nulls, text_encodings, key=Tensor.numel)):
            prefix, shared = self._prefix(text_embed, text_encodings, conditions, keep), None
            if text_encodings is None and self.conditions is None:  # then all prompts begin with the same tokens
                shared = snapshot.once(transformer, "no text", self._no_text, of_numbers=True)
            own = prefix if shared is None else prefix[:, self.max_text_len :]
            cache = transformer.prefill_by_blocks(own, self.suffix_tokens, shared)
        if cache is None:
            cache = transformer.prefill_by_layers(prefix, self.suffix_tokens)
        if null_rows:
            k, v = snapshot.once(
                transformer, "unconditional", lambda: self._null_cache(text_embed.device)[:2], of_numbers=True
            )
            k, v = (t.expand(-1, null_rows, -1, -1, -1) for t in (k, v))
            cache = cache._replace(k=torch.cat((cache.k, k), dim=1), v=torch.cat((cache.v, v), dim=1))
        return NetworkConditioning(cache, times if times.ndim == 3 else self.time_tokens(times), null_rows)

    def share(self, cond: NetworkConditioning, samples: int) -> NetworkConditioning:
        """Make a conditioning ready for steps of `samples` rows of each prompt, with one index for all rows.

        Time tokens then run once for several samples.
        """
        layout = row_layout(samples, self.suffix_tokens, self.num_time_embeds, cond.cache.k.device)
        return cond if layout is None else cond._replace(cache=self.causal_transformer.share(cond.cache, layout))

    def prepare(self, cond: NetworkConditioning) -> NetworkConditioning:
        """Make a conditioning that another network's prefill ran ready for steps of this one."""
        return cond._replace(cache=cond.cache._replace(blocks=self.causal_transformer.prepared()))

    def _no_text(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the encodings of no text, where they can be computed apart from what follows."""
        nulls, cache = self.null_text_encodings.to(self.stream_dtype), None
        if self.max_text_len:
            cache = self.causal_transformer.prefill_by_blocks(nulls, self.suffix_tokens)
        return None if cache is None else (cache.k, cache.v)

    def _null_cache(self, device) -> KVCache:
        """The prefix of the unconditional branch, as one prompt; without gradient to the (unused) text projection."""
        nulls = [] if self.conditions is None else [self.conditions.nulls()[None]]
        nulls = torch.cat((*nulls, self.null_text_encodings, self.null_text_embeds), dim=1)
        return self.causal_transformer.prefill(nulls.to(device, self.stream_dtype), self.suffix_tokens)

    def step(self, x: Tensor, index: Tensor, cond: NetworkConditioning, self_cond: Tensor | None = None) -> Tensor:
        """One evaluation behind the cached prefix.

        Args:
            x: (rows, dim), noisy embeddings; the rows of one prompt lie together.
            index: 0-d or (rows,) int64, into the times given to `prefill`.
            cond: from `prefill` or `share`.
            self_cond: (rows, dim), see `forward`.
        Returns:
            (rows, dim) in fp32 or wider.
        """
        rows, time_tokens = len(x), cond.time_tokens.index_select(0, index.reshape(-1))
        image_tokens = self._embed(self.to_image_embeds, x)
        if cond.null_rows:
            null_image = self.null_image_embed.to(image_tokens.dtype).expand_as(image_tokens)
            first_null = rows - rows * cond.null_rows // cond.cache.k.shape[1]
            image_tokens = torch.cat((image_tokens[:first_null], null_image[first_null:]))
        suffix = self._suffix(time_tokens, image_tokens, self_cond, cond.cache.samples)
        return self.causal_transformer.step(suffix, cond.cache).to(self.stream_dtype)

    def prepare_run(self, cond: NetworkConditioning, samples: int, **solver) -> ops.Run | ops.Launches | None:
        """A run whose steps are kernels alone, in C one each; None where there is none for them.

        Args:
            cond: see `step`.
            samples: of all prompts.
            **solver: what `ops.prepare_run` and `ops.prepare_launches` take of the solver.
        """
        cache, transformer = cond.cache, self.causal_transformer
        if cond.null_rows or not self._enters_as_it_is():
            return None
        solver |= dict(time_tokens=cond.time_tokens, query=self.learned_query, rows=samples // cache.samples)
        if cache.blocks is None or cache.blocks.owner is not transformer:
            return transformer.prepare_launches(cache, **solver)
        shared = dict(samples=cache.samples, rotary=cache.rotary, bias=cache.bias)
        return ops.prepare_run(cache.blocks, cache.k, cache.v, **shared, **solver)

    def prepare_rows(
        self, cond: NetworkConditioning, *, prompts: int, places: int, alike: bool = False
    ) -> ops.Rows | None:
        """Steps in C for rows that are each at a step of their own; None where there are none for them.

        Args:
            cond: of any prompt: prefixes of others have the same shape.
            prompts, places, alike: see `ops.prepare_rows`.
        """
        cache = cond.cache
        if cond.null_rows or cache.blocks is None or cache.blocks.owner is not self.causal_transformer:
            return None
        if not self._enters_as_it_is():
            return None
        sizes = dict(prompts=prompts, places=places, times=self.num_time_embeds, alike=alike)
        tensors = dict(query=self.learned_query, rotary=cache.rotary, bias=cache.bias)
        return ops.prepare_rows(cache.blocks, cache.k, cache.v, **sizes, **tensors)

    def _enters_as_it_is(self) -> bool:
        """Whether a noisy embedding is a token of the stream, and all that a step sees of its state."""
        embed, norm = self.to_image_embeds, self.causal_transformer.init_norm
        return (
            not self.self_cond
            and self.num_image_embeds == 1
            and type(embed) in (Projections, nn.Sequential)
            and type(embed[0]) is type(norm) is nn.Identity
            and are_called_as_they_are(embed, *embed, norm)
        )

    def null_table(self, times: Tensor) -> Tensor:
        """The unconditional prediction at each of the times (steps,): (steps, dim), in fp32 or wider.

        It depends on the time alone, because the null branch drops the image as well; so one table per set of weights
        replaces the second forward of guidance. Raises ValueError with self-conditioning, where it does see x.
        """
        if self.self_cond:
            raise ValueError("null_table: with self_cond=True the null prediction depends on x; there is no table")
        cache = self._null_cache(times.device)
        chunks = []
        for chunk in times.split(NULL_TABLE_ROWS):
            cond = NetworkConditioning(cache, self.time_tokens(chunk), null_rows=1)
            x = self.null_image_embed.to(self.stream_dtype).expand(len(chunk), -1)
            chunks.append(self.step(x, torch.arange(len(chunk), device=times.device), cond))
        return torch.cat(chunks)
