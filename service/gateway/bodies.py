"""Request bodies, read and checked against the schemas; what does not fit is named, field by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from models.api import MAX_ROWS, ClassifyParams, GenerateParams
from service.errors import BadRequest
from service.gateway.schemas import ClassifyForm, ClassifyRequest, GenerateRequest, to_params

M = TypeVar("M", bound=BaseModel)
Images = list[tuple[str, bytes | str]]
FILE_FIELDS = frozenset({"image", "images", "file", "files"})


async def generate_params(request: Request) -> GenerateParams:
    """The parameters of POST /generate from its JSON body."""
    return to_params(GenerateParams, await _read_json(request, GenerateRequest))


async def classify_input(request: Request) -> tuple[ClassifyParams, Images]:
    """The parameters of POST /classify, and its pictures as (field name, base64 text or bytes)."""
    if _media_type(request) == "multipart/form-data":
        return await _read_multipart(request)
    body: Any = await _read_json(request, ClassifyRequest)
    if (body.image is None) == (body.images is None):
        raise BadRequest("give either `image` or `images`", field="image")
    pictures = [("image", body.image)] if body.images is None else _numbered("images", body.images)
    return to_params(ClassifyParams, body), pictures


async def _read_json(request: Request, model: type[M]) -> M:
    if _media_type(request) != "application/json":
        raise BadRequest("send the body with Content-Type: application/json", field="Content-Type")
    for key in request.query_params:
        raise BadRequest(f"{key} belongs into the JSON body, not the query", field=key)
    try:
        data = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return _checked(model.model_validate, data)


async def _read_multipart(request: Request) -> tuple[ClassifyParams, Images]:
    files: list[tuple[str, UploadFile]] = []
    texts: dict[str, str] = dict(request.query_params)
    if len(texts) != len(request.query_params.multi_items()):
        raise BadRequest("a query parameter is given twice")
    async with request.form(max_files=MAX_ROWS + 1) as form:
        for key, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append((key, value))
            elif key in FILE_FIELDS:
                raise BadRequest(f"{key} must be a file", field=key)
            elif key in texts:
                raise BadRequest(f"{key} is given twice", field=key)
            else:
                texts[key] = value
        if strange := [key for key, _ in files if key not in FILE_FIELDS]:
            raise BadRequest(f"unknown file field; use one of {', '.join(sorted(FILE_FIELDS))}", field=strange[0])
        if not 1 <= len(files) <= MAX_ROWS:
            raise BadRequest(f"send 1 to {MAX_ROWS} files, got {len(files)}", field="files")
        params = to_params(ClassifyParams, _checked(ClassifyForm.model_validate_strings, texts))
        pictures = [await file.read() for _, file in files]
    return params, [(files[0][0], pictures[0])] if len(files) == 1 else _numbered("files", pictures)


def _checked(validate: Callable[[Any], M], data: Any) -> M:
    try:
        return validate(data)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None


def _numbered(name: str, values: list[Any]) -> Images:
    return [(f"{name}.{index}", value) for index, value in enumerate(values)]


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
