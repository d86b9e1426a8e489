"""Names that users of NNI, Neural Compressor, UniPruning and Torch-Pruning know: what to use here instead.

docs/migration.md says it at length. Whoever adds one of these names takes it out here.
"""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NoReturn

from torchshear.errors import KeywordError, OtherToolImportError, OtherToolNameError

# Modules that look a name up for `from ... import`.
_IMPORTERS: Final = frozenset({"importlib._bootstrap", "_frozen_importlib"})

_SCHEDULE: Final = (
    "schedules are those of a torchshear.PruningSession, for a model that you train, and of "
    "torchshear.training.prune_in_rounds; under NNI's names torchshear.compat.nni.AGPPruner, LinearPruner and "
    "LotteryTicketPruner"
)
_ROUNDS: Final = (
    "use torchshear.training.prune_in_rounds(model, x, tasks=..., pruner=..., fine_tune=...), or total_iteration= of "
    "torchshear.compat.nni.AGPPruner, LinearPruner and LotteryTicketPruner"
)
_SEARCH: Final = "use torchshear.search(model, x, evaluate=..., method='annealing'), which has other methods as well"
_MOVEMENT: Final = (
    "movement pruning is not here; nearest is torchshear.PruningSession(model, x, pattern='1x1', criterion='snip', "
    "schedule=...)"
)
_REGULARIZERS: Final = (
    "use torchshear.regularizers, as GroupLasso(1e-4), GrowingL2() or ScaleL1(1e-4), in a torchshear.PruningSession"
)
_NO_HOOKS: Final = (
    "there are no hooks: the masks on the model that compress() gives hold through any training loop; hooks are those "
    "of torchshear.compat.neural_compressor.prepare_compression"
)
_MAKE_ONE: Final = "use torchshear.compat.neural_compressor.prepare_pruning(model, config, optimizer)"
_SHRINK: Final = "use torchshear.shrink(model, plan), or shrink() of a pruner"
_ANALYZE: Final = "use torchshear.analyze(torchshear.trace(model, args)), whose groups are what goes together"
_TORCH_PRUNING: Final = "use torchshear.prune(model, args, criterion='l2', ratio=0.5), which gives a smaller copy"
_CRITERION: Final = "criteria have names here: criterion='l2'; see torchshear.pruners.registered_criteria()"
_NNI: Final = "the classes of NNI are in torchshear.compat.nni, under their own names"
_UNIPRUNING: Final = "it is in torchshear.compat.unipruning"
_NEURAL_COMPRESSOR: Final = "it is in torchshear.compat.neural_compressor"
_NOT_NEEDED: Final = "it is not needed here"
_ARGS: Final = "example inputs are args=(x,) and kwargs={...}"
_DATA: Final = "batches are data=, their number batches=, the loss loss_fn="


def _table(*entries: tuple[str, str]) -> Mapping[str, str]:
    """Name -> what to use instead, of pairs (names, text)."""
    found: dict[str, str] = {}
    for names, text in entries:
        for name in names.split():
            assert name not in found, f"{name!r} stands in the table twice"
            found[name] = text
    return MappingProxyType(found)


