"""What tests of several files share: small models, inputs, comparisons and processes; fixtures are in conftest.py."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
