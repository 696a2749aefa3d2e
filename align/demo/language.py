"""A small generated language world: sentences with agreement, their corruption, a parser and prompts.

The world gives a complete alignment task without any download: a reference model learns its clean sentences, a policy
learns corrupted ones, and a parser that shares only the word lists with the generator says which text is grammatical.

The grammar, with `n` a number (singular or plural) that all parts marked with it share:

    sentence      = noun phrase(n) [relative(n)] predicate(n) {"and" predicate(n)} "."
    noun phrase(n) = determiner(n) [adjective] noun(n)
    relative(n)   = "that" transitive(n) noun phrase(m)  |  "that" noun phrase(m) transitive(m)
    predicate(n)  = (intransitive(n) | transitive(n) noun phrase(m)) [adverb] [place phrase]
    place phrase  = preposition determiner(m) [adjective] place(m)
"""

import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

Number = Literal["singular", "plural"]

MIN_WORDS = 4
"""Fewest words of a generated sentence, the final "." not counted."""
MAX_WORDS = 14
"""Most words of a generated sentence, the final "." not counted."""
MAX_PROMPT_WORDS = 4
"""Most words of a prompt."""

_NOUNS = {noun: f"{noun}s" for noun in ("bird", "boy", "cat", "dog", "girl", "king")} | {
    "child": "children",
    "mouse": "mice",
}
_PLACES = {place: f"{place}s" for place in ("barn", "hill", "house", "lake", "tree")}
_INTRANSITIVE = {f"{verb}s": verb for verb in ("jump", "sing", "sleep", "wait", "walk")}
_TRANSITIVE = {f"{verb}s": verb for verb in ("chase", "find", "hear", "help", "like")}
_ADJECTIVES = ("big", "brave", "happy", "old", "small", "young")
_ADVERBS = ("again", "often", "quietly", "today")
_PREPOSITIONS = ("behind", "by", "near", "under")


def _by_number(plural_of: dict[str, str]) -> dict[Number, tuple[str, ...]]:
    return {"singular": tuple(plural_of), "plural": tuple(plural_of.values())}


def _unmarked(*words: str) -> dict[Number, tuple[str, ...]]:
    return {"singular": words, "plural": words}


_CLASSES: dict[str, dict[Number, tuple[str, ...]]] = {
    "determiner": {
        "singular": ("a", "every", "one", "this", "the", "my"),
        "plural": ("many", "some", "these", "two", "the", "my"),
    },
    "noun": _by_number(_NOUNS),
    "place": _by_number(_PLACES),
    "intransitive": _by_number(_INTRANSITIVE),
    "transitive": _by_number(_TRANSITIVE),
    "adjective": _unmarked(*_ADJECTIVES),
    "adverb": _unmarked(*_ADVERBS),
    "preposition": _unmarked(*_PREPOSITIONS),
    "that": _unmarked("that"),
    "and": _unmarked("and"),
    ".": _unmarked("."),
}
_CLASS_OF = {word: name for name, words in _CLASSES.items() for number in words for word in words[number]}
_OTHER_NUMBER = {
    form: other
    for pairs in (_NOUNS, _PLACES, _INTRANSITIVE, _TRANSITIVE)
    for singular, plural in pairs.items()
    for form, other in ((singular, plural), (plural, singular))
}

VOCABULARY: tuple[str, ...] = tuple(sorted(_CLASS_OF))
"""The full stop, then every word of the world in alphabetical order."""


def sentence(rng: random.Random) -> str:
    """Draw one grammatical sentence.

    Args:
        rng: source of all randomness; equal states give equal sentences.

    Returns:
        Words separated by single spaces, ending in " .", with `MIN_WORDS` to `MAX_WORDS` words before the full stop.
    """
    while True:
        words = list(_sentence_words(rng))
        if MIN_WORDS <= len(words) <= MAX_WORDS:
            return " ".join([*words, "."])


def _sentence_words(rng: random.Random) -> Iterator[str]:
    number = _draw_number(rng)
    yield from _noun_phrase(rng, number, "noun")
    if rng.random() < 0.25:
        yield from _relative(rng, number)
    yield from _predicate(rng, number)
    while rng.random() < 0.2:
        yield "and"
        yield from _predicate(rng, number)


def _draw_number(rng: random.Random) -> Number:
    return "singular" if rng.random() < 0.5 else "plural"


def _noun_phrase(rng: random.Random, number: Number, head: Literal["noun", "place"]) -> Iterator[str]:
    yield rng.choice(_CLASSES["determiner"][number])
    if rng.random() < 0.35:
        yield rng.choice(_ADJECTIVES)
    yield rng.choice(_CLASSES[head][number])


def _relative(rng: random.Random, number: Number) -> Iterator[str]:
    yield "that"
    other = _draw_number(rng)
    if rng.random() < 0.5:
        yield rng.choice(_CLASSES["transitive"][number])
        yield from _noun_phrase(rng, other, "noun")
    else:
        yield from _noun_phrase(rng, other, "noun")
        yield rng.choice(_CLASSES["transitive"][other])


def _predicate(rng: random.Random, number: Number) -> Iterator[str]:
    if rng.random() < 0.5:
        yield rng.choice(_CLASSES["intransitive"][number])
    else:
        yield rng.choice(_CLASSES["transitive"][number])
        yield from _noun_phrase(rng, _draw_number(rng), "noun")
    if rng.random() < 0.3:
        yield rng.choice(_ADVERBS)
    if rng.random() < 0.4:
        yield rng.choice(_PREPOSITIONS)
        yield from _noun_phrase(rng, _draw_number(rng), "place")


