"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

import dataclasses
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps to write a trace of.

    Attributes:
      start, stop: the first and the last of them, counted from 1; 0, 0 for none.
    """

    start: int = 0
    stop: int = 0

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """From START:STOP, or nothing.

        Raises:
          ValueError: other words.
        """
        if not text:
            return cls()
        start, _, stop = text.partition(":")
        if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop)):
            raise ValueError(
                f"profile: {text!r} must be START:STOP, the first and the last step of the trace, "
                "such as 100:110"
            )
        return cls(int(start), int(stop))

    def before(self, step: int, folder: Path) -> None:
        """Called before each step; begins the trace, to be written into `folder`."""
        if step == self.start:
            jax.profiler.start_trace(str(folder))

    def after(self, step: int, output: jax.Array) -> None:
        """Called after each step; ends the trace once its last step's output is there."""
        if self.start and step == self.stop:
            output.block_until_ready()
            jax.profiler.stop_trace()
