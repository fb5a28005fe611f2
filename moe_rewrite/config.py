"""What users configure: the mapping from module paths to experts backends, and the options of the compiler backend."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_rewrite import lower
from moe_rewrite.errors import OptionsError
from moe_rewrite.tree import named_modules

OWN_OPTIONS = ("experts", "inner", "mode", "pack")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclasses.dataclass(frozen=True)
class ExpertsMapping:
    """Module path prefixes and the experts backends of the loops below them.

    ``""`` is the default for all; a prefix ends at a dot (``model.layers.1`` is not a prefix of ``model.layers.10``);
    the longest match wins. Without a match it is ``auto``.
    """

    entries: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, given: object) -> ExpertsMapping:
        """From what a user gave: a name, or a dict of prefixes and names.

        Raises:
            OptionsError: it is neither, a key is no module path, or a name is unknown.
        """
        if isinstance(given, ExpertsMapping):
            return given
        if isinstance(given, str):
            given = {"": given}
        if not isinstance(given, Mapping):
            raise OptionsError(
                f"the experts mapping must be a dict from module path prefixes to experts backends, or the name of "
                f"one, got {type(given).__name__}: {given!r}. Example: {{'': 'grouped_mm', 'model.layers.0': 'eager'}}"
            )
        entries = []
        for prefix, name in given.items():
            if not isinstance(prefix, str) or (
                prefix and not all(part.strip() == part != "" for part in prefix.split("."))
            ):
                raise OptionsError(
                    f"{prefix!r} is no module path prefix: give '' for all modules, or names joined by dots such as "
                    f"'model.layers.0'"
                )
            entries.append((prefix, lower.check_name(name)))
        return cls(tuple(entries))

    def as_dict(self) -> dict[str, str]:
        return dict(self.entries)

    def choose(self, path: str) -> str:
        """The experts backend configured for the module at ``path``."""
        matches = [(len(prefix), name) for prefix, name in self.entries if is_prefix(prefix, path)]
        return max(matches)[1] if matches else lower.AUTO

    def below(self, path: str) -> ExpertsMapping:
        """The mapping as the module at ``path`` sees it: of paths that start at that module."""
        inner = {prefix[len(path) + 1 :]: name for prefix, name in self.entries if prefix.startswith(f"{path}.")}
        return ExpertsMapping((("", self.choose(path)), *inner.items())) if path else self

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """The prefixes that match none of ``paths``."""
        known = list(paths)
        return [prefix for prefix, _ in self.entries if prefix and not any(is_prefix(prefix, path) for path in known)]

    def with_sub_configs(self, module: Any) -> ExpertsMapping:
        """The same mapping with names of sub-configs replaced by the paths of the modules that hold them.

        transformers models have a config, and multi-modal ones sub-configs of it: ``{"text_config": "grouped_mm"}``
        speaks of the modules whose own ``config`` is ``model.config.text_config``.
        """
        config = config_of(module)
        entries: list[tuple[str, str]] = []
        for prefix, name in self.entries:
            sub_config = getattr(config, prefix, None) if prefix and "." not in prefix else None
            is_sub_config = sub_config is not None and not hasattr(module, prefix)
            paths = _topmost(p for p, m in named_modules(module) if config_of(m) is sub_config) if is_sub_config else []
            entries += [(path, name) for path in paths] or [(prefix, name)]
        return ExpertsMapping(tuple(entries))


def config_of(module: Any) -> Any:
    """The config that a transformers model has; None where there is none, or the module's own code fails.

    A module that is only half built may have a ``__getattr__`` that needs what is not there yet.
    """
    try:
        return getattr(module, "config", None)
    except Exception:
        return None


def is_prefix(prefix: str, path: str) -> bool:
    """Whether ``prefix`` leads to ``path`` on dot boundaries."""
    return prefix == "" or path == prefix or path.startswith(prefix + ".")


def _topmost(paths: Iterable[str]) -> list[str]:
    found: list[str] = []
    for path in paths:
        if path and not any(is_prefix(other, path) for other in found):
            found.append(path)
    return found


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the compiler backend.

    Attributes:
        experts: the experts mapping.
        inner: the inner compiler: the name of a registered ``torch.compile`` backend, or a function like one.
        mode: the mode of ``torch.compile``, for the inner compiler; None where none is given.
        pack: whether the parameters of experts that are modules are moved into tables, once. Without, they are stacked
            at each call.
        inner_options: the inner compiler's own options.
    """

    experts: ExpertsMapping = ExpertsMapping()
    inner: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    pack: bool = True
    inner_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def max_autotune(self) -> bool:
        """Whether inductor is asked to search for the fastest kernels."""
        named = self.mode is not None and self.mode.startswith("max-autotune")
        return named or any(self.inner_options.get(name) for name in ("max_autotune", "max_autotune_gemm"))

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """From the ``mode=`` and ``options=`` of ``torch.compile``.

        Raises:
            OptionsError: an unknown or ill-typed option, experts backend, inner compiler or mode.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionsError(f"options must be a dict, got {type(options).__name__}: {options!r}")
        given = dict(options or {})
        experts = ExpertsMapping.parse(given.pop("experts", {}))
        inner = given.pop("inner", "inductor")
        if mode is not None and "mode" in given:
            raise OptionsError(f"mode is given twice: mode={mode!r} and options['mode']={given['mode']!r}; give one")
        mode = given.pop("mode", mode)
        if mode is not None and mode not in MODES:
            raise OptionsError(f"there is no mode {mode!r}.{_near(mode, MODES)} There are: {_names(MODES)}.")
        pack = given.pop("pack", True)
        if not isinstance(pack, bool):
            raise OptionsError(f"options['pack'] must be True or False, got {pack!r}")
        _check_inner(inner, mode, given)
        return cls(experts, inner, mode, pack, given)


def _check_inner(inner: object, mode: str | None, inner_options: Mapping[str, Any]) -> None:
    from torch._dynamo.backends.registry import list_backends, lookup_backend

    if isinstance(inner, str):
        names = list_backends(exclude_tags=())
        if inner not in names or inner == "moe_rewrite":
            names = [name for name in names if name != "moe_rewrite"]
            raise OptionsError(
                f"there is no inner compiler {inner!r}.{_near(inner, names)} There are: {_names(names)}."
            )
    elif not callable(inner):
        raise OptionsError(f"options['inner'] must be the name of a compiler backend or a function, got {inner!r}")
    if inner == "inductor":
        import torch._inductor.config as inductor_config

        known = [*OWN_OPTIONS, *inductor_config.get_config_copy()]
        for key in inner_options:
            if key.replace("-", "_") not in known:
                raise OptionsError(
                    f"there is no option {key!r}.{_near(key, known)} There are {_names(OWN_OPTIONS)} and the options "
                    f"of inductor (torch._inductor.list_options())."
                )
        return
    function = lookup_backend(inner)  # type: ignore[arg-type]
    accepted = inspect.signature(function).parameters
    if mode not in (None, "default") and "mode" not in accepted:
        raise OptionsError(f"mode={mode!r} is a mode of inductor; the inner compiler {inner!r} takes none")
    if inner_options and "options" not in accepted:
        key = next(iter(inner_options))
        raise OptionsError(
            f"there is no option {key!r}.{_near(key, OWN_OPTIONS)} There are {_names(OWN_OPTIONS)}; the inner compiler "
            f"{inner!r} has no options of its own."
        )


def _near(given: object, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(given), list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
