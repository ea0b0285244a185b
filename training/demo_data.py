"""Data of the demo's three tasks, made by small grammars: support-intent, order-json, date-iso.

It does not know models or training; the rows look like anyone's JSONL.
Read first: everything follows from the seed, on every machine and Python; each answer is one exact string, so that a
right answer can be told by comparing.
"""

from __future__ import annotations

import calendar
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from runtime.errors import InvalidInputError
from training.data import TEST_FILE, TRAIN_FILE, Example

NUM_TRAIN = 480
NUM_TEST = 120
_MAX_REPEATS = 500

INTENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "refund_request": (
            "I sent the {item} back {when} and want my money back.",
            "Please refund me for the {item}.",
            "When will I get the refund for my {item}?",
            "The {item} isn't for me, how do I get reimbursed?",
            "I returned the {item} {when}, still no money on my card.",
            "It has been weeks and my refund for the {item} is not here.",
            "Can I get my money back? The {item} was returned {when}.",
        ),
        "late_delivery": (
            "My {item} should have arrived {when}. Where is it?",
            "The {item} I ordered {when} still hasn't come.",
            "Tracking for my {item} has not moved since {when}.",
            "Still waiting for the {item}, it is overdue.",
            "How much longer until the {item} gets here?",
            "No sign of my {item}, it was due {when}.",
            "Your courier promised the {item} {when} and nobody came.",
        ),
        "cancel_order": (
            "Please cancel the {item} I ordered {when}.",
            "I no longer need the {item}, don't ship it.",
            "Can you stop my order of the {item} before it goes out?",
            "I ordered the {item} by mistake {when}, call it off.",
            "Changed my mind, cancel the {item}.",
            "Is it too late to cancel? I bought the {item} {when}.",
            "Stop the {item}, I found one elsewhere.",
        ),
        "change_address": (
            "I moved {when}, send the {item} to my new address.",
            "Wrong street on my order of the {item}, how do I edit it?",
            "Can the {item} go to my office instead of my home?",
            "Please update the shipping address for the {item}.",
            "I typed the wrong postcode for the {item} {when}.",
            "I gave my old address when I bought the {item} {when}.",
            "Deliver the {item} to my parents' house, not to me.",
        ),
        "reset_password": (
            "I forgot my password {when} and cannot log in.",
            "The login page rejects my password since {when}.",
            "Send me a link to set a new password so I can order the {item}.",
            "I'm locked out of my account and need to track the {item}.",
            "The reset email from {when} never came, I can't sign in to buy the {item}.",
            "My password no longer works, and the {item} is in my cart.",
            "How can I change my password? I forgot it {when}.",
        ),
        "payment_failed": (
            "My card was declined when I tried to buy the {item}.",
            "Paying for the {item} gave an error {when}.",
            "The checkout won't accept my card for the {item}.",
            "I tried to pay for the {item} twice {when} and it failed.",
            "Why does my payment for the {item} not go through?",
            "My bank says all is fine, but you refuse my card for the {item}.",
            "The payment page crashed {when} while I was paying for the {item}.",
        ),
        "damaged_item": (
            "The {item} arrived broken {when}.",
            "There is a big crack in the {item} I got {when}.",
            "My new {item} stopped working {when}.",
            "I unpacked the {item} and it was scratched all over.",
            "The {item} came in a crushed box and is dented.",
            "One part of the {item} snapped off {when}.",
            "The {item} was smashed when it got here {when}.",
        ),
        "wrong_item": (
            "I ordered a {item} but got a {other}.",
            "You sent me a {other} instead of the {item}.",
            "The parcel from {when} has a {other}, not my {item}.",
            "This is the wrong colour of {item}.",
            "Why is there a {other} in the box? I bought a {item}.",
            "Somebody else's {other} was delivered, where is my {item}?",
            "The label says {item} but inside is a {other}.",
        ),
        "invoice_copy": (
            "I need an invoice for the {item}.",
            "Can you email me the receipt for the {item} from {when}?",
            "My accountant wants the bill for the {item}.",
            "Where can I download the invoice of {when}? It was a {item}.",
            "Please send a copy of the receipt, I bought the {item} {when}.",
            "I lost the receipt of the {item}, can I have another?",
            "For my taxes I need the invoice of {when}.",
        ),
        "close_account": (
            "Please delete my account, I only wanted the {item}.",
            "How do I close my account? I got my {item} {when}.",
            "Remove all my data, I won't buy another {item}.",
            "I wanted to end my membership {when}, how does that work?",
            "Erase my profile, the {item} was my last purchase.",
            "I'm leaving, please close my account. I still have the {item}.",
            "I asked {when} to have my account deleted.",
        ),
    }
)
_ITEMS = (
    "kettle", "desk lamp", "backpack", "keyboard", "blender", "jacket", "phone case", "tent", "toaster", "headset",
    "desk chair", "bike helmet", "rug", "camera", "monitor", "suitcase", "watch", "speaker", "mattress", "bookshelf",
)  # fmt: skip
_WHEN = ("yesterday", "on Monday", "last week", "on Friday", "two days ago", "this morning", "last month", "on Sunday")
_OPENINGS = ("", "", "Hi, ", "Hello, ", "Good morning. ", "Hey team, ", "Dear support, ")
_CLOSINGS = ("", "", " Thanks.", " Please help.", " Thank you!", " Can you look into it?")