NAMES: Final = _table(
    # NNI
    ("AGPPruner LinearPruner LotteryTicketPruner ADMMPruner", _NNI),
    ("IterativePruner", "use torchshear.compat.nni.AGPPruner, LinearPruner or LotteryTicketPruner"),
    ("PruningScheduler AGPTaskGenerator LinearTaskGenerator LotteryTicketTaskGenerator", _NNI),
    ("FunctionBasedTaskGenerator", _ROUNDS),
    ("SensitivityAnalysis", _SEARCH),
    ("L1NormPruner L1FilterPruner L2NormPruner L2FilterPruner FPGMPruner SlimPruner LevelPruner ConfigPruner", _NNI),
    ("SensitivityPruner NetAdaptPruner SimulatedAnnealingPruner AutoCompressPruner AMCPruner", _NNI),
    ("ActivationAPoZRankPruner ActivationAPoZRankFilterPruner ActivationMeanRankPruner", _NNI),
    ("ActivationMeanRankFilterPruner TaylorFOWeightPruner TaylorFOWeightFilterPruner Pruner", _NNI),
    ("AMCTaskGenerator AutoCompressTaskGenerator SimulatedAnnealingTaskGenerator", _SEARCH),
    ("MovementPruner", _MOVEMENT),
    ("TaylorPruner", "use torchshear.compat.nni.TaylorFOWeightPruner, or criterion='taylor_bn' for gates behind norms"),
    ("BasicPruner OneshotPruner OneShotPruner", "use one of the pruners of torchshear.compat.nni, as L1NormPruner"),
    ("ModelSpeedup", _SHRINK),
    ("ChannelDependency GroupDependency InputChannelDependency ReshapeDependency fix_mask_conflict", _ANALYZE),
    ("auto_set_denpendency_group_ids not_safe_to_prune", f"{_NOT_NEEDED}: what is coupled is found in the graph"),
    ("TorchEvaluator LightningEvaluator TransformersEvaluator DeepspeedTorchEvaluator", f"{_NOT_NEEDED}; {_DATA}"),
    ("apply_compression_results", "use torchshear.pruners.masks.apply(model, masks)"),
    ("count_flops_params compute_sparsity", "use the report of torchshear.prune or of shrink()"),
    # Neural Compressor
    ("WeightPruningConfig prepare_pruning prepare_compression CompressionManager", _NEURAL_COMPRESSOR),
    ("parse_auto_slim_config", _NEURAL_COMPRESSOR),
    ("PruningConfig", "use torchshear.compat.neural_compressor.WeightPruningConfig"),
    ("Pruning BasicPruning RetrainFreePruning", _MAKE_ONE),
    ("model_slim", "use torchshear.prune(model, args, roles=('ffn', 'heads'))"),
    ("prune_wanda", "use criterion='wanda', of whole units, with data="),
    ("SparseGPTPruning sparse_gpt dsnot", "pruners that rewrite the weights that stay are not here"),
    # UniPruning
    ("UniPruner read_unipruning_config plan_unipruning write_unipruning_mask plan_from_unipruning_mask", _UNIPRUNING),
    ("prune_by_mask convert", "use convert() of a torchshear.compat.unipruning.UniPruner"),
    ("SCOP PrunerKfCompressAlgo PrunerFtCompressAlgo", "it is not here; use torchshear.compat.unipruning.UniPruner"),
    # Torch-Pruning
    ("MagnitudePruner MetaPruner BasePruner BNScalePruner SaliencyPruner OutputPruner", _TORCH_PRUNING),
    ("GroupNormPruner GroupBNScaling GrowingRegPruner GroupLassoPruner", _REGULARIZERS),
    ("DependencyGraph", _ANALYZE),
    ("Importance MagnitudeImportance GroupMagnitudeImportance GroupNormImportance RandomImportance", _CRITERION),
    ("BNScaleImportance LAMPImportance FPGMImportance ActivationImportance OBDCImportance", _CRITERION),
    ("TaylorImportance GroupTaylorImportance HessianImportance GroupHessianImportance importance", _CRITERION),
    ("BasePruningFunc function", "use a rule for the operator: torchshear.dependency.operator_rule"),
    ("prune_conv_out_channels prune_conv_in_channels prune_linear_out_channels prune_linear_in_channels", _SHRINK),
    ("prune_batchnorm_out_channels", _SHRINK),
    ("count_ops_and_params", "parameters and MACs are in the report of torchshear.prune"),
    ("pruner", "use torchshear.prune, or the classes of torchshear.compat.nni"),
)

METHODS: Final = _table(
    # NNI
    ("get_best_result speedup_model", "use shrink(), which gives model, plan and report"),
    ("update_mask calc_mask generate_masks reset wrap_model unwrap_model _wrap_model _unwrap_model", _NOT_NEEDED),
    ("validate_config register_finished_callback", _NOT_NEEDED),
    ("update_epoch get_prune_iterations prune_iteration_start", _SCHEDULE),
    (
        "load_model_state_dict load_masks",
        "use torchshear.pruners.masks.Masks.load(path), and torch.load of plain weights",
    ),
    ("show_pruned_weights get_pruned_weights get_sparsity_ratio", "use the table of the pruner, and shrink().report"),
    # Neural Compressor
    ("callbacks on_train_begin on_train_end on_epoch_begin on_epoch_end on_step_begin on_step_end", _NO_HOOKS),
    ("on_before_optimizer_step on_after_optimizer_step on_before_eval on_after_eval", _NO_HOOKS),
    ("save export", "use export_model(model_path, mask_path, onnx_path)"),
    # UniPruning, Torch-Pruning
    ("apply convert", "use shrink()"),
    ("step", "use shrink(), which takes all at once; little by little a torchshear.PruningSession does"),
    ("regularize update_regularizer", _REGULARIZERS),
    ("pruning_history load_pruning_history", "use the plan: plan.save(path), torchshear.PruningPlan.load(path)"),
    ("manual_prune_width", "use torchshear.pruners.plan_from_kept(groups, kept)"),
)

