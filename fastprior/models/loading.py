"""Loading a state dict into a module: what to say when nothing in it is the module's, and all of it or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprior.models.weight_lock import weights_locked
from fastprior.utils import first_few


class NoticesForeignStates:
    """A torch module that warns where `load_state_dict(strict=False)` loads nothing at all.

    Its weights are loaded and moved while no call of another thread runs, see `weights_locked`.

    Attributes:
        loads_files: what reads files of other kinds, for the message.
    """

    loads_files = "fastprior.load reads files of trainers, moving averages, DDP and older releases"

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load weights as torch does, and return what it returns; warn where not one key given is this module's."""
        with weights_locked(self):
            result = super().load_state_dict(state_dict, strict, assign)
        if len(state_dict) and len(result.unexpected_keys) >= len(state_dict):
            warnings.warn(
                f"load_state_dict(strict=False) loaded nothing into this {type(self).__name__}: the keys given are "
                f"{first_few(state_dict)}; it has {first_few(self.state_dict())}. {self.loads_files}",
                stacklevel=2,
            )
        return result

    def _apply(self, *args, **kwargs):
        with weights_locked(self):
            return super()._apply(*args, **kwargs)


def _fault(own: Tensor, given: Any) -> str | None:
    """Why a tensor does not fit one of the module's; None where it does."""
    if not torch.is_tensor(given):
        return f"is a {type(given).__name__}; it must be a tensor"
    if given.shape != own.shape:
        return f"has shape {tuple(given.shape)}; it must be {tuple(own.shape)}"
    plain = given.layout is torch.strided and not (given.is_meta or given.is_quantized or given.is_nested)
    if not plain or given.is_floating_point() != own.is_floating_point() or given.is_complex():
        kind = f"{given.dtype}, {given.layout}, on {given.device}"
        return f"is {kind}; it must be a dense {'floating point' if own.is_floating_point() else own.dtype} tensor"
    if own.is_floating_point() and not given.to(own.dtype).isfinite().all():
        return f"holds NaN or infinity in {own.dtype}; its numbers must be finite"
    return None


@torch.no_grad()
def fitted(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict as `load_state_dict` takes it, checked before anything changes, where the module's tensors lie.

    Raises:
        ValueError: a key is missing or unexpected, or a tensor has another shape, another kind of numbers, or some
            that are not finite.
    """
    own = module.state_dict()
    found = [f"{key} is missing" for key in own if key not in state]
    found += [f"{key} is unexpected" for key in state if key not in own]
    for key, given in state.items():
        if key in own and (fault := _fault(own[key], given)):
            found.append(f"{key} {fault}")
    if found:
        kind = type(module).__name__
        raise ValueError(f"weights do not fit this {kind}, and nothing has changed: {first_few(found)}")
    return {key: given.to(own[key].device, own[key].dtype) for key, given in state.items()}
