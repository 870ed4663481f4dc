"""Errors for settings that nobody reads, with the names that would have been read.

Hydra refuses `trainer.max_step=1` without saying what is known, and lets `+trainer.max_step=1` pass.
"""

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, cast

from hydra.errors import CompactHydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

TOP_LEVEL_KEYS = (
    *("name", "seed", "lr", "resume"),
    *("quant", "optim", "model", "data", "trainer", "logger", "callbacks"),
)
COLLECTIONS = ("logger", "callbacks")  # {name: object}
ANY = "**"
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_"}


class UnknownSettingError(CompactHydraException):
    """Hydra prints the message of this one without a stack trace."""


class MissingSettingError(CompactHydraException):
    """Hydra prints the message of this one without a stack trace."""


def check_settings(config: DictConfig, known: Collection[str] = TOP_LEVEL_KEYS) -> None:
    """Raises for the first key that is no setting of the recipe, or no argument of the `_target_` beside it.

    known: the recipe's own keys. A setting that has to be given and was not is an error too.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise MissingSettingError(f"no value for {', '.join(missing)}: pass {missing[0]}=...")
    settings = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    _check_keys("", settings, known)
    for key, value in settings.items():
        if key in COLLECTIONS:
            for name, entry in (value or {}).items():
                _check_object(f"{key}.{name}", entry)
        elif isinstance(value, Mapping):
            _check_object(key, value)


@contextmanager
def hints_on_exit(top_level: Collection[str] = TOP_LEVEL_KEYS) -> Iterator[None]:
    """Hydra prints that it does not know a key, and exits; this adds which ones are known."""
    try:
        yield
    except SystemExit as leaving:
        refused = leaving.__context__ and leaving.__context__.__cause__
        if isinstance(refused, ConfigAttributeError | ConfigKeyError) and isinstance(refused.parent_node, DictConfig):
            path = str(refused.full_key).rpartition(".")[0]
            known = _arguments(refused.parent_node) if path else top_level
            if refused.key not in known:  # else Hydra's advice, to put a + before it, is right
                print(_unknown(f"{path}." if path else "", str(refused.key), known), file=sys.stderr)
        raise


def _check_object(path: str, settings: Any) -> None:
    if settings is None:
        return
    if not isinstance(settings, Mapping) or "_target_" not in settings:
        raise UnknownSettingError(f"unknown setting {path!r}: expected the _target_ of an object, got {settings!r}")
    _check_keys(f"{path}.", settings.keys() - HYDRA_KEYS, _arguments(settings))
    for key, value in settings.items():
        if isinstance(value, Mapping) and "_target_" in value:
            _check_object(f"{path}.{key}", value)


def _check_keys(prefix: str, keys: Collection[str], known: Collection[str]) -> None:
    for key in sorted(keys):
        if key not in known and ANY not in known:
            raise UnknownSettingError(_unknown(prefix, key, known))


def _arguments(settings: Mapping) -> list[str]:
    """Names that the _target_ takes, ANY if it takes all; beside no _target_ the keys that are there."""
    if "_target_" not in settings:
        return [str(key) for key in settings]
    parameters = inspect.signature(get_object(settings["_target_"])).parameters.values()
    return [ANY if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters]


def _unknown(prefix: str, key: str, known: Collection[str]) -> str:
    close = get_close_matches(key, known, n=1)
    hint = f" Did you mean {prefix}{close[0]}?" if close else ""
    return f"unknown setting '{prefix}{key}'.{hint} Known are: {', '.join(known)}"
