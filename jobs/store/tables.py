"""The DynamoDB tables.

A row is the unit of consistency. There are no transactions, no secondary indexes and no scans: for each way to look up rows
there is a table with a suitable key. Deleted rows stay as tombstones (`deleted`), so that a late writer cannot recreate
them. `attr_name` keeps the stored name of an attribute that was renamed in the code.

Reads and conditional writes are in jobs/store/operations.py; other modules call them here, as `tables.get` and so on.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from django.conf import settings
from pynamodb.attributes import (
    BooleanAttribute,
    JSONAttribute,
    NumberAttribute,
    UnicodeAttribute,
    UnicodeSetAttribute,
)
from pynamodb.exceptions import TableError

from jobs.store.connection import ConnectionMeta, Table, count_calls, reads, table_name
from jobs.store.ids import month_of, new_id, time_of
from jobs.store.operations import (
    get,
    keys_of,
    newest,
    put_if,
    put_new,
    refused,
    remove,
    rows,
    search,
    update,
)
from jobs.store.states import ENDED, DatasetStatus, JobStatus, ReportStatus

__all__ = [
    "ENDED",
    "TABLES",
    "Audit",
    "Dataset",
    "DatasetReport",
    "EstimateRecord",
    "EventChunk",
    "HeartbeatChunk",
    "HeartbeatJob",
    "HubModel",
    "Job",
    "JobIndex",
    "Table",
    "TunedModel",
    "Upload",
    "Usage",
    "WebhookDelivery",
    "WebhookEndpoint",
    "Worker",
    "count_calls",
    "create_tables",
    "get",
    "keys_of",
    "month_of",
    "new_id",
    "newest",
    "put_if",
    "put_new",
    "reads",
    "refused",
    "remove",
    "rows",
    "search",
    "time_of",
    "update",
]


class Dataset(Table):
    """An uploaded file and its report. Status: receiving → checking → ready | rejected."""

    class Meta(ConnectionMeta):
        table_name = table_name("Dataset")

    owner = UnicodeAttribute(hash_key=True)
    dataset_id = UnicodeAttribute(range_key=True)  # file-<ULID>
    name = UnicodeAttribute(default="")
    purpose = UnicodeAttribute(default="fine-tune")
    format: JSONAttribute = JSONAttribute(null=True)  # as requested, then as detected by the check
    status = UnicodeAttribute(default=DatasetStatus.RECEIVING.value)
    bytes = NumberAttribute(default=0)
    sha256 = UnicodeAttribute(default="")  # computed by the check if the file was sent directly to the bucket
    fingerprint = UnicodeAttribute(attr_name="mark", default="")  # copied from its upload
    key = UnicodeAttribute(default="")  # of the file in object storage
    summary: JSONAttribute = JSONAttribute(null=True)  # the counts of the report
    report_key = UnicodeAttribute(default="")  # of the full report, a JSON file in object storage
    # Set if it is a version of another dataset: see jobs/datasets/versions.py.
    origin: JSONAttribute = JSONAttribute(null=True)
    error = UnicodeAttribute(default="")  # why it was rejected, shown to the user
    created_at = NumberAttribute(default=time.time)
    expires_at = NumberAttribute(null=True)
    deleted = BooleanAttribute(attr_name="gone", default=False)

    @property
    def id(self) -> str:
        return self.dataset_id

    @property
    def unchecked(self) -> bool:
        return self.status in {DatasetStatus.RECEIVING, DatasetStatus.CHECKING}

    @property
    def date(self) -> str:
        """The date that chat templates read in reports and training, so that both count the same tokens on every day."""
        return datetime.fromtimestamp(float(self.created_at), UTC).date().isoformat()


class DatasetReport(Table):
    """A dataset checked with a tokenizer other than the starter model's: see jobs/datasets/reports.py."""

    class Meta(ConnectionMeta):
        table_name = table_name("DatasetReport")

    dataset_id = UnicodeAttribute(hash_key=True)
    base = UnicodeAttribute(range_key=True)  # tokenizer family
    owner = UnicodeAttribute()
    base_snapshot: JSONAttribute = JSONAttribute(attr_name="facts", default=dict)
    # The last request. Results of an earlier one are discarded.
    request_id = UnicodeAttribute(attr_name="asked", default="")
    status = UnicodeAttribute(default=ReportStatus.CHECKING.value)
    summary: JSONAttribute = JSONAttribute(null=True)
    report_key = UnicodeAttribute(default="")
    error = UnicodeAttribute(default="")
    created_at = NumberAttribute(default=time.time)


