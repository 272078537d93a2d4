"""What a device can compute: data sheets of GPUs, a measured matrix product on CPUs.

MFU is the model's FLOPs by time, divided by this.
"""

import functools
import re
import time
from dataclasses import dataclass

import torch
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import Precision

MATRIX = 1024  # rows and columns of the measured product
MEASURE_S = 0.3
FEWEST_PRODUCTS = 2  # however long they take; the first one warms up


@dataclass(frozen=True)
class GpuPeak:
    """A GPU's dense TFLOP/s by precision, as its data sheet has them (without sparsity).

    Attributes:
        pattern: regular expression of the names that CUDA gives it.
        fp32: outside of tensor cores.
        tf32, bf16: on tensor cores, bf16 accumulated in fp32; None before Ampere.
        source: NVIDIA's publication.
    """

    pattern: str
    fp32: float
    tf32: float | None
    bf16: float | None
    source: str

    def tflops(self, precision: Precision) -> float | None:
        """In fp32, tf32 or bf16; None where the GPU does not have it."""
        return {Precision.tf32: self.tf32, Precision.bf16: self.bf16}.get(precision, self.fp32)


# The first pattern that matches a name applies.
GPUS = (
    GpuPeak(r"\bB200\b", 75, 1125, 2250, "HGX B200 data sheet"),
    GpuPeak(r"\bGH200\b", 67, 494.5, 989.5, "GH200 data sheet"),
    GpuPeak(r"\bH200 NVL\b", 60, 417.5, 835.5, "H200 data sheet"),
    GpuPeak(r"\bH200\b", 67, 494.5, 989.5, "H200 data sheet"),
    GpuPeak(r"\bH100 NVL\b", 60, 417.5, 835.5, "H100 data sheet"),
    GpuPeak(r"\bH100 PCIe\b", 51, 378, 756.5, "H100 data sheet"),
    GpuPeak(r"\bH100\b", 67, 494.5, 989.5, "H100 data sheet, SXM"),
    GpuPeak(r"\bA100\b", 19.5, 156, 312, "A100 data sheet"),
    GpuPeak(r"\bA40\b", 37.4, 74.8, 149.7, "A40 data sheet"),
    GpuPeak(r"\bA30\b", 10.3, 82, 165, "A30 data sheet"),
    GpuPeak(r"\bA10\b", 31.2, 62.5, 125, "A10 data sheet"),
    GpuPeak(r"\bL40S\b", 91.6, 183, 362, "L40S data sheet"),
    GpuPeak(r"\bL40\b", 90.5, 90.5, 181, "L40 data sheet"),
    GpuPeak(r"\bL4\b", 30.3, 60, 121, "L4 data sheet"),
    GpuPeak(r"\bRTX A6000\b", 38.7, 77.4, 154.8, "RTX A6000 data sheet"),
    GpuPeak(r"\bRTX 4090$", 82.6, 82.6, 165.2, "Ada architecture paper, appendix A"),
    GpuPeak(r"\bRTX 3090$", 35.6, 35.6, 71, "GA102 architecture paper, appendix A"),
    GpuPeak(r"\bV100S", 16.4, None, None, "V100 data sheet"),
    GpuPeak(r"\bV100-PCIE", 14, None, None, "V100 data sheet"),
    GpuPeak(r"\bV100", 15.7, None, None, "V100 data sheet, SXM2"),
    GpuPeak(r"\bT4\b", 8.1, None, None, "T4 data sheet"),
)


@dataclass(frozen=True)
class Peak:
    """FLOP/s of a device in one precision, and where the value comes from."""

    flops: float
    source: str


def device_peak(device: torch.device, precision: Precision, tflops: float = 0.0) -> Peak:
    """The peak of this machine's device.

    Args:
        precision: not `auto`.
        tflops: `training.peak_tflops`, which replaces the known value; 0: none.

    Raises:
        ConfigError: a GPU that is in no table, or that does not have the precision.
    """
    if tflops:
        return Peak(1e12 * tflops, "training.peak_tflops")
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), precision)
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    flops = measured_product(device, dtype)
    return Peak(flops, f"measured product of {MATRIX} x {MATRIX} matrices")


def gpu_peak(name: str, precision: Precision) -> Peak:
    """The peak of a GPU by the name that CUDA gives it.

    Raises:
        ConfigError: the name is in no table, or the GPU does not have the precision.
    """
    gpu = find_gpu(name)
    tflops = None if gpu is None else gpu.tflops(precision)
    if gpu is None or tflops is None:
        raise ConfigError(
            f"the peak of {name} in {precision.name} is not known. Set training.peak_tflops to "
            f"the dense {precision.name} TFLOP/s of its data sheet"
        )
    return Peak(1e12 * tflops, gpu.source)


def find_gpu(name: str) -> GpuPeak | None:
    """The data sheet of a GPU by the name that CUDA gives it.

    None: it is not in the table, or it is a part of a GPU (MIG), which has a fraction of the peak.
    """
    if " MIG " in name:
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)


def measured_product(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several products of two square matrices.

    Measured once per process and number of threads.
    """
    return _measured_product(device, dtype, torch.get_num_threads())


@functools.cache
def _measured_product(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    a = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    b = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < FEWEST_PRODUCTS or sum(seconds) < MEASURE_S:
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * MATRIX**3 / min(seconds)
