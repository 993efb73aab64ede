"""The published numbers fit each other."""

from __future__ import annotations

import pytest

from deradiff.models.families import FAMILIES
from deradiff.models.gpus import COMPARED_GPUS, GPUS, MEASURED_TFLOPS, peak_tflops
from deradiff.models.published import (
    DATA_SETS,
    DENOISERS,
    PUBLISHED_RUNS,
    published_dpo,
)


def test_every_published_run_has_what_it_is_counted_on():
    assert set(PUBLISHED_RUNS) == set(DENOISERS)
    assert set(PUBLISHED_RUNS) <= set(FAMILIES)
    assert all(gpu.tflops > 100 and gpu.memory >= 24e9 for gpu in GPUS.values())
    assert set(COMPARED_GPUS) <= set(GPUS)
    assert all(tflops < GPUS[name].tflops for name, tflops in MEASURED_TFLOPS.items())
    assert DATA_SETS["pickapic_v2"].rows > DATA_SETS["pickapic_v1"].rows


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla V100-SXM2-32GB", "V100"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_reports(reported, name):
    assert peak_tflops(reported) == GPUS[name].tflops


def test_the_peak_of_another_gpu_is_unknown():
    assert peak_tflops("NVIDIA T4") is None


def test_the_papers_row_is_derived_from_its_recipe_and_says_by_how_much_it_differs():
    row = published_dpo()
    theirs = 336 * 3600 * 0.5 * 312e12
    denoisers = 2000 * 2048 * 2 * 4 * 6.76e12
    everything = 2000 * 2048 * 2 * (5 * 6.76e12 + 4.88e12)
    assert row.published_flops == pytest.approx(theirs, rel=1e-3)
    assert row.flops == pytest.approx(denoisers, rel=1e-3)
    assert row.ratio == pytest.approx(row.flops / 188.7e18)
    assert row.ratio == pytest.approx(1.174, abs=1e-3)
    assert row.with_everything == pytest.approx(everything, rel=1e-3)
    figures = (
        "+17%",
        "59% of the peak",
        "84% of the peak",
        "336 h",
        "221.6 EFLOP",
        "316.9 EFLOP",
    )
    for figure in figures:
        assert figure in row.why


def test_the_paper_states_no_cost_of_another_family():
    with pytest.raises(ValueError, match="sdxl alone, not for sd15"):
        published_dpo("sd15")
