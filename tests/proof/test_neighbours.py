"""Examples in a prompt: the nearest training rows, never the question itself, in the question's own form."""

from __future__ import annotations

from luthier.proof import neighbours
from luthier.proof.neighbours import Neighbours, cut, with_examples
from luthier.spec.data import Chat, Completion, Message, Text


def chat(question: str, answer: str, *before: Message) -> Chat:
    return Chat((*before, Message("user", question), Message("assistant", answer)))


TRAIN = [
    Completion("the weather in Lund is", " rain"),
    Completion("the weather in Oslo is", " snow"),
    Completion("buy two mugs", " order"),
    chat("the weather in Lund is", "rain"),
    Text("the weather in Lund is"),
]


def test_the_nearest_come_first_and_are_of_the_same_kind() -> None:
    [found] = Neighbours(TRAIN).nearest([Completion("the weather in Rome is", " sun")], 2)
    assert {row.prompt for row in found if isinstance(row, Completion)} == {
        "the weather in Lund is",
        "the weather in Oslo is",
    }
    [few] = Neighbours(TRAIN).nearest([chat("weather in Rome", "sun")], 3)
    assert few == [TRAIN[3]]


def test_a_row_that_asks_the_same_is_never_shown() -> None:
    """Also where case and spaces differ: its answer would be given away."""
    [found] = Neighbours(TRAIN).nearest([Completion("The weather  in LUND is", " rain")], 5)
    assert TRAIN[0] not in found
    assert len(found) == 2


def test_no_training_rows_no_examples() -> None:
    assert Neighbours([]).nearest([TRAIN[0]], 3) == [[]]
    assert Neighbours([Text("a")]).nearest([TRAIN[0]], 3) == [[]]


def test_of_many_rows_a_seed_takes_the_same() -> None:
    rows = [Completion(f"row {n} of many", " x") for n in range(neighbours.MOST_ROWS + 50)]
    one, other = Neighbours(rows, 4).rows, Neighbours(rows, 4).rows
    assert one == other
    assert len(one) == neighbours.MOST_ROWS
    assert Neighbours(rows, 5).rows != one


def test_a_plain_prompt_with_examples_is_read_top_down_the_nearest_last() -> None:
    shown = with_examples(Completion("c:", " 3"), [Completion("b:", " 2"), Completion("a:", " 1")])
    assert isinstance(shown, Completion)
    assert shown.prompt == "a: 1\n\nb: 2\n\nc:"
    assert shown.completion == " 3"
    assert cut(" 3\n\nd: 4", " 3") == " 3"
    assert cut(" 3\n\nd: 4", " 3\n\nis more") == " 3\n\nd: 4"


def test_a_chat_with_examples_keeps_its_system_message_first_and_learns_only_its_own_answer() -> None:
    own = chat("c", "3", Message("system", "be brief"))
    shown = with_examples(own, [chat("b", "2", Message("system", "be long")), chat("a", "1")])
    assert isinstance(shown, Chat)
    assert [(turn.role, turn.content) for turn in shown.messages] == [
        ("system", "be brief"),
        ("user", "a"),
        ("assistant", "1"),
        ("user", "b"),
        ("assistant", "2"),
        ("user", "c"),
        ("assistant", "3"),
    ]
    assert [turn.weight for turn in shown.messages if turn.role == "assistant"] == [0, 0, 1]
