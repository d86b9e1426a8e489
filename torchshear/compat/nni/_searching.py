"""NNI's pruners that try: `torchshear.search` under their names and with their arguments."""

import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn

from torch import Tensor, nn

from torchshear._arguments import check_kind, check_one_of
from torchshear._making import PruneResult
from torchshear._other_tools import missing_method
from torchshear.compat.nni._exporting import write_files
from torchshear.compat.nni._first_call import Call, example_inputs, first_call
from torchshear.compat.nni._keywords import refuse_unknown
from torchshear.configs import ConfigList, load_config, parse_config, resolve
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._analyze import analyze
from torchshear.errors import ArgumentError
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._copy import copy_model
from torchshear.pruners.masks import Masks
from torchshear.searching import Annealing, NetAdapt, SearchMethod, SearchResult, Sensitivity
from torchshear.searching._search import search

_BASES: Final = ("l1", "l2", "fpgm")
_ARGUMENTS: Final = "model, config_list, evaluator, optimize_mode, base_algo, args, kwargs, options"


class SearchingPruner:
    """Searches how much each group loses, so that the layers of a config lose its share of channels together.

    `compress` gives a smaller model for real, not a masked one, which would be no faster. The share is of the channels
    of all groups of the selected layers; where entries ask different ones, their mean by channels.

    Args:
        model: the model; it is left as it is.
        config_list: entries of NNI, which may exclude.
        evaluator: called with a candidate; gives a number.
        optimize_mode: "maximize" or "minimize" that number.
        base_algo: how channels are ranked: "l1", "l2" or "fpgm".
        args: example positional arguments. Without any, `evaluator` is called once with a copy of the model, and what
            it calls that with is taken.
        kwargs: example keyword arguments.
        dummy_input: NNI's word for both.
        options: further keywords of `torchshear.search`, as `storage`, `seed`, `trials` and `align`.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Callable[..., float],
        optimize_mode: str = "maximize",
        base_algo: str = "l1",
        *,
        method: SearchMethod,
        finetune: Callable[[nn.Module], Any] | None = None,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        dummy_input: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_module(model)
        check_one_of("optimize_mode", optimize_mode, ("maximize", "minimize"))
        if isinstance(base_algo, str) and base_algo == "level":
            raise ArgumentError("base_algo='level' masks single weights, which makes nothing smaller; use 'l1'.")
        check_one_of("base_algo", base_algo, _BASES)
        if not callable(evaluator):
            raise ArgumentError(f"evaluator is {type(evaluator).__name__}; expected a function of a model.")
        self._model, self._method, self._base_algo = model, method, base_algo
        self._evaluator, self._sign = evaluator, 1.0 if optimize_mode == "maximize" else -1.0
        if finetune is not None and not callable(finetune):
            raise ArgumentError(f"the fine-tuner is {type(finetune).__name__}; expected a function of a model.")
        self._finetune = finetune
        self._entries = parse_config(
            load_config(config_list) if isinstance(config_list, str | os.PathLike) else config_list
        )
        check_kind("options", options, (Mapping, type(None)), "a dictionary of keywords of torchshear.search, or None")
        self._inputs, self._options = example_inputs(args, kwargs, dummy_input), dict(options or {})
        self._found: SearchResult | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Say of methods of other tools what to use instead."""
            raise missing_method(type(self).__name__, name)

    def compress(self) -> nn.Module:
        """Search, once; return the best model, smaller for real.

        Raises:
            TorchshearError: as `torchshear.search`.
        """
        if self._found is None:
            args, kwargs = self._example()
            groups = analyze(trace(self._model, args, kwargs))
            ratios = self._ratios(self._model, groups)
            total = sum(groups[name].width for name in ratios)
            share = sum(groups[name].width * ratio for name, ratio in ratios.items()) / total
            self._found = self._search(self._model, groups, list(ratios), **self._budget(share))
        return self._found.result.model

    def _ratios(self, model: nn.Module, groups: ChannelGroups) -> dict[str, float]:
        """Return the share that the config asks of each group that can lose some.

        Raises:
            ArgumentError: there is none.
        """
        ratios = resolve(model, self._entries, groups, self._base_algo).ratios
        found = {name: ratio for name, ratio in ratios.items() if groups[name].is_prunable}
        if not found:
            raise ArgumentError("the config selects no layer whose channels can go.")
        return found

    def _budget(self, share: float) -> dict[str, Any]:
        """Return the budget of the search, where the config asks for a share of the channels of its layers."""
        return {"ratio": share}

    def _search(self, model: nn.Module, groups: ChannelGroups, chosen: Collection[str], **budget: Any) -> SearchResult:
        """Search the widths of some groups of a model."""
        return search(
            model,
            *self._example(),
            evaluate=self._score,
            method=self._method,
            criterion=self._base_algo,
            finetune=self._finetune,
            exclude=[group.name for group in groups if group.name not in chosen],
            group_reduction="filters",
            **{"progress": False} | self._options | budget,
        )

    @property
    def found(self) -> SearchResult:
        """The search; made by the first use or by `compress`."""
        self.compress()
        assert self._found is not None
        return self._found

    def shrink(self) -> PruneResult:
        """Return the result of the search: the smaller model with its plan and its proof."""
        return self.found.result

    def export_model(
        self,
        model_path: str | os.PathLike[str],
        mask_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write the smaller model.

        Args:
            model_path: for its `state_dict`: of safetensors if the name ends so, else as `torch.save` writes plain
                tensors, for `torch.load(..., weights_only=True)`.
            mask_path: for the masks of the dense model that keep the same, in safetensors.
            onnx_path: for it as ONNX, run in onnxruntime and compared.

        Raises:
            ExportError: the model cannot be written as ONNX, or the file computes something else.
            OutputError: a file cannot be written; what was there before is unchanged.
        """
        result = self.shrink()
        names = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        write_files(
            (model_path, mask_path, onnx_path),
            result.model.state_dict,
            lambda: Masks.of({name: mask for name, mask in result.plan.masks().items() if name in names}),
            lambda: result.model,
            self._example,
        )

    def _score(self, model: nn.Module) -> Any:
        found = self._evaluator(model)
        return self._sign * found if isinstance(found, int | float | Tensor) else found

    def _example(self) -> Call:
        """Return example inputs: the given ones, or those with which the evaluator first calls a model."""
        if self._inputs is None:
            self._inputs = first_call(copy_model(self._model).eval(), self._evaluator)
        if self._inputs is None:
            raise ArgumentError("evaluator does not call the model it is given; give example inputs as args=.")
        return self._inputs


class SensitivityPruner(SearchingPruner):
    """Cuts most where the model is least sensitive, in rounds; see `torchshear.searching.Sensitivity`.

    `evaluator` and `finetuner` are called with the candidate alone, where NNI calls them with `eval_args`, which hold
    the one model that it changes.

    Args:
        model: the model.
        config_list: entries of NNI.
        evaluator: called with a candidate; gives a number, the higher the better.
        finetuner: called with the model of each round.
        base_algo: "l1", "l2" or "fpgm".
        sparsity_per_iter: share of the channels that a round removes.
        acc_drop_threshold: fall of the number that is still safe.
        args: example positional arguments; see `SimulatedAnnealingPruner`.
        kwargs: example keyword arguments.
        options: further keywords of `torchshear.search`.
        **unknown: none; words of NNI that have no meaning here are answered.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Callable[..., float],
        finetuner: Callable[[nn.Module], Any] | None = None,
        base_algo: str = "l1",
        sparsity_per_iter: float = 0.1,
        acc_drop_threshold: float = 0.05,
        *,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **unknown: object,
    ) -> None:
        refuse_unknown("SensitivityPruner", unknown, f"{_ARGUMENTS}, finetuner, sparsity_per_iter, acc_drop_threshold")
        method = Sensitivity(threshold=acc_drop_threshold, step=sparsity_per_iter)
        super().__init__(
            model,
            config_list,
            evaluator,
            base_algo=base_algo,
            method=method,
            finetune=finetuner,
            args=args,
            kwargs=kwargs,
            options=options,
        )


