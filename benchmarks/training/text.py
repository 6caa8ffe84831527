"""English made by seeded code: enough of it, regular enough to be learnt, and nobody's.

A piece of text follows from its seed alone: Python's `random.Random` gives the same numbers on every machine.
Does not know: tokens, models.
"""

from __future__ import annotations

import random

MAKERS = ("Amati", "Brescia", "Cremona", "Dresden", "Ferrara", "Genoa", "Lyon", "Mirecourt", "Naples", "Padua")
THINGS = ("violin", "viola", "cello", "lute", "guitar", "mandolin", "double bass", "harp", "zither", "bow")
PARTS = ("bridge", "neck", "soundpost", "peg", "tailpiece", "fingerboard", "scroll", "bass bar", "nut", "saddle")
FAULTS = ("cracked", "loose", "warped", "worn", "missing", "swollen", "split", "bent", "chipped", "unglued")
WOODS = ("spruce", "maple", "ebony", "rosewood", "willow", "boxwood", "pear", "cedar")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
PEOPLE = ("Ada", "Bruno", "Clara", "Dario", "Elena", "Fritz", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Luca")

ORDER = (
    "{person} brought a {thing} from {maker} on {day}; its {part} is {fault}.",
    "The {part} of the {thing} is {fault}, and {person} needs it back by {day}.",
    "Could you look at a {thing}? The {part} seems {fault} since {day}.",
    "{person} asks what a new {part} of {wood} for the {thing} from {maker} would cost.",
    "This {thing} has {number} cracks beside the {part}, and the {wood} is {fault}.",
)
ANSWER = (
    "Take the {thing} to bench {number} and replace the {part} with one of {wood}.",
    "A {fault} {part} takes {number} hours; {person} can have the {thing} back on {day}.",
    "For a {thing} from {maker} we use {wood}, never {wood2}, for the {part}.",
    "Write to {person}: the {part} costs {number} crowns and is ready on {day}.",
    "First loosen the strings, then lift the {part}, and check the {wood} below it for cracks.",
)
RULE = (
    "When the {part} of a {thing} is {fault}, it goes to bench {number} before {day}.",
    "{wood} from {maker} is kept for the {part} of a {thing} and for nothing else.",
    "{person} decides about every {thing} that is older than {number} years.",
    "A {fault} {part} is never glued on a {day}, for the workshop is too damp then.",
    "The price of a {part} of {wood} is {number} crowns, of {wood2} {number2} crowns.",
)
STORY = (
    "In {maker} the makers cut {wood} for a {thing} only when the moon was {number} days old.",
    "{person} kept a {thing} whose {part} had been {fault} for {number} years, and played it every {day}.",
    "It is said that the {wood} of the {part} gives a {thing} its voice, but {person} of {maker} did not believe it.",
    "After {number} winters the {part} was {fault}, so {person} carved another of {wood2} and sold the {thing}.",
    "The road from {maker} took {number} days, and on {day} the cart lost a {thing} with a {fault} {part}.",
)
KINDS = {"order": ORDER, "answer": ANSWER, "rule": RULE, "story": STORY}


def sentences(kind: str, seed: str, count: int) -> str:
    """`count` sentences of a kind, one space between them."""
    chance = random.Random(f"{kind} {seed}")
    return " ".join(_sentence(kind, chance) for _ in range(count))


def _sentence(kind: str, chance: random.Random) -> str:
    pattern = chance.choice(KINDS[kind])
    said = pattern.format(
        person=chance.choice(PEOPLE),
        thing=chance.choice(THINGS),
        part=chance.choice(PARTS),
        fault=chance.choice(FAULTS),
        maker=chance.choice(MAKERS),
        wood=chance.choice(WOODS),
        wood2=chance.choice(WOODS),
        day=chance.choice(DAYS),
        number=chance.randint(2, 98),
        number2=chance.randint(2, 98),
    )
    return said[0].upper() + said[1:]
