"""What a running system stores and sends: rows of DynamoDB, objects, Redis keys, messages, responses of `/v1`, webhooks."""

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
from tests.golden.scenario import Resources
from tests.golden.shapes import lines, mask, shape
from tests.golden.stack import Person, Receiver, RedisMonitor, Stack, dynamodb_rows, receiver, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
QUEUES = ("checks", "notifications", "training", "inference")
Tables = dict[str, dict[str, Any]]


@dataclass
class Recorded:
    stack: Stack
    resources: Resources
    tables: list[Tables]  # before any worker, after all work was done, and with new work waiting
    messages: dict[str, list[dict[str, Any]]]  # by queue, while no worker runs
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
    resources = scenario.before_workers(ada, hooks)
    tables = [dynamodb_rows(stack.dynamodb_port)]
    messages = {queue: redis.waiting(queue) for queue in QUEUES}
    for queue in QUEUES:
        stack.start_worker(queue)
    staff = Person(stack.url, "sam@example.com").sign_in()
    scenario.with_workers(ada, staff, resources, keep_all=False)
    wait_until(
        lambda: len(hooks.received) >= 5, 120, hooks.received
    )  # a test event, two successes, a failure, a cancel
    wait_until(lambda: not work_left(stack), 600, lambda: work_left(stack))
    scenario.read_all(ada, resources)
    with ada.browser.stream("GET", f"/jobs/{resources.jobs['full']}/stream") as response:
        stream = list(response.iter_lines())
    tables.append(dynamodb_rows(stack.dynamodb_port))
    stack.stop_workers()
    scenario.after_workers(ada, stack.url, resources)
    tables.append(dynamodb_rows(stack.dynamodb_port))
    for queue in QUEUES:
        messages[queue] += redis.waiting(queue)
    return Recorded(stack, resources, tables, messages, redis, hooks.received, stream, {*ada.browser.cookies})


def work_left(stack: Stack) -> list[str]:
    """Jobs that have not ended and work that is due. Work scheduled for much later may remain."""
    rows = dynamodb_rows(stack.dynamodb_port)["llmtuner-JobIndex"]["rows"]
    ids = [row["job_id"]["S"] for row in rows if re.match(r"work$|active#", row["partition"]["S"])]
    return [id for id in ids if not re.match(r"expire#|delete#upload-", id)]


def test_table_descriptions_in_dynamodb(recorded: Recorded):
    compare("stored_tables", (line for name, table in recorded.tables[0].items() for line in key_lines(name, table["table"])))  # fmt: skip


def key_lines(name: str, table: dict[str, Any]) -> Iterator[str]:
    types = {entry["AttributeName"]: entry["AttributeType"] for entry in table["AttributeDefinitions"]}
    for key in table["KeySchema"]:
        yield f"{name}: {key['KeyType']} {key['AttributeName']} {types[key['AttributeName']]}"


def test_keys_of_rows(recorded: Recorded):
    """With their prefixes: indexes of active jobs, of all jobs of a month, of the outbox; rows of quotas and idempotency keys."""
    schemas = {
        name.removeprefix("llmtuner-"): table["table"]["KeySchema"]
        for name, table in recorded.tables[0].items()
    }
    entries = set()
    for name, row in recorded.rows():
        keys = " | ".join(mask(next(iter(row[key["AttributeName"]].values()))) for key in schemas[name])
        entries.add(f"{name}: {mask_machine(keys)}")
    compare("stored_keys", entries)


def mask_machine(keys: str) -> str:
    """Masks the kind of machine in keys of estimates, and the name of this one in keys of workers."""
    keys = re.sub(r"(training|checks|inference) \| .*", r"\1 | <worker>", keys)
    return re.sub(r"^(cpu|cuda)[^|]*", "<kind of machine> ", keys)


def test_attributes_and_the_keys_inside_them(recorded: Recorded):
    pairs = (pair for name, row in recorded.rows() for key, value in row.items() for pair in attribute(name, key, value))  # fmt: skip
    compare("stored_rows", lines(pairs))


