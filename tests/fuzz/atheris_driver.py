"""A reader driven by atheris, which looks for bytes that reach new lines of fastprior; needs `pip install atheris`.

    PYTHONPATH=tests python tests/fuzz/atheris_driver.py npy -max_total_time=600 -timeout=8

Further arguments are libFuzzer's. An input is the number of a folder of valid files, that of a file in it, and what
stands in its place; it ends with the first that is not read as it should be, and writes it to a file.
"""

import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import atheris

from helpers import fuzzing
from helpers.mutations import mutate

LONGEST = 2**22


class Driver:
    """The valid files of a reader, and a folder for changed ones."""

    def __init__(self, name: str, root: Path):
        from helpers.fuzz_readers import READERS

        self.reader, self.folder = READERS[name], root / "files"
        (root / "valid").mkdir()
        self.valid = [fuzzing.files_of(folder) for folder in self.reader.make(root / "valid")]
        for data in self.inputs():  # by which all is imported that a reader imports
            self.read(data)

    def inputs(self) -> list[bytes]:
        return [
            bytes([number, place]) + data
            for number, files in enumerate(self.valid)
            for place, data in enumerate(files.values())
        ]

    def _placed(self, data: bytes) -> tuple[dict[str, bytes], str]:
        files = self.valid[data[0] % len(self.valid)]
        return files, list(files)[data[1] % len(files)]

    def change(self, data: bytes, longest: int, seed: int) -> bytes:
        """Half of the changes know the formats."""
        draw = Random(seed)
        if len(data) < 2 or draw.random() < 0.5:
            return atheris.Mutate(data, longest)
        return (data[:2] + mutate(draw, self._placed(data)[1], data[2:], []))[:longest]

    def read(self, data: bytes) -> None:
        if len(data) < 2:
            return
        files, name = self._placed(data)
        shutil.rmtree(self.folder, ignore_errors=True)
        fuzzing.write_files({**files, name: data[2:]}, self.folder)
        try:
            self.reader.read(self.folder)
        except Exception as error:
            if fuzzing.clear(error, self.folder, self.reader.names):
                raise


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        with atheris.instrument_imports(include=["fastprior"]):
            driver = Driver(sys.argv[1], Path(root))
        corpus = Path(root) / "corpus"
        corpus.mkdir()
        for number, data in enumerate(driver.inputs()):
            (corpus / str(number)).write_bytes(data)
        arguments = [sys.argv[0], f"-max_len={LONGEST}", *sys.argv[2:], str(corpus)]
        atheris.Setup(arguments, driver.read, custom_mutator=driver.change)
        atheris.Fuzz()
