"""What a device can compute: data sheets of GPUs, a measured matrix product on CPUs.

MFU is the model's FLOPs by time, divided by this.
"""

import re
import time
from dataclasses import dataclass

import torch
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import Precision

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
DTYPES["fp16"] = torch.float16
MATRIX = 1024  # rows and columns of the measured product
MEASURE_S = 0.5


@dataclass(frozen=True)
class GpuPeak:
    """A GPU's dense TFLOP/s by precision, as its data sheet has them (without sparsity).

    Attributes:
        pattern: regular expression of the names that CUDA gives it.
        fp32: outside of tensor cores.
        tf32: None before Ampere.
        half: fp16 on tensor cores, accumulated in fp32.
        bf16: whether bf16 is as fast as fp16; GPUs before Ampere have no bf16.
        bandwidth: of the memory, GB/s.
        source: NVIDIA's publication.
    """

    pattern: str
    fp32: float
    tf32: float | None
    half: float
    bandwidth: float
    source: str
    bf16: bool = True

    def tflops(self, precision: str) -> float | None:
        """In fp32, tf32, bf16 or fp16; None where the GPU does not have it."""
        if precision == "fp32":
            return self.fp32
        if precision == "tf32":
            return self.tf32
        if precision == "bf16" and not self.bf16:
            return None
        return self.half


# The first pattern that is found in a name decides.
GPUS = (
    GpuPeak(r"\bB200\b", 75, 1125, 2250, 8000, "HGX B200 data sheet"),
    GpuPeak(r"\bGH200\b", 67, 494.5, 989.5, 4000, "GH200 data sheet"),
    GpuPeak(r"\bH200 NVL\b", 60, 417.5, 835.5, 4800, "H200 data sheet"),
    GpuPeak(r"\bH200\b", 67, 494.5, 989.5, 4800, "H200 data sheet"),
    GpuPeak(r"\bH100 NVL\b", 60, 417.5, 835.5, 3900, "H100 data sheet"),
    GpuPeak(r"\bH100 PCIe\b", 51, 378, 756.5, 2000, "H100 data sheet"),
    GpuPeak(r"\bH100\b", 67, 494.5, 989.5, 3350, "H100 data sheet, SXM"),
    GpuPeak(r"\bA100\b.*80GB PCIe", 19.5, 156, 312, 1935, "A100 data sheet"),
    GpuPeak(r"\bA100\b.*80GB", 19.5, 156, 312, 2039, "A100 data sheet"),
    GpuPeak(r"\bA100\b", 19.5, 156, 312, 1555, "A100 data sheet, 40 GB"),
    GpuPeak(r"\bA40\b", 37.4, 74.8, 149.7, 696, "A40 data sheet"),
    GpuPeak(r"\bA30\b", 10.3, 82, 165, 933, "A30 data sheet"),
    GpuPeak(r"\bA10\b", 31.2, 62.5, 125, 600, "A10 data sheet"),
    GpuPeak(r"\bL40S\b", 91.6, 183, 362, 864, "L40S data sheet"),
    GpuPeak(r"\bL40\b", 90.5, 90.5, 181, 864, "L40 data sheet"),
    GpuPeak(r"\bL4\b", 30.3, 60, 121, 300, "L4 data sheet"),
    GpuPeak(r"\bRTX A6000\b", 38.7, 77.4, 154.8, 768, "RTX A6000 data sheet"),
    GpuPeak(r"\bRTX 4090$", 82.6, 82.6, 165.2, 1008, "Ada architecture paper, appendix A"),
    GpuPeak(r"\bRTX 3090$", 35.6, 35.6, 71, 936, "GA102 architecture paper, appendix A"),
    GpuPeak(r"\bV100S", 16.4, None, 130, 1134, "V100 data sheet", bf16=False),
    GpuPeak(r"\bV100-PCIE", 14, None, 112, 900, "V100 data sheet", bf16=False),
    GpuPeak(r"\bV100", 15.7, None, 125, 900, "V100 data sheet, SXM2", bf16=False),
    GpuPeak(r"\bT4\b", 8.1, None, 65, 320, "T4 data sheet", bf16=False),
)


@dataclass(frozen=True)
class Peak:
    """FLOP/s of a device in one precision, and where the value comes from."""

    flops: float
    source: str


def device_peak(device: torch.device, precision: Precision, tflops: float = 0.0) -> Peak:
    """The peak of this machine's device.

    Args:
        tflops: `bench.peak_tflops`, which replaces the known value; 0: none.

    Raises:
        ConfigError: a GPU that is in no table, or that does not have the precision.
    """
    if tflops:
        return Peak(1e12 * tflops, "bench.peak_tflops")
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), precision)
    flops = measured_product(device, DTYPES[precision.name])
    return Peak(flops, f"measured product of {MATRIX} x {MATRIX} matrices")


def gpu_peak(name: str, precision: Precision) -> Peak:
    """The peak of a GPU by the name that CUDA gives it.

    Raises:
        ConfigError: the name is in no table, or the GPU does not have the precision.
    """
    gpu = find_gpu(name)
    tflops = None if gpu is None else gpu.tflops(precision.name)
    if gpu is None or tflops is None:
        raise ConfigError(
            f"the peak of {name} in {precision.name} is not known. Set bench.peak_tflops to the "
            f"dense {precision.name} TFLOP/s of its data sheet"
        )
    return Peak(1e12 * tflops, gpu.source)


def find_gpu(name: str) -> GpuPeak | None:
    """The data sheet of a GPU by the name that CUDA gives it; None: not in the table."""
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)


def measured_product(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several products of two square matrices."""
    a = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    b = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    fastest = float("inf")
    deadline = time.perf_counter() + MEASURE_S
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * MATRIX**3 / fastest
