"""How a prior transformer predicts: by a pass over all tokens, or by a few behind the prefix that its text is."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.kernels import ops
from fastprior.models.prior_transformer import blocks as prior_blocks
from fastprior.models.prior_transformer import prompt_memory
from fastprior.models.prior_transformer.blocks import HIDDEN, Prefix, normed, projected
from fastprior.models.shared_rows import row_layout


class Conditioning(NamedTuple):
    """What the steps of one run share.

    Attributes:
        prefix: keys and values of the prefix, per prompt.
        time_tokens: (steps, 1, dim).
    """

    prefix: Prefix
    time_tokens: Tensor


class PriorTransformerOutput(NamedTuple):
    """predicted_image_embedding: (batch, clip_embed_dim), or (batch, tokens, clip_embed_dim) without a "prd" token."""

    predicted_image_embedding: Tensor


class PriorForward:
    """`forward`, `prefill` and `step` of a prior transformer, whoever built its modules: ours or diffusers'.

    The tokens are text encodings, text embedding, time, noisy embedding and a learned "prd" token, whose output is the
    prediction. With an attention mask attention is causal, so the text is a prefix that no step changes.
    """

    output_class = PriorTransformerOutput
    gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | int,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ):
        """Predict from noisy embeddings.

        Without gradients and with a mask, the text runs once for as long as it, the weights and the modules stay the
        same; the result is that of a full pass. All tokens run under torch.compile, and where a module inside has a
        hook, is of an unknown kind, or drops out.

        Args:
            hidden_states: (batch, embedding_dim) or (batch, tokens, embedding_dim), the noisy embeddings.
            timestep: a number, 0-d, (1,) or (batch,).
            proj_embedding: (batch, embedding_proj_dim) or (batch, tokens, embedding_proj_dim), the text embedding.
            encoder_hidden_states: (batch, num_embeddings, embedding_dim), the text encodings.
            attention_mask: (batch, num_embeddings), 1 for real tokens; None attends in both directions.
            return_dict: return a `PriorTransformerOutput`, or else a tuple.
        Returns:
            predicted_image_embedding: (batch, clip_embed_dim); (batch, tokens, clip_embed_dim) with
                `added_emb_type=None`.
        Raises:
            ValueError: a shape does not fit the others or the config.
        """
        given = proj_embedding, encoder_hidden_states, attention_mask
        self._check(*given, hidden_states)
        time = timestep if torch.is_tensor(timestep) else torch.tensor(timestep, dtype=torch.long)
        time = time.reshape(-1).to(hidden_states.device)
        if len(time) not in (1, len(hidden_states)):
            raise ValueError(f"timestep has {len(time)} elements; it must have 1 or as many as hidden_states has rows")
        prefix = None
        if attention_mask is not None and prompt_memory.is_plain_call(given):
            suffix = self._count_suffix(hidden_states)
            with ops.sharing():
                prefix = prompt_memory.recall(self, given, suffix, lambda: self._prefix(*given, suffix))
        if prefix is None:
            pred = self._whole(hidden_states, time, *given)
        else:
            with ops.sharing():
                pred = self._behind(hidden_states, self._time_tokens(time, self._weight_dtype), prefix)
            kind = pred.device.type
            autocast = torch.is_autocast_enabled(kind)
            pred = pred.to(torch.get_autocast_dtype(kind) if autocast else self._weight_dtype)
        return self.output_class(pred) if return_dict else (pred,)

    def prefill(
        self, proj_embedding: Tensor, encoder_hidden_states: Tensor | None, attention_mask: Tensor, times: Tensor
    ) -> Conditioning:
        """Run the text once, for any number of steps. Prompts that are the same run as one.

        Args:
            proj_embedding: (prompts, embedding_proj_dim), any float dtype.
            encoder_hidden_states: (prompts, num_embeddings, embedding_dim), or None.
            attention_mask: (prompts, num_embeddings), 1 for real tokens.
            times: (steps,), the timesteps that `step` will be asked for, by index.
        Raises:
            ValueError: no mask, a shape that does not fit, or something in the model stands in the way (a hook, a
                foreign attention processor, dropout).
        """
        if attention_mask is None:
            raise ValueError("attention_mask is None; it must be given: without it attention is not causal")
        self._check(proj_embedding, encoder_hidden_states, attention_mask)
        dtype = self._weight_dtype
        proj_embedding = proj_embedding.to(dtype)
        encoder_hidden_states = None if encoder_hidden_states is None else encoder_hidden_states.to(dtype)
        suffix = 2 + (self.prd_embedding is not None)
        if reasons := prompt_memory.obstacles(self, suffix):
            raise ValueError(f"this prior cannot run behind a prefix: {'; '.join(reasons)}")
        prefix = self._prefix(proj_embedding, encoder_hidden_states, attention_mask, suffix)
        if prefix is None:
            raise ValueError("attention_mask hides tokens behind the text, or has values beyond 0 and 1; it must not")
        return Conditioning(prefix, self._time_tokens(times, dtype))

    def padded_prefill(
        self,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        times: Tensor,
        prompts: Tensor,
    ) -> Conditioning:
        """`prefill` as a CUDA graph takes it: shapes alone say what is computed, and no value is looked at.

        Args:
            proj_embedding: (texts, embedding_proj_dim).
            encoder_hidden_states: (texts, tokens, embedding_dim), the first of the `num_embeddings` tokens; no text has
                more.
            attention_mask: (texts, tokens), ones and zeros.
            prompts: (prompts,) int64, which text each is.
        """
        dtype, longest = self._weight_dtype, self.config["num_embeddings"]
        suffix = 2 + (self.prd_embedding is not None)
        if reasons := prompt_memory.obstacles(self, suffix):
            raise ValueError(f"this prior cannot run behind a prefix: {'; '.join(reasons)}")
        tokens = self._prefix_tokens(proj_embedding.to(dtype), encoder_hidden_states.to(dtype))
        positions = self._positions(longest + 1, suffix, masked=True)
        positions = torch.cat((positions[:, : tokens.shape[1] - 1], positions[:, longest : longest + 1]), dim=1)
        mask = F.pad((1 - attention_mask.float()) * HIDDEN, (0, 1))
        x = self._placed(tokens, positions)
        prefix = prior_blocks.prefill(self.transformer_blocks, x, mask, prompts, dtype, pack=False)
        return Conditioning(prefix, self._time_tokens(times, dtype))

    def prepare(self, cond: Conditioning) -> Conditioning:
        """The same for steps of this prior, where another one ran the prefill."""
        return cond._replace(prefix=cond.prefix._replace(blocks=prior_blocks.prepared(self.transformer_blocks)))

    def share(self, cond: Conditioning, samples: int) -> Conditioning:
        """The same for steps of `samples` rows of each prompt, see `DiffusionPriorNetwork.share`."""
        layout = row_layout(samples, 2 + (self.prd_embedding is not None), 1, cond.prefix.k.device)
        return cond if layout is None else cond._replace(prefix=prior_blocks.share(cond.prefix, layout))

    def step(self, x: Tensor, index: Tensor, cond: Conditioning) -> Tensor:
        """One evaluation behind the cached prefix.

        Args:
            x: (rows, embedding_dim), noisy embeddings; rows is a multiple of prompts, those of one prompt together.
            index: 0-d or (rows,) int64, into the times given to `prefill`.
            cond: from `prefill` or `share`.
        Returns:
            (rows, clip_embed_dim) in fp32 or wider.
        """
        time_tokens = cond.time_tokens.index_select(0, index.reshape(-1))
        pred = self._behind(x.to(self._weight_dtype), time_tokens, cond.prefix)
        return pred if pred.dim() == 2 else pred.squeeze(1)

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """Undo the normalisation of CLIP embeddings: `latents * clip_std + clip_mean`; None leaves a part out."""
        if self.clip_std is not None:
            prior_latents = prior_latents * self.clip_std.to(prior_latents.device)
        if self.clip_mean is not None:
            prior_latents = prior_latents + self.clip_mean.to(prior_latents.device)
        return prior_latents

    def _apply(self, *args, **kwargs):
        before = self.proj_in.weight.data_ptr()
        super()._apply(*args, **kwargs)
        if self.proj_in.weight.data_ptr() != before:  # offloading moves a model at every call, mostly to where it is
            prompt_memory.forget(self)
        return self

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self.proj_in.weight.dtype

    def _count_suffix(self, hidden_states: Tensor) -> int:
        return 1 + (hidden_states.shape[1] if hidden_states.dim() == 3 else 1) + (self.prd_embedding is not None)

    def _check(self, proj_embedding, encoder_hidden_states, attention_mask, hidden_states=None) -> None:
        config, rows = self.config, len(proj_embedding)
        dim, with_text = config["embedding_dim"], self.encoder_hidden_states_proj is not None
        if with_text and encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states is None; it must be given where encoder_hid_proj_type is not None")
        inner = config["num_attention_heads"] * config["attention_head_dim"]
        wanted = {
            "proj_embedding": (proj_embedding, (rows, ..., config["embedding_proj_dim"] or dim)),
            "hidden_states": (hidden_states, (rows, ..., dim)),
            "encoder_hidden_states": (encoder_hidden_states, (rows, "tokens", dim if with_text else inner)),
            "attention_mask": (attention_mask, (rows, config["num_embeddings"])),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is None:
                continue
            dims = (2, 3) if ... in shape else (len(shape),)
            if tensor.dim() not in dims or tensor.shape[0] != rows or tensor.shape[-1] != shape[-1]:
                text = ", ".join("[tokens]" if size is ... else str(size) for size in shape)
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({text})")

    def _positions(self, prefix: int, suffix: int, masked: bool) -> Tensor:
        """(1, tokens, dim); where there are too few they belong to the noisy embeddings, and others have none."""
        positions, tokens = self.positional_embedding, prefix + suffix
        if positions.shape[1] < tokens and not masked:
            positions = F.pad(positions, (0, 0, prefix + 1, int(self.prd_embedding is not None)))
        if positions.shape[1] != tokens:
            raise ValueError(
                f"there are {tokens} tokens; they must be num_embeddings + additional_embeddings, "
                f"{self.positional_embedding.shape[1]}, or without a mask hidden_states may have as many"
            )
        return positions

    def _time_tokens(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        return self.time_embedding(self.time_proj(times).to(dtype))[:, None]

    def _prefix_tokens(self, proj_embedding: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
        if self.embedding_proj_norm is not None:
            proj_embedding = self.embedding_proj_norm(proj_embedding)
        tokens = self.embedding_proj(proj_embedding)
        tokens = tokens[:, None] if tokens.dim() == 2 else tokens
        if encoder_hidden_states is None:
            return tokens
        if self.encoder_hidden_states_proj is not None:
            encoder_hidden_states = self.encoder_hidden_states_proj(encoder_hidden_states)
        return torch.cat((encoder_hidden_states, tokens), dim=1)

    def _suffix_tokens(self, hidden_states: Tensor, time_tokens: Tensor, samples: int = 1) -> Tensor:
        """What rows of some samples hold, see `RowLayout`."""
        hidden, rows = self.proj_in(hidden_states), len(hidden_states) // samples
        tokens = [time_tokens.expand(rows, -1, -1), hidden.reshape(rows, -1, hidden.shape[-1])]
        if self.prd_embedding is not None:
            tokens.append(self.prd_embedding.to(hidden.dtype).expand(rows, samples, -1))
        return torch.cat(tokens, dim=1)

    def _whole(self, hidden_states, time, proj_embedding, encoder_hidden_states, attention_mask) -> Tensor:
        """The prediction by a pass over all tokens, every module called as it stands."""
        prefix = self._prefix_tokens(proj_embedding, encoder_hidden_states)
        suffix = self._suffix_tokens(hidden_states, self._time_tokens(time, self.dtype))
        masked = attention_mask is not None
        x = torch.cat((prefix, suffix), dim=1)
        x = x + self._positions(prefix.shape[1], suffix.shape[1], masked).to(x.dtype)
        if masked:
            attention_mask = self._attention_mask(attention_mask, x)
        if self.norm_in is not None:
            x = self.norm_in(x)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, attention_mask)
            else:
                x = block(x, attention_mask=attention_mask)
        x = self.norm_out(x)
        x = x[:, prefix.shape[1] + 1 :] if self.prd_embedding is None else x[:, -1]
        return self.proj_to_clip_embeddings(x)

    def _attention_mask(self, attention_mask: Tensor, x: Tensor) -> Tensor:
        """What is added to the logits: (batch * heads, tokens, tokens), as attention processors take it."""
        tokens, heads = x.shape[1], self.config["num_attention_heads"]
        causal = torch.full((tokens, tokens), HIDDEN, dtype=x.dtype, device=x.device).triu(1)
        padding = (1 - attention_mask.to(x.dtype)) * HIDDEN
        padding = F.pad(padding, (0, tokens - padding.shape[1]))
        return (padding[:, None] + causal).repeat_interleave(heads, dim=0)

    def _prefix(self, proj_embedding, encoder_hidden_states, attention_mask, suffix: int) -> Prefix | None:
        """The prefix; None for a mask that hides suffix tokens, or undoes causality with values beyond 0 and 1."""
        mask = (1 - attention_mask.to(proj_embedding.device, torch.float32)) * HIDDEN
        if not ((mask >= HIDDEN) & (mask <= 0)).all():
            return None
        given = [t for t in (proj_embedding, encoder_hidden_states, mask) if t is not None]
        chosen, prompts = prior_blocks.distinct(given)
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states[chosen]
        tokens = self._prefix_tokens(proj_embedding[chosen], encoder_hidden_states)
        prefix = tokens.shape[1]
        if mask.shape[1] > prefix:
            return None
        mask = F.pad(mask[chosen], (0, prefix - mask.shape[1]))
        x = self._placed(tokens, self._positions(prefix, suffix, masked=True)[:, :prefix])
        return prior_blocks.prefill(self.transformer_blocks, x, mask, prompts, self._weight_dtype)

    def _placed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The residual stream at its start, in fp32 or wider."""
        stream = torch.promote_types(self._weight_dtype, torch.float32)
        x = tokens.to(stream) + positions.to(stream)
        return x if self.norm_in is None else normed(self.norm_in, x)

    def _behind(self, hidden_states: Tensor, time_tokens: Tensor, prefix: Prefix) -> Tensor:
        """The prediction for (all samples, …) noisy embeddings behind a prefix, in fp32 or wider."""
        layout, samples = prefix.layout, 1 if prefix.layout is None else prefix.layout.samples
        tokens = self._suffix_tokens(hidden_states, time_tokens, samples)
        positions = self.positional_embedding[:, -self._count_suffix(hidden_states) :]
        x = self._placed(tokens, positions if layout is None else positions[:, layout.tokens])
        outputs = samples if self.prd_embedding is not None else tokens.shape[1] - 1
        x = prior_blocks.step(self.transformer_blocks, x, prefix, outputs, self._weight_dtype)
        pred = projected(self.proj_to_clip_embeddings, normed(self.norm_out, x, self._weight_dtype)).to(x.dtype)
        return pred.flatten(0, 1) if layout is not None or self.prd_embedding is not None else pred
