"""Sa2VA-1B at its true size, with random weights: it loads in the memory of a laptop and answers on a CPU."""

import shutil
import tempfile
from pathlib import Path

import pytest

from sa2va.benchmarks.real_size import format_table, run

DESCRIPTION = Path(__file__).parent / "released" / "ByteDance--Sa2VA-1B.json"


@pytest.mark.slow
@pytest.mark.skipif(shutil.disk_usage(tempfile.gettempdir()).free < 4e9, reason="2.4 GB of weights are written")
def test_sa2va_1b_loads_under_8_gb_and_masks_a_picture():
    result = run(DESCRIPTION, threads=2)
    assert 1.15e9 < result["parameters"] < 1.17e9
    assert result["peak_load_gb"] < 8
    assert result["mask_shape"] == [1, 448, 448]
    stages = ("vision_tower", "prefill", "decode", "sam2_encode", "mask_decoder", "other")
    assert all(result["stage_seconds"][stage] > 0 for stage in stages)
    assert sum(result["stage_seconds"].values()) == pytest.approx(result["total_seconds"])
    assert "sam2_encode" in format_table(result)
