"""Edits for ``mutation_check.py`` in what is delivered: names, biases, configs, engines' rules."""

from __future__ import annotations

from scripts.quality.mutation_fault import Fault

_BIASES = "rewrite::test_a_bias_is_divided_with_the_weight_beside_it"
_FUNCTION = "rewrite::test_a_rewritten_model_computes_what_it_did"
_FACTS = "engine_facts::test_no_rule_contradicts_what_the_engine_selects"

_REWRITING = (
    Fault(
        "rewrite: the bias of a norm forgotten",
        "tuple(name for name in tensors if name in checkpoint.tensors)",
        "tuple(name for name in tensors[:1] if name in checkpoint.tensors)",
        _BIASES,
    ),
    Fault(
        "rewrite: the bias of a producer forgotten",
        "(producer.tensor, *((bias,) if bias in checkpoint.tensors else ()))",
        "(producer.tensor, *((bias,) if not bias else ()))",
        _BIASES,
    ),
    Fault(
        "rewrite: norms and biases left as they are",
        "rows = rows * (factor_R if rows.ndim == 1 else factor_R[:, None])",
        "rows = rows * (1.0 if rows.ndim == 1 else factor_R[:, None])",
        _BIASES,
    ),
    Fault(
        "rewrite: the norm of attention divided for the MLP",
        '    "mlp.gate_up_proj": "post_attention_layernorm",',
        '    "mlp.gate_up_proj": "input_layernorm",',
        _FUNCTION,
    ),
    Fault(
        "rewrite: only the first layer that reads an input multiplied",
        "        for layer in choice.site.consumers:\n            columns",
        "        for layer in choice.site.consumers[:1]:\n            columns",
        _FUNCTION,
    ),
    Fault(
        "rewrite: query heads take the scales of neighbouring heads",
        "i // head // shared * head + i % head",
        "i % producer.out_features",
        "rewrite::test_shared_heads_share_their_scales",
    ),
    Fault(
        "rewrite: a site moves though nothing is won",
        'found = [Choice(site, "", None, ones_P, 0.0, 0.0, method=methods[0])]',
        'found = [Choice(site, "", Strength(0.0, 0.0), ones_P, 0.0, 0.0, method=methods[0])]',
        "rewrite::test_no_site_is_predicted_worse_than_it_was",
    ),
)

_EXPORTS = (
    Fault(
        "export: biases left out",
        "        if name not in replaced\n",
        '        if name not in replaced and not name.endswith(".bias")\n',
        "exported_folder::test_biases_are_exported_and_run",
    ),
    Fault(
        "validate: the biases of an exported folder not loaded",
        'if name not in tensors and name.rpartition(".")[2] not in STORED_PARTS:',
        'if name not in tensors and name.rpartition(".")[2] == "weight":',
        "exported_folder::test_biases_are_exported_and_run",
    ),
    Fault(
        "names: scales of packed weights under another name",
        '            if word == "weight_scale" and weight.granularity.kind == "tensor" and start:',
        '            word = word.replace("weight_scale", "weight_scales")\n'
        '            if word == "weight_scale" and weight.granularity.kind == "tensor" and start:',
        "compressed_tensors::test_transformers_computes_what_was_emulated",
    ),
    Fault(
        "names: fused experts' router under the name in memory",
        'name = name.replace(f".{experts.fused_module}.", f".{experts.module}.")',
        'name = name.replace(f".{experts.fused_module}.", f".{experts.fused_module}.")',
        "compressed_tensors::test_the_layout_of_the_source_changes_no_byte_of_an_export",
    ),
    Fault(
        "names: SGLang's names of experts left out of the targets",
        'names += [f"{parent}.{known[w]}" for parent, w in first if parent == parents[0]]',
        "names += []",
        "loaded_names",
    ),
    Fault(
        "names: transformers' names of layers left out of the targets",
        'names.append(loaded.name.removesuffix(".weight"))',
        "names.append(layer.name)",
        "compressed_tensors::test_both_names_of_a_layer_are_targets",
    ),
    Fault(
        "config: layers that stay as they are not ignored",
        "            ignored += [layer.name for layer in group.layers]\n",
        "            ignored += [layer.name for layer in group.layers[1:]]\n",
        "compressed_tensors::test_every_linear_layer_and_what_engines_join_are_named_once_in_full",
    ),
    Fault(
        "config: a tied head not ignored",
        '        ignored.append("lm_head")',
        '        ignored.append("head")',
        "compressed_tensors::test_a_tied_lm_head_is_ignored_by_name",
    ),
    Fault(
        "config: the first format for a mixture",
        'formats[0] if len(formats) == 1 else "mixed-precision" if formats else "dense"',
        'formats[0] if formats else "dense"',
        "compressed_tensors::test_a_mixed_checkpoint_has_one_config_group_per_scheme",
    ),
    Fault(
        "config: symmetric whatever the scheme",
        '        "symmetric": operand.symmetric,\n',
        '        "symmetric": True,\n',
        "compressed_tensors_model compressed_tensors_recipe",
    ),
    Fault(
        "config: static scales of inputs said to be dynamic",
        "dynamic=not is_static)",
        "dynamic=True)",
        "compressed_tensors::test_the_config_says_which_scales_of_inputs_are_stored",
    ),
    Fault(
        "config: columns of a block before its rows",
        "[granularity.rows, granularity.columns]}",
        "[granularity.columns, granularity.rows]}",
        "compressed_tensors_recipe",
    ),
    Fault(
        "config of ModelOpt: layers that stay as they are not excluded",
        "            excluded += names\n",
        "            excluded += []\n",
        "exporters::test_modelopt_gets_one_algorithm_a_layer",
    ),
    Fault(
        "config of AutoRound: a channel for the whole tensor",
        'sizes = {"channel": -1, "token": -1, "tensor": 0,',
        'sizes = {"channel": 0, "token": -1, "tensor": 0,',
        "exporters::test_auto_round_gets_bits_and_groups",
    ),
    Fault(
        "config of TorchAO: asymmetric weights mapped symmetrically",
        "        if scheme.quantized_weight.symmetric\n        else MappingType.ASYMMETRIC,",
        "        if scheme.quantized_weight\n        else MappingType.ASYMMETRIC,",
        "torchao_config::test_integers_with_zero_points_are_mapped_asymmetrically",
    ),
)

