"""What several commands share."""

from __future__ import annotations

import argparse
import sys


def _say(kind: str, message: object) -> None:
    """One line on stderr, whatever the message looks like."""
    print(f"fastprior: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def load_clip(name: str, pretrained: str, device: str):
    """An open_clip model. Raises ValueError where it cannot be loaded."""
    from fastprior import OpenClipAdapter

    try:
        return OpenClipAdapter(name, pretrained, device=device)
    except ImportError:
        raise
    except Exception as error:  # open_clip raises whatever its readers do
        raise ValueError(f"CLIP {name} with weights {pretrained} cannot be loaded ({error})") from error


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{seed} is not between 0 and 2**63 - 1")
    return seed


def named(text: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value
