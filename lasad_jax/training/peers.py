"""Words between the processes of a run, through the key-value store of jax.distributed.

They go over the hosts' network alone: no device waits for them, and a thread may exchange them
while the main thread is in a compilation or a collective.
"""

import jax
from jax._src import distributed


class Peers:
    """The processes of this run; a process alone talks to itself.

    Attributes:
      index, count: of this process, and of all.
    """

    def __init__(self):
        self.index, self.count = jax.process_index(), jax.process_count()
        # Orbax reaches it in the same way: there is no public name for it.
        self._client = distributed.global_state.client if self.count > 1 else None
        self._own = {}

    def tell(self, key: str, value: str) -> None:
        """Puts a word of this process where every process finds it, over the one before."""
        if self._client is None:
            self._own[key] = value
        else:
            self._client.key_value_set(f"lasad_jax/{key}/{self.index}", value, allow_overwrite=True)

    def heard(self, key: str) -> dict[int, str]:
        """What has been told so far, by process."""
        if self._client is None:
            return {0: self._own[key]} if key in self._own else {}
        pairs = self._client.key_value_dir_get(f"lasad_jax/{key}/")
        return {int(name.rsplit("/", 1)[1]): value for name, value in pairs}

    def hear_all(self, key: str, seconds: int) -> list[str]:
        """What every process has told; waits for those that have not.

        Raises:
          RuntimeError: a process has told nothing in time.
        """
        if self._client is None:
            return [self._own[key]]
        get = self._client.blocking_key_value_get
        return [get(f"lasad_jax/{key}/{i}", 1000 * seconds) for i in range(self.count)]

    def meet(self, name: str, seconds: int) -> None:
        """Waits until every process is here; once for each name.

        Raises:
          RuntimeError: a process has not come in time.
        """
        if self._client is not None:
            self._client.wait_at_barrier(f"lasad_jax/{name}", 1000 * seconds)

    def leave(self, seconds: int) -> None:
        """Waits for the others and parts from them, so that nobody takes it for a failure."""
        if self._client is not None:
            self.meet("leave", seconds)
            jax.distributed.shutdown()
