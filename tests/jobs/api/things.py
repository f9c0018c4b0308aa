"""One of everything of one person's, and all that is stored of it, to compare before and after."""

from __future__ import annotations

from typing import Any

from tests.jobs.api.conftest import Person, rows

CANARY = "canary-of-alice"


def clear(owner: str) -> None:
    """What there may only be a few of at a time."""
    from jobs.store import tables

    for table, name in ((tables.Upload, "upload_id"), (tables.WebhookEndpoint, "endpoint_id")):
        for row in list(tables.rows(table, owner)):
            tables.remove(table, owner, getattr(row, name))


def put_things(alice: Person) -> dict[str, str]:
    """One of everything, straight into the stores; names carry the canary."""
    from jobs.store import blobs, tables

    owner = alice.owner
    clear(owner)
    file_id, job_id = tables.new_id("file"), tables.new_id("ftjob")
    key = blobs.put_file(f"datasets/{owner}/{file_id}/data", [rows()]).key
    tables.Dataset(
        owner, file_id, name=CANARY, status="ready", key=key, bytes=len(rows()), sha256="0" * 64
    ).save()
    model_id = f"ft:starter:alice:{CANARY}:{job_id[-8:].lower()}"
    chunk = tables.EventChunk(job_id, 1, last_seq=1, fencing_token=1, lease_owner="h")
    chunk.lines = ['{"t": "log", "level": "info", "message": "' + CANARY + '", "time": 1}']
    chunk.save()
    job = tables.Job(
        owner, job_id, name=CANARY, base="starter", dataset_id=file_id, status="paused", desired="pause"
    )
    job.model_id, job.fencing_token, job.last_seq, job.metadata = model_id, 1, 1, {"note": CANARY}
    job.save()
    tables.TunedModel(owner, model_id, name=CANARY, base="starter", job_id=job_id, files=[]).save()
    upload_id = tables.new_id("upload")
    tables.Upload(owner, upload_id, filename=CANARY, bytes=3, target=tables.new_id("file")).save()
    hook_id = tables.new_id("hook")
    tables.WebhookEndpoint(owner, hook_id, url=f"https://{CANARY}.example", secret="whsec_x").save()
    return {
        "file_id": file_id,
        "dataset_id": file_id,
        "job_id": job_id,
        "model": model_id,
        "model_id": model_id,
        "upload_id": upload_id,
        "webhook_endpoint_id": hook_id,
        "pk": str(alice.user.api_keys.get(name="all").pk),
        "owner": owner,
    }


def plain(row: Any) -> dict[str, Any]:
    """A row as JSON would have it; sets (of quotas) in order. A quota's row keeps no `created_at` and reads as now."""
    values = row.to_simple_dict(force=True)
    values.pop("created_at", None)
    return {name: sorted(v, key=repr) if isinstance(v, (set, list)) else v for name, v in values.items()}


def everything_of(alice: Person, ids: dict[str, str]) -> dict[str, Any]:
    """All that is stored for Alice, to compare before and after."""
    from jobs.store import blobs, tables

    result: dict[str, Any] = {}
    for table in (
        tables.Dataset,
        tables.Job,
        tables.TunedModel,
        tables.Upload,
        tables.Usage,
        tables.WebhookEndpoint,
    ):
        result[table.__name__] = [plain(row) for row in tables.rows(table, alice.owner)]
    result["events"] = [plain(row) for row in tables.rows(tables.EventChunk, ids["job_id"])]
    result["objects"] = sorted(blobs.list_keys(f"datasets/{alice.owner}/"))
    keys = alice.user.api_keys.order_by("pk")
    result["keys"] = list(keys.values_list("pk", "name", "digest", "scopes", "expires_at", "revoked_at"))
    user = type(alice.user).objects.filter(pk=alice.user.pk)
    result["user"] = list(user.values("email", "password", "owner_id", "slug", "is_active", "is_staff"))
    return result
