"""Where to start: stated rules with their sources, from a deployment to a space and a budget.

The rules say which formats are worth measuring. What a model then loses is measured and not
looked up, so an advice ends where `mofq calibrate` begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mofq.decision.timing import engines_for
from mofq.engines import ENGINES
from mofq.engines.devices import DeviceModel
from mofq.exceptions import MofqError, option

#: The rules of thumb that are ours and no paper's.
_OURS = "mofq's own rule of thumb"
_KURTIC = "arXiv:2411.02355 (E. Kurtic et al., ACL 2025), abstract"
_QIN = "arXiv:2408.15301 (M. Qin), abstract"
#: Below it a GPU is taken for mid-tier: GDDR6 or LPDDR memory; the paper's abstract draws no line.
_HIGH_END_BYTES_PER_SECOND = 1.5e12
#: From so many weights of linear layers on, INT8 is tried with finer groups: "70B".
_LARGE_WEIGHTS = 50e9
#: The rest is for the KV cache and what is computed.
_MEMORY_SHARE_OF_WEIGHTS = 0.8
_RECOVERY_OF_FP8 = 0.99


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known of a deployment."""

    deployment: str  #: of `DEPLOYMENTS`
    device: DeviceModel
    weights: int | None = None  #: of all linear layers; None: no model was named
    other_bytes: int = 0  #: of all other tensors
    recovery: float | None = None  #: share of the original's accuracy that must be kept
    tp: int = 1  #: devices that share the model

    @property
    def has_fp8(self) -> bool:
        """Whether the device multiplies FP8."""
        return "fp8" in self.device.instructions

    @property
    def is_beyond_rules(self) -> bool:
        """Whether the device is of a generation that no engine's rules were asked for."""
        known = {one.capability[0] for one in ENGINES.values() if one.capability is not None}
        return self.device.capability is not None and self.device.capability[0] not in known

    @property
    def is_high_end(self) -> bool:
        """Whether the device is not mid-tier."""
        return self.device.bytes_per_second >= _HIGH_END_BYTES_PER_SECOND

    @property
    def is_decode_bound(self) -> bool:
        """Whether the weights' way from memory decides, as far as the rules know."""
        return self.deployment == "synchronous" or not self.is_high_end

    @property
    def wants_lossless(self) -> bool:
        """Whether 99 % of the accuracy or more must be kept."""
        return self.recovery is not None and self.recovery >= _RECOVERY_OF_FP8

    @property
    def is_large(self) -> bool:
        """Whether the model is of 70B's kind."""
        return self.weights is not None and self.weights >= _LARGE_WEIGHTS


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and where it was published."""

    says: str
    source: str


@dataclass(frozen=True, slots=True)
class Rule(Finding):
    """A finding that applies to some situations."""

    when: Callable[[Situation], bool]


@dataclass(frozen=True, slots=True)
class Advice:
    """Where to start, and why."""

    space: str
    budget: tuple[str, ...]  #: options of `mofq search`
    engines: tuple[str, ...]  #: for the device, the first to be tried first
    rules: tuple[Finding, ...]  #: those that apply


RULES: tuple[Rule, ...] = (
    Rule(
        "Synchronous serving waits for the weights to arrive from memory: INT4 weights with "
        "16-bit activations (W4A16) are the most cost-efficient.",
        _KURTIC,
        lambda s: s.deployment == "synchronous",
    ),
    Rule(
        "Asynchronous serving on a mid-tier GPU: W4A16 has the best cost-efficiency there too. "
        "(Mid-tier: below 1.5 TB/s of memory, a line that mofq draws.)",
        _KURTIC,
        lambda s: s.deployment == "asynchronous" and not s.is_high_end,
    ),
    Rule(
        "Asynchronous serving with continuous batching on a high-end GPU is bound by arithmetic: "
        "8-bit weights and activations (W8A8) excel for mid-size and large models.",
        _KURTIC,
        lambda s: s.deployment == "asynchronous" and s.is_high_end,
    ),
    Rule(
        "FP8 weights and activations are effectively lossless at every size of Llama-3.1; the "
        "device multiplies FP8.",
        _KURTIC,
        lambda s: s.has_fp8 and (s.wants_lossless or not s.is_decode_bound),
    ),
    Rule(
        "The device has no FP8 instruction: INT8 is its 8-bit arithmetic, which loses 1 to 3 % "
        "of accuracy when it is tuned well.",
        _KURTIC + "; the device's data sheet",
        lambda s: not s.has_fp8 and not s.is_decode_bound,
    ),
    Rule(
        "99 % of the accuracy or more, and no FP8: W4A16 rivals 8-bit formats, but only FP8 is "
        "called lossless. Mixtures of 4 to 8 bits lie between.",
        _KURTIC,
        lambda s: s.wants_lossless and not s.has_fp8 and s.is_decode_bound,
    ),
    Rule(
        "99 % of the accuracy or more, and no FP8: a ninth bit leaves the layers that INT8 hurts "
        "most as they are.",
        _OURS,
        lambda s: s.wants_lossless and not s.has_fp8 and not s.is_decode_bound,
    ),
    Rule(
        "Per-channel INT8 ruined LLaMA3-70B, through the weights of a few layers; finer groups on "
        "less than 3 % of the layers, or smoothing, repaired it.",
        _QIN,
        lambda s: s.is_large and not s.has_fp8 and not s.is_decode_bound,
    ),
    Rule(
        "The device multiplies FP4 (NVFP4, MXFP4), which the papers above have not measured: try "
        "the space blackwell_fp4 beside this one.",
        _OURS,
        lambda s: "fp4" in s.device.instructions,
    ),
    Rule(
        "No engine was asked what it selects on the device's compute capability: the engines named "
        "are those for the nearest one below it, which has instructions that this one may lack. "
        "Load an exported checkpoint there before you rely on it.",
        _OURS,
        lambda s: s.is_beyond_rules,
    ),
    Rule(
        "The weights should leave a fifth of the memory to the KV cache and activations: the "
        "size is the budget.",
        _OURS,
        lambda s: s.weights is not None and _needs_size(s),
    ),
)


def advise(situation: Situation) -> Advice:
    """The search space, the engines and the budget to start from.

    Raises:
        MofqError: The recovery is no share.
    """
    if situation.recovery is not None and not 0 < situation.recovery <= 1:
        raise MofqError(f"{option('recovery')} is a share, at most 1; found {situation.recovery}.")
    space, budget = _start(situation)
    return Advice(
        space,
        budget,
        engines=engines_for(situation.device),
        rules=tuple(Finding(one.says, one.source) for one in RULES if one.when(situation)),
    )


def _start(situation: Situation) -> tuple[str, tuple[str, ...]]:
    """The search space, and the budget."""
    if situation.weights is not None and _needs_size(situation):
        return "w4w8_mixed", ("--max-size", f"{_room(situation) / 1e9:.1f}GB")
    if situation.wants_lossless and situation.has_fp8:
        return "w8a8", ("--max-bits", "8.2")
    if situation.is_decode_bound:
        if situation.wants_lossless:
            return "w4w8_mixed", ("--max-bits", "6.0")
        return "w4a16", ("--max-bits", "4.5")
    if situation.is_large and not situation.has_fp8:
        return "llama3_70b_w8a8", ("--max-finer", "0.03")
    lossless = situation.wants_lossless and not situation.has_fp8
    return "w8a8", ("--max-bits", "9.0" if lossless else "8.2")


def _room(situation: Situation) -> int:
    memory = situation.device.memory_bytes * situation.tp
    return int(_MEMORY_SHARE_OF_WEIGHTS * memory)


def _needs_size(situation: Situation) -> bool:
    """Whether the formats that the deployment asks for are too large for the memory."""
    assert situation.weights is not None
    is_8_bit = not situation.is_decode_bound or (situation.wants_lossless and situation.has_fp8)
    bits = 8.1 if is_8_bit else 4.5
    return situation.weights * bits / 8 + situation.other_bytes > _room(situation)
