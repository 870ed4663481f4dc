"""The claim of the first example, run in full: four minutes on two cores."""

import csv
from pathlib import Path

import pytest

BITS_PER_BYTE = 2.7
BESIDE_16_BITS = 1.03  # of one seed


def final_bits(folder: Path) -> float:
    with (folder / "metrics" / "metrics.csv").open(newline="") as file:
        return [float(row["val/bits_per_byte"]) for row in csv.DictReader(file) if row["val/bits_per_byte"]][-1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_int8_training_learns_as_well_as_16_bits(train):
    int8 = final_bits(train("experiment=bytes_gpt", "quant=int8_switchback", tiny=False).folder)
    baseline = final_bits(train("experiment=bytes_gpt", "quant=none", tiny=False).folder)
    assert int8 < BITS_PER_BYTE
    assert int8 < BESIDE_16_BITS * baseline
