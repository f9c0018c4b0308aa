"""The tables of work, and the few ways to write them.

One item is one unit of consistency. There are no transactions, no secondary indexes and no scans: each way to reach a
row is a table with a key made for it. Deleted rows stay as tombstones (`gone`), so that nothing brings them back.

A reply can be lost although the write was applied, and the client then sends it again and is refused by its own write.
So every conditional write here takes `already_applied`, which looks at the row and says whether it already holds what we wanted.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from django.conf import settings
from pynamodb.attributes import (
    BooleanAttribute,
    JSONAttribute,
    NumberAttribute,
    UnicodeAttribute,
    UnicodeSetAttribute,
)
from pynamodb.connection.table import TableConnection
from pynamodb.exceptions import DeleteError, PutError, TableError, UpdateError
from pynamodb.expressions.condition import Condition
from pynamodb.expressions.update import Action
from pynamodb.models import Model

ENDED = frozenset({"succeeded", "failed", "cancelled", "void"})

# ---- ids -----------------------------------------------------------------------------------------------------------

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(prefix: str) -> str:
    """`<prefix>-<ULID>`: 48 bits of milliseconds, then 80 random bits, so ids sort by time."""
    number = int(time.time() * 1000) << 80 | secrets.randbits(80)
    return prefix + "-" + "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def time_of(id: str) -> float:
    """Unix seconds at which the id was made."""
    number = 0
    for letter in id.rpartition("-")[2]:
        number = number << 5 | CROCKFORD.index(letter)
    return (number >> 80) / 1000


def month_of(when: float) -> str:
    """`2026-11`, the month of an oversight partition."""
    return time.strftime("%Y-%m", time.gmtime(when))


# ---- the connection ------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_clients: dict[tuple[float, float, int], Any] = {}
_counters: list[Counter[str]] = []


class Table(Model):
    """What all tables share. PynamoDB makes a botocore client for each class (100 ms and 10 MB apiece): ours share one
    for each kind of patience."""

    @classmethod
    def _get_connection(cls) -> TableConnection:
        known = cls._connection is not None
        table = super()._get_connection()
        if not known:
            patience = (
                cls.Meta.connect_timeout_seconds,
                cls.Meta.read_timeout_seconds,
                cls.Meta.max_retry_attempts,
            )
            with _lock:
                if patience not in _clients:
                    _clients[patience] = table.connection.client
                    _clients[patience].meta.events.register("before-call.dynamodb", _count)
                table.connection._client = _clients[patience]
        return table


class ConnectionMeta:
    """The settings of the connection; each table's `Meta` adds its name."""

    region = settings.AWS_REGION
    host = settings.DYNAMODB_ENDPOINT or None
    # The embedded server verifies the signature, DynamoDB Local takes any, and botocore always wants credentials. On AWS it
    # finds its own. Those in AWS_ACCESS_KEY_ID may be the bucket's alone.
    _ours = host and (settings.DYNAMODB_SECRET or "AWS_ACCESS_KEY_ID" not in os.environ)
    aws_access_key_id = "local" if _ours else None
    aws_secret_access_key = (settings.DYNAMODB_SECRET or "local") if _ours else None
    connect_timeout_seconds = 2
    read_timeout_seconds = 5
    max_retry_attempts = 2
    max_pool_connections = 50
    billing_mode = "PAY_PER_REQUEST"


def _name(name: str) -> str:
    return settings.DYNAMODB_TABLE_PREFIX + name


def _count(model: Any, **_: Any) -> None:
    for counter in list(_counters):
        counter[model.name] += 1


