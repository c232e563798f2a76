"""Edits that a person could make by mistake, for ``mutation_check.py``."""

from __future__ import annotations

from scripts.quality.mutation_fault import Fault
from scripts.quality.mutation_faults_cache import CACHE_AND_SOURCES
from scripts.quality.mutation_faults_delivery import DELIVERY

_NUMBERS = (
    Fault(
        "integers: ties away from even",
        "return torch.round(torch.clamp(x, low, high))",
        "x = torch.clamp(x, low, high)\n    return torch.sign(x) * torch.floor(x.abs() + 0.5)",
        "quantize_references quantize formats",
    ),
    Fault(
        "floats: ties away from even",
        "return torch.copysign((x + magic) - magic, x)",
        "step = binade * 2.0**-element.mantissa_bits\n"
        "    return torch.copysign(torch.floor((x / step).abs() + 0.5) * step, x)",
        "formats quantize",
    ),
    Fault(
        "bf16 scales truncated",
        "((bits + (0x7FFF + odd)) & _UPPER_HALF)",
        "((bits + 0 * odd) & _UPPER_HALF)",
        "quantize_scales quantize_references",
    ),
    Fault(
        "one step too coarse below the smallest normal",
        "min=2.0**element.min_exponent)",
        "min=2.0 ** (element.min_exponent + 1))",
        "formats quantize",
    ),
    Fault(
        "codebook: ties to the upper value",
        "codes = codes + (x > midpoint)",
        "codes = codes + (x >= midpoint)",
        "formats quantize_references quantize",
    ),
    Fault(
        "wrong zero point",
        "-middle, largest - middle) + middle\n",
        "-middle, largest - middle) + middle + 1\n",
        "quantize_scales quantize_references",
    ),
    Fault(
        "dropped global scale",
        "return self.scale if self.global_scale is None else self.scale * self.global_scale",
        "return self.scale",
        "quantize_scales quantize_references quantize",
    ),
    Fault(
        "global scale off by the FP8 range",
        "scale = divide(tensor_amax, largest_scale * scheme.element.max)",
        "scale = divide(tensor_amax, scheme.element.max)",
        "quantize_scales quantize_references",
    ),
    Fault(
        "full range: sign of the scale",
        "torch.where(_largest_is_positive(x_ARGK, amax), -scale, scale)",
        "torch.where(_largest_is_positive(x_ARGK, amax), scale, -scale)",
        "quantize_scales quantize_references",
    ),
    Fault(
        "off-by-one group",
        "return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)",
        "x = x.roll(1, 1)\n"
        "    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)",
        "quantize quantize_scales quantize_references",
    ),
    Fault(
        "activations: one scale for all tokens",
        "return tiles, tile_scales(tiles, scheme, tensor_amax=amax)",
        "return tiles, tile_scales(\n"
        "        tiles.abs().amax(0, keepdim=True).expand_as(tiles), scheme, tensor_amax=amax\n"
        "    )",
        "quantize_activations",
    ),
    Fault(
        "export: a scale transposed",
        "scale.reshape(-1) if _is_tensor(weight) else scale}",
        "scale.T.reshape(-1) if _is_tensor(weight) else scale.T.reshape(scale.shape)}",
        "laws compressed_tensors",
    ),
    Fault(
        "export: wrong packing order",
        "words[..., word] |= (runs[..., place] << shift) & 0xFFFFFFFF",
        "words[..., word] |= (runs[..., _WORD_BITS - 1 - place] << shift) & 0xFFFFFFFF",
        "laws compressed_tensors",
    ),
    Fault(
        "export: halves of a byte swapped",
        "return codes[:, ::2] | (codes[:, 1::2] << 4)",
        "return codes[:, 1::2] | (codes[:, ::2] << 4)",
        "laws compressed_tensors",
    ),
    Fault(
        "export: a multiplier written where a divisor is read",
        "divisor: Tensor = 1.0 / multiplier",
        "divisor: Tensor = multiplier",
        "laws compressed_tensors",
    ),
    Fault(
        "estimator: a swapped sign",
        "x_MCI.sub_(plain) @ weight_RI.T",
        "x_MCI.sub_(plain).neg_() @ weight_RI.T",
        "measure_score prediction",
    ),
    Fault(
        "estimator: the half of the second order dropped",
        "error_NS=(error_NS / (2 * inputs.tokens)).cpu(),",
        "error_NS=(error_NS / inputs.tokens).cpu(),",
        "measure_score prediction",
    ),
    Fault(
        "estimator: tokens squared before they are summed",
        "projected[activation].unflatten(1, (inputs.sequences, -1)).sum(2)",
        "projected[activation].unflatten(1, (inputs.sequences, -1)).square().sum(2).sqrt()",
        "measure_score prediction",
    ),
    Fault(
        "a skipped layer of a fusion group",
        "parts = list(filled[corpus].values())",
        "parts = list(filled[corpus].values())[:1]",
        "measure measure_score prediction",
    ),
    Fault(
        "calibration: the mean score not taken off",
        "= root_RV - log_p_RV.exp() * mean_R1",
        "= root_RV - 0 * mean_R1",
        "calibration prediction",
    ),
    Fault(
        "calibration: the same labels for every sequence",
        '{seed}/{corpus}/{sequence}/{draw}"',
        '{seed}/{corpus}/{draw}"',
        "calibration",
    ),
    Fault(
        "cost: padding forgotten",
        "row_bytes = 4 * -(-columns * bits // 32) if",
        "row_bytes = 4 * (columns * bits // 32) if",
        "sizes laws",
    ),
    Fault(
        "budget off by one",
        "return n + 1 if times * (n + 1) / over <= limit else n",
        "return n + 1",
        "exact::test_budgets_that_contradict_each_other_are_told_apart "
        "exact::test_the_tightest_possible_bits_are_rounded_so_that_they_can_be_met",
    ),
    Fault(
        "a layer left out of its fusion group",
        '        "self_attn.v_proj": ("kv", "hidden"),\n    },\n    "attn.o": {',
        '    },\n    "attn.v": {"self_attn.v_proj": ("kv", "hidden")},\n    "attn.o": {',
        "layers",
    ),
    Fault(
        "inferred layers: what engines join left apart",
        '(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),',
        "",
        "inferred_layers",
    ),
    Fault(
        "inferred layers: a router taken for a layer",
        r'(re.compile(r"(?!.*att)(.*\.)?(gate|gating|\w*router)(\.\w+)*"), _ROUTER),',
        "",
        "inferred_layers",
    ),
    Fault(
        "experts: what they compute is taken on trust",
        'return None if is_same else f"{name}, {_ANOTHER_FORMULA}"',
        "return None",
        "modules",
    ),
    Fault(
        "a split fusion group accepted",
        "if scheme != chosen[first]:",
        "if scheme == 0:",
        "recipe laws",
    ),
    Fault(
        "a file written under its final name",
        'beside = path.with_name(f".{path.name}.tmp")',
        "beside = path",
        "documents",
    ),
    Fault(
        "a half last line kept",
        "        os.ftruncate(file, len(complete))\n    return lines",
        "        pass\n    return lines",
        "table laws",
    ),
    Fault(
        "KL in the wrong direction",
        "(log_p.exp() * (log_p - log_q))",
        "(log_q.exp() * (log_q - log_p))",
        "metrics",
    ),
    Fault(
        "emulation without the rounding of activations",
        "        return straight_through(round_to, x)",
        "        return x",
        "emulate quantize_activations",
    ),
    Fault(
        "enforcement of the first layer of each fusion group",
        "    for layer in group.layers:\n            codes = None",
        "    for layer in group.layers[:1]:\n            codes = None",
        "enforcement",
    ),
    Fault(
        "an exported folder's tokenizer and generation config not compared",
        "    yield from find_file_deviations(checkpoint, exported)\n",
        "",
        "exported_folder",
    ),
    Fault(
        "an exported folder scored on the original's tokens",
        "windows_NT = original.windows.cut_by(tokenizer)",
        "windows_NT = original.windows.tokens_NT",
        "exported_folder",
    ),
    Fault(
        "gains: clusters of unequal size weigh alike",
        "    cluster_KD += all_ND.mean() - cluster_KD.mean()\n",
        "",
        "gains",
    ),
    Fault(
        "gains: the correction with the wrong sign",
        "(gains.cluster_N - gains.own_N) / gains.own_N.mean()",
        "(gains.own_N - gains.cluster_N) / gains.own_N.mean()",
        "gains",
    ),
    Fault(
        "calibration: the gain of inputs without their largest magnitude",
        "gain = (square_T * amax_T.square()).sum()",
        "gain = square_T.sum()",
        "gains",
    ),
    Fault(
        "shared inputs: layers taken for independent",
        "error_NS[:, schemes] += cross_N[:, None]",
        "error_NS[:, schemes] += 0 * cross_N[:, None]",
        "measure_shared",
    ),
    Fault(
        "cross-fitting: judged by the half that was fitted to",
        '{"first": "second", "second": "first"}',
        '{"first": "first", "second": "second"}',
        "fits",
    ),
    Fault(
        "cross-fitting: a half that no token reached costs nothing",
        "error_NS=of_weight[:, None] * (half.error_NS.mean(0) - input_S)",
        "error_NS=0 * of_weight[:, None] * (half.error_NS.mean(0) - input_S)",
        "crossfit",
    ),
    Fault(
        "fitted codes: tokens count alike in GPTQ's Hessian",
        "one.x_TI.double() * one.norm_T[:, None]",
        "one.x_TI.double() * one.norm_T.sign()[:, None]",
        "fits",
    ),
    Fault(
        "fitted codes: an error is passed on twice within a batch",
        "adjusted_IO[column + 1 : stop] += passed_BB[place, place + 1 :] *",
        "adjusted_IO[column + 1 :] += passed_II[column, column + 1 :, None].double() *",
        "quantize_feedback",
    ),
    Fault(
        "fitted codes of other numerics taken",
        "if found not in (NUMERICS, *EARLIER_FITTED_CODES) and not is_by_hand:",
        "if found is None and not is_by_hand:",
        "fits::test_codes_that_were_fitted_otherwise_are_refused",
    ),
    Fault(
        "rewrite: a norm multiplied where it is divided",
        "rows[name] = 1 / choice.scale_P",
        "rows[name] = choice.scale_P",
        "rewrite",
    ),
    Fault(
        "rewrite: the last proposal taken for the best",
        "best = min(every, key=lambda one: (one.nats_after, one.strength is not None))",
        "best = every[-1]",
        "rewrite",
    ),
    Fault(
        "spread windows: the text's end left out",
        "* i // max(sequences - 1, 1) for i in",
        "* i // sequences for i in",
        "corpora",
    ),
    Fault(
        "a fine-tune taken for its base by a worker",
        "if found == needed and weights_sha256 is not None:",
        "if found == needed and weights_sha256 is None:",
        "distributed::test_a_worker_that_sees_another_model_or_other_stats_says_so",
    ),
    Fault(
        "a worker with other numerics taken",
        "if sender != _this_mofq():",
        "if not sender:",
        "distributed::test_a_unit_of_another_mofq_is_not_run",
    ),
    Fault(
        "spread windows: excerpts of a long text from its beginning",
        "starts = [len(text) * i // sequences for i",
        "starts = [64 * sequence_length * i for i",
        "corpora::test_excerpts_of_a_long_text_are_spread_over_all_of_it",
    ),
    Fault(
        "windows: a second BOS before that of a chat template",
        "if window[: len(leading)] == list(leading):",
        "if not leading:",
        "corpora::test_conversations_are_what_the_chat_template_writes_and_get_no_second_bos",
    ),
    Fault(
        "calibrate: no BOS whatever is asked",
        "leading = leading_tokens(tokenizer, samples.bos)",
        'leading = leading_tokens(tokenizer, "never")',
        "bos::test_static_scales_see_the_largest_activation_which_is_that_of_bos",
    ),
    Fault(
        "fitted codes: a scale from the weight as it was",
        "as_float32(adjusted_IO[whole]).T",
        "as_float32(weight_IO[whole]).T",
        "quantize_feedback::test_the_scale_of_a_group_is_that_of_the_weights_as_feedback_left_them",
    ),
    Fault(
        "fitted codes: nothing is passed on beyond a batch",
        "send(error_BO, passed_II",
        "send(0 * error_BO, passed_II",
        "quantize_feedback",
    ),
    Fault(
        "Optuna: a trial that died moves those after it",
        "number = trial.number - sum(one.number < trial.number for one in failed)",
        "number = trial.number",
        "optuna::test_trials_that_died_do_not_move_those_after_them",
    ),
    Fault(
        "Optuna: a recipe is measured again",
        "if choice_F.tobytes() not in tried:",
        "if True:",
        "optuna::test_a_recipe_that_was_measured_is_not_proposed_while_there_is_another",
    ),
)

FAULTS = (*_NUMBERS, *CACHE_AND_SOURCES, *DELIVERY)
