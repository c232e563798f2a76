"""What a device can do at most: bytes and operations per second, as data with a source.

The figures are the vendors' peaks without sparsity, so times that follow from them are lower
bounds (rooflines). For figures that you measured yourself, give a YAML file;
``DeviceModelFile`` specifies its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict, TypeAdapter

from mofq.exceptions import BudgetError, nearest_name
from mofq.files.documents import parse_yaml, read_text
from mofq.files.validated import (
    Count,
    Name,
    Positive,
    check_version,
    only_these_keys,
    published_schema,
    validate,
)

DEVICE_MODEL_VERSION: Literal[1] = 1
MAX_FILE_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """One accelerator, as far as a roofline knows it."""

    name: str
    memory_bytes: int
    bytes_per_second: float  #: of its memory
    #: Arithmetic -> dense multiplications and additions per second, each counted singly;
    #: what is not listed has no instruction.
    operations_per_second: Mapping[str, float]
    capability: tuple[int, int] | None  #: CUDA compute capability; None: not a CUDA device
    source: str
    #: Arithmetic that it has instructions for, of unknown peak: no times follow from it.
    unrated: tuple[str, ...] = ()

    @property
    def instructions(self) -> frozenset[str]:
        """All arithmetic that it has instructions for, of known peak or not."""
        return frozenset((*self.operations_per_second, *self.unrated))


#: A table of the vendors' sheets; its author had NVIDIA mark figures with sparsity as such.
_ML_ENGINEERING = (
    "dense peaks as tabulated in github.com/stas00/ml-engineering, compute/accelerator/README.md, "
    "commit 0074473"
)

#: Tensor cores of GeForce cards sum in FP32 at half of the rate at which they sum in FP16. Kernels
#: of language models sum in FP32, so the peaks of BF16 and FP8 are those; INT8 sums in INT32 and
#: FP4 in FP32 at the full rate. Data-centre and RTX PRO 6000 cards sum in FP32 at the full rate.
_GEFORCE = "BF16 and FP8 with FP32 accumulation, half of the rates with FP16 accumulation"
#: Of three generations of GeForce cards in one table. The rows of NVIDIA's whitepapers were read in
#: quotations that name document, table and row, and agree with each other; not in the PDFs.
_BLACKWELL_PAPER = (
    "NVIDIA RTX Blackwell GPU Architecture whitepaper V1.1, appendix A, table 3, https://images."
    "nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_CAPABILITY = "compute capability: https://developer.nvidia.com/cuda-gpus"

DEVICE_MODELS: dict[str, DeviceModel] = {
    "rtx3090": DeviceModel(
        "rtx3090",
        24 * 10**9,
        0.936e12,
        {"bf16": 71e12, "int8": 284e12},
        capability=(8, 6),
        source=f"NVIDIA Ampere GA102 GPU Architecture whitepaper V2.0, appendix A, table 9: 71 and "
        f"INT8 284 dense, 936 GB/s; a copy at https://docslib.org/doc/759549; 71.2 in "
        f"{_BLACKWELL_PAPER}; {_GEFORCE}; no FP8: TensorRT-RTX support matrix; {_CAPABILITY}",
    ),
    "rtx4090": DeviceModel(
        "rtx4090",
        24 * 10**9,
        1.008e12,
        {"bf16": 165.2e12, "int8": 660.6e12, "fp8": 330.3e12},
        capability=(8, 9),
        source=f"NVIDIA Ada GPU Architecture whitepaper V2.1, appendix A, table 2 (before V2.02 it "
        f"gave FP8 with FP32 accumulation twice as much); {_GEFORCE}; the same figures in "
        f"https://waredb.com/processor/nvidia-geforce-rtx-4090; {_CAPABILITY}",
    ),
    "rtx5090": DeviceModel(
        "rtx5090",
        32 * 10**9,
        1.792e12,
        {"bf16": 209.5e12, "int8": 838e12, "fp8": 419e12, "fp4": 1676e12},
        capability=(12, 0),
        source=f"{_BLACKWELL_PAPER}: 209.5, FP8 419, FP4 1,676 dense; {_GEFORCE}; 3,352 AI TOPS, "
        f"which are FP4 with sparsity, at https://www.nvidia.com/en-us/geforce/graphics-cards/"
        f"50-series/rtx-5090/; INT8, which sums in INT32, as FP8 with FP16 accumulation; "
        f"{_CAPABILITY}",
    ),
    "rtx-pro-6000": DeviceModel(
        "rtx-pro-6000",
        96 * 10**9,
        1.792e12,
        {"bf16": 503.8e12, "int8": 1007.6e12, "fp8": 1007.6e12, "fp4": 2015.2e12},
        capability=(12, 0),
        source="NVIDIA RTX PRO Blackwell GPU Architecture whitepaper V1.0, table 4, https://www."
        "nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
        "NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf: BF16 503.8 dense, 1,792 GB/s, of the "
        "Workstation Edition (the Server Edition has 1,597 GB/s); FP8, INT8 and FP4 in https://"
        "hmc-tech.com/gpu/nvidia-rtx-pro-6000-blackwell-vs-amd-radeon-pro-duo-polaris, and half of "
        "the 4,000 AI TOPS of its data sheet, which are FP4 with sparsity; FP32 accumulation at "
        f"the full rate; {_CAPABILITY}",
    ),
    "dgx-spark": DeviceModel(
        "dgx-spark",
        128 * 10**9,
        0.273e12,
        {"fp4": 500e12},
        capability=(12, 1),
        source="NVIDIA DGX Spark data sheet, https://www.nvidia.com/en-us/products/workstations/"
        "dgx-spark/: 1 PFLOPS of FP4 with sparsity (half), 273 GB/s, memory shared with the CPU; "
        f"it says no rates of BF16, INT8 and FP8; {_CAPABILITY}",
        unrated=("bf16", "int8", "fp8"),
    ),
    "l4": DeviceModel(
        "l4",
        24 * 10**9,
        0.3e12,
        {"bf16": 121e12, "int8": 242.5e12, "fp8": 242.5e12},
        capability=(8, 9),
        source="NVIDIA L4 data sheet, https://www.nvidia.com/en-us/data-center/l4/ (its peaks are "
        f"with sparsity, 242, 485 and 485: half; 300 GB/s); {_CAPABILITY}",
    ),
    "a100": DeviceModel(
        "a100",
        80 * 10**9,
        2.039e12,
        {"bf16": 312e12, "int8": 624e12},
        capability=(8, 0),
        source=f"NVIDIA A100 80GB SXM data sheet: {_ML_ENGINEERING}; 2,039 GB/s and the same "
        "peaks in glennklockwood.com/garden/processors/A100, which quotes the data sheet",
    ),
    "l40s": DeviceModel(
        "l40s",
        48 * 10**9,
        0.864e12,
        {"bf16": 362e12, "int8": 733e12, "fp8": 733e12},
        capability=(8, 9),
        source=f"NVIDIA L40S data sheet: {_ML_ENGINEERING}; 864 GB/s, FP8 733 and BF16 362 dense "
        "in dealers' copies of the sheet",
    ),
    "h100": DeviceModel(
        "h100",
        80 * 10**9,
        3.35e12,
        {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12},
        capability=(9, 0),
        source=f"NVIDIA H100 SXM data sheet (its peaks are with sparsity: half): "
        f"{_ML_ENGINEERING}; the same in glennklockwood.com/garden/processors/h100",
    ),
    "h100-pcie": DeviceModel(
        "h100-pcie",
        80 * 10**9,
        2.0e12,
        {"bf16": 756e12, "int8": 1513e12, "fp8": 1513e12},
        capability=(9, 0),
        source=f"NVIDIA H100 PCIe data sheet: {_ML_ENGINEERING}",
    ),
    "h200": DeviceModel(
        "h200",
        141 * 10**9,
        4.8e12,
        {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12},
        capability=(9, 0),
        source=f"NVIDIA H200 SXM data sheet (its peaks are with sparsity: half): {_ML_ENGINEERING}",
    ),
    "b200": DeviceModel(
        "b200",
        180 * 10**9,
        8.0e12,
        {"bf16": 2250e12, "int8": 4500e12, "fp8": 4500e12, "fp4": 9000e12},
        capability=(10, 0),
        source=f"NVIDIA HGX B200: {_ML_ENGINEERING}; the same in "
        "glennklockwood.com/garden/processors/B200 (HGX at 1,000 W); 180 GB usable, MLPerf "
        "inference 6.0 system descriptions",
    ),
    "mi300x": DeviceModel(
        "mi300x",
        192 * 10**9,
        5.3e12,
        {"bf16": 1300e12, "int8": 2600e12, "fp8": 2600e12},
        capability=None,
        source=f"AMD Instinct MI300X data sheet: {_ML_ENGINEERING}",
    ),
}


Capability = Annotated[str, Strict(), Field(pattern=r"^[0-9]+\.[0-9]+$")]


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePeaks:
    """Multiplications and additions per second of each arithmetic; None: no instruction."""

    bf16: Positive
    int8: Positive | None = None
    fp8: Positive | None = None
    fp4: Positive | None = None


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModelFile:
    """A device model for ``mofq search --device-model``; see `DeviceModel`."""

    version: Literal[1]
    memory_bytes: Count
    bytes_per_second: Positive
    operations_per_second: Annotated[
        DevicePeaks, Field(description="dense; what is not listed has no instruction")
    ]
    capability: Annotated[
        Capability | None,
        Field(description="CUDA compute capability, quoted: '9.0'"),
    ] = None
    source: Name


_DEVICE_FILE = TypeAdapter(DeviceModelFile)
DEVICE_MODEL_SCHEMA = published_schema(
    _DEVICE_FILE, "A device model for mofq search --device-model"
)


def load_device_model(name_or_path: str) -> DeviceModel:
    """The figures of a device.

    Args:
        name_or_path: A key of `DEVICE_MODELS`, or the path of a YAML file.

    Returns:
        The device.

    Raises:
        BudgetError: There is no such device or file, or the file is not valid.
    """
    if name_or_path in DEVICE_MODELS:
        return DEVICE_MODELS[name_or_path]
    path = Path(name_or_path)
    if not path.exists():
        raise BudgetError(
            f"{name_or_path}: no such device model or file."
            + nearest_name(name_or_path, DEVICE_MODELS)
        )
    where = str(path)
    value = parse_yaml(read_text(path, BudgetError, MAX_FILE_BYTES), where, BudgetError)
    check_version(value, DEVICE_MODEL_VERSION, where, BudgetError)
    file = validate(_DEVICE_FILE, value, where, BudgetError)
    major, _, minor = (file.capability or "").partition(".")
    return DeviceModel(
        path.stem,
        file.memory_bytes,
        file.bytes_per_second,
        {name: peak for name, peak in asdict(file.operations_per_second).items() if peak},
        capability=(int(major), int(minor)) if file.capability else None,
        source=file.source,
    )