def attribute(table: str, key: str, value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The DynamoDB type of an attribute, and the shape of what it contains if it is JSON text."""
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
    compare(
        "objects", (mask(str(path.relative_to(objects))) for path in objects.rglob("*") if path.is_file())
    )


def test_folders_of_var(recorded: Recorded):
    compare("var", (path.name for path in (recorded.stack.folder / "var").iterdir()))


# ---- Redis and Celery ------------------------------------------------------------------------------------------------

LISTS, CHANNELS = {"LPUSH", "BRPOP", "LLEN", "RPUSH", "LRANGE"}, {"PUBLISH", "SUBSCRIBE", "PSUBSCRIBE"}
OTHERS = {
    "SET": "text", "GET": "text", "EXISTS": "text", "INCR": "text", "INCRBY": "text", "SETEX": "text", "DEL": "", "UNLINK": "",
    "XADD": "stream", "XREAD": "stream", "ZADD": "sorted set", "ZREM": "sorted set", "SADD": "set", "SMEMBERS": "set", "HSET": "hash",
}  # fmt: skip
CELERY_KEYS = re.compile(r"unacked|_kombu\.(?!binding)|celery|^/\d+\.")  # internal to Celery


def test_redis_keys_and_channels(recorded: Recorded):
    compare("redis", {line for command in recorded.redis.commands for line in redis_keys(command)})


def redis_keys(command: str) -> Iterator[str]:
    name, *arguments = command.split()
    name = name.upper()
    keys: Iterable[str] = arguments[:1]
    kind = OTHERS.get(name)
    if name in CHANNELS:
        kind = "channel"
    elif name in LISTS:
        kind = "list"
        keys = arguments[:-1] if name == "BRPOP" else arguments[:1]
    elif name == "EVAL":
        call = re.search(r"\\n (\d+) (.*)$", command)  # the arguments after the script's last line
        assert call, command
        kind, keys = "sorted set", call[2].split()[: int(call[1])]
    elif name == "XREAD":
        rest = arguments[[a.upper() for a in arguments].index("STREAMS") + 1 :]
        keys = rest[: len(rest) // 2]
    if kind:
        for key in keys:
            if not CELERY_KEYS.search(key):
                yield f"{kind} {redis_mask(key)}"


def redis_mask(key: str) -> str:
    """Celery has a list per queue and priority; allauth appends what it counts to a key."""
    key = re.sub(r"(allauth:[^:]+:).*", r"\1…", key.replace("\\x06\\x16", " priority "))
    return mask(key)


def test_celery_messages(recorded: Recorded):
    """As they wait in the queues, where an older or newer worker may receive them."""
    entries = set()
    for queue, messages in recorded.messages.items():
        for message in messages:
            args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
            shown = ", ".join(mask(json.dumps(argument)) for argument in args)
            entries.add(
                f"{queue}: {message['headers']['task']}({shown}){' ' + json.dumps(kwargs) if kwargs else ''}"
            )
            entries.add(f"{message['content-type']}, body in {message['properties']['body_encoding']}")
    compare("messages", entries)


# ---- what other programs receive ---------------------------------------------------------------------------------------


def test_responses_of_the_api(recorded: Recorded):
    """With our own fields under `llmtuner`."""
    pairs = []
    for request, response in recorded.resources.responses.items():
        path = re.sub(r"^fine_tuning/jobs/\w+", "fine_tuning/jobs/<job>", request)
        pairs += [
            (re.sub(r"(top_logprobs\[\])\..*", r"\1.<token>", p), kind) for p, kind in shape(response, path)
        ]
    compare("answers", lines(pairs))


def test_webhooks_as_received(recorded: Recorded):
    ours = {"content-type", "user-agent", "webhook-id", "webhook-timestamp", "webhook-signature"}
    pairs = [pair for _, body in recorded.received for pair in shape(json.loads(body), "body")]
    compare("webhooks", [*lines(pairs), *(f"header {name}" for headers, _ in recorded.received for name in ours & {*headers})])  # fmt: skip
    secret = base64.b64decode(
        recorded.resources.responses["webhook_endpoints POST"]["signing_secret"].removeprefix("whsec_")
    )
    for headers, body in recorded.received:
        text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
        signature = base64.b64encode(hmac.new(secret, text, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{signature}"


def test_cookies(recorded: Recorded):
    compare("cookies", recorded.cookies)
