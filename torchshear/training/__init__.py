"""Pruning while a model trains: a session in the user's own loop, lottery tickets, and pruning in rounds."""

from torchshear.training._lottery import LotteryTicket
from torchshear.training._rounds import RoundsResult, by_criterion, prune_in_rounds
from torchshear.training._rounds_folder import Round

__all__ = ["LotteryTicket", "Round", "RoundsResult", "by_criterion", "prune_in_rounds"]
