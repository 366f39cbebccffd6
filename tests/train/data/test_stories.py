"""The story generator: reproducible bytes, correct English, and consistent casts and plots."""

import hashlib
import re
from collections import Counter
from itertools import islice

import pytest

from tilewright.train.data import stories
from tilewright.train.data.stories import generate_stories

COUNT = 10_000

# Words whose article depends on the sound and not on the first letter.
CONSONANT_SOUND = re.compile(r"(?:uni|use|uku|eu|one)", re.IGNORECASE)
VOWEL_SOUND = re.compile(r"(?:hour|honest|heir)", re.IGNORECASE)

# A phrase that occurs in one plot only.
PLOT_MARKS = {
    "a lost toy": "took it everywhere",
    "learning something new": "So {0} practiced every day",
    "the storm": "The thunder went BOOM",
    "sharing": "They are mine, all mine!",
    "a sick friend": "A-choo!",
    "baking": "flour, sugar, butter",
    "afraid of the dark": "Good night, dark",
    "the race": "Ready, steady, go!",
    "planting a seed": "as small as a crumb",
    "the secret door": "There was a keyhole, but no key",
    "the broken bridge": "Somebody must do something",
    "the shy new neighbor": "Shy ones often have the most to say",
    "something found": "we are rich!",
    "a night with stars": "It was a shooting star!",
    "making a present": "The best presents are made at home",
    "the stubborn animal": "Has anybody asked it what is wrong",
}


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return list(islice(generate_stories(0), COUNT))


def names(story: str) -> list[str]:
    """Return the names that the opening introduces. There must be exactly one, the hero's."""
    opening = story.split("\n\n")[0]
    patterns = [r"(?:named|called) ([^\W\d_]+)", r"whose name was ([^\W\d_]+)", r"^([^\W\d_]+) was an? "]
    return [match[1] for pattern in patterns if (match := re.search(pattern, opening))]


def test_the_same_seed_gives_the_same_stories(sample: list[str]) -> None:
    assert list(islice(generate_stories(0), 100)) == sample[:100]


def test_stories_are_stable(sample: list[str]) -> None:
    first = "\n".join(sample).encode()[:100_000]
    assert hashlib.sha256(first).hexdigest() == "023966d831cc86cc2613a4d9d43099baeef8fee2093685e11b648a2f7b51438a"


def test_other_seeds_give_other_stories(sample: list[str]) -> None:
    assert set(sample).isdisjoint(islice(generate_stories(1), COUNT))


def test_stories_are_distinct(sample: list[str]) -> None:
    assert len(set(sample)) == COUNT


def test_lengths(sample: list[str]) -> None:
    lengths = [len(story.encode()) for story in sample]
    assert min(lengths) >= 500
    assert max(lengths) <= 1500
    assert 750 < sum(lengths) / COUNT < 1100


def test_every_slot_is_filled(sample: list[str]) -> None:
    text = "\n".join(sample)
    assert not re.search(r"[%{}()|@_/=]", text)
    assert "None" not in text


def test_spacing_and_endings(sample: list[str]) -> None:
    for story in sample:
        assert not re.search(r"  |\n\n\n| \n|\n | [.,!?]", story)
        assert story[0].isupper()
        assert re.search(r'[.!?]"?$', story), story
        assert 3 <= len(story.split("\n\n")) <= 12


def test_quotes_are_closed_within_their_paragraph(sample: list[str]) -> None:
    assert all(paragraph.count('"') % 2 == 0 for story in sample for paragraph in story.split("\n\n"))


def test_sentences_begin_with_a_capital(sample: list[str]) -> None:
    for story in sample:
        assert not re.search(r'(?:^|\n\n|[.!?] |[.!?] ")[a-z]', story), story
        assert not re.search(r'[a-z]\." [a-z]', story), story


def test_articles(sample: list[str]) -> None:
    for story in sample:
        for article, word in re.findall(r"\b([Aa]n?) ([^\W\d_]+)", story):
            vowel = word[0].lower() in "aeioué"
            if word[0].lower() == "u":
                vowel = True
            if CONSONANT_SOUND.match(word):
                vowel = False
            if VOWEL_SOUND.match(word):
                vowel = True
            assert (article.lower() == "an") is vowel, f"{article} {word}"
        assert not re.search(r"\b([Aa]n?|the) (?:an?|the)\b", story)


