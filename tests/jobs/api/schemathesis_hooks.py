"""A Schemathesis check for runs with one user's key and another user's IDs."""

from __future__ import annotations

from typing import Any

import schemathesis

# These take the other user's IDs in the body, where another field may be rejected first.
IDS_IN_BODY = {"POST /v1/fine_tuning/jobs", "POST /v1/completions", "POST /v1/chat/completions"}


@schemathesis.check
def other_users_resources_do_not_exist(ctx: Any, response: Any, case: Any) -> None:
    # Invalid JSON is rejected before the IDs in it are read.
    unparsed = response.status_code == 400 and '"invalid_json"' in response.text
    allowed = {400, 404} if unparsed or case.operation.label in IDS_IN_BODY else {404}
    assert response.status_code in allowed, (
        f"{response.status_code} for another user's resource: {response.text[:500]}"
    )
    requested_model = str((case.body or {}).get("model")) if isinstance(case.body, dict) else ""
    assert "canary" not in response.text.replace(requested_model, "")  # an error may repeat what was sent
