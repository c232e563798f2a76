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


#: A table of the vendors' sheets; its author had NVIDIA mark figures with sparsity as such.
_ML_ENGINEERING = (
    "dense peaks as tabulated in github.com/stas00/ml-engineering, compute/accelerator/README.md, "
    "commit 0074473"
)

DEVICE_MODELS: dict[str, DeviceModel] = {
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
