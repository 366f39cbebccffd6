"""Requirements of the base installation and of its extras, read from the metadata with the standard library only."""

import importlib.metadata
import operator
import platform
import re
import sys

_COMPARE = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without trailing zeros: (2, 13) for 2.13.0+cpu.

    2.11.0a0, as vendors name their builds of torch, counts as 2.11.
    """
    found = [int(number) for number in re.findall(r"\d+", (re.match(r"[\d.]*", version) or [""])[0])]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def in_range(version: str, specifier: str) -> bool:
    """Return whether a version is in a range such as `>=1.26,<3`."""
    for clause in filter(None, re.split(r"[,\s]+", specifier)):
        found = re.fullmatch(r"([<>=!]=|[<>])([\d.]+)", clause)
        if found is None:
            raise ValueError(f"range {specifier!r} of versions is unknown: >=, <=, >, <, == and != are known, and numbers")
        if not _COMPARE[found[1]](numbers(version), numbers(found[2])):
            return False
    return True


def applies(marker: str, extra: str = "") -> bool:
    """Return whether a requirement with this environment marker applies to this machine and `extra`."""
    values = {
        "platform_system": platform.system(),
        "sys_platform": sys.platform,
        "platform_machine": platform.machine(),
        "extra": extra,
    }
    for clause in filter(None, (clause.strip() for clause in marker.split(" and "))):
        found = re.fullmatch(r"(\w+)\s*([!=]=)\s*[\"']([\w-]*)[\"']", clause)
        if found is None or found[1] not in values:
            raise ValueError(f"marker {marker!r} is unknown: {', '.join(values)} are known, ==, != and `and`")
        if not _COMPARE[found[2]](values[found[1]], found[3]):
            return False
    return True


def requirements(extra: str = "") -> dict[str, str]:
    """Return the version range of each package that the base installation, or `extra`, needs on this machine.

    An extra's packages exclude the base's, and include those of the extras that it contains.
    """
    found: dict[str, str] = {}
    for line in importlib.metadata.requires("tilewright") or ():
        requirement, _, marker = line.partition(";")
        if not applies(marker, extra) or (extra and applies(marker)):
            continue
        name, extras, specifier = re.fullmatch(
            r"([\w.-]+)\s*(?:\[([\w,\s-]*)\])?\s*\(?([^()]*)\)?\s*", requirement.strip()
        ).groups()  # pyright: ignore
        if name == "tilewright":
            for part in extras.split(","):
                found |= requirements(part.strip())
        else:
            found[name] = specifier.strip()
    return found


def extras() -> list[str]:
    """Return the names of the extras of this installation, in alphabetical order."""
    return sorted(importlib.metadata.metadata("tilewright").get_all("Provides-Extra") or ())


def extra_of(package: str, command: str) -> str | None:
    """Return the extra to install for a missing package: the command's own extra if it has the package, else the smallest."""
    preferred = "tokenizer" if command == "tokenizer" else "train"
    sizes = {extra: len(requirements(extra)) for extra in extras() if _module(package) in map(_module, requirements(extra))}
    return preferred if preferred in sizes else min(sizes, key=sizes.__getitem__, default=None)


def _module(package: str) -> str:
    return package.partition(".")[0].replace("-", "_").lower()