KEYWORDS: Final = _table(
    # NNI
    ("dummy_input example_inputs", _ARGS),
    ("statistics_batch_num training_steps training_batches", "the number of batches is batches="),
    ("evaluator dataloader loss_func traced_optimizer", _DATA),
    ("trainer optimizer", f"{_DATA}; while a model trains use torchshear.compat.nni.AGPPruner"),
    ("criterion", "the class says what ranks channels; a loss is loss_fn="),
    ("mode", "total_sparsity in the config list ranks layers together; coupled layers always lose the same channels"),
    ("global_sort", "total_sparsity in the config list ranks layers together"),
    ("balance_gran", "use torchshear.pruners.masks.choose_masks(model, '2:4', 0.5)"),
    ("max_sparsity_per_layer", "it is a key of the config list, beside total_sparsity"),
    ("preserve_round round_to round_multiplier", "kept widths are multiples of align="),
    ("activation", "activations are found in the graph"),
    ("sparsifying_training_epochs training_epochs scale", "use torchshear.compat.nni.SlimPruner, with trainer="),
    ("regular_scale", "scale= of torchshear.compat.nni.SlimPruner, with trainer=, is the weight of the penalty"),
    ("movement_mode sparse_granularity warm_up_step cool_down_beginning_step", _MOVEMENT),
    ("warmup_step cooldown_begin_step", _MOVEMENT),
    ("admm_num_iterations admm_epochs_per_iteration row", "use torchshear.compat.nni.ADMMPruner or AutoCompressPruner"),
    ("num_iterations epochs_per_iteration", "use torchshear.compat.nni.AGPPruner, LinearPruner or ADMMPruner"),
    ("total_iteration pruning_algorithm iterative_steps reset_weight skip_first_iteration", _ROUNDS),
    ("sparsity_per_iteration", "use torchshear.compat.nni.NetAdaptPruner"),
    ("iterative_pruning_ratio_scheduler total_times", _SCHEDULE),
    ("start_temperature stop_temperature cool_down_rate perturbation_magnitude optimize_mode", _SEARCH),
    ("short_term_fine_tuner finetuner fine_tuner", f"this trains nothing: fine-tune what shrink() gives, or {_ROUNDS}"),
    ("log_dir keep_intermediate_result checkpoint_dir experiment_data_dir", "only export_model and save write files"),
    ("speedup confidence batch_dim map_location customized_replace_func masks_file", _NOT_NEEDED),
    # Neural Compressor
    ("ffn2_sparsity mha_sparsity", "use torchshear.prune(model, args, ratio={'ffn': 0.5, 'heads': 0.25})"),
    ("pruning_configs target_sparsity pruning_type", "these are keys of the config"),
    # Torch-Pruning
    ("importance", _CRITERION),
    ("pruning_ratio pruning_ratio_dict ch_sparsity ch_sparsity_dict", "use torchshear.prune(model, args, ratio=...)"),
    ("max_pruning_ratio", "use max_ratio= of torchshear.prune"),
    ("global_pruning isomorphic", "use scope='global' or scope='isomorphic' of torchshear.prune"),
    ("ignored_layers", "use exclude= of torchshear.prune, with names"),
    ("num_heads in_channel_groups out_channel_groups channel_groups", f"{_NOT_NEEDED}: heads and groups are found"),
    (
        "prune_num_heads prune_head_dims head_pruning_ratio head_pruning_ratio_dict",
        "use ratio={'heads': 0.25}, or roles=",
    ),
    ("customized_pruners unwrapped_parameters root_module_types forward_fn output_transform", _NOT_NEEDED),
)


def answering(module: str) -> Callable[[str], NoReturn]:
    """Make the `__getattr__` of a package, which says of other tools' names what to use.

    Args:
        module: name of the package.

    Returns:
        A function that raises `OtherToolImportError` where a name of the table is imported, `OtherToolNameError` where
        it is looked up, and AttributeError for any other name.
    """

    def answer(name: str) -> NoReturn:
        if name not in NAMES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name, obj=sys.modules.get(module))
        said = f"{module} has no {name!r}: {NAMES[name]}. docs/migration.md has more."
        # `from ... import` takes an AttributeError for its own, and would drop the message.
        is_import = sys._getframe(1).f_globals.get("__name__") in _IMPORTERS
        raise OtherToolImportError(said) if is_import else OtherToolNameError(said)

    return answer


def missing_method(owner: str, name: str) -> AttributeError:
    """Make the error for a name that an object does not have."""
    if name in METHODS:
        return OtherToolNameError(f"{owner} has no {name!r}: {METHODS[name]}. docs/migration.md has more.")
    return AttributeError(f"{owner!r} object has no attribute {name!r}")


def unknown_keyword(function: str, name: str, expected: str) -> KeywordError:
    """Make the error for a keyword argument that does not exist.

    Args:
        function: what was called.
        name: the keyword.
        expected: the keywords that there are.
    """
    hint = f" Instead of {name!r}: {KEYWORDS[name]}." if name in KEYWORDS else ""
    return KeywordError(f"{function}() has no argument {name!r}; expected {expected}.{hint}")
