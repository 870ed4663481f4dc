"""What the processes of a run tell each other beside their gradients: through the store that started their group.

A collective has to be called by all ranks, in one order; where one rank is alone (it failed and saves what it has) the
others never come, and the device is not free for it. A store has neither trouble: each rank writes under its own key,
and rank 0 waits for the keys of the others, but not for ever.
"""

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

START_PATIENCE = timedelta(minutes=30)  # ranks load and quantise their models at different speeds; torch's own timeout
_FAREWELL = timedelta(seconds=10)  # rank 0 holds the store, which the others still read the refusal from
_LONGEST_PAUSE = 0.25
_SHOWN = 5
_NO_ANSWER = "no answer"

Facts = Mapping[str, str]


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def gathered_on_first(name: str, value: bytes, patience: timedelta) -> tuple[list[bytes], list[int]]:
    """The values of all ranks in order, and which ranks sent none in time, then without values; both empty elsewhere.

    Each rank's n-th call with a name belongs to the n-th of every other rank, so a name that tells the moment keeps
    ranks together of which one called alone before.
    """
    store, base = _call(name)
    store.set(f"{base}/{dist.get_rank()}", value)  # type: ignore[arg-type]
    if dist.get_rank() != 0:
        return [], []
    keys = [f"{base}/{rank}" for rank in range(dist.get_world_size())]
    absent = _absent(store, keys, patience)
    if absent:
        return [], absent
    values = [store.get(key) for key in keys]
    for key in keys:
        store.delete_key(key)
    return values, []


def check_same(name: str, facts: Facts, patience: timedelta = START_PATIENCE) -> None:
    """ValueError on every rank, that names rank and differences, unless the facts of all ranks are those of rank 0.

    TimeoutError that names the ranks which gave none within `patience`.
    """
    if world_size() == 1:
        return
    store, base = _call(name)
    keys = [f"{base}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], zlib.compress(json.dumps(dict(facts)).encode()))  # type: ignore[arg-type]
    if dist.get_rank() != 0:
        verdict = _verdict(store, f"{base}/verdict", patience)
        store.set(f"{base}/read/{dist.get_rank()}", "")
    else:
        absent = _absent(store, keys, patience)
        verdict = _missing(absent, patience) if absent else differences([_read(store, key) for key in keys])
        store.set(f"{base}/verdict", verdict)
        if verdict:
            others = [rank for rank in range(1, dist.get_world_size()) if rank not in absent]
            _absent(store, [f"{base}/read/{rank}" for rank in others], _FAREWELL)
    if verdict:
        raise (TimeoutError if verdict.startswith(_NO_ANSWER) else ValueError)(verdict)


def differences(of_ranks: Sequence[Facts]) -> str:
    """What to tell of ranks that differ from the first, or nothing."""
    first, told = of_ranks[0], []
    for rank, facts in enumerate(of_ranks):
        names = sorted(name for name in first.keys() | facts.keys() if first.get(name) != facts.get(name))
        pairs = [(name, facts.get(name, "absent"), first.get(name, "absent")) for name in names]
        if pairs:
            parts = [f"{name} is {value} (rank 0: {expected})" for name, value, expected in pairs]
            told.append(f"rank {rank} differs from rank 0: {_first_few(parts, '; ')}")
    if not told:
        return ""
    return f"{_first_few(told, '. ')}. Start every process with the same configuration, on the same versions"


def _first_few(parts: Sequence[str], separator: str) -> str:
    more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return separator.join([*parts[:_SHOWN], *more])


def _call(name: str) -> tuple["dist.Store", str]:
    """The store, and the place in it of this rank's next call with a name; the count lives as long as the store."""
    store = dist.PrefixStore("lq_plugin", dist.distributed_c10d._get_default_store())
    return store, f"{name}/{store.add(f'{name}/calls/{dist.get_rank()}', 1)}"


def _absent(store: "dist.Store", keys: Sequence[str], patience: timedelta) -> list[int]:
    """Positions of the keys that nobody has written within `patience`; a `wait` would hold the store's lock."""
    end, pause = time.monotonic() + patience.total_seconds(), 0.001
    while not store.check(list(keys)):
        if time.monotonic() > end:
            return [position for position, key in enumerate(keys) if not store.check([key])]
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return []


def _read(store: "dist.Store", key: str) -> Facts:
    return json.loads(zlib.decompress(store.get(key)))


def _verdict(store: "dist.Store", key: str, patience: timedelta) -> str:
    """Waits longer than rank 0, which first tells who is missing."""
    if _absent(store, [key], patience + _FAREWELL):
        return _missing([0], patience + _FAREWELL)
    return store.get(key).decode()


def _missing(absent: Sequence[int], patience: timedelta) -> str:
    names = _first_few(list(map(str, absent)), ", ")
    seconds = f"{patience.total_seconds():.0f} s"
    return f"{_NO_ANSWER} from rank {names} within {seconds}: it failed or hangs, and its own log tells why"
