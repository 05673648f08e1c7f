"""PyTorch's attentions, timed in a process of their own so that a crash is only a missing peer.

Reads a request (JSON) from standard input and writes the answer as the last line of standard
output; `peers` starts it. Needs `torch` with CUDA and, for linear attention, `fla`
(flash-linear-attention).
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable

from lasad_jax.benchmarks.tables import one_line


def softmax() -> Callable:
    """Flash attention, causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attention(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return attention


def lightning() -> Callable:
    """Lightning attention, of the first of 12 layers."""
    from fla.ops.lightning_attn import chunk_lightning_attn

    return lambda q, k, v: chunk_lightning_attn(q, k, v, layer_idx=0, num_layers=12)[0]


def retention() -> Callable:
    """RetNet's retention."""
    from fla.ops.retention import chunk_retention

    return lambda q, k, v: chunk_retention(q, k, v)[0]


ATTENTIONS = {"softmax": softmax, "lightning": lightning, "retention": retention}


def call(attention: Callable, direction: str) -> Callable:
    """What is timed, as a function of (q, k, v, d_o); as `cases.call`."""
    import torch

    def forward(q, k, v, d_o):
        with torch.no_grad():
            return attention(q, k, v)

    def forward_and_backward(q, k, v, d_o):
        # Leaves made here belong to the stream that runs or captures this call.
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        o = attention(*inputs)
        return o.detach(), torch.autograd.grad(o, inputs, d_o)

    return forward if direction == "forward" else forward_and_backward


def draw(shape: tuple[int, ...], dtype: str, num_sets: int, device: str) -> list[tuple]:
    """Sets of q, k, v and d_o."""
    import torch

    torch.manual_seed(0)
    new = lambda: torch.randn(shape, device=device).to(getattr(torch, dtype))
    return [(new() * shape[-1] ** -0.5, new(), new(), new()) for _ in range(num_sets)]


def seconds(round_of_calls: Callable, calls: int, repeats: int, min_seconds: float) -> list[float]:
    """Seconds of one call by CUDA's clock, once for each repeat."""
    import torch

    def timed(rounds: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            results = round_of_calls()
        end.record()
        torch.cuda.synchronize()
        del results
        return 1e-3 * start.elapsed_time(end)

    timed(1)
    rounds = max(1, math.ceil(min_seconds / timed(1)))
    return [timed(rounds) / (rounds * calls) for _ in range(repeats)]


def graph_of(round_of_calls: Callable) -> Callable:
    """A replay of the calls as one CUDA graph: no time of the host counts."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        round_of_calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = round_of_calls()

    def replay():
        graph.replay()
        return results

    return replay


def time_case(attention: Callable, case: dict, request: dict) -> dict:
    """Timings "calls" and "graph", each a list of seconds or a reason why there are none."""
    import torch

    sets = draw(case["shape"], case["dtype"], request["num_sets"], "cuda")
    function = call(attention, case["direction"])
    timed = {}
    one_round = lambda: [function(*inputs) for inputs in sets]
    for name, prepare in {"calls": lambda: one_round, "graph": lambda: graph_of(one_round)}.items():
        try:
            timed[name] = seconds(prepare(), len(sets), request["repeats"], request["min_seconds"])
        except Exception as error:
            timed[name] = one_line(error)
    torch.cuda.empty_cache()
    return timed


def answer(request: dict) -> dict:
    """Times all cases of one peer.

    Args:
      request: "peer", one of ATTENTIONS; "cases", each with "shape" (B, N, H, D), "dtype" and
        "direction"; "repeats", "num_sets" and "min_seconds"; "patience": seconds after which
        no further case is begun.

    Returns:
      "version" of the packages and "cases" as `time_case` returns them, or "missing": why the
      peer cannot run at all.
    """
    start = time.monotonic()
    try:
        import torch

        if not torch.cuda.is_available():
            return {"missing": "this PyTorch sees no GPU"}
        version = f"torch {torch.__version__}"
        attention = ATTENTIONS[request["peer"]]()
        if "fla" in sys.modules:
            version = f"fla {sys.modules['fla'].__version__}, {version}"
    except Exception as error:  # of any kind: importing fla already compiles and probes
        return {"missing": one_line(error)}
    cases = []
    for case in request["cases"]:
        if time.monotonic() - start > request["patience"]:
            cases.append(dict.fromkeys(("calls", "graph"), f"not within {request['patience']} s"))
            continue
        cases.append(time_case(attention, case, request))
        shown = {k: v if isinstance(v, str) else statistics.median(v) for k, v in cases[-1].items()}
        print(request["peer"], case, shown, file=sys.stderr, flush=True)
    return {"version": version, "cases": cases}


if __name__ == "__main__":
    print("\n" + json.dumps(answer(json.load(sys.stdin))))
