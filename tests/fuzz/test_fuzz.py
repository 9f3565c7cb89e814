"""Every reader of files from elsewhere, with files changed at random.

pytest -m fuzz                                               a minute of it
FUZZ="--cases 10000 --seed 7" pytest -m fuzz                 as long as that takes; see helpers/fuzzing.py
FUZZ="--case npy:7:4711 --keep folder" pytest -m fuzz        one case, and its files
"""

import os
import shlex

import pytest

from helpers import fuzzing


@pytest.mark.fuzz
def test_every_reader_reads_or_says_what_is_wrong(capsys):
    arguments = shlex.split(os.environ.get("FUZZ", ""))
    options = fuzzing.parser().parse_args(arguments)
    found = fuzzing.run(*arguments)
    with capsys.disabled():
        print(f"\n{fuzzing.table(found)}\nseed {options.seed}; {fuzzing.COMMAND} runs a case again\n")
    assert not (faults := fuzzing.faults(found, options.seed)), "\n" + faults
    assert found
