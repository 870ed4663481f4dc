"""What a LoRA adapter is: rank, scale, where it goes. The fields have PEFT's names and meanings.

scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.

Sources: LoRA, https://arxiv.org/abs/2106.09685; rsLoRA, https://arxiv.org/abs/2312.03732; DoRA,
https://arxiv.org/abs/2402.09353; PEFT's LoraConfig, https://huggingface.co/docs/peft/package_reference/lora
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

ALL_LINEAR = "all-linear"
_BIASES = ("none", "all", "lora_only")
_INITS = (True, False, "gaussian")
# They leave the base as it was, so that an adapter that began so loads like any other.
_INITS_OF_SAVED = (*_INITS, "eva", "orthogonal")

# Fields of PEFT that say nothing about the adapter, or that only matter where another field is set.
_IGNORED = frozenset(
    ["auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "peft_type", "inference_mode"]
)


@dataclass(frozen=True)
class LoRAConfig:
    """target_modules: "all-linear", a list of suffixes of whole dotted names or globs, or a regular expression.

    A pattern in a list without `*` is a suffix of whole dotted names, one with `*` a glob over the whole name. A string
    is a regular expression over the whole name, or where it is only a name, a suffix; one that is no regular expression
    is a glob. "all-linear" leaves out what conversion always skips: the output embedding, routers, the projections of
    MultiheadAttention. Embeddings are adapted where a pattern names them.
    exclude_modules: patterns of the same kinds. layers_to_transform: indices of layers, layers_pattern: the name of the
    list that holds them; both need a list of target_modules.
    target_parameters: suffixes of the names of fused weights of experts ("experts.gate_up_proj"), each expert of which
    gets an adapter; they have no dropout and no DoRA.
    rank_pattern, alpha_pattern: a regular expression that the name ends with -> r or lora_alpha; the first match wins.
    init_lora_weights: True is B = 0 and A uniform like an nn.Linear, "gaussian" draws A with deviation 1/r, False
    leaves B uniform too.
    bias: which biases train: "none", "all", or "lora_only", those of adapted layers. modules_to_save: modules that
    train whole and are saved with the adapter: those whose names end so, as in PEFT ("norm": also "input_layernorm").
    fan_in_fan_out is found from the layers, whatever is given.
    """

    r: int = 8
    target_modules: str | tuple[str, ...] | None = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    init_lora_weights: bool | str = True
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("modules_to_save", "layers_pattern", "target_parameters"):
            self._set(name, _strings(name, getattr(self, name)))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            value = ALL_LINEAR if isinstance(value, str) and value.lower() == ALL_LINEAR else value
            self._set(name, value if isinstance(value, str) else (_strings(name, value) or None))
        layers = self.layers_to_transform
        self._set("layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers) if layers else None)
        for name in ("rank_pattern", "alpha_pattern"):
            self._set(name, dict(getattr(self, name) or {}))
        self._set("task_type", getattr(self.task_type, "value", self.task_type))  # PEFT's is an enumeration
        self._check_numbers()
        self._check_choices()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"the rank of {name!r} must be a whole number of at least 1, got {rank!r}")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise ValueError(f"the alpha of {name!r} must be a positive number, got {alpha!r}")
        if isinstance(self.lora_dropout, bool) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _compiled(pattern)

    def _check_choices(self) -> None:
        if self.bias not in _BIASES:
            raise ValueError(f"bias must be one of {', '.join(_BIASES)}, got {self.bias!r}")
        if not any(self.init_lora_weights is known or self.init_lora_weights == known != True for known in _INITS):  # noqa: E712
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported; expected True, False or 'gaussian'. "
                "Inits that change the base (pissa, olora, corda, loftq) would make the adapter useless beside the "
                "frozen weights"
            )
        if self.target_modules is None and not self.target_parameters:
            raise ValueError(f"target_modules is empty: name layers, or pass {ALL_LINEAR!r}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names, got a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts, which is not given")

    @classmethod
    def of(cls, config: object) -> "LoRAConfig":
        """From a LoRAConfig, peft.LoraConfig, or the dict of an adapter_config.json.

        ValueError: another method than LoRA, or an option that is set and not supported here, by name.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return cls._of_options(config)
        if type(config).__module__.partition(".")[0] == "peft" and hasattr(config, "to_dict"):
            return cls._of_options({k: v for k, v in config.to_dict().items() if k != "runtime_config"})
        raise TypeError(f"expected LoRAConfig, peft.LoraConfig or a dict of its fields, got {type(config).__name__}")

    @classmethod
    def _of_options(cls, options: Mapping[str, Any]) -> "LoRAConfig":
        kind = options.get("peft_type", "LORA")
        if str(getattr(kind, "value", kind)).upper() != "LORA":
            raise ValueError(f"peft_type={str(kind)!r} is another method than LoRA, which is all that is supported")
        known = {f.name for f in fields(cls)}
        unsupported = {k: v for k, v in options.items() if k not in known | _IGNORED and v}
        if unsupported:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unsupported.items()))
            raise ValueError(f"LoRA options that are not supported: {listed}; supported: {', '.join(sorted(known))}")
        given = {k: v for k, v in options.items() if k in known and v is not None}
        given.setdefault("target_modules", None)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(given.get(name), set | frozenset):
                given[name] = sorted(given[name])
        return cls(**given)

    @classmethod
    def of_saved(cls, options: Mapping[str, Any]) -> "LoRAConfig":
        """The config of a trained adapter: how A and B began no longer matters, unless it changed the base."""
        init = options.get("init_lora_weights", True)
        if init not in _INITS_OF_SAVED:
            raise ValueError(
                f"the adapter began with init_lora_weights={init!r}, which changed the base: it fits the changed base "
                "only. In PEFT, save it with path_initial_model_for_weight_conversion to make it a plain adapter"
            )
        return cls._of_options({**options, "init_lora_weights": True})

    def to_peft(self) -> dict[str, Any]:
        """The fields as plain values, as they stand in adapter_config.json."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in plain.items():
            if isinstance(value, tuple):
                plain[name] = list(value) or None
        return plain | {"peft_type": "LORA", "inference_mode": True}

    def rank(self, name: str) -> int:
        return _first_match(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        return _first_match(self.alpha_pattern, name, self.lora_alpha)

    def scale(self, name: str) -> float:
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, name: str) -> bool:
        """Whether a pattern of target_modules matches and none of exclude_modules does; "all-linear" matches all."""
        if self.target_modules is None or self._saves_whole(name):
            return False
        if any(matches(pattern, name, self.exclude_modules) for pattern in patterns(self.exclude_modules)):
            return False
        return self.named(name) and self._in_layers(name)

    def named(self, name: str) -> bool:
        return any(matches(pattern, name, self.target_modules) for pattern in patterns(self.target_modules))

    def _saves_whole(self, name: str) -> bool:
        """Whether the module of that name is one of modules_to_save or inside one."""
        return any(re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", name) for module in self.modules_to_save)

    def _in_layers(self, name: str) -> bool:
        """The index of the layer is the first number after layers_pattern, or else the first number of the name."""
        if self.layers_to_transform is None:
            return True
        places = [rf"(?:^|.*?\.){place}\.(\d+)\." for place in self.layers_pattern] or [r".*?\.?[^.]*\.(\d+)\."]
        found = next((match for place in places if (match := re.match(place, name))), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def patterns(spec: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if spec is None else (spec,) if isinstance(spec, str) else spec


def matches(pattern: str, name: str, spec: object) -> bool:
    """Whether a pattern matches the name of a module; spec: the string or tuple in which the pattern stands."""
    if pattern == ALL_LINEAR:
        return True
    if isinstance(spec, str) and not re.fullmatch(r"[\w.\-]+", pattern):
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error:
            return fnmatchcase(name, pattern)
    if "*" in pattern:
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def ends_with(pattern: str, name: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern: a regular expression for the end of the name, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_match(table: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for pattern, value in table.items() if ends_with(pattern, name)), otherwise)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rank_pattern, alpha_pattern: {pattern!r} is no regular expression: {error}") from error


def _strings(name: str, value: Iterable[str] | None) -> tuple[str, ...]:
    """One name or several; a set, which has no order, is sorted."""
    names = (value,) if isinstance(value, str) else tuple(sorted(value) if isinstance(value, set) else value or ())
    for item in names:
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name} takes names, got {item!r}")
    return names
