"""Arithmetic word problems made by rule: a source of mathematics that needs no package.

Every problem states its steps, so a model can learn the form of working something out. They are
of few kinds; the corpus card says so. Source: ours.
"""

import random
from collections.abc import Iterator

PROBLEMS_A_PAGE = 12
_NAMES = (
    "Ada",
    "Bela",
    "Chen",
    "Dora",
    "Emeka",
    "Farid",
    "Greta",
    "Hana",
    "Ivo",
    "Juno",
    "Kofi",
    "Lena",
    "Mira",
    "Noor",
    "Otto",
    "Priya",
    "Rosa",
    "Sami",
    "Tariq",
    "Uma",
    "Viktor",
    "Yuki",
)
_THINGS = (
    "apples",
    "books",
    "buttons",
    "candles",
    "coins",
    "eggs",
    "marbles",
    "nails",
    "pears",
    "pencils",
    "plates",
    "ribbons",
    "seeds",
    "shells",
    "stamps",
    "tiles",
    "tickets",
)


def pages(num_pages: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(id, text) of `num_pages` pages of worked problems; the same for the same seed."""
    rng = random.Random(seed)
    for page in range(num_pages):
        problems = [rng.choice(_KINDS)(rng) for _ in range(PROBLEMS_A_PAGE)]
        yield f"page-{page}", "\n\n".join(problems)


def _sharing(rng: random.Random) -> str:
    name = rng.choice(_NAMES)
    thing = rng.choice(_THINGS)
    friends = rng.randint(2, 12)
    each = rng.randint(3, 40)
    left = rng.randint(0, friends - 1)
    total = friends * each + left
    rest = f" and {left} are left over" if left else ""
    return (
        f"Question: {name} shares {total} {thing} equally among {friends} friends. How many "
        f"does each get, and how many are left over?\n"
        f"Answer: {friends} * {each} = {friends * each}, and {total} - {friends * each} = "
        f"{left}. Each friend gets {each}{rest}."
    )


def _shopping(rng: random.Random) -> str:
    name = rng.choice(_NAMES)
    first, second = rng.sample(_THINGS, 2)
    a = rng.randint(2, 20)
    b = rng.randint(2, 20)
    price_a = rng.randint(1, 15)
    price_b = rng.randint(1, 15)
    total = a * price_a + b * price_b
    paid = (total // 50 + 1) * 50
    return (
        f"Question: {name} buys {a} {first} at {price_a} crowns each and {b} {second} at "
        f"{price_b} crowns each, and pays with {paid} crowns. How much change is due?\n"
        f"Answer: The {first} cost {a} * {price_a} = {a * price_a} crowns. The {second} cost "
        f"{b} * {price_b} = {b * price_b} crowns. Together that is {a * price_a} + "
        f"{b * price_b} = {total} crowns. The change is {paid} - {total} = {paid - total} "
        "crowns."
    )


def _journey(rng: random.Random) -> str:
    name = rng.choice(_NAMES)
    speed = rng.randint(3, 20) * 5
    hours = rng.randint(1, 6)
    more_speed = rng.randint(3, 20) * 5
    more_hours = rng.randint(1, 6)
    one, two = speed * hours, more_speed * more_hours
    return (
        f"Question: {name} travels {hours} hours at {speed} km per hour, then {more_hours} "
        f"hours at {more_speed} km per hour. How far is that?\n"
        f"Answer: The first part is {speed} * {hours} = {one} km. The second part is "
        f"{more_speed} * {more_hours} = {two} km. In all it is {one} + {two} = {one + two} km."
    )


def _percentage(rng: random.Random) -> str:
    thing, percent = rng.choice(_THINGS), rng.randint(1, 19) * 5
    total = rng.randint(2, 60) * 20
    part = total * percent // 100
    return (
        f"Question: Of {total} {thing} in a box, {percent} percent are blue. How many are not "
        f"blue?\nAnswer: {percent} percent of {total} is {total} * {percent} / 100 = {part}. "
        f"So {total} - {part} = {total - part} {thing} are not blue."
    )


def _equation(rng: random.Random) -> str:
    x = rng.randint(-12, 12)
    a = rng.randint(2, 15)
    b = rng.randint(-30, 30)
    left = f"{a}x {'+' if b >= 0 else '-'} {abs(b)}"
    return (
        f"Question: Solve {left} = {a * x + b} for x.\n"
        f"Answer: {'Subtract' if b >= 0 else 'Add'} {abs(b)} on both sides: {a}x = {a * x}. "
        f"Divide by {a}: x = {x}."
    )


def _rectangle(rng: random.Random) -> str:
    width = rng.randint(2, 40)
    longer = rng.randint(1, 30)
    length = width + longer
    return (
        f"Question: A garden is {width} m wide and {longer} m longer than it is wide. What are "
        f"its area and the length of the fence around it?\n"
        f"Answer: The length is {width} + {longer} = {length} m. The area is {width} * "
        f"{length} = {width * length} square metres. The fence is 2 * ({width} + {length}) = "
        f"{2 * (width + length)} m long."
    )


_KINDS = (_sharing, _shopping, _journey, _percentage, _equation, _rectangle)
