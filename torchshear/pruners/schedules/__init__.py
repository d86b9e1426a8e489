"""Schedules: when something goes while a model trains, and how much of what is asked for in the end."""

from torchshear.pruners.schedules._curves import AGP, Cos, Cube, Exp, Linear, Lottery, OneShot, Poly, Repeated
from torchshear.pruners.schedules._history import History, Renewal, Residuals
from torchshear.pruners.schedules._schedule import Schedule

__all__ = [
    "AGP",
    "Cos",
    "Cube",
    "Exp",
    "History",
    "Linear",
    "Lottery",
    "OneShot",
    "Poly",
    "Renewal",
    "Repeated",
    "Residuals",
    "Schedule",
]
