"""What GPUs can do at most, as their vendors say: figures for plans and for utilisation.

Peaks are dense (half of what data sheets state "with sparsity"), in TFLOPS of 10^12; memory and rates in 10^9 bytes.
Source: the data sheets and product pages of NVIDIA and AMD, read up to November 2026.
"""

import difflib
import re
from dataclasses import dataclass, replace

from tidal_dist.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        bf16_tflops: of bf16 with float32 sums, dense; none: it has no bf16. fp16_tflops: likewise.
        fp32_tflops: of float32 as PyTorch multiplies it by default, without TF32.
        memory_gb: of the device. memory_gb_per_second: from it.
        link_gb_per_second: to the other GPUs of the node, in one direction; PCIe where there is no NVLink.
    """

    name: str
    bf16_tflops: float | None
    fp16_tflops: float
    fp32_tflops: float
    memory_gb: float
    memory_gb_per_second: float
    link_gb_per_second: float

    def tflops(self, precision: str) -> float | None:
        """Peak in `fp32`, `fp16` or `bf16`; none where it cannot."""
        return {"bf16": self.bf16_tflops, "fp16": self.fp16_tflops, "fp32": self.fp32_tflops}[precision]


_PCIE_4, _PCIE_5 = 32, 64  # x16, one direction

_H100 = Gpu("h100", 989, 989, 67, 80, 3350, 450)
_A100 = Gpu("a100", 312, 312, 19.5, 80, 2039, 300)

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100", None, 125, 15.7, 32, 900, 150),
        Gpu("l4", 121, 121, 30.3, 24, 300, _PCIE_4),
        Gpu("a10", 125, 125, 31.2, 24, 600, _PCIE_4),
        Gpu("a40", 149.7, 149.7, 37.4, 48, 696, _PCIE_4),
        Gpu("l40s", 362, 362, 91.6, 48, 864, _PCIE_4),
        Gpu("rtx-3090", 71, 71, 35.6, 24, 936, _PCIE_4),
        Gpu("rtx-4090", 165, 165, 82.6, 24, 1008, _PCIE_4),
        replace(_A100, name="a100-40gb", memory_gb=40, memory_gb_per_second=1555),
        _A100,
        replace(_A100, name="a800", link_gb_per_second=200),
        _H100,
        Gpu("h100-pcie", 756, 756, 51, 80, 2000, _PCIE_5),
        Gpu("h100-nvl", 835, 835, 60, 94, 3900, 300),
        replace(_H100, name="h800", link_gb_per_second=200),
        Gpu("h20", 148, 148, 44, 96, 4000, 450),
        replace(_H100, name="gh200", memory_gb=96, memory_gb_per_second=4000),
        replace(_H100, name="h200", memory_gb=141, memory_gb_per_second=4800),
        Gpu("b200", 2250, 2250, 75, 180, 7700, 900),
        Gpu("gb200", 2500, 2500, 80, 186, 8000, 900),
        Gpu("b300", 2250, 2250, 75, 270, 7700, 900),
        Gpu("mi300x", 1307, 1307, 163, 192, 5300, 448),
        Gpu("mi325x", 1307, 1307, 163, 256, 6000, 448),
    )
}

# Words of a device's own name that make it another product: a part of a GPU, or one with less power.
_OTHERS = {"mig", "laptop", "d", "max", "mobile", "ada"}


def gpu_named(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        ConfigError: it is not in the table; names the nearest one.
    """
    gpu = GPUS.get(name.strip().lower())
    if gpu is None:
        near = difflib.get_close_matches(name.strip().lower(), GPUS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--gpu {name}: not in the table; {hint}known: {', '.join(GPUS)}")
    return gpu


def recognised(device_name: str) -> Gpu | None:
    """The GPU that calls itself `NVIDIA A100-SXM4-40GB`, say; none where it is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    found = [gpu for gpu in GPUS.values() if set(gpu.name.split("-")) <= words]
    if not found or words & _OTHERS:
        return None
    return max(found, key=lambda gpu: gpu.name.count("-"))


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak of the device that PyTorch names so, in `fp32`, `fp16` or `bf16`; none where it is not known."""
    gpu = recognised(device_name)
    return gpu.tflops(precision) if gpu else None