def test_every_plot_occurs_with_children_and_with_animals(sample: list[str]) -> None:
    scripts = stories._scripts()
    assert len(scripts) == 2 * len(PLOT_MARKS)
    told = {title: [s for s in sample if re.search(mark.format(r"\w+"), s)] for title, mark in PLOT_MARKS.items()}
    for title, found in told.items():
        assert len(found) > 10, title
        assert any("little girl" in story or "little boy" in story for story in found), title
        assert any("the animals" in story or re.search(r"(?:den|burrow|nest) near", story) for story in found), title


def test_every_variant_of_a_beat_occurs() -> None:
    used = [Counter() for _ in stories._scripts()]
    scripts = stories._scripts()
    for draws in islice(stories._draws(0), 100_000):
        index = draws[0] % len(scripts)
        beats = scripts[index][1]
        used[index].update((k, draw % len(beat)) for k, (beat, draw) in enumerate(zip(beats, reversed(draws), strict=False)))
    for counter, (_, beats) in zip(used, scripts, strict=True):
        assert len(counter) == sum(map(len, beats))


def test_each_beat_has_four_variants_and_there_are_enough_draws() -> None:
    for tables, beats in stories._scripts():
        assert all(len(set(beat)) >= 4 for beat in beats)
        # Slots use draws from the beginning, beats from the end.
        assert 1 + len(tables) + len(beats) <= stories._DRAWS


def test_every_slot_of_a_template_has_a_table() -> None:
    known = {slot for tables, _ in stories._scripts() for table in tables for slot in table[0]}
    used = stories._used_slots()
    assert used <= known
    words = stories._entries(stories._sections()["words"], ", ")
    for slot in words:
        assert used & {slot, f"a {slot}", f"A {slot}", f"{slot}+", slot.capitalize()}, f"{slot} is never used"


def test_lists_have_no_duplicates() -> None:
    for section, separator in (("names", ", "), ("words", ", "), ("shared", " / ")):
        for key, entries in stories._entries(stories._sections()[section], separator).items():
            assert len(entries) == len(set(entries)), key


def test_hero_occurs_in_the_last_third(sample: list[str]) -> None:
    for story in sample:
        (name,) = names(story)
        assert name in story[len(story) * 2 // 3 :], story


def test_hero_and_friend_have_different_names(sample: list[str]) -> None:
    for story in sample:
        (name,) = names(story)
        assert not re.search(rf"\b{name} and {name}\b|\b{name} (?:told|saw|found|met) {name}\b", story)


def test_pronouns_fit_the_hero() -> None:
    for (tables, _), draws in islice(zip(stories._scripts() * 50, stories._draws(3), strict=False), 1000):
        slots: dict[str, str] = {}
        for table, draw in zip(tables, draws[1:], strict=False):
            slots.update(table[draw])
        assert (slots["he"], slots["kind"]) not in {("he", "girl"), ("she", "boy")}
        assert slots["near"] == ("in" if slots["kind"] in ("girl", "boy") else "near")


def test_vocabulary() -> None:
    size, words = 0, set()
    for story in generate_stories(0):
        words.update(re.findall(r"[^\W\d_]+", story.lower()))
        size += len(story.encode())
        if size > 10_000_000:
            break
    assert len(words) >= 4500


def test_word_frequencies_fall_like_natural_language(sample: list[str]) -> None:
    counts = Counter(re.findall(r"[^\W\d_]+", "\n".join(sample).lower())).most_common()
    assert counts[10][1] > 20 * counts[500][1] > 100 * counts[5000][1]


@pytest.mark.parametrize(
    ("word", "plural"),
    [("box", "boxes"), ("cherry", "cherries"), ("toy", "toys"), ("bench", "benches"), ("glass", "glasses"), ("dog", "dogs")],
)
def test_regular_plurals(word: str, plural: str) -> None:
    assert stories._plural(word) == plural


@pytest.mark.parametrize(
    ("word", "article"),
    [
        ("apple", "an"),
        ("unicorn", "a"),
        ("honest girl", "an"),
        ("ukulele", "a"),
        ("umbrella", "an"),
        ("éclair", "an"),
        ("Elm", "an"),
    ],
)
def test_article(word: str, article: str) -> None:
    assert stories._article(word) == article