class _JobAttributes(Table):
    owner = UnicodeAttribute(hash_key=True)
    job_id = UnicodeAttribute(range_key=True)  # ftjob-<ULID>

    # The request
    name = UnicodeAttribute(default="")
    base = UnicodeAttribute(default="")
    # The base model as it was at submission: see jobs/registry/base_models.py.
    base_snapshot: JSONAttribute = JSONAttribute(attr_name="base_facts", null=True)
    method = UnicodeAttribute(default="full")
    dataset_id = UnicodeAttribute(default="")
    # Copied at submission, because the dataset may be deleted later.
    dataset_name = UnicodeAttribute(default="")
    validation_dataset_id = UnicodeAttribute(null=True)
    settings: JSONAttribute = JSONAttribute(default=dict)  # requested hyperparameters
    # Which defaults those have that are missing: training/plan/config.py:SCHEMA. Null in rows of earlier versions: 1.
    settings_schema = NumberAttribute(null=True)
    prompts: JSONAttribute = JSONAttribute(default=list)  # for the samples
    suffix = UnicodeAttribute(default="")
    # Only in rows of earlier versions: jobs/lifecycle/submission.py:settings_of.
    seed = NumberAttribute(null=True)
    metadata: JSONAttribute = JSONAttribute(default=dict)
    api: JSONAttribute = JSONAttribute(null=True)  # values of the `/v1` request that responses repeat
    # What a worker must have: {"memory": bytes, "gpu": true}.
    needs: JSONAttribute = JSONAttribute(default=dict)
    priority = NumberAttribute(default=0)
    model_id = UnicodeAttribute(default="")  # of the resulting model, assigned at submission
    body_hash = UnicodeAttribute(default="")
    start_from: JSONAttribute = JSONAttribute(null=True)  # a checkpoint of another job, for a retry

    # Its state (jobs/lifecycle/transitions.py has the transitions)
    status = UnicodeAttribute(default=JobStatus.VALIDATING.value)
    phase = UnicodeAttribute(default="")
    desired = UnicodeAttribute(default="run")  # run, pause, cancel
    version = NumberAttribute(default=0)
    fencing_token = NumberAttribute(attr_name="epoch", default=0)  # increases with each claim
    # Identifies the worker process that holds the lease, or held it last.
    lease_owner = UnicodeAttribute(attr_name="holder", default="")
    worker = UnicodeAttribute(default="")  # its display name
    lease = UnicodeAttribute(null=True)  # changes with each heartbeat; only set while running
    attempts = NumberAttribute(default=0)
    attempts_without_progress = NumberAttribute(default=0)
    platform_faults = NumberAttribute(default=0)  # in a row without progress; they do not count as attempts

    # Progress and results
    last_seq = NumberAttribute(default=0)  # sequence number of the last event
    progress: JSONAttribute = JSONAttribute(default=dict)  # step, total_steps, epoch, tokens, eta_s, …
    metrics: JSONAttribute = JSONAttribute(default=dict)  # the latest value of each
    checkpoint_step = NumberAttribute(null=True)  # the pointer: where the next attempt resumes
    checkpoint_key = UnicodeAttribute(null=True)
    # [{key, step, epoch, bytes, sha256, …}], newest last; `epoch` is the fencing token here.
    checkpoints: JSONAttribute = JSONAttribute(default=list)
    plan: JSONAttribute = JSONAttribute(null=True)  # resolved settings with their reasons
    estimate: JSONAttribute = JSONAttribute(null=True)
    # See jobs/worker/resume_check.py.
    resume_check: JSONAttribute = JSONAttribute(attr_name="proof", null=True)
    reason = UnicodeAttribute(default="")  # why it failed or paused: a key of jobs.store.reasons.REASONS
    message = UnicodeAttribute(default="")  # the details, shown to the user
    advice = UnicodeAttribute(default="")
    # {"epoch", "prefix", "files", "step", "kept_step" (of the model's weights), "early" (stopped early), "metrics", …}
    result: JSONAttribute = JSONAttribute(null=True)
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
    """One fine-tuning job. Times are only displayed: no decision depends on another machine's clock."""

    class Meta(ConnectionMeta):
        table_name = table_name("Job")


class HeartbeatJob(_JobAttributes):
    """The same rows with short timeouts: a heartbeat is a single request of 3 s without retries, because the next one follows
    soon."""

    class Meta(ConnectionMeta):
        table_name = table_name("Job")
        connect_timeout_seconds = settings.JOBS["heartbeat_timeout_s"]
        read_timeout_seconds = settings.JOBS["heartbeat_timeout_s"]
        max_retry_attempts = 0


