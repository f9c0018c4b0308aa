"""`manage.py create_tables` creates missing DynamoDB tables. Idempotent."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from jobs.store.tables import create_tables


class Command(BaseCommand):
    help = "Creates missing DynamoDB tables."

    def handle(self, *args: Any, **options: Any) -> None:
        create_tables()
