"""A seeded generator of children's stories: a corpus of any size for small models, without a download.

A story combines a cast and a plot. The cast (hero, friend, grown-ups, places and things) is sampled once per story. The plot is
a sequence of beats, and each beat has several alternative texts. `stories.txt` contains:

- `# names`: characters, and stems and endings of the names of people and villages.
- `# words`: `slot: word, word, ...`, common words first. An irregular plural, or a gerund, follows a slash.
- `# shared`: beats that several plots use, as `name: one text / another text / ...`; the text `_` is empty.
- `# plots`: `## title` and then the beats; `=` begins a paragraph, `-` continues it, `@name` is a shared beat.

In a text, `(a|b|)` is a random choice. `{toy}`, `{toy+}`, `{a toy}`, `{A toy}` are the slot's word, its second form, and the
word with its article. `{he}` refers to the hero, `{f.he}` to the friend, `{p.he}` to the parent, `{e.he}` to the elder.
"""

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import product

import numpy as np

_DRAW_BITS = 12
_DRAWS = 75  # per story: one for its script, one per table, one per beat; 64 random bits give five draws
_STORIES = 1024  # stories per batch of random bits

_Slots = dict[str, str]
_Table = tuple[_Slots, ...]  # 2**_DRAW_BITS entries; common items occur many times
_Beat = tuple[str, ...]

_PRONOUNS = {"she": ("she", "her", "her", "herself"), "he": ("he", "him", "his", "himself")}

# Exceptions whose sound differs from the spelling: "a useful unicorn", "an hour".
_LIKE_CONSONANT = ("uni", "use", "uku", "eu", "one")
_LIKE_VOWEL = ("hour", "honest", "heir")

_MACROS = {"{pal}": "{friend}{f.the}", "{elder}": "{title} {surname}"}


def _entries(text: str, separator: str) -> dict[str, list[str]]:
    bodies = re.findall(r"^(\S+): (.*(?:\n  .*)*)", text, re.MULTILINE)
    return {key: " ".join(body.split()).split(separator) for key, body in bodies}


def _plural(word: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def _article(word: str) -> str:
    vowel = word.startswith(_LIKE_VOWEL) or (word[0] in "aeiouAEIOUé" and not word.startswith(_LIKE_CONSONANT))
    return "an" if vowel else "a"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]  # str.capitalize would lowercase the rest


def _forms(key: str, entry: str) -> _Slots:
    word, _, second = entry.partition("/")
    phrase = f"{_article(word)} {word}"
    return {
        key: word,
        _upper(key): _upper(word),
        f"a {key}": phrase,
        f"A {key}": _upper(phrase),
        f"{key}+": second or _plural(word),
    }


def _person(role: str, key: str, name: str, pronoun: str) -> _Slots:
    he, him, his, himself = _PRONOUNS[pronoun]
    slots = {"he": he, "him": him, "his": his, "himself": himself, "He": _upper(he), "His": _upper(his)}
    return {key: name} | {role + slot: word for slot, word in slots.items()}


def _compounds(stems: list[str], endings: list[str]) -> list[str]:
    # Rotates the endings, so that common names (the first ones) have different stems.
    turns = range(len(endings))
    return [stem + endings[(i + turn) % len(endings)] for turn in turns for i, stem in enumerate(stems)]


