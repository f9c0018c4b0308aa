"""One resource of each kind for a user, and a snapshot of all that is stored for that user."""

from __future__ import annotations

from typing import Any

from tests.jobs.api.conftest import ApiUser, training_rows

CANARY = "canary-of-alice"


def clear_limited_resources(owner: str) -> None:
    """Delete the resources of which a user may have only a few at a time."""
    from jobs.store import tables

    for table, name in ((tables.Upload, "upload_id"), (tables.WebhookEndpoint, "endpoint_id")):
        for row in list(tables.rows(table, owner)):
            tables.remove(table, owner, getattr(row, name))


def create_resources(alice: ApiUser) -> dict[str, str]:
    """Write one resource of each kind to the stores; every name contains the canary."""
    from jobs.store import blobs, tables

    owner = alice.owner
    clear_limited_resources(owner)
    file_id, job_id = tables.new_id("file"), tables.new_id("ftjob")
    key = blobs.put_file(f"datasets/{owner}/{file_id}/data", [training_rows()]).key
    tables.Dataset(
        owner, file_id, name=CANARY, status="ready", key=key, bytes=len(training_rows()), sha256="0" * 64
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


def to_plain_dict(row: Any) -> dict[str, Any]:
    """A row as plain values, sets sorted. Without `created_at`: a quota row does not store it and defaults to now."""
    values = row.to_simple_dict(force=True)
    values.pop("created_at", None)
    return {name: sorted(v, key=repr) if isinstance(v, (set, list)) else v for name, v in values.items()}


def snapshot(alice: ApiUser, ids: dict[str, str]) -> dict[str, Any]:
    """Everything stored for Alice, to compare before and after a request."""
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
        result[table.__name__] = [to_plain_dict(row) for row in tables.rows(table, alice.owner)]
    result["events"] = [to_plain_dict(row) for row in tables.rows(tables.EventChunk, ids["job_id"])]
    result["objects"] = sorted(blobs.list_keys(f"datasets/{alice.owner}/"))
    keys = alice.user.api_keys.order_by("pk")
    result["keys"] = list(keys.values_list("pk", "name", "digest", "scopes", "expires_at", "revoked_at"))
    user = type(alice.user).objects.filter(pk=alice.user.pk)
    result["user"] = list(user.values("email", "password", "owner_id", "slug", "is_active", "is_staff"))
    return result
