"""What Inspect loads to learn which models there are (its entry points): the name `ws`, and nothing that takes long."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="ws")
def ws() -> type[ModelAPI]:
    """The class behind `ws/...`; torch is imported only where such a model is asked for."""
    from ws.chat.inspect_provider import SteeredAPI

    return SteeredAPI