def corrupt(text: str, rng: random.Random) -> str:
    """Damage a sentence so that it is nearly always ungrammatical while most of its words stay in place.

    Three edits, and one more for every three words. Edits may cancel out, so a few results stay grammatical.

    Args:
        text: a sentence of this world, ending in " .".
        rng: source of all randomness.

    Returns:
        The damaged sentence, still ending in " .".
    """
    words = text.split()[:-1]
    for _ in range(3 + len(words) // 3):
        words = _edited(words, rng)
    return " ".join([*words, "."])


def _edited(words: list[str], rng: random.Random) -> list[str]:
    """Replace one word by the other number, by nothing, by itself twice, by a word of the wrong class, or swap two."""
    index = rng.randrange(len(words))
    before, word, after = words[:index], words[index], words[index + 1 :]
    match rng.choice(("number", "number", "lose", "double", "class", "swap")):
        case "number":
            return [*before, _OTHER_NUMBER.get(word, word), *after]
        case "lose" if len(words) > 1:
            return before + after
        case "double":
            return [*before, word, word, *after]
        case "class":
            strangers = [other for other in VOCABULARY[1:] if _CLASS_OF[other] != _CLASS_OF[word]]
            return [*before, rng.choice(strangers), *after]
        case _:
            return [*before, *after[:1], word, *after[1:]]


def is_grammatical(text: str) -> bool:
    """Whether `text` is exactly one complete sentence of the world, judged by recursive descent over its words.

    Surrounding and repeated spaces do not matter; letter case does. Length is not limited here.

    Args:
        text: any text.

    Returns:
        True if the words parse as one `sentence` (see the module's grammar) and nothing follows its full stop.
    """
    try:
        _parse_sentence(_Words(text.split()))
    except _UngrammaticalError:
        return False
    return True


class _UngrammaticalError(Exception):
    """The words read so far cannot begin a sentence."""


class _Words:
    """The words of a text and how many of them the parser has read."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._num_read = 0

    def next_class(self) -> str | None:
        """Class of the next word; None for a word outside the world and at the end."""
        return None if self.all_read() else _CLASS_OF.get(self._words[self._num_read])

    def read(self, word_class: str) -> set[Number]:
        """Read one word of a class and return the numbers it can have."""
        if self.next_class() != word_class:
            raise _UngrammaticalError
        word = self._words[self._num_read]
        self._num_read += 1
        return {number for number, forms in _CLASSES[word_class].items() if word in forms}

    def all_read(self) -> bool:
        return self._num_read == len(self._words)


def _agree(one: set[Number], other: set[Number]) -> set[Number]:
    if not one & other:
        raise _UngrammaticalError
    return one & other


def _parse_sentence(words: _Words) -> None:
    subject = _parse_noun_phrase(words, "noun")
    if words.next_class() == "that":
        _parse_relative(words, subject)
    _parse_predicate(words, subject)
    while words.next_class() == "and":
        words.read("and")
        _parse_predicate(words, subject)
    words.read(".")
    if not words.all_read():
        raise _UngrammaticalError


def _parse_noun_phrase(words: _Words, head: str) -> set[Number]:
    determiner = words.read("determiner")
    if words.next_class() == "adjective":
        words.read("adjective")
    return _agree(determiner, words.read(head))


def _parse_relative(words: _Words, subject: set[Number]) -> None:
    words.read("that")
    if words.next_class() == "transitive":
        _agree(subject, words.read("transitive"))
        _parse_noun_phrase(words, "noun")
    else:
        _agree(_parse_noun_phrase(words, "noun"), words.read("transitive"))


def _parse_predicate(words: _Words, subject: set[Number]) -> None:
    if words.next_class() == "intransitive":
        _agree(subject, words.read("intransitive"))
    else:
        _agree(subject, words.read("transitive"))
        _parse_noun_phrase(words, "noun")
    if words.next_class() == "adverb":
        words.read("adverb")
    if words.next_class() == "preposition":
        words.read("preposition")
        _parse_noun_phrase(words, "place")


class PromptSplit(NamedTuple):
    """Prompts to train on and prompts kept apart to judge by; no text occurs in both, or twice in one."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


def prompts(seed: int, num_train: int = 512, num_heldout: int = 128) -> PromptSplit:
    """Draw distinct sentence beginnings of 1 to `MAX_PROMPT_WORDS` words and split them.

    Args:
        seed: equal seeds give equal splits.
        num_train: prompts to train on, at least 1.
        num_heldout: prompts kept apart, at least 1.

    Returns:
        The split, each side in random order.

    Raises:
        ValueError: a count is below 1, or the world has too few beginnings to be drawn in reasonable time.
    """
    if num_train < 1 or num_heldout < 1:
        raise ValueError(f"num_train and num_heldout must be at least 1, got {num_train} and {num_heldout}")
    rng, wanted = random.Random(seed), num_train + num_heldout
    beginnings: dict[str, None] = {}
    for _ in range(100 * wanted):
        words = sentence(rng).split()[: rng.randint(1, MAX_PROMPT_WORDS)]
        beginnings[" ".join(words)] = None
        if len(beginnings) == wanted:
            break
    if len(beginnings) < wanted:
        raise ValueError(f"found only {len(beginnings)} of {wanted} distinct prompts; ask for fewer")
    texts = rng.sample(list(beginnings), wanted)
    return PromptSplit(tuple(texts[:num_train]), tuple(texts[num_train:]))
