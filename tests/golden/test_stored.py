"""What a running studio stores and says: rows of DynamoDB, objects, Redis, messages, answers of `/v1`, webhooks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests import hub_server
from tests.golden import scenario
from tests.golden.compare import compare
from tests.golden.scenario import Things
from tests.golden.shapes import lines, mask, shape
from tests.golden.stack import Person, Receiver, RedisMonitor, Stack, dynamodb_rows, receiver, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
QUEUES = ("checks", "notifications", "training", "inference")
Tables = dict[str, dict[str, Any]]


@dataclass
class Recorded:
    stack: Stack
    things: Things
    tables: list[Tables]  # before any worker, after all was done, and with work that is left again
    messages: dict[str, list[dict[str, Any]]]  # by queue, while no worker ran
    redis: RedisMonitor
    received: list[tuple[dict[str, str], str]]
    stream: list[str]  # of a job's page, as server-sent events
    cookies: set[str]

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for tables in self.tables:
            for name, table in tables.items():
                yield from ((name.removeprefix("llmtuner-"), row) for row in table["rows"])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("stored")
    with hub_server.running(scenario.repositories(folder / "hub")) as hub, receiver() as hooks:
        stack = Stack(folder, HF_ENDPOINT=hub.url)
        try:
            yield run(stack, hooks)
        finally:
            stack.stop()


def run(stack: Stack, hooks: Receiver) -> Recorded:
    stack.start_stores()
    redis = RedisMonitor(stack.redis_port)
    stack.add_staff("sam@example.com")
    stack.start_web()
    ada = Person(stack.url, "ada@example.com").sign_up()
    ada.make_key()
    things = scenario.before_workers(ada, hooks)
    tables = [dynamodb_rows(stack.dynamodb_port)]
    messages = {queue: redis.waiting(queue) for queue in QUEUES}
    for queue in QUEUES:
        stack.start_worker(queue)
    staff = Person(stack.url, "sam@example.com").sign_in()
    scenario.with_workers(ada, staff, things, keep_all=False)
    wait_until(
        lambda: len(hooks.got) >= 5, 120, hooks.got
    )  # a test event, two successes, a failure, a cancel
    wait_until(lambda: not work_left(stack), 600, lambda: work_left(stack))
    scenario.look(ada, things)
    with ada.browser.stream("GET", f"/jobs/{things.jobs['full']}/stream") as answer:
        stream = list(answer.iter_lines())
    tables.append(dynamodb_rows(stack.dynamodb_port))
    stack.stop_workers()
    scenario.after_workers(ada, stack.url, things)
    tables.append(dynamodb_rows(stack.dynamodb_port))
    for queue in QUEUES:
        messages[queue] += redis.waiting(queue)
    return Recorded(stack, things, tables, messages, redis, hooks.got, stream, {*ada.browser.cookies})


def work_left(stack: Stack) -> list[str]:
    """Jobs that have not ended and work that is due; what is to be done much later may be left."""
    rows = dynamodb_rows(stack.dynamodb_port)["llmtuner-JobIndex"]["rows"]
    lists = [row["job_id"]["S"] for row in rows if re.match(r"work$|active#", row["partition"]["S"])]
    return [id for id in lists if not re.match(r"expire#|delete#upload-", id)]


def test_tables_as_dynamodb_has_them(recorded: Recorded):
    compare("stored_tables", (line for name, table in recorded.tables[0].items() for line in described(name, table["table"])))  # fmt: skip


def described(name: str, table: dict[str, Any]) -> Iterator[str]:
    types = {entry["AttributeName"]: entry["AttributeType"] for entry in table["AttributeDefinitions"]}
    for key in table["KeySchema"]:
        yield f"{name}: {key['KeyType']} {key['AttributeName']} {types[key['AttributeName']]}"


def test_keys_of_rows(recorded: Recorded):
    """With their prefixes: lists of active jobs, of all jobs of a month, of work; rows of quotas and idempotency keys."""
    schemas = {
        name.removeprefix("llmtuner-"): table["table"]["KeySchema"]
        for name, table in recorded.tables[0].items()
    }
    found = set()
    for name, row in recorded.rows():
        keys = " | ".join(mask(next(iter(row[key["AttributeName"]].values()))) for key in schemas[name])
        found.add(f"{name}: {keys_of_machine(keys)}")
    compare("stored_keys", found)


def keys_of_machine(keys: str) -> str:
    """Estimates stand under a kind of machine, and workers under this one's name."""
    keys = re.sub(r"(training|checks|inference) \| .*", r"\1 | <worker>", keys)
    return re.sub(r"^(cpu|cuda)[^|]*", "<kind of machine> ", keys)


def test_attributes_and_keys_inside_them(recorded: Recorded):
    found = (pair for name, row in recorded.rows() for key, value in row.items() for pair in attribute(name, key, value))  # fmt: skip
    compare("stored_rows", lines(found))


