"""Edits that a person could make by mistake, for ``mutation_check.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One edit, and the tests that must see it."""

    name: str
    file: str  #: under mofq/
    old: str  #: stands there exactly once
    new: str
    tests: str  #: names of test files without test_ and .py, or one test of a file behind ``::``


FAULTS = (
    Fault(
        "integers: ties away from even",
        "quantize/rounding.py",
        "return torch.round(torch.clamp(x, low, high))",
        "x = torch.clamp(x, low, high)\n    return torch.sign(x) * torch.floor(x.abs() + 0.5)",
        "quantize_references quantize formats",
    ),
    Fault(
        "floats: ties away from even",
        "quantize/rounding.py",
        "return torch.copysign((x + magic) - magic, x)",
        "step = binade * 2.0**-element.mantissa_bits\n"
        "    return torch.copysign(torch.floor((x / step).abs() + 0.5) * step, x)",
        "formats quantize",
    ),
    Fault(
        "bf16 scales truncated",
        "quantize/rounding.py",
        "((bits + (0x7FFF + odd)) & _UPPER_HALF)",
        "((bits + 0 * odd) & _UPPER_HALF)",
        "quantize_scales quantize_references",
    ),
    Fault(
        "one step too coarse below the smallest normal",
        "quantize/rounding.py",
        "min=2.0**element.min_exponent)",
        "min=2.0 ** (element.min_exponent + 1))",
        "formats quantize",
    ),
    Fault(
        "codebook: ties to the upper value",
        "quantize/rounding.py",
        "codes = codes + (x > midpoint)",
        "codes = codes + (x >= midpoint)",
        "formats quantize_references quantize",
    ),
    Fault(
        "wrong zero point",
        "quantize/scales.py",
        "-middle, largest - middle) + middle\n",
        "-middle, largest - middle) + middle + 1\n",
        "quantize_scales quantize_references",
    ),
    Fault(
        "dropped global scale",
        "quantize/scales.py",
        "return self.scale if self.global_scale is None else self.scale * self.global_scale",
        "return self.scale",
        "quantize_scales quantize_references quantize",
    ),
    Fault(
        "global scale off by the FP8 range",
        "quantize/scales.py",
        "scale = divide(tensor_amax, largest_scale * scheme.element.max)",
        "scale = divide(tensor_amax, scheme.element.max)",
        "quantize_scales quantize_references",
    ),
    Fault(
        "full range: sign of the scale",
        "quantize/scales.py",
        "torch.where(_largest_is_positive(x_ARGK, amax), -scale, scale)",
        "torch.where(_largest_is_positive(x_ARGK, amax), scale, -scale)",
        "quantize_scales quantize_references",
    ),
    Fault(
        "off-by-one group",
        "quantize/tiles.py",
        "return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)",
        "x = x.roll(1, 1)\n"
        "    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)",
        "quantize quantize_scales quantize_references",
    ),
    Fault(
        "activations: one scale for all tokens",
        "quantize/activations.py",
        "return tiles, tile_scales(tiles, scheme, tensor_amax=amax)",
        "return tiles, tile_scales(\n"
        "        tiles.abs().amax(0, keepdim=True).expand_as(tiles), scheme, tensor_amax=amax\n"
        "    )",
        "quantize_activations",
    ),
    Fault(
        "export: a scale transposed",
        "backends/compressed_tensors/packing.py",
        "scale.reshape(-1) if _is_tensor(weight) else scale}",
        "scale.T.reshape(-1) if _is_tensor(weight) else scale.T.reshape(scale.shape)}",
        "laws compressed_tensors",
    ),
    Fault(
        "export: wrong packing order",
        "backends/compressed_tensors/packing.py",
        "words[..., word] |= (runs[..., place] << shift) & 0xFFFFFFFF",
        "words[..., word] |= (runs[..., _WORD_BITS - 1 - place] << shift) & 0xFFFFFFFF",
        "laws compressed_tensors",
    ),
    Fault(
        "export: halves of a byte swapped",
        "backends/compressed_tensors/packing.py",
        "return codes[:, ::2] | (codes[:, 1::2] << 4)",
        "return codes[:, 1::2] | (codes[:, ::2] << 4)",
        "laws compressed_tensors",
    ),
    Fault(
        "export: a multiplier written where a divisor is read",
        "backends/compressed_tensors/packing.py",
        "divisor: Tensor = 1.0 / multiplier",
        "divisor: Tensor = multiplier",
        "laws compressed_tensors",
    ),
    Fault(
        "estimator: a swapped sign",
        "measure/block.py",
        "change_MCR = (x_MCI - inputs.x[None]) @ weight_RI.T",
        "change_MCR = (inputs.x[None] - x_MCI) @ weight_RI.T",
        "measure_score prediction",
    ),
    Fault(
        "estimator: the half of the second order dropped",
        "measure/score.py",
        "error_NS=(error_NS / (2 * inputs.tokens)).cpu(),",
        "error_NS=(error_NS / inputs.tokens).cpu(),",
        "measure_score prediction",
    ),
    Fault(
        "estimator: tokens squared before they are summed",
        "measure/block.py",
        "whole_RNS = projection_RMS.unflatten(1, (sequences, -1)).sum(2)",
        "whole_RNS = projection_RMS.unflatten(1, (sequences, -1)).square().sum(2).sqrt()",
        "measure_score prediction",
    ),
    Fault(
        "a skipped layer of a fusion group",
        "measure/rows.py",
        "_corpus_rows(corpus, list(filled[corpus].values()), i, common)",
        "_corpus_rows(corpus, list(filled[corpus].values())[:1], i, common)",
        "measure measure_score prediction",
    ),
    Fault(
        "calibration: the mean score not taken off",
        "calibration/run.py",
        "= root_RV - log_p_RV.exp() * mean_R1",
        "= root_RV - 0 * mean_R1",
        "calibration prediction",
    ),
    Fault(
        "calibration: the same labels for every sequence",
        "calibration/run.py",
        '{seed}/{corpus}/{sequence}/{draw}"',
        '{seed}/{corpus}/{draw}"',
        "calibration",
    ),
    Fault(
        "cost: padding forgotten",
        "cost.py",
        "row_bytes = 4 * -(-columns * bits // 32) if",
        "row_bytes = 4 * (columns * bits // 32) if",
        "cost laws",
    ),
    Fault(
        "budget off by one",
        "solvers/budgets.py",
        "return n + 1 if times * (n + 1) / over <= limit else n",
        "return n + 1",
        "solvers::test_budgets_that_contradict_each_other_are_told_apart "
        "solvers::test_the_tightest_possible_bits_are_rounded_so_that_they_can_be_met",
    ),
    Fault(
        "a layer left out of its fusion group",
        "layers/families.py",
        '        "self_attn.v_proj": ("kv", "hidden"),\n    },\n    "attn.o": {',
        '    },\n    "attn.v": {"self_attn.v_proj": ("kv", "hidden")},\n    "attn.o": {',
        "layers",
    ),
    Fault(
        "a split fusion group accepted",
        "recipe.py",
        "if scheme != chosen[first]:",
        "if scheme == 0:",
        "recipe laws",
    ),
    Fault(
        "a file written under its final name",
        "documents.py",
        'beside = path.with_name(f".{path.name}.tmp")',
        "beside = path",
        "documents",
    ),
    Fault(
        "a half last line kept",
        "table/writer.py",
        "        os.ftruncate(file, len(complete))\n    return table",
        "        pass\n    return table",
        "table laws",
    ),
    Fault(
        "KL in the wrong direction",
        "metrics.py",
        "(log_p.exp() * (log_p - log_q))",
        "(log_q.exp() * (log_q - log_p))",
        "metrics",
    ),
    Fault(
        "emulation without the rounding of activations",
        "quantize/linear.py",
        "            x = fake_quantize_activation(\n                x, self",
        "            _ = fake_quantize_activation(\n                x, self",
        "emulate quantize_activations",
    ),
    Fault(
        "enforcement of the first layer of each fusion group",
        "validate/enforcement.py",
        "    for layer in group.layers:\n        yield _Expected(",
        "    for layer in group.layers[:1]:\n        yield _Expected(",
        "enforcement",
    ),
    Fault(
        "gains: clusters of unequal size weigh alike",
        "measure/gains.py",
        "    cluster_KD += all_ND.mean() - cluster_KD.mean()\n",
        "",
        "gains",
    ),
    Fault(
        "gains: the correction with the wrong sign",
        "measure/gains.py",
        "(gains.cluster_N - gains.own_N) / gains.own_N.mean()",
        "(gains.own_N - gains.cluster_N) / gains.own_N.mean()",
        "gains",
    ),
    Fault(
        "calibration: the gain of inputs without their largest magnitude",
        "calibration/captured.py",
        "gain = float((square_T * amax_T.square()).sum())",
        "gain = float(square_T.sum())",
        "gains",
    ),
    Fault(
        "shared inputs: layers taken for independent",
        "measure/score.py",
        "error_NS[:, schemes] += cross_N[:, None]",
        "error_NS[:, schemes] += 0 * cross_N[:, None]",
        "measure_shared",
    ),
    Fault(
        "cross-fitting: judged by the half that was fitted to",
        "measure/crossfit.py",
        '(("first", "second"), ("second", "first"))',
        '(("first", "first"), ("second", "second"))',
        "fits",
    ),
    Fault(
        "cross-fitting: a half that no token reached costs nothing",
        "measure/crossfit.py",
        "error_NS=of_weight[:, None] * (half.error_NS.mean(0) - input_S)",
        "error_NS=0 * of_weight[:, None] * (half.error_NS.mean(0) - input_S)",
        "crossfit",
    ),
    Fault(
        "fitted codes: tokens count alike in GPTQ's Hessian",
        "fits.py",
        "samples.x_TI.double() * norm_T[:, None]",
        "samples.x_TI.double() * norm_T.sign()[:, None]",
        "fits",
    ),
    Fault(
        "fitted codes: an error is passed on twice within a batch",
        "quantize/feedback.py",
        "later = slice(column + 1, stop)",
        "later = slice(column + 1, None)",
        "quantize_feedback",
    ),
    Fault(
        "fitted codes of other numerics taken",
        "backends/fitted.py",
        "if found != NUMERICS and not is_by_hand:",
        "if found is None and not is_by_hand:",
        "fits::test_codes_that_were_fitted_otherwise_are_refused",
    ),
    Fault(
        "rewrite: a norm multiplied where it is divided",
        "rewrite/write.py",
        "rows[name] = 1 / choice.scale_P",
        "rows[name] = choice.scale_P",
        "rewrite",
    ),
    Fault(
        "rewrite: the last proposal taken for the best",
        "rewrite/choose.py",
        "best = min(range(len(nats)), key=lambda i: nats[i])",
        "best = len(nats) - 1",
        "rewrite",
    ),
    Fault(
        "spread windows: the text's end left out",
        "corpora.py",
        "* i // max(sequences - 1, 1) for i in",
        "* i // sequences for i in",
        "corpora",
    ),
    Fault(
        "a fine-tune taken for its base by a worker",
        "checkpoint/shared.py",
        "if found == needed and weights_sha256 is not None:",
        "if found == needed and weights_sha256 is None:",
        "distributed::test_a_worker_that_sees_another_model_or_other_stats_says_so",
    ),
)
