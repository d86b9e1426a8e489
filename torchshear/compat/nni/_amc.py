"""NNI's AMC pruner."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from torchshear._arguments import check_count, check_kind, check_one_of, check_share
from torchshear.compat.nni._keywords import refuse_unknown
from torchshear.compat.nni._searching import SearchingPruner
from torchshear.configs import ConfigList
from torchshear.errors import ArgumentError
from torchshear.searching import AMC

_FIXED: Final[Mapping[str, float]] = {
    "hidden1": 300,
    "hidden2": 300,
    "lr_a": 1e-4,
    "lr_c": 1e-3,
    "discount": 1.0,
    "bsize": 64,
    "tau": 0.01,
    "rbound": 1.0,
}
"""Settings of the agent that are those of the paper here."""
_UNUSED: Final = (
    "suffix, model_type, dataset, n_calibration_batches, n_points_per_layer, rmsize, window_length, output_dir, debug, "
    "max_episode_length, epsilon, log_dir, keep_intermediate_result, keep_final_result"
)
_ARGUMENTS: Final = (
    "model, config_list, evaluator, val_loader, or total_episode, model, config_list, dummy_input, evaluator; "
    "flops_ratio, lbound, channel_round, train_episode, warmup, init_delta, delta_decay, ddpg_params, target, "
    "pruning_algorithm, finetuner, seed, args, kwargs, options"
)


class AMCPruner(SearchingPruner):
    """An agent learns how much of each group stays, from the scores of whole models; see `torchshear.searching.AMC`.

    Both orders of arguments are taken: `AMCPruner(model, config_list, evaluator, val_loader, flops_ratio=0.5)` of NNI
    2.0 to 2.4, and `AMCPruner(100, model, config_list, dummy_input, evaluator)` of 2.5 and later. The budget is one of
    the whole model: `flops_ratio`, or what `total_sparsity` or `sparsity` of the config leaves.

    Args:
        model: the model; or the number of episodes, with what follows one place later.
        config_list: entries of NNI; without a share they ask for what `flops_ratio` does.
        evaluator: called with `val_loader` and a candidate, without a loader with the candidate alone; gives a number,
            the higher the better.
        val_loader: the loader, or None.
        fifth: the evaluator, where the first is a number of episodes and the fourth are example inputs.
        flops_ratio: share of the operations that stays.
        lbound: smallest share of a group that may stay.
        channel_round: what kept widths are a multiple of.
        train_episode: number of episodes; 800 if not given.
        total_episode: likewise, with a quarter of them as `warmup`.
        warmup: episodes at random; 100 if not given.
        init_delta: noise of the first episode behind them.
        delta_decay: factor of the noise from episode to episode.
        reward: "acc_reward"; the reward is the score.
        target: "flops" or "params".
        pruning_algorithm: how channels are ranked: "l1", "l2" or "fpgm".
        finetuner: called with each candidate before it is scored.
        ddpg_params: `warmup`, `init_delta`, `delta_decay` and `lbound` as above. Sizes and rates of the agent are those
            of the paper.
        seed: seed of the search.
        dummy_input: example inputs; NNI's word for the next two.
        args: example positional arguments. Without any, `evaluator` is called once with a copy of the model, and what
            it calls that with is taken.
        kwargs: example keyword arguments.
        options: further keywords of `torchshear.search`.
        **unknown: none; words of NNI that have no meaning here are answered.

    Raises:
        ArgumentError: an argument is outside what is accepted, or asks for another agent.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: Any,
        config_list: Any,
        evaluator: Any = None,
        val_loader: Any = None,
        fifth: Any = None,
        *,
        flops_ratio: float | None = None,
        lbound: float = 0.2,
        channel_round: int | None = None,
        train_episode: int | None = None,
        total_episode: int | None = None,
        warmup: int | None = None,
        init_delta: float = 0.5,
        delta_decay: float = 0.99,
        reward: str = "acc_reward",
        target: str = "flops",
        pruning_algorithm: str = "l1",
        finetuner: Callable[[nn.Module], Any] | None = None,
        ddpg_params: Mapping[str, Any] | None = None,
        seed: int | None = None,
        dummy_input: Any = None,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **unknown: object,
    ) -> None:
        if isinstance(model, int):
            total_episode, model, config_list = model, config_list, evaluator
            is_evaluator = callable(val_loader) and not isinstance(val_loader, nn.Module) and fifth is None
            evaluator, dummy_input = (val_loader, dummy_input) if is_evaluator else (fifth, val_loader)
            val_loader = fifth = None
        if fifth is not None:
            raise ArgumentError(
                "five arguments by place go with a number of episodes as the first; give others by name."
            )
        check_one_of("target", target, ("flops", "params"))
        if not isinstance(reward, str) or reward != "acc_reward":
            raise ArgumentError(
                f"reward={reward!r}; expected 'acc_reward': a search has a budget, so that the score alone is the "
                f"reward. Count the cost in evaluator if it should matter within the budget."
            )
        if flops_ratio is not None:
            check_share("flops_ratio", flops_ratio)
            config_list = _with_share(config_list, 1 - flops_ratio)
        check_kind("ddpg_params", ddpg_params, (Mapping, type(None)), "a dictionary of settings of the agent, or None")
        for name, count, least in (("channel_round", channel_round, 1), ("seed", seed, 0)):
            if count is not None:
                check_count(name, count, least)
        named = {"warmup": warmup, "init_delta": init_delta, "delta_decay": delta_decay, "lbound": lbound}
        method = _agent(train_episode, total_episode, named, dict(ddpg_params or {}) | unknown)
        self._target = {"flops": "target_macs", "params": "target_params"}[target]
        super().__init__(
            model,
            config_list,
            evaluator if val_loader is None else _on_loader(evaluator, val_loader),
            base_algo=pruning_algorithm,
            method=method,
            finetune=finetuner,
            args=args,
            kwargs=kwargs,
            dummy_input=dummy_input,
            options=options,
        )
        self._options = {"align": channel_round, "seed": 0 if seed is None else seed} | self._options

    def _budget(self, share: float) -> dict[str, Any]:
        return {self._target: 1 - share}


