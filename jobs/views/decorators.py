"""What views share: access control, refusals shown as warnings, and the check for partial requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import redirect_to_login
from django.http import Http404, HttpRequest, HttpResponseBase

from jobs.store import access
from jobs.store.errors import Refused
from jobs.store.quotas import OverQuota

View = Callable[..., HttpResponseBase]
AsyncView = Callable[..., Awaitable[HttpResponseBase]]


def signed_in(view: View) -> View:
    """Requires a signed-in user; anything that isn't theirs is a 404."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: object, **kwargs: object) -> HttpResponseBase:
        try:
            return view(request, *args, **kwargs)
        except access.NotFound as error:
            raise Http404 from error

    protected: View = login_required(guarded)
    return protected


def signed_in_async(view: AsyncView) -> AsyncView:
    """The same for async views. The session is read in a thread, which is released before the view starts."""

    @wraps(view)
    async def guarded(request: HttpRequest, *args: object, **kwargs: object) -> HttpResponseBase:
        user = await request.auser()
        if not user.is_authenticated:
            return await sync_to_async(redirect_to_login)(request.get_full_path())
        request.user = user
        try:
            return await view(request, *args, **kwargs)
        except access.NotFound as error:
            raise Http404 from error

    return guarded


@contextmanager
def refusal_as_warning(request: HttpRequest) -> Iterator[None]:
    """If the action inside is refused, its reason becomes a warning on the next page, and the view continues after the block."""
    try:
        yield
    except (Refused, OverQuota) as refused:
        messages.warning(request, str(refused))


def owner_of(request: HttpRequest) -> str:
    return str(request.user.owner_id)


def wants_partial(request: HttpRequest) -> bool:
    """Whether htmx requests only a part of the page. A history restore or plain reload needs the whole page."""
    htmx: Any = getattr(request, "htmx", None)
    return bool(htmx) and not htmx.history_restore_request
