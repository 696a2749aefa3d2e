"""The language world: generator, corruption, parser and prompts."""

import random

import pytest

from align.demo import language


@pytest.mark.parametrize("seed", range(4))
def test_every_generated_sentence_is_accepted_and_keeps_its_length_limits(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1000):
        text = language.sentence(rng)
        words = text.split(" ")
        assert language.is_grammatical(text), text
        assert words[-1] == "."
        assert language.MIN_WORDS <= len(words) - 1 <= language.MAX_WORDS


def test_the_generator_uses_every_word_and_every_construction() -> None:
    rng = random.Random(0)
    texts = [language.sentence(rng) for _ in range(3000)]
    assert {word for text in texts for word in text.split()} == set(language.VOCABULARY)
    openings = {tuple(text.split()[:3]) for text in texts}
    assert any(words[2] == "that" for words in openings)
    assert any(text.count(" and ") == 2 for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "the cat sleeps .",
        "my small dogs sleep quietly .",
        "two mice help a brave child near the old barn .",
        "the cat that the dogs chase sleeps .",
        "the cat that chases the dogs sleeps .",
        "these children that one girl hears sing and help a king and walk today under many trees .",
        "  the cat   sleeps  . ",
    ],
)
def test_hand_written_good_sentences_are_accepted(text: str) -> None:
    assert language.is_grammatical(text)


_BROKEN = [
    ("", "a sentence has words"),
    (".", "a sentence has words before the full stop"),
    ("the cat sleeps", "a full stop ends it"),
    ("the cat sleeps . .", "one full stop"),
    ("the cat sleeps . the dog sings .", "one sentence"),
    ("the cat sleeps . the", "nothing after the full stop"),
    ("the cat sleeps.", "words are separate"),
    ("The cat sleeps .", "lower case"),
    ("the cat meows .", "known words only"),
    ("cat sleeps .", "a noun has a determiner"),
    ("the the cat sleeps .", "one determiner"),
    ("the small .", "a noun phrase has a noun"),
    ("the small old cat sleeps .", "one adjective"),
    ("the cat small sleeps .", "the adjective precedes the noun"),
    ("the barn sleeps .", "places do nothing"),
    ("a cats sleep .", "a singular determiner takes a singular noun"),
    ("these cat sleeps .", "a plural determiner takes a plural noun"),
    ("the cat sleep .", "a singular subject takes a singular verb"),
    ("the cats sleeps .", "a plural subject takes a plural verb"),
    ("the cat chase the dog .", "a singular subject takes a singular transitive verb"),
    ("the cat .", "a sentence has a predicate"),
    ("the cat chases .", "a transitive verb has an object"),
    ("the cat chases the barn .", "objects are not places"),
    ("the cat sleeps the dog .", "an intransitive verb has no object"),
    ("the cat sleeps sings .", "verbs are joined by and"),
    ("the cat chases two dog .", "objects agree with their determiner"),
    ("the cat quietly sleeps .", "the adverb follows the verb"),
    ("the cat sleeps quietly today .", "one adverb"),
    ("the cat sleeps near the barn quietly .", "the adverb precedes the place"),
    ("the cat sleeps near .", "a preposition has a place"),
    ("the cat sleeps near the dog .", "a preposition takes a place"),
    ("the cat sleeps near many barn .", "places agree with their determiner"),
    ("the cat sleeps near the barn by the lake .", "one place phrase"),
    ("the cat that chase the dog sleeps .", "the verb of a relative agrees with the noun before it"),
    ("the cat that the dogs chases sleeps .", "the verb of a relative agrees with its own subject"),
    ("the cat that the dogs chase sleep .", "the main verb agrees across the relative"),
    ("the cat that the dogs sleep sleeps .", "the verb of a relative is transitive"),
    ("the cat that sleeps sings .", "the verb of a relative is transitive"),
    ("the cat that the dogs chase .", "a relative is no predicate"),
    ("the cat that a dogs chase sleeps .", "the subject of a relative agrees with its determiner"),
    ("the cat sleeps and .", "and joins two predicates"),
    ("the cat sleeps and sing .", "the second verb agrees with the subject"),
    ("the cat helps the dogs and sing .", "the second verb agrees with the subject, not with the object"),
    ("the cat sleeps and the dog sings .", "and joins predicates, not sentences"),
]
"""Sentences that break one rule each, and the rule."""


@pytest.mark.parametrize(("text", "rule"), _BROKEN)
def test_hand_written_bad_sentences_are_rejected(text: str, rule: str) -> None:
    assert not language.is_grammatical(text), rule


def test_the_broken_sentences_use_known_words_so_that_each_breaks_its_own_rule() -> None:
    used = {word for text, _ in _BROKEN for word in text.split()}
    assert used - set(language.VOCABULARY) == {"sleeps.", "The", "meows"}


def test_hardly_any_corrupted_sentence_stays_grammatical_and_all_stay_in_the_vocabulary() -> None:
    rng = random.Random(0)
    texts = [language.corrupt(language.sentence(rng), rng) for _ in range(3000)]
    assert sum(map(language.is_grammatical, texts)) < 0.02 * len(texts)
    for text in texts:
        words = text.split(" ")
        assert words.index(".") == len(words) - 1 > 0
        assert set(words) <= set(language.VOCABULARY)


def test_corruption_leaves_much_of_the_sentence_in_place() -> None:
    rng = random.Random(0)
    num_kept = num_words = 0
    for _ in range(1000):
        words = language.sentence(rng).split()[:-1]
        damaged = language.corrupt(" ".join([*words, "."]), rng).split()
        num_kept += sum(word in damaged for word in words)
        num_words += len(words)
    assert 0.5 < num_kept / num_words < 0.95


def test_a_sentence_of_one_word_can_be_corrupted_without_becoming_empty() -> None:
    rng = random.Random(0)
    for _ in range(200):
        assert len(language.corrupt("cat .", rng).split()) > 1


def test_train_and_heldout_prompts_are_disjoint_and_distinct() -> None:
    split = language.prompts(seed=3)
    assert (len(split.train), len(split.heldout)) == (512, 128)
    assert len({*split.train, *split.heldout}) == 640


def test_prompts_are_beginnings_of_sentences_of_one_to_four_words() -> None:
    split = language.prompts(seed=0)
    rng = random.Random(1)
    short_beginnings = {" ".join(language.sentence(rng).split()[:2]) for _ in range(20_000)}
    texts = split.train + split.heldout
    assert {len(text.split()) for text in texts} == {1, 2, 3, 4}
    assert {text for text in texts if len(text.split()) == 2} <= short_beginnings
    assert not any(text.endswith(".") for text in texts)


def test_equal_seeds_give_equal_worlds_and_other_seeds_other_ones() -> None:
    def draw(seed: int) -> tuple[str, str]:
        rng = random.Random(seed)
        text = language.sentence(rng)
        return text, language.corrupt(text, rng)

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert language.prompts(5) == language.prompts(5)
    assert language.prompts(5) != language.prompts(6)


def test_impossible_numbers_of_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 128"):
        language.prompts(0, num_train=0)
    with pytest.raises(ValueError, match="at least 1, got 512 and 0"):
        language.prompts(0, num_heldout=0)


def test_more_prompts_than_there_are_beginnings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "MAX_PROMPT_WORDS", 1)
    assert len(language.prompts(0, num_train=6, num_heldout=4).train) == 6
    with pytest.raises(ValueError, match="found only 10 of 11 distinct prompts"):
        language.prompts(0, num_train=7, num_heldout=4)
