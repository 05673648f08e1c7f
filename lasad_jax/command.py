"""What commands share: one line for an error, a compilation cache, quiet libraries, sizes."""

import os
import sys
import warnings
from collections.abc import Callable
from logging import LogRecord
from pathlib import Path

import jax
from absl import app, flags, logging
from PIL import Image

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of a TPU pod or Slurm job; elsewhere JAX_COORDINATOR_ADDRESS, "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID say which they are.",
)


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`, an entry point's whole work.

    Errors that a user can mend (a bad value, a missing file, a full disk, a loss that is not
    finite) end the program with status 1 and one line. Compiled programs are kept in the
    user's cache, so that the same command starts faster the next time.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]!r}; flags begin with --")
        try:
            if _DISTRIBUTED.value:
                _join_processes()
            main()
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            sys.exit(f"{type(error).__name__}: {error}")

    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(_is_news)
    # Pillow warns of images above half its limit on pixels; above the limit it refuses them.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lasad_jax"))
    app.run(guarded, flags_parser=_parse_flags)


def rows_and_columns(name: str, words: list[str]) -> tuple[int, int]:
    """The value of a flag: two sizes, or one for both.

    Args:
      name: of the flag, for messages.
      words: as `flags.DEFINE_list` gives them.

    Raises:
      ValueError: other words.
    """
    if not 1 <= len(words) <= 2 or not all(word.isdecimal() for word in words):
        raise ValueError(f"{name}: {','.join(words)!r} must be rows,columns such as 16,24")
    numbers = [int(word) for word in words]
    return numbers[0], numbers[-1]


def _is_news(record: LogRecord) -> bool:
    """Not what Orbax warns of in any case, nor its tracebacks of errors that it raises too."""
    orbax = "orbax" in record.pathname
    words = str(record.msg)
    usual = "is read only" in words or "did not provide metrics" in words
    return not (orbax and (usual or record.exc_info))


def _join_processes() -> None:
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(
        num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID")
    )


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's own parsing, with an unknown --config field named in one line."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        sys.exit(f"--config: no such field: {error.args[0]}")