@contextmanager
def count_calls() -> Iterator[Counter[str]]:
    """Counts the calls to DynamoDB of this process inside the block, by operation: `reads(counter)` sums the reads."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def reads(counter: Counter[str]) -> int:
    return sum(n for name, n in counter.items() if name in {"GetItem", "BatchGetItem", "Query", "Scan"})


# ---- the tables ----------------------------------------------------------------------------------------------------


class Dataset(Table):
    """An uploaded file and its report. Status: receiving → checking → ready | rejected."""

    class Meta(ConnectionMeta):
        table_name = _name("Dataset")

    owner = UnicodeAttribute(hash_key=True)
    dataset_id = UnicodeAttribute(range_key=True)  # file-<ULID>
    name = UnicodeAttribute(default="")
    purpose = UnicodeAttribute(default="fine-tune")
    format: JSONAttribute = JSONAttribute(null=True)  # how to read it: as asked, then as the report found it
    status = UnicodeAttribute(default="receiving")
    bytes = NumberAttribute(default=0)
    sha256 = UnicodeAttribute(default="")  # of what came straight into the bucket: from its check on
    fingerprint = UnicodeAttribute(attr_name="mark", default="")  # as its upload had it
    key = UnicodeAttribute(default="")  # of the object
    summary: JSONAttribute = JSONAttribute(null=True)  # of the report
    report_key = UnicodeAttribute(default="")  # object that holds the full report as JSON
    origin: JSONAttribute = JSONAttribute(
        null=True
    )  # of a version of another one: see jobs/datasets/versions.py
    error = UnicodeAttribute(default="")  # why rejected, for a person
    created_at = NumberAttribute(default=time.time)
    expires_at = NumberAttribute(null=True)
    deleted = BooleanAttribute(attr_name="gone", default=False)

    @property
    def id(self) -> str:
        return self.dataset_id


class DatasetReport(Table):
    """What a dataset is to a base with another tokenizer than the starter's: see jobs/datasets/reports.py."""

    class Meta(ConnectionMeta):
        table_name = _name("DatasetReport")

    dataset_id = UnicodeAttribute(hash_key=True)
    base = UnicodeAttribute(range_key=True)  # what bases that read text alike are called together
    owner = UnicodeAttribute()
    base_snapshot: JSONAttribute = JSONAttribute(attr_name="facts", default=dict)
    # Results of an older request are not written any more.
    request_id = UnicodeAttribute(attr_name="asked", default="")
    status = UnicodeAttribute(default="checking")
    summary: JSONAttribute = JSONAttribute(null=True)
    report_key = UnicodeAttribute(default="")
    error = UnicodeAttribute(default="")
    created_at = NumberAttribute(default=time.time)


