"""What the operator is compared with: softmax attention and other linear attentions."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence

import jax

from lasad_jax.benchmarks import torch_peers
from lasad_jax.benchmarks.cases import Case, call, random_tokens
from lasad_jax.benchmarks.tables import one_line
from lasad_jax.benchmarks.timing import NUM_SETS

_IN_JAX = "softmax"
# Names on the command line, and as shown.
PEERS = {
    _IN_JAX: "softmax (jax)",
    "softmax_torch": "softmax (torch)",
    "lightning": "lightning (fla)",
    "retention": "retention (fla)",
}
_IN_TORCH = {"softmax_torch": "softmax", "lightning": "lightning", "retention": "retention"}
# How long one case may take beyond the patience for all; fla tries out many kernels at first.
_LAST_CASE_SECONDS = 120


@dataclasses.dataclass
class PeerTimes:
    """What was found.

    Attributes:
      times: peer as shown -> case -> seconds, once for each repeat.
      skipped: peer -> reason -> the cases without a time.
      versions: peer -> its packages.
    """

    times: dict[str, dict[Case, list[float]]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, peer: str, case: Case, found: list[float] | str) -> None:
        """Enters seconds, or a reason."""
        if isinstance(found, str):
            self.skipped.setdefault(peer, {}).setdefault(found, []).append(str(case))
        else:
            self.times.setdefault(peer, {})[case] = found


def time_peers(
    names: Sequence[str],
    cases: Sequence[Case],
    *,
    repeats: int,
    min_seconds: float,
    patience: float,
    time_calls: Callable[..., list[float]],
) -> PeerTimes:
    """Seconds of each peer in each case, and why those that are not there are not.

    Args:
      names: of PEERS.
      cases: what to time.
      repeats, min_seconds: as in `timing.seconds_per_call`, for peers in PyTorch. They are
        timed both call by call and as a CUDA graph, which is a peer of its own.
      patience: seconds that each of them may take; cases not begun by then are skipped.
      time_calls: (function, input_sets) to seconds, for peers in JAX.
    """
    found = PeerTimes()
    for name in names:
        if name == _IN_JAX:
            for case in cases:
                found.add(PEERS[name], case, _time_softmax(case, time_calls))
            continue
        request = {
            "peer": _IN_TORCH[name],
            "cases": [
                {"shape": case.shape.array, "dtype": case.dtype, "direction": case.direction}
                for case in cases
            ],
            "num_sets": NUM_SETS,
            "repeats": repeats,
            "min_seconds": min_seconds,
            "patience": patience,
        }
        answer = _ask_torch(request)
        if "missing" in answer:
            for case in cases:
                found.add(PEERS[name], case, answer["missing"])
            continue
        found.versions[PEERS[name]] = answer["version"]
        for case, timed in zip(cases, answer["cases"], strict=True):
            found.add(PEERS[name], case, timed["calls"])
            found.add(f"{PEERS[name]} graph", case, timed["graph"])
    return found


def _time_softmax(case: Case, time_calls: Callable) -> list[float] | str:
    """`jax.nn.dot_product_attention`, causal: cuDNN's flash attention on a GPU in bf16."""
    fused = jax.default_backend() == "gpu" and case.dtype == "bfloat16"
    attention = lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn" if fused else "xla"
    )
    try:
        return time_calls(call(attention, case.direction), random_tokens(case, NUM_SETS))
    except Exception as error:
        return one_line(error)


def _ask_torch(request: dict) -> dict:
    if jax.default_backend() != "gpu":
        return {"missing": "needs an NVIDIA GPU"}
    try:
        process = subprocess.run(
            [sys.executable, "-m", torch_peers.__name__],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=request["patience"] + _LAST_CASE_SECONDS,
        )
        return json.loads(process.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"missing": one_line(error)}
