"""Pull a person's details out of a sentence, as strict JSON.

Synthetic data: names, towns and ages come from the package Faker (MIT licence), put into sentence patterns written
for this task. No person in it is real. The held-out people are never seen in training (the split is by full name).
"""

import functools
import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.errors import MissingDependencyError

from .task import Example, Task

if TYPE_CHECKING:
    from faker import Faker

_PATTERNS = (
    "{name} ({age}) lives in {city}.",
    "{name}, {age} years old, is from {city}.",
    "Our guest from {city} is {name}, aged {age}.",
    "{name} moved to {city} at {age}.",
    "At {age}, {name} opened a shop in {city}.",
    "In {city} we met {name}, who is {age}.",
    "{name} turned {age} last week in {city}.",
)


@functools.cache
def _faker() -> "Faker":
    """One generator for the process; `_draw` seeds it before each use, so it carries nothing from call to call."""
    try:
        from faker import Faker
    except ImportError as error:
        raise MissingDependencyError("Task contact_json needs the package faker: pip install faker") from error
    return Faker("en_US")


def _draw(rng: random.Random) -> Example:
    faker = _faker()
    faker.seed_instance(rng.getrandbits(64))
    name = f"{faker.first_name()} {faker.last_name()}"
    city = faker.city()
    age = rng.randint(18, 89)
    sentence = rng.choice(_PATTERNS).format(name=name, age=age, city=city)
    return Example(
        key=name,
        prompt=f"Only JSON with name, age and city: {sentence}",
        completion=json.dumps({"name": name, "age": age, "city": city}),
        extras={},
    )


def check(prediction: str, row: Mapping[str, Any]) -> bool:
    """True when the prediction parses as JSON and equals the gold object: same keys, same values, same types.

    Order of keys and white space are free; prose or a code fence around the JSON is not.
    """
    try:
        predicted = json.loads(prediction)
    except ValueError:
        return False
    gold = json.loads(row["completion"])
    return isinstance(predicted, dict) and predicted == gold and type(predicted["age"]) is int


TASK = Task(
    name="contact_json",
    description="a sentence about a person → JSON (synthetic, Faker)",
    draw=_draw,
    check=check,
    max_new_tokens=40,
)