class _JobAttributes(Table):
    owner = UnicodeAttribute(hash_key=True)
    job_id = UnicodeAttribute(range_key=True)  # ftjob-<ULID>

    # What was asked for
    name = UnicodeAttribute(default="")
    base = UnicodeAttribute(default="")
    base_snapshot: JSONAttribute = JSONAttribute(
        attr_name="base_facts", null=True
    )  # of what it starts from, as it was then: jobs/registry/base_models.py
    method = UnicodeAttribute(default="full")
    dataset_id = UnicodeAttribute(default="")
    dataset_name = UnicodeAttribute(default="")  # as it was then: the dataset may be deleted
    validation_dataset_id = UnicodeAttribute(null=True)
    settings: JSONAttribute = JSONAttribute(
        default=dict
    )  # hyperparameters as asked (training.plan.config.FIELDS)
    prompts: JSONAttribute = JSONAttribute(default=list)  # pinned prompts for samples
    suffix = UnicodeAttribute(default="")
    seed = NumberAttribute(null=True)
    metadata: JSONAttribute = JSONAttribute(default=dict)
    api: JSONAttribute = JSONAttribute(null=True)  # what `/v1` was sent, to answer in the same words
    needs: JSONAttribute = JSONAttribute(default=dict)  # of a worker: {"memory": bytes, "gpu": true}
    priority = NumberAttribute(default=0)
    model_id = UnicodeAttribute(default="")  # of the model that will come of it, fixed at submit
    body_hash = UnicodeAttribute(default="")
    start_from: JSONAttribute = JSONAttribute(null=True)  # a checkpoint of another job, for a retry

    # Where it stands (jobs/lifecycle/transitions.py has the moves)
    status = UnicodeAttribute(default="validating")
    phase = UnicodeAttribute(default="")
    desired = UnicodeAttribute(default="run")  # run, pause, cancel
    version = NumberAttribute(default=0)
    fencing_token = NumberAttribute(attr_name="epoch", default=0)  # of the lease: rises with each claim
    lease_owner = UnicodeAttribute(
        attr_name="holder", default=""
    )  # process start + nonce of who holds or held the lease
    worker = UnicodeAttribute(default="")  # its name, for people
    lease = UnicodeAttribute(null=True)  # changes with each heartbeat; absent unless running
    attempts = NumberAttribute(default=0)
    attempts_without_progress = NumberAttribute(default=0)
    platform_faults = NumberAttribute(default=0)  # without progress; they spend no attempt

    # What came of it
    last_seq = NumberAttribute(default=0)  # number of the last event
    progress: JSONAttribute = JSONAttribute(default=dict)  # step, total_steps, epoch, tokens, eta_s, …
    metrics: JSONAttribute = JSONAttribute(default=dict)  # the latest of each
    checkpoint_step = NumberAttribute(null=True)  # the pointer: where a next attempt goes on
    checkpoint_key = UnicodeAttribute(null=True)
    checkpoints: JSONAttribute = JSONAttribute(
        default=list
    )  # [{key, step, epoch, bytes, sha256, …}], newest last
    plan: JSONAttribute = JSONAttribute(null=True)  # resolved settings with their reasons
    estimate: JSONAttribute = JSONAttribute(null=True)
    resume_check: JSONAttribute = JSONAttribute(attr_name="proof", null=True)  # whether it resumed exactly
    reason = UnicodeAttribute(default="")  # why it failed or paused: a key of lifecycle.REASONS
    message = UnicodeAttribute(default="")  # what exactly, for a person
    advice = UnicodeAttribute(default="")
    result: JSONAttribute = JSONAttribute(null=True)  # {"epoch", "prefix", "files", "metrics", …}
    created_at = NumberAttribute(default=time.time)
    started_at = NumberAttribute(null=True)
    ended_at = NumberAttribute(null=True)
    deleted = BooleanAttribute(attr_name="gone", default=False)

    @property
    def id(self) -> str:
        return self.job_id

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Job(_JobAttributes):
    """One requested fine-tune. Times are for people only: no decision hangs on another machine's clock."""

    class Meta(ConnectionMeta):
        table_name = _name("Job")


class HeartbeatJob(_JobAttributes):
    """The same rows, written impatiently: a heartbeat is one try of 3 s, and the next one comes soon."""

    class Meta(ConnectionMeta):
        table_name = _name("Job")
        connect_timeout_seconds = settings.JOBS["heartbeat_timeout_s"]
        read_timeout_seconds = settings.JOBS["heartbeat_timeout_s"]
        max_retry_attempts = 0


class JobIndex(Table):
    """Lists of jobs. `active#<shard>`: not ended. `all#2026-11` and `<end status>#2026-11`: for oversight.
    `work`: other unfinished work (`check#…`, `deliver#…`, `delete#…`), put before it and removed after it."""

    class Meta(ConnectionMeta):
        table_name = _name("JobIndex")

    partition = UnicodeAttribute(hash_key=True)
    job_id = UnicodeAttribute(range_key=True)
    owner = UnicodeAttribute()
    name = UnicodeAttribute(default="")
    base = UnicodeAttribute(default="")
    lease = UnicodeAttribute(null=True)  # of who does this errand


class _ChunkAttributes(Table):
    job_id = UnicodeAttribute(hash_key=True)
    first_seq = NumberAttribute(range_key=True)
    last_seq = NumberAttribute()
    fencing_token = NumberAttribute(attr_name="epoch")
    lease_owner = UnicodeAttribute(attr_name="holder")
    lines: JSONAttribute = JSONAttribute(default=list)


class EventChunk(_ChunkAttributes):
    """Up to 100 events or 64 KB of one attempt: `lines` are JSON texts numbered first_seq … last_seq."""

    class Meta(ConnectionMeta):
        table_name = _name("EventChunk")


