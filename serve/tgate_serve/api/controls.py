"""Control pictures inside JSON, as a model takes them."""

from __future__ import annotations

from collections.abc import Mapping

from tgate_engine.errors import RequestError
from tgate_runtime.control import Control
from tgate_runtime.picture import read_picture
from tgate_serve.api.errors import ApiError
from tgate_serve.api.forms import data_in
from tgate_serve.api.schemas import ControlAsked


def controls_in(asked: Mapping[str, ControlAsked] | None) -> dict[str, Control] | None:
    """What is asked of each ControlNet, its picture decoded. Raises :class:`ApiError` naming the parameter."""
    return {name: _control(f"controls.{name}", each) for name, each in asked.items()} if asked else None


def _control(param: str, asked: ControlAsked) -> Control:
    try:
        picture = read_picture(data_in(asked.image_url, f"{param}.image_url"), param)
    except RequestError as error:
        raise ApiError(400, str(error), code="invalid_value", param=param) from None
    return Control(
        image=picture,
        scale=1.0 if asked.scale is None else asked.scale,
        start=0.0 if asked.start is None else asked.start,
        end=1.0 if asked.end is None else asked.end,
        until_gate=bool(asked.until_gate),
    )
