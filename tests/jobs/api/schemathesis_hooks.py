"""A check of ours for Schemathesis, switched on where it runs with one person's key and another's ids."""

from __future__ import annotations

import schemathesis

# Her ids stand in these bodies; what else is in a body may be refused first.
IN_BODIES = {"POST /v1/fine_tuning/jobs", "POST /v1/completions", "POST /v1/chat/completions"}


@schemathesis.check
def others_things_do_not_exist(ctx, response, case):
    unread = response.status_code == 400 and '"invalid_json"' in response.text  # refused before anybody looks
    allowed = {400, 404} if unread or case.operation.label in IN_BODIES else {404}
    assert response.status_code in allowed, (
        f"{response.status_code} for somebody else's: {response.text[:500]}"
    )
    words = str((case.body or {}).get("model")) if isinstance(case.body, dict) else ""
    assert "canary" not in response.text.replace(words, "")  # its own words may come back
