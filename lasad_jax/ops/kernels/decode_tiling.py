"""How the products of decoding are cut into tiles for a Hopper GPU. See `decode_product`."""

import dataclasses

ROWS = 64  # of a warpgroup
PAIR = 32  # columns of gate, then of up
SHARED_MEMORY = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Tiling:
    rows: int
    columns: int
    stages: int
    cluster: tuple[int, int] = (1, 1)
    split: int = 1
    depth: int = 64

    def cluster_size(self, axis):
        return self.cluster["mn".index(axis)]

    def obstacle(self, K, N, *, gated=False, normed=False):
        return None


def tiling(M, K, N, *, gated=False, normed=False):
    return Tiling(64, 64, 8)
