"""GPUs by their makers' data sheets, and what was measured on one. Light: it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A GPU, by its maker's data sheet.

    Attributes:
        tflops: 10^12 FLOP/s of dense 16-bit matrix products, accumulated in 32 bits.
        memory: bytes.
        reported_name: a part of the name that CUDA reports.
    """

    tflops: float
    memory: float
    reported_name: str


# A name that contains another one's stands before it.
GPUS = {
    "A100-80GB": GPU(312.0, 80e9, "A100"),
    "H100-PCIe": GPU(756.0, 80e9, "H100 PCIe"),
    "H100-SXM": GPU(989.4, 80e9, "H100"),
    "H200": GPU(989.4, 141e9, "H200"),
    "L40S": GPU(362.0, 48e9, "L40S"),
    "A40": GPU(149.7, 48e9, "A40"),
    "V100": GPU(125.0, 32e9, "V100"),
    "RTX-4090": GPU(165.2, 24e9, "4090"),
}

MEASURED_TFLOPS = {"H200": 790.0}
"""10^12 FLOP/s that large bfloat16 matrix products were measured to reach."""

COMPARED_GPUS = ("RTX-4090", "A100-80GB", "H100-SXM", "H200")
"""Those that tables of hours compare."""

MEASURED_MFU = {"lora": 0.11, "full": 0.2}
"""Share of the peak that training reached on an H200, by method.

SDXL at 1024 pixels, four pairs at once, bfloat16, checkpointed gradients, the reference evaluated:
2.70 and 3.78 pairs a second. A repeated forward pass is no use: it is not counted.
"""

MEASURED_MFU_OF_GRAPHS = {"lora": 0.19}
"""The same where passes are replayed as CUDA graphs: 4.71 pairs a second.

The blocks were not compiled there, which raises it further. A full fine-tune was not measured.
"""


def peak_tflops(reported_name: str) -> float | None:
    """10^12 FLOP/s of a GPU by the name that CUDA reports; None for an unknown GPU."""
    for gpu in GPUS.values():
        if gpu.reported_name in reported_name:
            return gpu.tflops
    return None
