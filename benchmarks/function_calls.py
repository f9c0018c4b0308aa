"""Conversations that call functions, generated from a seed: the rows and prompts of `bin/bench tools`.

Seven functions, each asked for in several phrasings, one to three of them offered; every eighth conversation needs no
call. The entities (people, cities, songs, times, amounts, …) of the held-out prompts are in no training row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
EVERY_PLAIN = 8  # one of so many conversations needs no call


def _split(words: str) -> list[str]:
    return words.split("|")


NAMES = _split(
    "Anna|Ben|Clara|David|Emma|Frank|Grace|Henry|Iris|Jack|Karen|Liam|Maria|Noah|Olivia|Peter|Quinn|Rosa"
    "|Sam|Tara|Umar|Vera|Walter|Yusuf|Zoe|Amir|Bella|Carlos|Diana|Ethan|Fatima|George|Hannah|Ivan|Julia"
    "|Kevin|Laura|Miguel"
)
CITIES = _split(
    "Paris|London|Berlin|Madrid|Rome|Vienna|Prague|Dublin|Oslo|Lisbon|Athens|Warsaw|Cairo|Lagos|Nairobi"
    "|Delhi|Tokyo|Seoul|Sydney|Boston|Chicago|Denver|Dallas|Seattle|Toronto|Lima|Bogota|Havana|Geneva"
    "|Munich|Naples|Krakow"
)
ROOMS = _split(
    "kitchen|bedroom|garage|hallway|bathroom|office|attic|basement|living room|dining room|laundry room"
    "|guest room|playroom|library|balcony|pantry"
)
TASKS = _split(
    "water the plants|call the dentist|feed the cat|pay the rent|buy some milk|walk the dog"
    "|take out the trash|wash the car|pick up the parcel|charge the phone|send the report|book the hotel"
    "|clean the oven|pack the bags|return the books|order new tires|renew the passport|check the oil"
    "|sign the contract|print the tickets"
)
SONGS = _split(
    "Yellow River|Blue Moon|Silent Street|Golden Hour|Summer Rain|Paper Planes|Broken Glass|Winter Sun"
    "|Midnight Train|Silver Lining|Open Road|Dancing Shadows|Falling Leaves|Crystal Lake|Burning Bridges"
    "|Northern Lights"
)
MESSAGES = _split(
    "I am on my way|dinner is ready|the train is late|the plan has changed|the door is locked"
    "|the meeting is over|I by_text the keys|the cake was great|we need more paper|the game starts soon"
    "|the shop is closed|I will be late"
)
DAYS = [
    f"{month} {day}"
    for month in ("January", "March", "April", "June", "July", "August", "October", "December")
    for day in range(2, 29)
]
TIMES = [f"{hour}:{minute:02}" for hour in range(6, 23) for minute in range(0, 60, 5)]
AMOUNTS = range(12, 500)


@dataclass(frozen=True)
class Entities:
    """The entities of the training rows, or those of the held-out prompts."""

    names: Sequence[str]
    cities: Sequence[str]
    days: Sequence[str]
    times: Sequence[str]
    amounts: Sequence[int]
    rooms: Sequence[str]
    tasks: Sequence[str]
    songs: Sequence[str]
    messages: Sequence[str]


def split(seed: int, held_out: float = 0.3) -> tuple[Entities, Entities]:
    """(those of training rows, those held out). No entity is in both."""
    pools: tuple[Sequence[Any], ...] = (NAMES, CITIES, DAYS, TIMES, AMOUNTS, ROOMS, TASKS, SONGS, MESSAGES)
    rng = random.Random(f"entities:{seed}")  # noqa: S311  not for secrets
    shuffled = [rng.sample(pool, len(pool)) for pool in pools]
    cuts = [round(len(pool) * held_out) for pool in shuffled]
    return (
        Entities(*(pool[cut:] for pool, cut in zip(shuffled, cuts, strict=True))),
        Entities(*(pool[:cut] for pool, cut in zip(shuffled, cuts, strict=True))),
    )


# --- functions: a definition, and a request with the arguments that it asks for ----------------------


def _weather(rng: random.Random, e: Entities) -> tuple[str, Row]:
    city, day = rng.choice(e.cities), rng.choice(e.days)
    text = rng.choice(
        (
            f"What will the weather be like in {city} on {day}?",
            f"Will it rain in {city} on {day}?",
            f"I am going to {city} on {day}. How is the weather there?",
            f"On {day}, do I need a coat in {city}?",
        )
    )
    return text, {"city": city, "day": day}


def _reminder(rng: random.Random, e: Entities) -> tuple[str, Row]:
    task, time = rng.choice(e.tasks), rng.choice(e.times)
    text = rng.choice(
        (
            f"Remind me to {task} at {time}.",
            f"At {time} I have to {task}. Please remind me.",
            f"Can you set a reminder for {time} to {task}?",
            f"Don't let me forget to {task} at {time}.",
        )
    )
    return text, {"task": task, "time": time}


def _money(rng: random.Random, e: Entities) -> tuple[str, Row]:
    person, amount = rng.choice(e.names), rng.choice(e.amounts)
    text = rng.choice(
        (
            f"Send {amount} dollars to {person}.",
            f"I owe {person} {amount} dollars, please pay it back.",
            f"Transfer {amount} dollars to {person}, please.",
            f"{person} should get {amount} dollars from me.",
        )
    )
    return text, {"to": person, "amount": amount}


def _lights(rng: random.Random, e: Entities) -> tuple[str, Row]:
    room, on = rng.choice(e.rooms), rng.random() < 0.5
    word = "on" if on else "off"
    text = rng.choice(
        (
            f"Turn {word} the lights in the {room}.",
            f"Switch the {room} lights {word}, please.",
            f"Lights {word} in the {room}!",
            f"It is too dark in the {room}." if on else f"Nobody is in the {room}, save some power there.",
        )
    )
    return text, {"room": room, "on": on}


def _table(rng: random.Random, e: Entities) -> tuple[str, Row]:
    person, guests, time = rng.choice(e.names), rng.randint(2, 9), rng.choice(e.times)
    text = rng.choice(
        (
            f"Book a table for {guests} at {time} under the name {person}.",
            f"We are {guests} people and want to eat at {time}. The name is {person}.",
            f"A table at {time} for {guests}, please, for {person}.",
            f"Please reserve a table for {person}, {guests} guests, {time}.",
        )
    )
    return text, {"name": person, "guests": guests, "time": time}


def _song(rng: random.Random, e: Entities) -> tuple[str, Row]:
    song = rng.choice(e.songs)
    text = rng.choice(
        (
            f"Play {song}.",
            f"I want to hear {song}.",
            f"Put on the song {song}, please.",
            f"Could you play {song} for me?",
        )
    )
    return text, {"title": song}


def _message(rng: random.Random, e: Entities) -> tuple[str, Row]:
    person, message = rng.choice(e.names), rng.choice(e.messages)
    text = rng.choice(
        (
            f"Tell {person} that {message}.",
            f"Write to {person}: {message}",
            f'Send {person} the message "{message}".',
            f"Let {person} know that {message}.",
        )
    )
    return text, {"to": person, "text": message}


def _function(name: str, description: str, /, **types: str) -> Row:
    """A definition in OpenAI's form."""
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in types.items()},
        "required": list(types),
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


