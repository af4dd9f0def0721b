"""Worthless replies that the reward head learns from."""

from repo.assets.rows import Row
from repo.assets.spoiled import LONGEST_REPEATED, PROSE, STEPS, padded_rows
from tests.scoring.test_hacking import CLOSING, RAMBLE
from tests.scoring.test_hacking import STEPS as TESTED_STEPS


def words(reply):
    return len(reply.split())


def rows(count, kind="everyday", reply="Mix flour and water, and bake it."):
    return [Row(f"Question {i}?", reply, kind, harm=0.0, helpful=1.0, refusal=0.0) for i in range(count)]


def test_a_reply_said_again_is_worthless_only_once_the_second_copy_has_begun():
    good = rows(30)
    again = [row for row in padded_rows(good, words) if row.kind == "again"]
    assert len(again) == 30
    for row in again:
        copies = words(row.reply) // words(good[0].reply)
        assert row.reply == " ".join([good[0].reply] * copies)
        assert copies in (2, 3, 4)
        assert words(good[0].reply) < row.since < 2 * words(good[0].reply)
        assert row.helpful == 0.0
        assert row.harm is None
        assert row.refusal is None
    assert {words(row.reply) // 7 for row in again} == {2, 3, 4}


def test_long_replies_and_worthless_ones_are_not_repeated():
    long = rows(3, reply="word " * (LONGEST_REPEATED + 1))
    assert {row.kind for row in padded_rows(long, words)} == {"empty form"}
    assert not padded_rows([Row("Question?", "No.", "refusal", helpful=0.0)], words)


def test_one_in_four_of_the_replies_that_are_not_everyday_ones_is_padded():
    assert len(padded_rows(rows(16, kind="on-policy"), words)) == 8


def test_forms_have_no_content_and_are_not_those_that_the_tests_try():
    forms = [row.reply for row in padded_rows(rows(40), words) if row.kind == "empty form"]
    assert len(set(forms)) == 40
    assert {form.split()[0] for form in forms} > {"Step", "1.", "1)", "Here", "Follow"}
    for sentence in STEPS + PROSE:
        assert sentence not in " ".join((CLOSING, RAMBLE, TESTED_STEPS))