class JobIndex(Table):
    """Lists of jobs. The partitions `active#<shard>` list jobs that have not ended, and `all#2026-11` and `<status>#2026-11`
    are for administrators. `work` is the outbox (`check#…`, `deliver#…`, `delete#…`): see jobs/store/outbox.py."""

    class Meta(ConnectionMeta):
        table_name = table_name("JobIndex")

    partition = UnicodeAttribute(hash_key=True)
    job_id = UnicodeAttribute(range_key=True)
    owner = UnicodeAttribute()
    name = UnicodeAttribute(default="")
    base = UnicodeAttribute(default="")
    lease = UnicodeAttribute(null=True)  # of the worker that handles this message


class _ChunkAttributes(Table):
    job_id = UnicodeAttribute(hash_key=True)
    first_seq = NumberAttribute(range_key=True)
    last_seq = NumberAttribute()
    fencing_token = NumberAttribute(attr_name="epoch")
    lease_owner = UnicodeAttribute(attr_name="holder")
    lines: JSONAttribute = JSONAttribute(default=list)


class EventChunk(_ChunkAttributes):
    """Up to 100 events or 64 KB from one attempt. `lines` are JSON texts with the sequence numbers first_seq … last_seq."""

    class Meta(ConnectionMeta):
        table_name = table_name("EventChunk")


class HeartbeatChunk(_ChunkAttributes):
    """The same rows with the short timeouts of a heartbeat, because storing events must not delay the lease's renewal."""

    class Meta(ConnectionMeta):
        table_name = table_name("EventChunk")
        connect_timeout_seconds = settings.JOBS["heartbeat_timeout_s"]
        read_timeout_seconds = settings.JOBS["heartbeat_timeout_s"]
        max_retry_attempts = 0


class TunedModel(Table):
    """Trained weights that a user owns."""

    class Meta(ConnectionMeta):
        table_name = table_name("TunedModel")

    owner = UnicodeAttribute(hash_key=True)
    model_id = UnicodeAttribute(range_key=True)  # ft:<base>:<owner slug>:<suffix>:<short id>
    job_id = UnicodeAttribute(default="")
    name = UnicodeAttribute(default="")
    base = UnicodeAttribute(default="")  # what it was tuned from: possibly another tuned model
    base_snapshot: JSONAttribute = JSONAttribute(attr_name="base_facts", null=True)  # copied from its job
    method = UnicodeAttribute(default="full")
    # What the rows of its dataset were: chat, completion or text. Empty for models from before this was recorded.
    trained_on = UnicodeAttribute(default="")
    step = NumberAttribute(default=0)
    fencing_token = NumberAttribute(attr_name="epoch", default=0)
    prefix = UnicodeAttribute(default="")  # of its keys in object storage
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
    """A model of the Hugging Face Hub that a user added, in the state in which it was checked; or a base that an administrator
    imported (jobs/registry/imported_bases.py)."""

    class Meta(ConnectionMeta):
        table_name = table_name("HubModel")

    owner = UnicodeAttribute(hash_key=True)
    name = UnicodeAttribute(range_key=True)  # owner/name on the Hub, or the name given at the import
    # training.plan.catalog.BaseModel and the revision; of an import also `prefix` and `files`
    snapshot: JSONAttribute = JSONAttribute(attr_name="facts", default=dict)
    checked_at = NumberAttribute(default=time.time)


class Usage(Table):
    """The IDs that count toward a quota (`jobs`, `datasets`), the checkpoint bytes of each job (`checkpoints#<job>`), and
    `idem#<key>` rows that make submissions idempotent."""

    class Meta(ConnectionMeta):
        table_name = table_name("Usage")

    owner = UnicodeAttribute(hash_key=True)
    what = UnicodeAttribute(range_key=True)
    ids = UnicodeSetAttribute(null=True)
    job_id = UnicodeAttribute(null=True)
    body_hash = UnicodeAttribute(null=True)
    data: JSONAttribute = JSONAttribute(null=True)
    version = NumberAttribute(default=0)
    created_at = NumberAttribute(default=time.time)


class Worker(Table):
    """A worker's hardware and current job, for pages and estimates. `last_seen` is a time of the worker's own clock."""

    class Meta(ConnectionMeta):
        table_name = table_name("Worker")

    kind = UnicodeAttribute(hash_key=True)  # training, checks, notifications, inference
    worker_id = UnicodeAttribute(range_key=True)
    info: JSONAttribute = JSONAttribute(default=dict)
    job_id = UnicodeAttribute(default="")
    started_at = NumberAttribute(default=time.time)
    last_seen = NumberAttribute(attr_name="heard_at", default=time.time)


