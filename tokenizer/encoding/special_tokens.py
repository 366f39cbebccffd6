"""The special tokens of a tokenizer: which of them a text may hold, where it holds them, and their ids."""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np

from ...errors import UserError
from ..text.specials import SpecialFinder
from .encoder import NO_ID, NO_IDS

Specials = Literal["all"] | Collection[str]


def chosen(argument: str, names: Specials) -> Specials:
    """Return a choice of special tokens that can be asked again and again; what is none raises a `TypeError`."""
    if names == "all":
        return "all"
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} is {names!r}: 'all' or a collection of strings is needed")
    return frozenset(names)


class SpecialTokens:
    """Special tokens, given with their ids; `finder` finds all of them."""

    def __init__(self, ids: Mapping[str, int]):
        self._ids = ids
        self.finder = SpecialFinder(tuple(ids))

    def borders_in(self, data: np.ndarray, allowed: Specials, disallowed: Specials) -> tuple[np.ndarray, np.ndarray]:
        """Return where the uint8 text holds special tokens that are allowed, and their ids: borders as `Encoder` takes them.

        One that is refused raises a `UserError`.
        """
        borders = self._find(data, allowed, disallowed)
        return borders, self.ids_of(data, borders)

    def ids_of(self, data: np.ndarray, borders: np.ndarray) -> np.ndarray:
        """Return the id of each border, uint32; `NO_ID` for one without a byte, as there may be where a document ends."""
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
        """Return the special tokens that are allowed, and those that are refused."""
        allowed, disallowed = chosen("allowed_special", allowed), chosen("disallowed_special", disallowed)
        for names in (allowed, disallowed):
            for name in () if names == "all" else sorted(names, key=repr):
                if name not in self._ids:
                    known = ", ".join(map(repr, self._ids)) or "none"
                    raise UserError(f"{name!r} is no special token: there are {known}")
        rest = [] if allowed == "all" else [name for name in self._ids if name not in allowed]
        # "all" are all that are not allowed; what is refused by name is refused, allowed or not.
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
                f"the text holds the special token {name!r} at byte {found[0]}: allow it with allowed_special, or leave it out"
                " of disallowed_special to have it encoded as text"
            )
        return SpecialFinder(names).find(data)