def _table(items: list[_Slots]) -> _Table:
    """Return a table where item k of n has a share near k**(-2/3), as in natural language, by exact integer arithmetic."""
    used = _used_slots()
    items = [{slot: word for slot, word in item.items() if slot in used} for item in items]
    size = 1 << _DRAW_BITS
    return tuple(items[len(items) * i**3 // size**3] for i in range(size))


def _ways(way: str) -> list[str]:
    """Return all variants of a text as templates for the % operator, which is faster than str.format."""
    parts = re.split(r"\(([^)]*)\)", way)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return [re.sub(r"\{([^}]+)\}", r"%(\1)s", "".join(chosen)) for chosen in product(*choices)]


def _beat(start: str, ways: list[str]) -> _Beat:
    told = [_ways(start + way) if way != "_" else [""] for way in ways]
    # Each text has the same share, regardless of its number of variants.
    return tuple(variants[i % len(variants)] for i in range(max(map(len, told))) for variants in told)


@cache
def _sections() -> dict[str, str]:
    text = files("tilewright.train.data").joinpath("stories.txt").read_text(encoding="utf-8")
    for macro, meaning in _MACROS.items():
        text = text.replace(macro, meaning)
    _, *parts = re.split(r"^# (\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@cache
def _used_slots() -> frozenset[str]:
    return frozenset(re.findall(r"\{([^}]+)\}", _sections()["shared"] + _sections()["plots"]))


def _casts() -> list[list[_Table]]:
    """Return the tables of a cast of children and of a cast of animals. Hero and friend come first; later tables override."""
    names, words = _entries(_sections()["names"], ", "), _entries(_sections()["words"], ", ")

    def people(she: list[str], he: list[str]) -> list[tuple[str, str]]:
        return [person for pair in zip(she, he, strict=False) for person in zip(pair, _PRONOUNS, strict=True)]

    girls = names["girl"] + _compounds(names["child-stem"], names["girl-ending"])
    boys = names["boy"] + _compounds(names["child-stem"], names["boy-ending"])
    pets = _compounds(names["pet-stem"], names["pet-ending"])
    children = people(girls, boys)
    animals = people(names["she-animal"] + pets[::2], names["he-animal"] + pets[1::2])
    child = {"near": "in", "others": "children"}
    girl_or_boy = {"she": _forms("kind", "girl") | child, "he": _forms("kind", "boy") | child}
    species = [_forms("kind", kind) for kind in names["species"]]
    villages = _compounds(names["village-stem"], names["village-ending"])
    surnames = _compounds(names["surname-stem"], names["surname-ending"])
    common = [
        *(_table([_forms(slot, word) for word in entries]) for slot, entries in words.items()),
        _table([_person("p.", "parent", *parent.split("/")) for parent in names["parent"]]),
        _table([_person("e.", "title", *title.split("/")) for title in names["title"]]),
        _table([{"surname": surname} for surname in surnames]),
        _table([{"village": village} for village in villages]),
    ]
    return [
        [
            _table([_person("", "name", *person) | girl_or_boy[person[1]] for person in children]),
            _table([_person("f.", "friend", *person) | {"f.the": ""} for person in children]),
            *common,
        ],
        [
            _table([_person("", "name", *person) for person in animals]),
            _table([_person("f.", "friend", *person) for person in animals]),
            *common,
            _table([kind | {"home": kind["kind+"], "near": "near", "others": "animals"} for kind in species]),
            _table([{"f.the": f" the {kind}"} for kind in names["friend"]]),
        ],
    ]


@cache
def _scripts() -> list[tuple[list[_Table], list[_Beat]]]:
    """Return the scripts, every plot with every cast: the tables that its slots use, and its beats."""
    shared = _entries(_sections()["shared"], " / ")

    def beat(start: str, told: str) -> _Beat:
        return _beat(start, shared[told[1:]] if told.startswith("@") else told.split(" / "))

    scripts = []
    casts = _casts()
    for plot in _sections()["plots"].split("## ")[1:]:
        marked = re.findall(r"^([=-]) (.*(?:\n  .*)*)", plot, re.MULTILINE)
        beats = [beat("", "@open"), beat(" ", "@like")]
        beats += [beat("\n\n" if mark == "=" else " ", " ".join(told.split())) for mark, told in marked]
        slots = set(re.findall(r"%\(([^)]+)\)s", "".join("".join(ways) for ways in beats)))
        scripts += [([table for table in cast if not slots.isdisjoint(table[0])], beats) for cast in casts]
    return scripts


def _draws(seed: int) -> Iterator[list[int]]:
    # Raw bits and integer arithmetic, because NumPy guarantees only the raw stream across versions.
    bits = np.random.PCG64(seed)
    shifts = np.arange(0, 64 - _DRAW_BITS + 1, _DRAW_BITS, dtype=np.uint64)
    while True:
        raw = bits.random_raw(_STORIES * _DRAWS // len(shifts))
        draws = (raw[:, None] >> shifts) & np.uint64((1 << _DRAW_BITS) - 1)
        yield from draws.reshape(_STORIES, _DRAWS).tolist()


def generate_stories(seed: int = 0) -> Iterator[str]:
    """Yield an endless stream of stories of 500 to 1,500 bytes. A `seed` (0 or more) gives the same stories everywhere."""
    scripts = _scripts()
    for draws in _draws(seed):
        tables, beats = scripts[draws[0] % len(scripts)]
        slots: _Slots = {}
        for table, draw in zip(tables, draws[1:], strict=False):
            slots.update(table[draw])
        if slots.get("friend") == slots["name"]:
            friends = tables[1]
            slots.update(friends[draws[2] - len(friends) // 2])  # the entry half a table away has another name
        ways = zip(beats, reversed(draws), strict=False)
        yield "".join([beat[draw % len(beat)] for beat, draw in ways]) % slots