def attribute(table: str, key: str, value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Of a row as DynamoDB has it: the type is the store's own, and what is inside a text of JSON is told."""
    kind, content = next(iter(value.items()))
    path = f"{table}.{key}"
    yield path, f"stored as {kind}"
    if kind == "S" and path != "EstimateRecord.kind":
        if key == "lines":
            for line in json.loads(content):
                event = json.loads(line)
                yield from shape(event, f"event {event['t']}")
        else:
            yield from ((p, k) for p, k in shape(content, path) if p != path or k.startswith("“"))


def test_events_as_stored_and_read(recorded: Recorded):
    kinds = {line.partition(":")[0] for line in recorded.stream if line and not line.startswith(":")}
    names = {line for line in recorded.stream if line.startswith("event:")}
    compare("stream", [*(f"field {kind}" for kind in kinds), *names])


def test_object_keys(recorded: Recorded):
    objects = recorded.stack.folder / "var/objects"
    found = {mask(str(path.relative_to(objects))) for path in objects.rglob("*") if path.is_file()}
    compare("objects", found)


def test_folders_of_var(recorded: Recorded):
    compare("var", (path.name for path in (recorded.stack.folder / "var").iterdir()))


# ---- Redis and Celery ------------------------------------------------------------------------------------------------

LISTS, CHANNELS = {"LPUSH", "BRPOP", "LLEN", "RPUSH", "LRANGE"}, {"PUBLISH", "SUBSCRIBE", "PSUBSCRIBE"}
OTHERS = {
    "SET": "text", "GET": "text", "EXISTS": "text", "INCR": "text", "INCRBY": "text", "SETEX": "text", "DEL": "", "UNLINK": "",
    "XADD": "stream", "XREAD": "stream", "ZADD": "sorted set", "ZREM": "sorted set", "SADD": "set", "SMEMBERS": "set", "HSET": "hash",
}  # fmt: skip
CELERYS = re.compile(r"unacked|_kombu\.(?!binding)|celery|^/\d+\.")  # its own, below its promises to us


def test_redis_keys_and_channels(recorded: Recorded):
    compare("redis", {line for command in recorded.redis.commands for line in redis_keys(command)})


def redis_keys(command: str) -> Iterator[str]:
    word, *arguments = command.split()
    word = word.upper()
    keys: Iterable[str] = arguments[:1]
    kind = OTHERS.get(word)
    if word in CHANNELS:
        kind = "channel"
    elif word in LISTS:
        kind = "list"
        keys = arguments[:-1] if word == "BRPOP" else arguments[:1]
    elif word == "EVAL":
        call = re.search(r"\\n (\d+) (.*)$", command)  # what comes after the script's last line
        assert call, command
        kind, keys = "sorted set", call[2].split()[: int(call[1])]
    elif word == "XREAD":
        rest = arguments[[a.upper() for a in arguments].index("STREAMS") + 1 :]
        keys = rest[: len(rest) // 2]
    if kind:
        for key in keys:
            if not CELERYS.search(key):
                yield f"{kind} {redis_mask(key)}"


def redis_mask(key: str) -> str:
    """Celery's queues have a list for each priority; Django and allauth add what they count to a key."""
    key = re.sub(r"(allauth:[^:]+:).*", r"\1…", key.replace("\\x06\\x16", " priority "))
    return mask(key)


def test_messages_of_celery(recorded: Recorded):
    """As they lie in the queues: an older or newer worker takes them."""
    found = set()
    for queue, messages in recorded.messages.items():
        for message in messages:
            args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
            told = ", ".join(mask(json.dumps(argument)) for argument in args)
            found.add(
                f"{queue}: {message['headers']['task']}({told}){' ' + json.dumps(kwargs) if kwargs else ''}"
            )
            found.add(f"{message['content-type']}, body in {message['properties']['body_encoding']}")
    compare("messages", found)


# ---- what is said to others --------------------------------------------------------------------------------------------


def test_answers_of_the_api(recorded: Recorded):
    """With our own fields under `llmtuner`."""
    found = []
    for asked, answer in recorded.things.answers.items():
        path = re.sub(r"^fine_tuning/jobs/\w+", "fine_tuning/jobs/<job>", asked)
        found += [
            (re.sub(r"(top_logprobs\[\])\..*", r"\1.<token>", p), kind) for p, kind in shape(answer, path)
        ]
    compare("answers", lines(found))


def test_webhooks_as_received(recorded: Recorded):
    ours = {"content-type", "user-agent", "webhook-id", "webhook-timestamp", "webhook-signature"}
    found = [pair for _, body in recorded.received for pair in shape(json.loads(body), "body")]
    compare("webhooks", [*lines(found), *(f"header {name}" for headers, _ in recorded.received for name in ours & {*headers})])  # fmt: skip
    secret = base64.b64decode(
        recorded.things.answers["webhook_endpoints POST"]["signing_secret"].removeprefix("whsec_")
    )
    for headers, body in recorded.received:
        text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
        signature = base64.b64encode(hmac.new(secret, text, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{signature}"


def test_cookies(recorded: Recorded):
    compare("cookies", recorded.cookies)
