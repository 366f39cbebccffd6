"""The special tokens of a tokenizer: those allowed in a text, their places, and their ids."""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np

from ...errors import UserError
from ..text.specials import SpecialFinder
from .encoder import NO_ID, NO_IDS

Specials = Literal["all"] | Collection[str]


def frozen_choice(argument: str, names: Specials) -> Specials:
    """Return a choice of special tokens as "all" or a frozenset; an invalid one raises a `TypeError`."""
    if names == "all":
        return "all"
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} is {names!r}: expected 'all' or a collection of strings")
    return frozenset(names)


class SpecialTokens:
    """Special tokens with their ids; `finder` finds all of them."""

    def __init__(self, ids: Mapping[str, int]):
        self._ids = ids
        self.finder = SpecialFinder(tuple(ids))

    def borders_in(self, data: np.ndarray, allowed: Specials, disallowed: Specials) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of allowed special tokens in the uint8 text, and their ids: borders for `Encoder`.

        A refused special token in the text raises a `UserError`.
        """
        borders = self._find(data, allowed, disallowed)
        return borders, self.ids_of(data, borders)

    def ids_of(self, data: np.ndarray, borders: np.ndarray) -> np.ndarray:
        """Return the id of each border, uint32; `NO_ID` for an empty border, such as the end of a document."""
        if not len(borders):
            return NO_IDS
        found = borders[::2] < borders[1::2]
        ids = np.full(len(found), NO_ID, np.uint32)
        if len(self._ids) == 1:
            ids[found] = next(iter(self._ids.values()))
        else:
            names = (data[start:end].tobytes().decode() for start, end in borders.reshape(-1, 2)[found].tolist())
            ids[found] = [self._ids[name] for name in names]
        return ids

    def choice(self, allowed: Specials, disallowed: Specials) -> tuple[list[str], list[str]]:
        """Return the allowed and the refused special tokens."""
        allowed, disallowed = frozen_choice("allowed_special", allowed), frozen_choice("disallowed_special", disallowed)
        for names in (allowed, disallowed):
            for name in () if names == "all" else sorted(names, key=repr):
                if name not in self._ids:
                    known = ", ".join(map(repr, self._ids)) or "none"
                    raise UserError(f"{name!r} is not a special token: expected one of {known}")
        rest = [] if allowed == "all" else [name for name in self._ids if name not in allowed]
        # "all" refuses all that are not allowed. A token refused by name is refused even if it is allowed.
        refused = rest if disallowed == "all" else [name for name in self._ids if name in disallowed]
        return [name for name in self._ids if name not in rest and name not in refused], refused

    def _find(self, data: np.ndarray, allowed: Specials, disallowed: Specials) -> np.ndarray:
        if allowed == "all" == disallowed:
            return self.finder.find(data)
        names, refused = self.choice(allowed, disallowed)
        found = SpecialFinder(refused).find(data)
        if len(found):
            name = data[found[0] : found[1]].tobytes().decode()
            raise UserError(
                f"the text holds the special token {name!r} at byte {found[0]}: allow it with allowed_special, or encode it as"
                " text by omitting it from disallowed_special"
            )
        return SpecialFinder(names).find(data)