def _agent(
    train_episode: int | None, total_episode: int | None, named: Mapping[str, Any], further: Mapping[str, Any]
) -> AMC:
    """Return the agent that NNI's words describe.

    Args:
        train_episode: number of episodes, 800 of them if neither is given, 100 at random.
        total_episode: likewise, a quarter of them at random.
        named: words with their values.
        further: words of a dictionary or of no meaning; they stand for those above, or must say what is so.

    Raises:
        ArgumentError: a setting is wrong, or not the one that the agent has.
        KeywordError: a word does not exist.
    """
    asked = dict(named)
    for word, value in further.items():
        if word in asked:
            asked[word] = value
        elif word in _FIXED:
            if value != _FIXED[word]:
                raise ArgumentError(
                    f"{word}={value!r:.60}; it is {_FIXED[word]:g} here, as in the paper. Leave it away."
                )
        elif word not in _UNUSED.split(", "):
            refuse_unknown("AMCPruner", {word: value}, _ARGUMENTS)
    episodes = total_episode if total_episode is not None else 800 if train_episode is None else train_episode
    check_count("number of episodes", episodes)
    at_random = (100 if total_episode is None else episodes // 4) if asked["warmup"] is None else asked["warmup"]
    check_count("warmup", at_random, least=0)
    return AMC(
        episodes=episodes,
        warm_up=min(max(1, at_random), episodes),
        least=asked["lbound"],
        noise=asked["init_delta"],
        decay=asked["delta_decay"],
    )


def _with_share(config_list: ConfigList, share: float) -> Any:
    """Return a config whose entries ask for a share, if it is a list of entries that ask for none."""
    if not isinstance(config_list, list) or not all(isinstance(entry, Mapping) for entry in config_list):
        return config_list
    words = ("sparsity", "sparsity_per_layer", "total_sparsity", "sparse_ratio", "exclude")
    return [entry if any(word in entry for word in words) else {"sparsity": share, **entry} for entry in config_list]


def _on_loader(evaluator: Any, val_loader: Any) -> Any:
    """Return an evaluator of a model alone."""
    return (lambda model: evaluator(val_loader, model)) if callable(evaluator) else evaluator
