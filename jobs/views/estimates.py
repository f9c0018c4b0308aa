"""Estimate accuracy: the estimate of each finished job next to the actual figures."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from jobs.lifecycle import estimates
from jobs.views.decorators import owner_of, signed_in

# The chart has one job every STEP units. It shows the actual time divided by the P50 estimate, on a log scale, so that 2×
# and ½× are equally far from the center line.
HEIGHT, STEP, LEFT, RIGHT = 200, 16, 44, 12
MAX_LOG_RATIO = math.log(2.5)


@signed_in
@require_GET
def index(request: HttpRequest) -> HttpResponse:
    """The user's own jobs; for staff, `?of=all` shows all jobs of the current machine."""
    everybody = request.GET.get("of") == "all"
    if everybody and not request.user.is_staff:
        raise Http404
    records = estimates.records(estimates.machine() if everybody else owner_of(request))
    rows = [_row(record) for record in records if record.get("p90") and record.get("actual")]
    context = {
        "rows": rows,
        "everybody": everybody,
        "machine": estimates.machine() if everybody else None,
        "chart": _chart(rows) if rows else None,
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


def _chart(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One dot per job, newest on the left, with a bar from its P50 to its P90 estimate."""

    def height(ratio: float) -> float:
        return round(HEIGHT / 2 * (1 - max(-1.0, min(1.0, math.log(ratio) / MAX_LOG_RATIO))), 1)

    return {
        "width": LEFT + RIGHT + STEP * max(len(rows), 20),
        "height": HEIGHT,
        "left": LEFT,
        "marks": [(label, height(ratio)) for label, ratio in (("2 ×", 2.0), ("1 ×", 1.0), ("½ ×", 0.5))],
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
