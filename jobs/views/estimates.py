"""How the last estimates did: what was said before each job, and what it took."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from jobs.lifecycle import estimates
from jobs.views.decorators import for_people, owner_of

# The picture: a job every STEP units, the time it took over the P50 it was told, on a scale where double and half lie
# equally far from the line.
HEIGHT, STEP, LEFT, RIGHT = 200, 16, 44, 12
MOST = math.log(2.5)


@for_people
@require_GET
def index(request: HttpRequest) -> HttpResponse:
    """One's own jobs; with `?of=all`, for staff, all of the machine that runs them."""
    everybody = request.GET.get("of") == "all"
    if everybody and not request.user.is_staff:
        raise Http404
    found = estimates.records(estimates.machine() if everybody else owner_of(request))
    rows = [_row(record) for record in found if record.get("p90") and record.get("actual")]
    context = {
        "rows": rows,
        "everybody": everybody,
        "machine": estimates.machine() if everybody else None,
        "picture": _picture(rows) if rows else None,
        "held": sum(row["held"] for row in rows),
        "error": median(abs(row["ratio"] - 1) for row in rows) if rows else None,
        "memory_error": median(seen)
        if (seen := [abs(r["memory"] - 1) for r in rows if r["memory"]])
        else None,
    }
    return render(request, "jobs/estimates.html", context)


def _row(record: dict[str, Any]) -> dict[str, Any]:
    peak, expected = record.get("peak") or 0, record.get("peak_predicted") or 0
    return record | {
        "ratio": record["actual"] / record["predicted"],
        "held": record["actual"] <= record["p90"],
        "memory": peak / expected if peak and expected else None,
    }


def _picture(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A dot each, the newest on the left, with a line from P50 up to its P90."""

    def height(ratio: float) -> float:
        return round(HEIGHT / 2 * (1 - max(-1.0, min(1.0, math.log(ratio) / MOST))), 1)

    return {
        "width": LEFT + RIGHT + STEP * max(len(rows), 20),
        "height": HEIGHT,
        "left": LEFT,
        "marks": [(label, height(ratio)) for label, ratio in (("2 ×", 2.0), ("as said", 1.0), ("½ ×", 0.5))],
        "jobs": [
            {
                "x": LEFT + STEP // 2 + STEP * at,
                "y": height(row["ratio"]),
                "p90": height(row["p90"] / row["predicted"]),
                "p50": height(1.0),
                "held": row["held"],
            }
            for at, row in enumerate(rows)
        ],
    }