class HeartbeatChunk(_ChunkAttributes):
    """The same rows, written as impatiently as the heartbeat that follows: the lease must not wait for them."""

    class Meta(ConnectionMeta):
        table_name = _name("EventChunk")
        connect_timeout_seconds = settings.JOBS["heartbeat_timeout_s"]
        read_timeout_seconds = settings.JOBS["heartbeat_timeout_s"]
        max_retry_attempts = 0


class TunedModel(Table):
    """Trained weights that a person owns."""

    class Meta(ConnectionMeta):
        table_name = _name("TunedModel")

    owner = UnicodeAttribute(hash_key=True)
    model_id = UnicodeAttribute(range_key=True)  # ft:<base>:<owner slug>:<suffix>:<short id>
    job_id = UnicodeAttribute(default="")
    name = UnicodeAttribute(default="")
    base = UnicodeAttribute(default="")  # what it was tuned from: maybe another tuned model
    base_snapshot: JSONAttribute = JSONAttribute(attr_name="base_facts", null=True)  # the job's
    method = UnicodeAttribute(default="full")
    step = NumberAttribute(default=0)
    fencing_token = NumberAttribute(attr_name="epoch", default=0)
    prefix = UnicodeAttribute(default="")  # folder of the objects
    files: JSONAttribute = JSONAttribute(default=list)  # [{"name", "bytes", "sha256"}]
    bytes = NumberAttribute(default=0)
    metrics: JSONAttribute = JSONAttribute(default=dict)
    verdict: JSONAttribute = JSONAttribute(null=True)
    export_check: JSONAttribute = JSONAttribute(attr_name="fidelity", null=True)
    aliases: JSONAttribute = JSONAttribute(default=list)
    created_at = NumberAttribute(default=time.time)
    deleted = BooleanAttribute(attr_name="gone", default=False)

    @property
    def id(self) -> str:
        return self.model_id


class HubModel(Table):
    """A model of the Hugging Face Hub that a person added, as it was when it was checked."""

    class Meta(ConnectionMeta):
        table_name = _name("HubModel")

    owner = UnicodeAttribute(hash_key=True)
    name = UnicodeAttribute(range_key=True)  # owner/name on the Hub
    # training.plan.catalog.BaseModel and the revision
    snapshot: JSONAttribute = JSONAttribute(attr_name="facts", default=dict)
    checked_at = NumberAttribute(default=time.time)


class Usage(Table):
    """Conditional sets behind quotas (`jobs`, `datasets`), bytes by job (`checkpoints#<job>`), and `idem#<key>` rows that
    make a submission one."""

    class Meta(ConnectionMeta):
        table_name = _name("Usage")

    owner = UnicodeAttribute(hash_key=True)
    what = UnicodeAttribute(range_key=True)
    ids = UnicodeSetAttribute(null=True)
    job_id = UnicodeAttribute(null=True)
    body_hash = UnicodeAttribute(null=True)
    data: JSONAttribute = JSONAttribute(null=True)
    version = NumberAttribute(default=0)
    created_at = NumberAttribute(default=time.time)


class Worker(Table):
    """What a worker has and does, for people; when last heard is by its own clock."""

    class Meta(ConnectionMeta):
        table_name = _name("Worker")

    kind = UnicodeAttribute(hash_key=True)  # training, checks, notifications, inference
    worker_id = UnicodeAttribute(range_key=True)
    info: JSONAttribute = JSONAttribute(default=dict)
    job_id = UnicodeAttribute(default="")
    started_at = NumberAttribute(default=time.time)
    last_seen = NumberAttribute(attr_name="heard_at", default=time.time)


