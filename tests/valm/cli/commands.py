"""The valm command called from tests, and the sizes of the models it trains there."""

from valm.cli import main

THINGS = {"apple": "red", "sea": "blue", "leaf": "green", "lemon": "yellow", "coal": "black", "snow": "white"}
STEPS = ["--steps", "3", "--batch-size", "4"]
SIZE = ["--model", "3x32x4", "--context", "32", *STEPS]


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])
