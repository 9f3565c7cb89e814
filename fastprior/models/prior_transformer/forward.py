"""How a prior transformer predicts: by a pass over all tokens, or by a few behind the prefix that its text is."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprior.kernels import ops
from fastprior.models.linears import dtype_of
from fastprior.models.loading import NoticesForeignStates
from fastprior.models.prior_transformer import cached_blocks, prompt_memory
from fastprior.models.prior_transformer.cached_blocks import HIDDEN, Prefix
from fastprior.models.shared_rows import row_layout
from fastprior.models.weight_lock import reads_weights, weights_locked


class PriorTransformerConditioning(NamedTuple):
    """The text, run once, and the times: all that the steps of one run share.

    Attributes:
        prefix: keys and values of the prefix, per prompt.
        time_tokens: (steps, 1, dim).
        null_rows: how many of the prompts, counted from the last, are the unconditional branch of a
            `PriorTransformerNet`.
    """

    prefix: Prefix
    time_tokens: Tensor
    null_rows: int = 0


class PriorTransformerOutput(NamedTuple):
    """predicted_image_embedding: (batch, clip_embed_dim), or (batch, tokens, clip_embed_dim) without a "prd" token."""

    predicted_image_embedding: Tensor


class PriorForward(NoticesForeignStates):
    """`forward`, `prefill` and `step` of a prior transformer, whoever built its modules: ours or diffusers'.

    The tokens are text encodings, text embedding, time, noisy embedding and a learned "prd" token, whose output is the
    prediction. With an attention mask attention is causal, so the text is a prefix that no step changes.
    """

    output_class = PriorTransformerOutput
    loads_files = "from_pretrained reads folders, and fastprior.convert makes one of Karlo's and Kandinsky's own files"
    gradient_checkpointing = False

    @reads_weights
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
        text, pred = (proj_embedding, encoder_hidden_states, attention_mask), None
        self._check(*text, hidden_states)
        times = timestep if torch.is_tensor(timestep) else torch.tensor(timestep, dtype=torch.long)
        times = times.reshape(-1).to(hidden_states.device)
        if times.shape[0] not in (1, hidden_states.shape[0]):
            raise ValueError(f"timestep has {len(times)} elements; it must have 1 or as many as hidden_states has rows")
        if attention_mask is not None and prompt_memory.is_plain_call(text):
            suffix = self._count_suffix(hidden_states)
            with ops.sharing():
                found = prompt_memory.recall(self, text, suffix, lambda model: model.encode_prefix(*text, suffix))
                if found is not None:
                    model = self if found.model is None else found.model
                    pred = model.predict_behind(hidden_states, model.time_tokens(times), found.prefix)
                    kind = pred.device.type
                    autocast = torch.is_autocast_enabled(kind)
                    pred = pred.to(torch.get_autocast_dtype(kind) if autocast else self._weight_dtype)
        if pred is None:
            pred = self.predict_whole(hidden_states, times, *text)
        return self.output_class(pred) if return_dict else (pred,)

    def prefill(
        self, proj_embedding: Tensor, encoder_hidden_states: Tensor | None, attention_mask: Tensor, times: Tensor
    ) -> PriorTransformerConditioning:
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
        dtype, suffix = self._weight_dtype, self._suffix_behind_prefix()
        proj_embedding = proj_embedding.to(dtype)
        encoder_hidden_states = None if encoder_hidden_states is None else encoder_hidden_states.to(dtype)
        prefix = self.encode_prefix(proj_embedding, encoder_hidden_states, attention_mask, suffix)
        if prefix is None:
            raise ValueError("attention_mask hides tokens behind the text, or has values beyond 0 and 1; it must not")
        return PriorTransformerConditioning(prefix, self.time_tokens(times, dtype))

    def padded_prefill(
        self,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        times: Tensor,
        prompts: Tensor,
    ) -> PriorTransformerConditioning:
        """`prefill` as a CUDA graph takes it: shapes alone say what is computed, and no value is looked at.

        Args:
            proj_embedding: (texts, embedding_proj_dim).
            encoder_hidden_states: (texts, tokens, embedding_dim), the first of the `num_embeddings` tokens; no text has
                more.
            attention_mask: (texts, tokens), ones and zeros.
            prompts: (prompts,) int64, which text each is.
        """
        dtype, longest = self._weight_dtype, self.config["num_embeddings"]
        of_prefix, of_suffix = self._positions_around(longest + 1, self._suffix_behind_prefix())
        tokens = self._prefix_tokens(proj_embedding.to(dtype), encoder_hidden_states.to(dtype))
        of_prefix = torch.cat((of_prefix[:, : tokens.shape[1] - 1], of_prefix[:, longest:]), dim=1)
        mask = F.pad((1 - attention_mask.float()) * HIDDEN, (0, 1))
        x = self._placed(tokens, of_prefix)
        prefix = cached_blocks.prefill(self.transformer_blocks, x, mask, prompts, dtype, pack=False)
        return PriorTransformerConditioning(prefix._replace(positions=of_suffix), self.time_tokens(times, dtype))

    def prepare(self, cond: PriorTransformerConditioning) -> PriorTransformerConditioning:
        """Make a conditioning that another prior's prefill ran ready for steps of this one."""
        return cond._replace(prefix=cond.prefix._replace(blocks=cached_blocks.prepared(self.transformer_blocks)))

    def share(self, cond: PriorTransformerConditioning, samples: int) -> PriorTransformerConditioning:
        """Make a conditioning ready for steps of `samples` rows of each prompt, see `DiffusionPriorNetwork.share`."""
        layout = row_layout(samples, self._count_suffix(), 1, cond.prefix.k.device)
        return cond if layout is None else cond._replace(prefix=cached_blocks.share(cond.prefix, layout))

    def step(self, x: Tensor, index: Tensor, cond: PriorTransformerConditioning) -> Tensor:
        """One evaluation behind the cached prefix, (rows, clip_embed_dim): see `DiffusionPriorNetwork.step`."""
        time_tokens = cond.time_tokens.index_select(0, index.reshape(-1))
        return self.predict_behind(x.to(cond.prefix.dtype), time_tokens, cond.prefix).flatten(0, -2)

    def prepare_run(self, cond: PriorTransformerConditioning, rows: int, guided: int, **solver) -> ops.Launches | None:
        """A run whose steps are kernels alone; None where there is none for them.

        Args:
            cond: see `step`; of `rows` rows, and then of the unconditional branch of the first `guided` of them.
            **solver: coefficients (steps, 6), cond_scale, clamp, radius and uses_prediction, see `solver_step`.
        """
        prefix, position = cond.prefix, cond.prefix.positions
        if position is None or self.prd_embedding is None or self.norm_in is not None:
            return None
        return cached_blocks.prepare_launches(
            self.transformer_blocks, prefix, (self.norm_out, self.proj_to_clip_embeddings), self.proj_in,
            rows=(rows + guided) // prefix.samples, guided=guided // prefix.samples,
            time_tokens=cond.time_tokens, time_position=position[0, :1], entry_position=position[0, 1],
            query=self.prd_embedding[0, 0], query_position=position[0, -1], **solver,
        )  # fmt: skip

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """Undo the normalisation of CLIP embeddings: `latents * clip_std + clip_mean`; None leaves a part out."""
        if self.clip_std is not None:
            prior_latents = prior_latents * self.clip_std.to(prior_latents.device)
        if self.clip_mean is not None:
            prior_latents = prior_latents + self.clip_mean.to(prior_latents.device)
        return prior_latents

    def _apply(self, *args, **kwargs):
        with weights_locked(self):
            before = self.positional_embedding.data_ptr()
            super()._apply(*args, **kwargs)
            if self.positional_embedding.data_ptr() != before:  # offloading moves at every call, mostly to where it is
                prompt_memory.forget(self)
        return self

    @property
    def _weight_dtype(self) -> torch.dtype:
        return dtype_of(self.proj_in, self)

    def _count_suffix(self, hidden_states: Tensor | None = None) -> int:
        noisy = 1 if hidden_states is None or hidden_states.dim() == 2 else hidden_states.shape[1]
        return 1 + noisy + (self.prd_embedding is not None)

    def _suffix_behind_prefix(self) -> int:
        """Number of suffix tokens; raises ValueError where they cannot run behind a prefix."""
        suffix = self._count_suffix()
        if reasons := prompt_memory.prefix_obstacles(self, suffix):
            raise ValueError(f"this prior cannot run behind a prefix: {'; '.join(reasons)}")
        return suffix

    def _check(self, proj_embedding, encoder_hidden_states, attention_mask, hidden_states=None) -> None:
        config, rows = self.config, proj_embedding.shape[0]
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
        positions, tokens, most = self.positional_embedding, prefix + suffix, self.positional_embedding.shape[1]
        if most < tokens and not masked:
            positions = F.pad(positions, (0, 0, prefix + 1, int(self.prd_embedding is not None)))
        if positions.shape[1] != tokens:
            rule = f"num_embeddings + additional_embeddings, {most}, or without a mask hidden_states may have as many"
            raise ValueError(f"there are {tokens} tokens; they must be {rule}")
        return positions

    def time_tokens(self, times: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tokens of times (steps,): (steps, 1, dim), in the weights' dtype or another one."""
        return self.time_embedding(self.time_proj(times).to(dtype or self._weight_dtype))[:, None]

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
        """Tokens (rows, suffix, dim) of all samples' noisy embeddings, in the order of `RowLayout`."""
        hidden, rows = self.proj_in(hidden_states), hidden_states.shape[0] // samples
        tokens = [time_tokens.expand(rows, -1, -1), hidden.reshape(rows, -1, hidden.shape[-1])]
        if self.prd_embedding is not None:
            tokens.append(self.prd_embedding.to(hidden.dtype).expand(rows, samples, -1))
        return torch.cat(tokens, dim=1)

    def predict_whole(self, hidden_states, times, proj_embedding, encoder_hidden_states, attention_mask) -> Tensor:
        """Predict as `forward` does, by a pass over all tokens, every module called as it stands."""
        prefix = self._prefix_tokens(proj_embedding, encoder_hidden_states)
        suffix = self._suffix_tokens(hidden_states, self.time_tokens(times, self.dtype))
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
        """Causality and padding as processors add them to the logits: (batch * heads, tokens, tokens)."""
        tokens, heads = x.shape[1], self.config["num_attention_heads"]
        causal = torch.full((tokens, tokens), HIDDEN, dtype=x.dtype, device=x.device).triu(1)
        padding = F.pad((1 - attention_mask.to(x.dtype)) * HIDDEN, (0, tokens - attention_mask.shape[1]))
        return (padding[:, None] + causal).repeat_interleave(heads, dim=0)

    def encode_prefix(
        self, proj_embedding: Tensor, encoder_hidden_states: Tensor | None, attention_mask: Tensor, suffix: int
    ) -> Prefix | None:
        """Run the text of `forward` once, for steps of `suffix` tokens; texts that are the same run as one.

        None for a mask that hides suffix tokens, or undoes causality with values beyond 0 and 1.
        """
        mask = (1 - attention_mask.to(proj_embedding.device, torch.float32)) * HIDDEN
        if not ((mask >= HIDDEN) & (mask <= 0)).all():
            return None
        text = [t for t in (proj_embedding, encoder_hidden_states, mask) if t is not None]
        chosen, prompts = cached_blocks.distinct(text)
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states[chosen]
        tokens = self._prefix_tokens(proj_embedding[chosen], encoder_hidden_states)
        prefix = tokens.shape[1]
        if mask.shape[1] > prefix:
            return None
        mask = F.pad(mask[chosen], (0, prefix - mask.shape[1]))
        of_prefix, of_suffix = self._positions_around(prefix, suffix)
        blocks, x = self.transformer_blocks, self._placed(tokens, of_prefix)
        found = cached_blocks.prefill(blocks, x, mask, prompts, self._weight_dtype)
        return found._replace(positions=of_suffix)

    def _positions_around(self, prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
        """Those of prefix and of suffix tokens, (1, tokens, dim) each, in fp32 or wider."""
        positions = self._positions(prefix, suffix, masked=True)
        return positions.to(torch.promote_types(positions.dtype, torch.float32)).split((prefix, suffix), dim=1)

    def _placed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The residual stream at its start, in fp32 or wider."""
        stream, norm = torch.promote_types(positions.dtype, torch.float32), self.norm_in
        x = tokens.to(stream) + positions.to(stream)
        return x if norm is None else cached_blocks.normed(norm, x, stream, self._weight_dtype)

    def predict_behind(self, hidden_states: Tensor, time_tokens: Tensor, prefix: Prefix) -> Tensor:
        """Predict from (all samples, …) noisy embeddings behind a prefix, in fp32 or wider."""
        positions = prefix.positions
        if positions is None:
            positions = self.positional_embedding[:, -self._count_suffix(hidden_states) :]
        x = self._placed(self._suffix_tokens(hidden_states, time_tokens, prefix.samples), positions)
        outputs = x.shape[1] - 1 if self.prd_embedding is None else prefix.samples
        head = self.norm_out, self.proj_to_clip_embeddings
        pred = cached_blocks.step(self.transformer_blocks, x, prefix, outputs, head)
        return pred.flatten(0, 1) if prefix.samples > 1 or self.prd_embedding is not None else pred
