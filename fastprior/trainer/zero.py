"""DeepSpeed's ZeRO, stages 1 and 2: weights whole on every process, gradients and moments in parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from fastprior.trainer.stepper import MOMENTS, Stepper


class Zero(Stepper):
    """A prior and its optimizer under a DeepSpeed engine, which trains fp32 weights as the other modes do.

    bf16 is autocast's, and not the engine's, whose weights would be of that dtype. A step whose gradient is not finite
    on some process is skipped by the engine on all.

    Raises:
        ValueError: a configuration of DeepSpeed that this does not cover.
    """

    needed = "step", *MOMENTS

    def __init__(self, accelerator: Accelerator, prior: nn.Module, optimizer: Optimizer, max_grad_norm: float | None):
        self.base, self.precision = optimizer, accelerator.mixed_precision
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        stage = config["zero_optimization"]["stage"]
        if stage not in (1, 2):
            raise ValueError(f"accelerator runs stage {stage} of ZeRO; it must be 1 or 2, or FSDP")
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.precision!r} under DeepSpeed; it must be 'no' or 'bf16'")
        for key in ("offload_optimizer", "offload_param"):
            if config["zero_optimization"].get(key, {}).get("device") not in (None, "none"):
                raise ValueError(f"DeepSpeed's {key} is set; it must not be")
        for key in ("bf16", "fp16"):
            config.pop(key, None)
        # the engine's batches are only counted; how many make a step is said in `backward`
        config.update(gradient_clipping=max_grad_norm or 0.0, train_micro_batch_size_per_gpu=1)
        config["train_batch_size"] = "auto"
        config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
        super().__init__(accelerator, prior, optimizer)

    def syncing(self, is_last: bool) -> AbstractContextManager:
        return nullcontext()  # see `backward`

    def autocast(self) -> AbstractContextManager:
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add to the gradient, and add up over the processes with the last chunk of the last batch of a step."""
        self.model.set_gradient_accumulation_boundary(is_last and self.accelerator.sync_gradients)
        self.model.backward(loss)

    def step(self, max_grad_norm: float | None) -> bool:
        self.model.step()
        return not self.model.optimizer.overflow

    def named_state(self, names: Mapping[Parameter, str]) -> dict:
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = [{**group, "params": []} for group in self.base.param_groups]
        steps = [kept["step"] for kept in self.base.state.values()]
        state = {}
        if steps:
            self._link_moments()
        for group, named in zip(self.model.optimizer.bit16_groups, groups):
            named["params"] = [names[parameter] for parameter in group]
            for parameter in group if steps else ():
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                state[names[parameter]] = {"step": steps[0].clone(), **moments}
        return {"state": state, "param_groups": groups}

    def _link_moments(self) -> None:
        """Let parameters find their moments: DeepSpeed does that in the first step, before the last group has any."""
        self.model.optimizer._hp_optimizer_states_linked = False
        self.model.optimizer._lazy_init_hp_params_optimizer_state()

    def load_moments(self, moments: Mapping[str, Mapping[str, Any]], names: Mapping[Parameter, str]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        optimizer = self.model.optimizer
        self.base.state.clear()
        if not moments:
            return
        step = next(iter(moments.values()))["step"]
        for part in optimizer.single_partition_of_fp32_groups:
            zeros = {key: torch.zeros_like(part) for key in MOMENTS}
            self.base.state[part] = {"step": torch.as_tensor(step).to(part.device, torch.float32, copy=True), **zeros}
        self._link_moments()
        for group in optimizer.bit16_groups:
            for parameter in group:
                for key in MOMENTS if names[parameter] in moments else ():
                    value = moments[names[parameter]][key].to(parameter.device, torch.float32)
                    safe_set_full_optimizer_state(parameter, value, key)

    def weights_changed(self) -> None:
        self.model.optimizer.refresh_fp32_params()