_DRINKS = ("latte", "cappuccino", "espresso", "mocha", "americano", "flat white", "hot chocolate", "green tea", "chai")
_SIZES = {"small": ("small", "little"), "medium": ("medium", "regular"), "large": ("large", "big")}
_QUANTITIES = {
    1: ("one", "1", "a single"),
    2: ("two", "2", "a couple of"),
    3: ("three", "3"),
    4: ("four", "4"),
    5: ("five", "5"),
}
_PLACES = {
    True: ("to go", "to take away", "takeaway"),
    False: ("for here", "to drink in", "to have in"),
}
_ORDERS = (
    "Can I get {quantity} {size} {drink} {place}, please?",
    "{quantity} {size} {drink} {place}",
    "I'd like {quantity} {size} {drink}, {place}.",
    "Hi, {quantity} {drink}, {size}, {place} please.",
    "We'll have {quantity} {size} {drink} {place}, thanks.",
    "{place}: {quantity} {size} {drink}",
    "Make that {quantity} {drink} in {size}, {place}.",
    "Could you do {quantity} {size} {drink} {place}?",
    "uh, {quantity} {size} {drink}... {place}, yes",
)

_ORDINAL_WORDS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
)  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_FIRST_YEAR, _LAST_YEAR = 1990, 2035
_DATES = (
    "the {ordinal} of {month} {year}",
    "{month} {ordinal}, {year}",
    "{month} {day}, {year}",
    "{day} {month} {year}",
    "{day} {short} {year}",
    "{short} {ordinal} {year}",
    "{day}-{short}-{year}",
    "{year}, {month} {day}",
    "the {ordinal} day of {month} in {year}",
)
_CARRIERS = (
    "{date}", "{date}", "on {date}", "The meeting is on {date}.", "invoice dated {date}", "Due by {date}",
    "She was born {date}.", "the lease ends {date}", "Our flight leaves {date} at noon.", "signed {date}, both parties",
    "Start: {date}", "It happened on {date}, I think.",
)  # fmt: skip


def demo_examples(task: str, *, num: int, seed: int) -> tuple[Example, ...]:
    """`num` examples of one demo task; no two inputs are the same, even when case is ignored.

    A larger `num` with the same seed begins with the same examples.

    Args:
        task: one of `DEMO_TASKS`.
        num: how many, >= 1.
        seed: any integer.

    Raises:
        InvalidInputError: an unknown task, or more examples than its grammar has.
    """
    if task not in _GRAMMARS:
        raise InvalidInputError("task", task, f"must be one of {', '.join(DEMO_TASKS)}")
    # Seeding with a string goes through SHA-512, which is the same everywhere; hash() is not.
    rng = random.Random(f"{task}:{seed}")  # noqa: S311 - repeatable data, not secrets
    found: dict[str, Example] = {}
    num_repeats = 0
    while len(found) < num:
        example = _GRAMMARS[task](rng)
        is_new = found.setdefault(example.input.casefold(), example) is example
        num_repeats = 0 if is_new else num_repeats + 1
        if num_repeats == _MAX_REPEATS:
            raise InvalidInputError("num", num, f"the grammar of {task} has fewer different inputs")
    return tuple(found.values())


