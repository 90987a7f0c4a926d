"""GET /models: what the workers advertise."""

from __future__ import annotations

from fastapi import APIRouter

from models.api import ModelInfo
from service.errors import NotFound
from service.gateway.routes.deps import Shared
from service.gateway.schemas import ModelList

router = APIRouter()


@router.get("/models")
async def list_models(gateway: Shared) -> ModelList:
    """Every advertised model, by name."""
    infos = await gateway.catalogue.infos()
    return ModelList(models=[infos[name] for name in sorted(infos)])


@router.get("/models/{name}")
async def get_model(name: str, gateway: Shared) -> ModelInfo:
    """One model: labels, image shape, gears or methods with their cost."""
    infos = await gateway.catalogue.infos()
    if name not in infos:
        raise NotFound(f"no model {name!r}; known: {', '.join(sorted(infos)) or 'none'}", field="name")
    return infos[name]
