"""What calls may cost: a reservation before each call, its settlement after -> a cap that holds with many at once."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from alignlab.errors import UserError


@dataclass(frozen=True, slots=True)
class Spent:
    """What has been used so far."""

    calls: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    """US dollars by the given prices; None without prices."""

    def __str__(self) -> str:
        money = "" if self.cost is None else f", ${self.cost:.4f}"
        return f"{self.calls} calls, {self.input_tokens} + {self.output_tokens} tokens{money}"


class OverBudget(UserError):
    """The next call would go over a cap."""


class Budget:
    """Calls and money that may be spent. Every attempt counts as a call, also one that fails.

    A call reserves the most that it can cost, and what it did cost takes the place of that once it is known. A call
    that finds too little left waits while others may still give some back, and is refused when none can.
    """

    def __init__(self, *, max_calls: int | None, max_cost: float | None, prices: tuple[float, float] | None) -> None:
        """`prices` are US dollars a million tokens, of input and output."""
        self.max_calls, self.max_cost, self.prices = max_calls, max_cost, prices
        self._calls = self._input = self._output = self._open = 0
        self._cost = self._reserved = 0.0
        self._changed = threading.Condition()

    def reserve(self, input_tokens: int, output_tokens: int) -> float:
        """Counts a call that is about to be made; what `settle` takes.

        Args:
            input_tokens: the most that it can send; `output_tokens` the most that it can bring.

        Raises:
            OverBudget: a cap would be broken.
        """
        most = self._price(input_tokens, output_tokens)
        with self._changed:
            while True:
                if self.max_calls is not None and self._calls >= self.max_calls:
                    raise OverBudget(f"max_calls is {self.max_calls}")
                if self.max_cost is None or self._cost + self._reserved + most <= self.max_cost:
                    break
                if not self._open:
                    raise OverBudget(f"max_cost is ${self.max_cost:g} and the next call may cost ${most:.4f}")
                self._changed.wait(0.5)
            self._calls += 1
            self._open += 1
            self._reserved += most
        return most

    def settle(self, reserved: float, input_tokens: int, output_tokens: int) -> None:
        """A call is over; it used these tokens (0 and 0 where it was turned away)."""
        with self._changed:
            self._open -= 1
            self._reserved -= reserved
            self._input += input_tokens
            self._output += output_tokens
            self._cost += self._price(input_tokens, output_tokens)
            self._changed.notify_all()

    def spent(self) -> Spent:
        with self._changed:
            return Spent(self._calls, self._input, self._output, self._cost if self.prices else None)

    def _price(self, input_tokens: int, output_tokens: int) -> float:
        if self.prices is None:
            return 0.0
        return (input_tokens * self.prices[0] + output_tokens * self.prices[1]) / 1e6