def write_demo_data(folder: Path, *, seed: int = 7, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> None:
    """Write `<folder>/<task>/{train,test}.jsonl` for all demo tasks; no test input is a train input.

    Args:
        folder: made if missing; files of these names are overwritten.
        seed: decides every row.
        num_train: train rows per task.
        num_test: test rows per task.

    Raises:
        InvalidInputError: more rows than a grammar has.
    """
    for task in DEMO_TASKS:
        examples = demo_examples(task, num=num_test + num_train, seed=seed)
        target = folder / task
        target.mkdir(parents=True, exist_ok=True)
        # The test rows come first, so that more training rows leave them as they are.
        _write_rows(target / TEST_FILE, examples[:num_test])
        _write_rows(target / TRAIN_FILE, examples[num_test:])


def _write_rows(path: Path, examples: tuple[Example, ...]) -> None:
    rows = (json.dumps({"input": row.input, "output": row.output}, ensure_ascii=False) for row in examples)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", newline="\n")


def _support_intent(rng: random.Random) -> Example:
    intent = rng.choice(tuple(INTENTS))
    item, other = rng.sample(_ITEMS, 2)
    sentence = rng.choice(INTENTS[intent]).format(item=item, other=other, when=rng.choice(_WHEN))
    return Example(_as_typed(rng, rng.choice(_OPENINGS) + sentence + rng.choice(_CLOSINGS)), intent)


def _order_json(rng: random.Random) -> Example:
    drink, size = rng.choice(_DRINKS), rng.choice(tuple(_SIZES))
    quantity, to_go = rng.choice(tuple(_QUANTITIES)), rng.choice((True, False))
    text = rng.choice(_ORDERS).format(
        drink=drink if quantity == 1 else _plural(drink),
        size=rng.choice(_SIZES[size]),
        quantity=rng.choice(_QUANTITIES[quantity]),
        place=rng.choice(_PLACES[to_go]),
    )
    order = {"drink": drink, "size": size, "quantity": quantity, "to_go": to_go}
    return Example(_as_typed(rng, text), json.dumps(order, separators=(",", ":")))


def _date_iso(rng: random.Random) -> Example:
    year, month = rng.randint(_FIRST_YEAR, _LAST_YEAR), rng.randint(1, 12)
    day = rng.randint(1, calendar.monthrange(year, month)[1])
    name = _MONTHS[month - 1]
    ordinals = [f"{day}{_ordinal_ending(day)}"] * 2 + list(_ORDINAL_WORDS[day - 1 : day])
    date = rng.choice(_DATES).format(day=day, ordinal=rng.choice(ordinals), month=name, short=name[:3], year=year)
    return Example(_as_typed(rng, rng.choice(_CARRIERS).format(date=date)), f"{year:04}-{month:02}-{day:02}")


def _as_typed(rng: random.Random, text: str) -> str:
    """The text as some people type it: as it is, or all lower case."""
    return text.lower() if rng.random() < 0.3 else text[0].upper() + text[1:]


def _plural(drink: str) -> str:
    return f"cups of {drink}" if drink.endswith("tea") else f"{drink}s"


def _ordinal_ending(day: int) -> str:
    return "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


_GRAMMARS: Mapping[str, Callable[[random.Random], Example]] = MappingProxyType(
    {"date-iso": _date_iso, "order-json": _order_json, "support-intent": _support_intent}
)
DEMO_TASKS: tuple[str, ...] = tuple(_GRAMMARS)
