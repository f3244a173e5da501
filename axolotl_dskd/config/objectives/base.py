"""What the keys of all objectives have in common, and which class is whose by its name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from typing import Annotated, Any, ClassVar

from pydantic import Field

from axolotl_dskd.config.base import Block
from axolotl_dskd.config.samples import SamplesConfig

Weight = Annotated[float, Field(ge=0, le=100)]


class ObjectiveConfig(Block):
    """The keys of one objective; subclasses add theirs, and state their name as its default."""

    #: Every subclass, by its name.
    known: ClassVar[dict[str, type[ObjectiveConfig]]] = {}

    name: str

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        name = cls.model_fields["name"].default
        if not isinstance(name, str):
            return
        known = ObjectiveConfig.known.get(name)
        if known is not None and known.__module__ != cls.__module__:
            raise TypeError(
                f"{cls.__module__} defines an objective named {name!r}, but {known.__module__} has "
                "one of that name. Give `name` another default."
            )
        ObjectiveConfig.known[name] = cls

    def nothing_to_learn(self) -> str | None:
        """Why no term of the objective has a weight, in words; None where one has."""
        return None

    def refuses(self, samples: SamplesConfig) -> str | None:
        """Why it cannot learn from rows that are drawn like this, in words; None where it can."""
        return None


def objective_config(value: Any) -> Any:
    """The typed keys of an objective, from its name alone or from a block with its name.

    Raises:
        ValueError: no name, an unknown one, or a module that defines no objective.
    """
    if isinstance(value, ObjectiveConfig):
        return value
    block = {"name": value} if isinstance(value, str) else value
    if not isinstance(block, dict) or not isinstance(block.get("name", "dual_space"), str):
        raise ValueError(
            f"dskd.objective is {value!r}. Write a name, such as `objective: uld`, or a block with "
            "a `name:`."
        )
    name = block.get("name", "dual_space")
    kind = ObjectiveConfig.known.get(name)
    if kind is None and ("." in name or importlib.util.find_spec(name) is not None):
        kind = _from_module(name)
    if kind is None:
        names = ", ".join(sorted(ObjectiveConfig.known))
        close = difflib.get_close_matches(name, ObjectiveConfig.known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"dskd.objective: there is no objective {name!r}.{hint} Known: {names}; or name a "
            "module of your own by its dotted path."
        )
    return kind.model_validate({**block, "name": name})


def _from_module(path: str) -> type[ObjectiveConfig]:
    try:
        importlib.import_module(path)
    except ImportError as error:
        raise ValueError(
            f"dskd.objective: the module {path!r} cannot be imported: {error}. Name an objective "
            "of this package, or a module on Python's path that defines one."
        ) from error
    defined = [kind for kind in ObjectiveConfig.known.values() if kind.__module__ == path]
    if len(defined) != 1:
        raise ValueError(
            f"dskd.objective: the module {path!r} defines {len(defined)} subclasses of "
            "ObjectiveConfig with a name; one is needed."
        )
    return defined[0]