class Upload(Table):
    """A file that is uploaded in parts, through `/v1/uploads` or from a page (jobs/datasets/multipart.py). Only uploads from
    pages have a `target`."""

    class Meta(ConnectionMeta):
        table_name = table_name("Upload")

    owner = UnicodeAttribute(hash_key=True)
    upload_id = UnicodeAttribute(range_key=True)  # upload-<ULID>
    filename = UnicodeAttribute(default="")
    bytes = NumberAttribute(default=0)  # as declared at the start
    mime_type = UnicodeAttribute(default="")
    purpose = UnicodeAttribute(default="fine-tune")
    # pending, completed, cancelled, expired; of a base model also checking, rejected
    status = UnicodeAttribute(default="pending")
    part_ids = UnicodeSetAttribute(null=True)  # `<part id>:<bytes>`
    dataset_id = UnicodeAttribute(default="")  # of the completed upload
    keep_s = NumberAttribute(null=True)  # requested lifetime of the file
    target = UnicodeAttribute(default="")  # ID of the future dataset
    # Recognizes the same file later: `sha256:…`, or a hash of samples of the file.
    fingerprint = UnicodeAttribute(attr_name="mark", default="")
    multipart = UnicodeAttribute(default="")  # S3's upload ID, if the parts go to S3
    base: JSONAttribute = JSONAttribute(null=True)  # of a base model: {"name", "license"}
    error = UnicodeAttribute(default="")  # why a base model was rejected
    created_at = NumberAttribute(default=time.time)
    expires_at = NumberAttribute(default=lambda: time.time() + 3600)


class WebhookEndpoint(Table):
    """Where a user is notified: a webhook or, with the ID `email`, the email address."""

    class Meta(ConnectionMeta):
        table_name = table_name("WebhookEndpoint")

    owner = UnicodeAttribute(hash_key=True)
    endpoint_id = UnicodeAttribute(range_key=True)  # hook-<ULID>
    name = UnicodeAttribute(default="")
    url = UnicodeAttribute()  # https://… or mailto:…
    events: JSONAttribute = JSONAttribute(default=list)  # the event types to send; empty = all
    secret = UnicodeAttribute()  # whsec_…, not hashed because it is needed for signing; empty for email
    active = BooleanAttribute(default=True)
    created_at = NumberAttribute(default=time.time)
    last_result = UnicodeAttribute(default="")


class WebhookDelivery(Table):
    """A notification to be sent to one endpoint. A sender increments `tries` before it posts."""

    class Meta(ConnectionMeta):
        table_name = table_name("WebhookDelivery")

    owner = UnicodeAttribute(hash_key=True)
    delivery_id = UnicodeAttribute(range_key=True)  # <job id>#<event>#<endpoint id or email>
    event = UnicodeAttribute(default="")  # fine_tuning.job.succeeded …
    job_id = UnicodeAttribute(default="")
    payload = UnicodeAttribute(default="")  # the exact request body
    status = UnicodeAttribute(default="pending")  # pending, sent, given up
    tries = NumberAttribute(default=0)
    next_at = NumberAttribute(default=0)
    last_result = UnicodeAttribute(default="")
    created_at = NumberAttribute(default=time.time)


class EstimateRecord(Table):
    """A job's predicted and actual duration, with which later estimates for the same kind of machine are corrected."""

    class Meta(ConnectionMeta):
        table_name = table_name("EstimateRecord")

    kind = UnicodeAttribute(hash_key=True)
    job_id = UnicodeAttribute(range_key=True)
    data: JSONAttribute = JSONAttribute(default=dict)


class Audit(Table):
    """Actions of administrators, by month."""

    class Meta(ConnectionMeta):
        table_name = table_name("Audit")

    month = UnicodeAttribute(hash_key=True)
    audit_id = UnicodeAttribute(range_key=True)
    actor = UnicodeAttribute()
    action = UnicodeAttribute()
    target = UnicodeAttribute()
    data: JSONAttribute = JSONAttribute(default=dict)
    created_at = NumberAttribute(default=time.time)


TABLES: tuple[type[Table], ...] = (
    Dataset,
    DatasetReport,
    Job,
    JobIndex,
    EventChunk,
    TunedModel,
    HubModel,
    Usage,
    Worker,
    Upload,
    WebhookEndpoint,
    WebhookDelivery,
    EstimateRecord,
    Audit,
)


def create_tables() -> None:
    """Creates missing tables. Safe to run in several processes at once."""
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
