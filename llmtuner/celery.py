"""Celery, whose messages over Redis only tell workers that there is work. The work itself is recorded in DynamoDB.

Messages are acknowledged early and taken one at a time; results are not stored. A lost or duplicated message does no harm:
the store decides who runs what, and the reconciler in every worker sends lost messages again.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, signals

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

os.umask(0o077)  # workers write users' data: no other account may read it

app = Celery("llmtuner")
app.conf.update(
    broker_url=settings.REDIS_URL,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_connection_timeout=3,
    broker_transport_options={
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 10,
        # Celery redelivers a message that is not acknowledged within this time, by the wall clock. With `-P solo`, a message
        # stays unacknowledged while its task runs, even with early acknowledgment. Duplicates are harmless but useless, so
        # this is a week.
        "visibility_timeout": 7 * 24 * 3600,
    },
    task_ignore_result=True,
    task_acks_late=False,
    task_reject_on_worker_lost=False,
    task_serializer="json",
    accept_content=["json"],
    task_default_queue="checks",  # short tasks, which must never wait behind hours of training
    task_routes={"run_next": "training", "generate": "inference", "deliver": "notifications"},
    # A web request must not wait for retries. If a message is lost, the reconciler sends it again.
    task_publish_retry=False,
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    worker_soft_shutdown_timeout=30,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)
app.autodiscover_tasks(["jobs.worker"])


@signals.worker_init.connect
def _init(**_: Any) -> None:
    from llmtuner import checks

    try:
        checks.refuse_unsafe_start(needs_sql=False)
    except ImproperlyConfigured as error:
        # Celery only logs any other exception.
        raise SystemExit(f"This worker cannot start: {error}") from None


@signals.worker_ready.connect
def _ready(sender: Any, **_: Any) -> None:
    from jobs.worker import worker_process

    worker_process.start(set(app.amqp.queues.consume_from))


@signals.worker_shutting_down.connect
def _shutting_down(**_: Any) -> None:
    from jobs.worker import worker_process

    worker_process.STOP.set()


@signals.worker_shutdown.connect
def _shutdown(**_: Any) -> None:
    from jobs.worker import worker_process

    worker_process.finish()