class NetAdaptPruner(SearchingPruner):
    """Cuts one group a round, the one whose cut costs least; see `torchshear.searching.NetAdapt`.

    Args:
        model: the model.
        config_list: entries of NNI.
        short_term_fine_tuner: called with each candidate before it is scored.
        evaluator: called with a candidate; gives a number.
        optimize_mode: "maximize" or "minimize" that number.
        base_algo: "l1", "l2" or "fpgm".
        sparsity_per_iteration: share of the channels that a round removes.
        args: example positional arguments; see `SimulatedAnnealingPruner`.
        kwargs: example keyword arguments.
        options: further keywords of `torchshear.search`.
        **unknown: none; words of NNI that have no meaning here are answered.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        short_term_fine_tuner: Callable[[nn.Module], Any],
        evaluator: Callable[..., float],
        optimize_mode: str = "maximize",
        base_algo: str = "l1",
        sparsity_per_iteration: float = 0.05,
        *,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **unknown: object,
    ) -> None:
        refuse_unknown("NetAdaptPruner", unknown, f"{_ARGUMENTS}, short_term_fine_tuner, sparsity_per_iteration")
        method = NetAdapt(step=sparsity_per_iteration, decay=1.0, rule="score")
        super().__init__(
            model,
            config_list,
            evaluator,
            optimize_mode,
            base_algo,
            method=method,
            finetune=short_term_fine_tuner,
            args=args,
            kwargs=kwargs,
            options=options,
        )


class SimulatedAnnealingPruner(SearchingPruner):
    """Anneals the share of each group, larger groups losing larger shares; see `torchshear.searching.Annealing`.

    Args:
        model: the model.
        config_list: entries of NNI.
        evaluator: called with a candidate; gives a number.
        optimize_mode: "maximize" or "minimize" that number.
        base_algo: "l1", "l2" or "fpgm".
        start_temperature: temperature at the beginning.
        stop_temperature: temperature at the end.
        cool_down_rate: factor of each accepted move.
        perturbation_magnitude: largest change of a share in the first move.
        args: example positional arguments. Without any, `evaluator` is called once with a copy of the model, and what
            it calls that with is taken.
        kwargs: example keyword arguments.
        options: further keywords of `torchshear.search`, as `storage`, `seed`, `trials` and `align`.
        **unknown: none; words of NNI that have no meaning here are answered.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Callable[..., float],
        optimize_mode: str = "maximize",
        base_algo: str = "l1",
        start_temperature: float = 100.0,
        stop_temperature: float = 20.0,
        cool_down_rate: float = 0.9,
        perturbation_magnitude: float = 0.35,
        *,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **unknown: object,
    ) -> None:
        temperatures = "start_temperature, stop_temperature, cool_down_rate, perturbation_magnitude"
        refuse_unknown("SimulatedAnnealingPruner", unknown, f"{_ARGUMENTS}, {temperatures}")
        method = Annealing(
            start=start_temperature, stop=stop_temperature, cooling=cool_down_rate, perturbation=perturbation_magnitude
        )
        super().__init__(
            model,
            config_list,
            evaluator,
            optimize_mode,
            base_algo,
            method=method,
            args=args,
            kwargs=kwargs,
            options=options,
        )
