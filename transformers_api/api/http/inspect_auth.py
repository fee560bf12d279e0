"""The right to look inside, and how often: checked before a model is leased for it."""

from __future__ import annotations

from transformers_api.api.http.services import services
from transformers_api.errors import InspectionDisabled, ModelLoading


def check() -> None:
    """The checks before every POST that looks inside, in the documented order.

    Raises InspectionDisabled, ModelLoading, RateLimited.
    """
    check_enabled()
    check_started()
    check_rate()


def check_enabled() -> None:
    """Raise InspectionDisabled where INSPECT_ENABLED is off."""
    if not services().settings.inspect_enabled:
        raise InspectionDisabled()


def check_started() -> None:
    """Raise ModelLoading while the model of the start is on its way.

    Later loads are waited for, as on every route; so is the next try after a start that failed.
    """
    ready, _ = services().ready()
    status = services().swapper.status()
    if not ready and status.model is None and status.loading is not None:
        raise ModelLoading("Model not ready yet, please retry", retry_after=1)


def check_rate() -> None:
    """Take a token of this client's bucket, which all such routes share. Raises RateLimited."""
    services().limits.take_inspection()
