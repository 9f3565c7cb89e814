"""Loading a state dict into a module: what to say when nothing in it is the module's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from fastprior.utils import first_few


class NoticesForeignStates:
    """A torch module that warns where `load_state_dict(strict=False)` loads nothing at all.

    Attributes:
        loads_files: what reads files of other kinds, for the message.
    """

    loads_files = "fastprior.load reads files of trainers, moving averages, DDP and older releases"

    def load_state_dict(self, state_dict: Mapping, strict: bool = True, assign: bool = False):
        """Load weights as torch does, and return what it returns; warn where not one key given is this module's."""
        result = super().load_state_dict(state_dict, strict, assign)
        if len(state_dict) and len(result.unexpected_keys) >= len(state_dict):
            warnings.warn(
                f"load_state_dict(strict=False) loaded nothing into this {type(self).__name__}: the keys given are "
                f"{first_few(state_dict)}; it has {first_few(self.state_dict())}. {self.loads_files}",
                stacklevel=2,
            )
        return result