class Upload(Table):
    """A file that comes in parts, through `/v1/uploads` or from a page (jobs/datasets/multipart.py: those have a target)."""

    class Meta(ConnectionMeta):
        table_name = _name("Upload")

    owner = UnicodeAttribute(hash_key=True)
    upload_id = UnicodeAttribute(range_key=True)  # upload-<ULID>
    filename = UnicodeAttribute(default="")
    bytes = NumberAttribute(default=0)  # as announced
    mime_type = UnicodeAttribute(default="")
    purpose = UnicodeAttribute(default="fine-tune")
    status = UnicodeAttribute(default="pending")  # pending, completed, cancelled, expired
    part_ids = UnicodeSetAttribute(null=True)  # `<part id>:<bytes>`
    dataset_id = UnicodeAttribute(default="")  # what became of it
    keep_s = NumberAttribute(null=True)  # how long the file is to be kept
    target = UnicodeAttribute(default="")  # the dataset it will be
    fingerprint = UnicodeAttribute(
        attr_name="mark", default=""
    )  # tells the same file again: `sha256:…`, or made of samples of it
    multipart = UnicodeAttribute(default="")  # S3's name for it, where the parts go there
    created_at = NumberAttribute(default=time.time)
    expires_at = NumberAttribute(default=lambda: time.time() + 3600)


class WebhookEndpoint(Table):
    """Where a person wants to be told: webhooks, and the mail address under the id `email`."""

    class Meta(ConnectionMeta):
        table_name = _name("WebhookEndpoint")

    owner = UnicodeAttribute(hash_key=True)
    endpoint_id = UnicodeAttribute(range_key=True)  # hook-<ULID>
    name = UnicodeAttribute(default="")
    url = UnicodeAttribute()  # https://… or mailto:…
    events: JSONAttribute = JSONAttribute(default=list)  # that are told; empty = all
    secret = UnicodeAttribute()  # whsec_…: needed in clear to sign with; empty for mail
    active = BooleanAttribute(default=True)
    created_at = NumberAttribute(default=time.time)
    last_result = UnicodeAttribute(default="")


class WebhookDelivery(Table):
    """One notice to one place. A sender moves `tries` n → n + 1, then posts."""

    class Meta(ConnectionMeta):
        table_name = _name("WebhookDelivery")

    owner = UnicodeAttribute(hash_key=True)
    delivery_id = UnicodeAttribute(range_key=True)  # <job id>#<event>#<endpoint id or email>
    event = UnicodeAttribute(default="")  # fine_tuning.job.succeeded …
    job_id = UnicodeAttribute(default="")
    payload = UnicodeAttribute(default="")  # the exact body
    status = UnicodeAttribute(default="pending")  # pending, sent, given up
    tries = NumberAttribute(default=0)
    next_at = NumberAttribute(default=0)
    last_result = UnicodeAttribute(default="")
    created_at = NumberAttribute(default=time.time)


class EstimateRecord(Table):
    """What was predicted and what it took, to correct later estimates on the same kind of machine."""

    class Meta(ConnectionMeta):
        table_name = _name("EstimateRecord")

    kind = UnicodeAttribute(hash_key=True)
    job_id = UnicodeAttribute(range_key=True)
    data: JSONAttribute = JSONAttribute(default=dict)


class Audit(Table):
    """Who did what, by month."""

    class Meta(ConnectionMeta):
        table_name = _name("Audit")

    month = UnicodeAttribute(hash_key=True)
    audit_id = UnicodeAttribute(range_key=True)
    actor = UnicodeAttribute()
    action = UnicodeAttribute()
    target = UnicodeAttribute()
    data: JSONAttribute = JSONAttribute(default=dict)
    created_at = NumberAttribute(default=time.time)


TABLES: tuple[type[Table], ...] = (
    Dataset, DatasetReport, Job, JobIndex, EventChunk, TunedModel, HubModel, Usage, Worker, Upload, WebhookEndpoint, WebhookDelivery,
    EstimateRecord, Audit,
)  # fmt: skip


def create_tables() -> None:
    """Makes the tables that are missing. Several processes may do so at once."""
    for table in TABLES:
        if not table.exists():
            try:
                table.create_table()
            except TableError as error:
                if "ResourceInUse" not in str(error):
                    raise
    for table in TABLES:
        while table.describe_table()["TableStatus"] != "ACTIVE":
            time.sleep(0.2)


# ---- reading and writing -------------------------------------------------------------------------------------------

Row = TypeVar("Row", bound=Table)