_ENGINES = (
    Fault(
        "rules: Machete's zero points served on Hopper",
        r"""        r"int(4|8)\.(channel|g64|g128)\.asym",
        layers="dense",
        min_capability=(9, 0),
        max_capability=(9, 9),
        refused=""",
        r"""        r"int(4|8)\.(channel|g64|g128)\.asym",
        layers="dense",
        min_capability=(9, 5),
        max_capability=(9, 9),
        refused=""",
        "engines::test_what_an_engine_computes_otherwise_is_refused_as_not_measured",
    ),
    Fault(
        "rules: groups of 16 that no tile straddles left out",
        '_TILES = "g(16|32|64|128|256)"',
        '_TILES = "g(32|64|128|256)"',
        _FACTS,
    ),
    Fault(
        "rules: SGLang's Marlin experts on Blackwell",
        "        max_capability=(9, 0),\n        in_features_multiple=128,\n",
        "        in_features_multiple=128,\n",
        "engines::test_experts_without_marlin_are_served_in_groups_that_triton_has",
    ),
    Fault(
        "rules: SGLang's INT8 kernel on Blackwell",
        '        refused="int8_scaled_mm stops at compute capability 9.0; take FP8",',
        '        kernel="CompressedTensorsW8A8Int8, int8_scaled_mm",',
        "engines::test_a_scheme_that_no_kernel_takes_is_refused engine_facts",
    ),
    Fault(
        "rules: a rule of another version taken",
        "and (not rule.versions or self.version in rule.versions)",
        "and (not rule.versions or self.version)",
        "engines::test_an_engine_is_of_its_newest_version_unless_one_is_named",
    ),
    Fault(
        "rules: the highest capability left out of a rule",
        "(most is None or capability <= most)",
        "(most is None or capability < most)",
        _FACTS,
    ),
)

_TUNING = (
    Fault(
        "tuning: norms that are tuned away from the original",
        "(q_RV - p_RV) * (1",
        "(p_RV - q_RV) * (1",
        "tuning::test_tuned_norms_diverge_less_from_the_original_on_what_no_step_saw",
    ),
    Fault(
        "tuning: kept without a gain",
        "return one.kl_before - one.kl_after > sure",
        "return one.kl_before - one.kl_after >= 0",
        "tuning::test_where_nothing_is_gained_it_says_so",
    ),
    Fault(
        "tuning: a norm without its gradient where it was stopped before that was written",
        "            and self._outside(gradients, step).exists()\n",
        "",
        "tune_streamed::test_a_tuning_that_was_stopped_goes_on_and_ends_with_the_same_bytes",
    ),
    Fault(
        "tuning: what is half written counts as learned",
        'self._folder.glob("learned-*") if one.suffix != PART',
        'self._folder.glob("learned-*")',
        "tune_streamed::test_a_tuning_that_was_stopped_goes_on_and_ends_with_the_same_bytes",
    ),
    Fault(
        "tuning: 1 + weight taken for weight",
        "(1 + gain_C if _adds_one(module, gain_C) else gain_C).abs()",
        "gain_C.abs()",
        "tuning::test_the_norms_of_families_are_found_with_the_size_of_their_gains",
    ),
    Fault(
        "tuning: schemes that were edited since",
        "tuning.decisions_sha256 != recipe.decisions_sha256",
        "not recipe.decisions_sha256",
        "tuning::test_a_recipe_whose_schemes_were_edited_is_refused_until_its_norms_are_removed",
    ),
    Fault(
        "tuning: what inputs lost is taken once more",
        "lost_TI = (original_TI - x_TI) * norm_T1",
        "lost_TI = (x_TI - original_TI) * norm_T1",
        "compensate::test_what_layers_before_lost_is_given_back",
    ),
    Fault(
        "tuning: what the residual stream lost is not given back",
        "            given_HOI += self.stream_HOI\n",
        "            pass\n",
        "compensate::test_what_other_text_bears_out_is_given_back",
    ),
    Fault(
        "tuning: all is given back, whatever other text says",
        "(2 * share * pulls - share**2 * scale, share, damping)",
        "(1.0, 1.0, damping)",
        "compensate::test_what_other_text_bears_out_is_given_back",
    ),
    Fault(
        "tuning: the worse of descent and a fit anew is taken",
        "lost(fresh) < descended",
        "lost(fresh) > descended",
        "compensate::test_codes_are_fitted_anew_where_descent_changes_much",
    ),
    Fault(
        "tuning: a compensation that was stopped begins anew",
        "            if not path.exists():\n                self._run_unit",
        "            if True:\n                self._run_unit",
        "compensate::test_a_compensation_that_was_stopped_goes_on_and_ends_with_the_same_bytes",
    ),
    Fault(
        "tuning: what codes began with is lost layer by layer",
        '"start": None if one.start is None else _parts(one.start),',
        '"start": None,',
        "compensate::test_a_model_in_memory_and_one_layer_by_layer_compensate_the_same",
    ),
)

DELIVERY = (*_REWRITING, *_EXPORTS, *_ENGINES, *_TUNING)
