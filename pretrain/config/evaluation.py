"""Settings of the evaluation (`eval`): held-out sets, and how they are named."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.common.addresses import userinfo_problems
from data_pipeline.common.distinct_names import lengthen_equal_names
from data_pipeline.common.problems import Problems
from data_pipeline.settings import DataConfig, caption_key_problems
from pretrain.config.paths import normalized_address

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FILE_EXTENSION = re.compile(r"\.(tar|json|txt)$", re.IGNORECASE)
_PATTERN = re.compile(r"[-_.]*[{*].*")
"""Of shards: from its first brace or wildcard on."""
_FALLBACK_NAME = "set"


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A held-out set of shards."""

    name: str
    """Name of the set in tables and TensorBoard."""
    shards: str
    """Its manifest, or the folder that contains it."""
    labels: str = ""
    """Text file with one candidate caption per line for retrieval; empty means the captions of the
    set."""
    caption_keys: tuple[str, ...] | None = None
    """Instead of `data.caption_keys`. All captions under these keys are captions of the image, such
    as the five of COCO under `json:captions`."""

    def problems(self) -> list[str]:
        """An invalid name or caption key, or no shards."""
        messages = userinfo_problems(self.shards, f"eval.sets {self.name!r}")
        if not _NAME.fullmatch(self.name):
            messages.append(
                f"eval.sets has a set named {self.name!r}; use letters, digits and _ . - only"
            )
        if not self.shards:
            messages.append(
                f"eval.sets {self.name!r} has no shards; give a manifest or the folder that "
                f"contains one"
            )
        if self.caption_keys is not None:
            setting = f"eval.sets {self.name!r}: caption_keys"
            messages += caption_key_problems(self.caption_keys, setting)
        return messages

    def data(self, data: DataConfig) -> DataConfig:
        """The settings with which this set is read."""
        if self.caption_keys is None:
            return data
        weights = (1.0,) * len(self.caption_keys)
        return replace(data, caption_keys=self.caption_keys, caption_weights=weights)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out sets."""

    sets: tuple[EvalSet, ...] = ()
    """Held-out sets: addresses of shards, which are named after their last component, or sections
    (`vlmoe settings eval.sets` lists their settings)."""
    batch_size: int = 128
    """Pairs per forward pass during evaluation."""
    caption_samples: int = 200
    """Number of images per set for which captions are generated and compared with the
    references."""

    @classmethod
    def expand_short_forms(cls, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings in which every address in `sets` is a section with a name."""
        entries = mapping.get("sets")
        if not isinstance(entries, list | tuple):
            return mapping
        given = [entry.get("name") for entry in entries if isinstance(entry, Mapping)]
        addresses = [entry for entry in entries if isinstance(entry, str)]
        names = iter(set_names(addresses, [name for name in given if isinstance(name, str)]))
        sets = [
            {"name": next(names), "shards": entry} if isinstance(entry, str) else entry
            for entry in entries
        ]
        return {**mapping, "sets": sets}

    def problems(self) -> list[str]:
        """Numbers that are out of range, and names that are not unique."""
        found = Problems(self, "eval")
        found.at_least(1, "batch_size")
        found.at_least(0, "caption_samples")
        counts = Counter(eval_set.name for eval_set in self.sets)
        for name, count in sorted(counts.items()):
            found.require(
                count == 1, f"eval.sets has {count} sets named {name!r}; names must be unique"
            )
        return found.messages


def set_names(addresses: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """A valid name for the shards at each address: its last component, without an extension
    and what follows a brace or wildcard, or its folder if that is empty.

    Names that would be equal, or are `taken`, contain parent folders too, and if that does not
    distinguish them a number. Only an address that is given twice, in any spelling, has the same
    name twice. Names of relative paths depend on the working directory only if they need its name.

    Args:
        addresses: Manifests, folders, or patterns of shards.
        taken: Names of other sets.
    """
    normalized = [normalized_address(address) if address else "" for address in addresses]
    distinct = list(dict.fromkeys(normalized))
    components = [_components(address) for address in distinct]
    names = lengthen_equal_names(components, _valid_name, taken)
    names = _numbered(names, taken)
    name_of = dict(zip(distinct, names, strict=True))
    return [name_of[address] for address in normalized]


def _components(address: str) -> list[str]:
    """The components of a normalized address that can be part of a name, at least one."""
    if not address:
        return [_FALLBACK_NAME]
    path = address.removeprefix("@")
    components = _split(path.partition("://")[2] if "://" in path else path)
    if len(components) < 2 and "://" not in path:  # parents for a name that is not unique
        components = _split(os.path.abspath(path))
    if components:
        components[-1] = _PATTERN.sub("", _FILE_EXTENSION.sub("", components[-1]))
    return [part for part in components if part] or [_FALLBACK_NAME]


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".", "..")]


def _valid_name(components: Sequence[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(components))
    return name.rstrip("-").lstrip("_.-") or _FALLBACK_NAME


def _numbered(names: Sequence[str], taken: Collection[str]) -> list[str]:
    """The names, with a number after those that an earlier set has."""
    result: list[str] = []
    for name in names:
        unique, number = name, 1
        while unique in result or unique in taken:
            number += 1
            unique = f"{name}-{number}"
        result.append(unique)
    return result