def get(table: type[Row], hash_key: Any, range_key: Any) -> Row | None:
    """The row as it is now (a consistent read), or None."""
    if len(str(hash_key).encode()) > 2048 or len(str(range_key).encode()) > 1024:
        return None  # no row has such a key, and DynamoDB takes the question for an error
    try:
        return table.get(hash_key, range_key, consistent_read=True)
    except table.DoesNotExist:
        return None


def put_new(row: Row, already_applied: Callable[[Row], bool] = lambda found: True) -> Row | None:
    """Puts the row if none is there. Returns it, or the row that was there if `already_applied` says that it's ours, or None."""
    return _put(row, _hash_key(type(row)).does_not_exist(), already_applied)


def put_if(row: Row, condition: Condition, already_applied: Callable[[Row], bool]) -> Row | None:
    """Puts the row where the condition holds for the one there. Returns as `put_new` does."""
    return _put(row, condition, already_applied)


def _put(row: Row, condition: Condition, already_applied: Callable[[Row], bool]) -> Row | None:
    try:
        row.save(condition=condition)
    except PutError as error:
        if not refused(error):
            raise
        found = get(type(row), *keys_of(row))
        return found if found is not None and already_applied(found) else None
    return row


def update(
    row: Row,
    actions: Iterable[Action],
    condition: Condition,
    already_applied: Callable[[Row], bool] = lambda found: False,
) -> Row | None:
    """Updates where the condition holds. Returns the row as it then is, also when `already_applied` finds that an earlier send
    of the same write was applied; None if somebody else was first. `row` itself stays as it was read."""
    fresh = type(row)(*keys_of(row))
    try:
        fresh.update(actions=list(actions), condition=condition)
    except UpdateError as error:
        if not refused(error):
            raise
        found = get(type(row), *keys_of(row))
        return found if found is not None and already_applied(found) else None
    return fresh


def remove(table: type[Row], hash_key: Any, range_key: Any) -> None:
    """Deletes; fine if it isn't there."""
    try:
        table(hash_key, range_key).delete()
    except DeleteError as error:
        if not refused(error):
            raise


def refused(error: PutError | UpdateError | DeleteError) -> bool:
    """Did the condition fail (in contrast to: the store cannot be reached)?"""
    # Not `error.cause_response_code`: it stumbles over a connection that was closed before an answer came.
    answer = getattr(error.cause, "response", None) or {}
    return bool(answer.get("Error", {}).get("Code") == "ConditionalCheckFailedException")


def keys_of(row: Row) -> tuple[Any, Any]:
    return getattr(row, row._hash_keyname or ""), getattr(row, row._range_keyname or "")


def _hash_key(table: type[Table]) -> Any:
    return getattr(table, table._hash_keyname or "")


def _range_key(table: type[Table]) -> Any:
    return getattr(table, table._range_keyname or "")


def newest(
    table: type[Row], hash_key: str, limit: int, after: str | None = None, **options: Any
) -> Iterator[Row]:
    """Rows of a partition, newest first, a page of `limit` at a time (one read each)."""
    keep: Condition | None = None
    if after is not None:
        keep = _range_key(table) < after
    return iter(
        table.query(
            hash_key, keep, scan_index_forward=False, page_size=limit, consistent_read=True, **options
        )
    )


def search(
    table: type[Row], hash_key: str, where: Condition, after: str | None = None
) -> Iterator[tuple[list[Row], int]]:
    """Rows of a partition for which `where` holds, newest first, and how many have been read for them so far. The store
    leaves out the others, which costs neither transfer nor parsing. Reads grow from 100 rows to the 1 MB that DynamoDB
    reads at once: short where matches are many, few where they are rare."""
    keys = _range_key(table) < after if after is not None else None
    found = table.query(hash_key, keys, where, scan_index_forward=False, consistent_read=True, page_size=100)
    reads = found.page_iter
    for page in reads:
        yield [table.from_raw_data(item) for item in page["Items"]], reads.total_scanned_count
        reads.page_size = 2 * (reads.page_size or 100)


def rows(table: type[Row], hash_key: str, keep: Condition | None = None) -> Iterator[Row]:
    """All rows of a partition in the order of their keys."""
    return iter(table.query(hash_key, keep, consistent_read=True))