Request = Callable[[random.Random, Entities], tuple[str, Row]]
FUNCTIONS: list[tuple[Row, Request]] = [
    (_function("get_weather", "Weather forecast", city="string", day="string"), _weather),
    (_function("set_reminder", "Reminds the user", task="string", time="string"), _reminder),
    (_function("send_money", "Pays dollars", to="string", amount="integer"), _money),
    (_function("set_lights", "Switches lights", room="string", on="boolean"), _lights),
    (
        _function("book_table", "Reserves a table", name="string", guests="integer", time="string"),
        _table,
    ),
    (_function("play_song", "Plays music", title="string"), _song),
    (_function("send_message", "Sends a text", to="string", text="string"), _message),
]


# --- conversations -----------------------------------------------------------------------------------


def _small_talk(rng: random.Random, e: Entities) -> tuple[str, str]:
    """A message that needs no call, and its answer."""
    person, city = rng.choice(e.names), rng.choice(e.cities)
    return rng.choice(
        (
            (f"Hello, I am {person}.", f"Hello {person}, what can I do for you?"),
            (f"Thank you! Best wishes from {person}.", f"You are welcome, {person}!"),
            (f"Good morning from {city}!", f"Good morning! I hope you like {city}."),
            (f"My name is {person} and I live in {city}.", f"Nice to meet you, {person} from {city}."),
        )
    )


def _conversation(rng: random.Random, e: Entities, plain: bool) -> Row:
    offered = rng.sample(FUNCTIONS, rng.choice((1, 1, 1, 1, 2, 2, 3)))
    if plain:
        text, answer = _small_talk(rng, e)
        reply: Row = {"role": "assistant", "content": answer}
    else:
        definition, request = rng.choice(offered)
        text, arguments = request(rng, e)
        call = {"name": definition["function"]["name"], "arguments": json.dumps(arguments)}
        reply = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        }
    return {
        "messages": [{"role": "user", "content": text}, reply],
        "tools": [definition for definition, _ in offered],
    }


def _conversations(rng: random.Random, e: Entities, count: int) -> list[Row]:
    by_text: dict[str, Row] = {}  # by their text, so that each is there once
    while len(by_text) < count:
        row = _conversation(rng, e, plain=len(by_text) % EVERY_PLAIN == EVERY_PLAIN - 1)
        by_text.setdefault(row["messages"][0]["content"], row)
    return list(by_text.values())


def generate(seed: int, train: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) in OpenAI's format; the last message of a held-out row is the right answer."""
    trained, unseen = split(seed)
    rng = random.Random(f"calls:{seed}")  # noqa: S311  not for secrets
    return _conversations(rng, trained, train), _conversations(rng, unseen, held_out)


def write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def call_of(row: Row) -> tuple[str, Row] | None:
    """The (function, arguments) that answer a row, None if it needs no call."""
    for call in row["messages"][-1].get("tool_calls", ()):
        return call["function"]["name"], json.loads(call["function"]["arguments"])
    return None
