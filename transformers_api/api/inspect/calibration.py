"""/inspect/calibration: the texts that usual numbers are measured over."""

from __future__ import annotations

from typing import Any

import flask

from transformers_api.api.http import inspect_auth
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.services import services
from transformers_api.api.inspect.schemas.stored import (
    CalibrationBody,
    CalibrationForgotten,
    CalibrationTexts,
)

blueprint = Blueprint("calibration", __name__, dialect=NIELS, description="Texts for usual numbers")


@blueprint.at("/inspect/calibration")
@blueprint.gives(CalibrationTexts)
def get_calibration() -> Any:
    """Show the texts over which means, norms and the figures of lenses and SAEs are taken."""
    inspect_auth.check_enabled()
    calibration = services().calibration.get(flask.g.client)
    return {"texts": list(calibration.texts), "own": calibration.is_own}


@blueprint.at("/inspect/calibration", methods=["PUT"])
@blueprint.takes(CalibrationBody, example={"texts": ["The first text.", "And another one."]})
@blueprint.gives(CalibrationTexts)
def put_calibration(body: dict[str, Any]) -> Any:
    """Put other texts in the place of the server's own, for this key."""
    inspect_auth.check_enabled()
    services().calibration.put(flask.g.client, body["texts"])
    return {"texts": body["texts"], "own": False}


@blueprint.at("/inspect/calibration", methods=["DELETE"])
@blueprint.gives(CalibrationForgotten)
def delete_calibration() -> Any:
    """Take the server's own texts again."""
    inspect_auth.check_enabled()
    return {"deleted": services().calibration.delete(flask.g.client)}
