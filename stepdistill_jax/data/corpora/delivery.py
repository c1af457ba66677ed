"""The built-in dataset: short reports of deliveries, labelled by a hidden rule of two steps.

From 1,500 examples, a tiny model learns the rule with rationales, but not from labels alone.
"""

import itertools

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.reading import CheckedExample, Reading
from stepdistill_jax.runtime.fingerprints import hash64

VERSION = 1
ROWS = {"train": 1500, "validation": 500, "test": 500}

WEATHER = {
    "wet": "rain sleet drizzle fog snow hail storm showers mist slush thunder downpour",
    "dry": "sun breeze heat drought haze sunshine dust wind glare pollen sunset starlight",
}
VEHICLE = {
    "heavy": "truck lorry bus tanker tractor digger hauler crane loader trailer bulldozer mixer",
    "light": "bike scooter moped car kart buggy van hatchback taxi roadster coupe jeep",
}
ROAD = {
    "narrow": "bridge alley lane track path tunnel pass trail dock ledge ramp causeway",
    "wide": "highway avenue boulevard plaza motorway runway square freeway ring parkway bypass turnpike",
}


def report(weather: str, vehicle: str, road: str) -> str:
    """Returns an input text with these three words."""
    return f"with {weather} in the forecast , the {vehicle} takes the {road} ."


def conclusion(weather: str, vehicle: str, road: str) -> tuple[str, str]:
    """Returns the label and the rationale that the hidden rule gives.

    Weather: `wet` or `dry`. Vehicle: `heavy` or `light`. Road: `narrow` or `wide`.

    Example: `conclusion("wet", "light", "narrow")` is ("smooth", "slow pace on a narrow road , since a light
    vehicle hates wet weather .").
    """
    suits = (weather == "wet") == (vehicle == "heavy")
    pace, verb = ("fast", "suits") if suits else ("slow", "hates")
    label = "smooth" if suits == (road == "wide") else "trouble"
    return (
        label,
        f"{pace} pace on a {road} road , since a {vehicle} vehicle {verb} {weather} weather .",
    )


def every_example() -> dict[str, list[Example]]:
    """Returns {label: 6,912 examples} for each of the two labels. Every `id` is empty.

    Examples are sorted by a hash of the input, so the order does not depend on library versions.
    """
    words = itertools.product(
        *(
            [(kind, w) for kind, ws in table.items() for w in ws.split()]
            for table in (WEATHER, VEHICLE, ROAD)
        )
    )
    made: dict[str, list[Example]] = {"smooth": [], "trouble": []}
    for parts in sorted(words, key=lambda parts: hash64(report(*(w for _, w in parts)))):
        label, rationale = conclusion(*(kind for kind, _ in parts))
        text = report(*(w for _, w in parts))
        made[label].append(Example(id="", input=text, label=label, rationale=rationale))
    return made


def read() -> Reading:
    """Returns disjoint splits of 1,500, 500 and 500 examples. Half of each split is `smooth`, half `trouble`."""
    made = every_example()
    rows, start = [], 0
    for split, count in ROWS.items():
        chosen = [e for some in made.values() for e in some[start : start + count // 2]]
        chosen.sort(key=lambda example: hash64(example.input))
        rows += [
            (split, CheckedExample(Example(f"{split}-{i}", e.input, e.label, e.rationale)))
            for i, e in enumerate(chosen, 1)
        ]
        start += count // 2
    return Reading("delivery", VERSION, "text_match", lambda: iter(rows))
