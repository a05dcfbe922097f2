"""Which models there are, and how the server is."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from tgate_engine.plan import Plan
from tgate_serve.api.schemas import HealthAnswer, ModelAnswer, ModelFacts, ModelsAnswer, PlanFacts
from tgate_serve.api.service import Served, Service
from tgate_serve.choice import steps_of
from tgate_serve.model import Model

router = APIRouter()


@router.get("/v1/models", response_model=ModelsAnswer, tags=["models"])
async def models(service: Served) -> Any:
    """All models that are served, with their sizes and plans."""
    return ModelsAnswer(data=[_answer(model) for model in service.models.values()])


@router.get("/v1/models/{name}", response_model=ModelAnswer, tags=["models"])
async def model(name: str, service: Served) -> Any:
    """One of them."""
    return _answer(service.find(name))


@router.get("/health", response_model=HealthAnswer, responses={503: {"model": HealthAnswer}}, tags=["server"])
async def health(service: Served) -> Any:
    """Whether the server works: 503 once a worker has failed, and it has to be started again."""
    answer = _health(service)
    return JSONResponse(answer.model_dump(), 503) if answer.status == "failed" else answer


@router.get("/ready", response_model=HealthAnswer, responses={503: {"model": HealthAnswer}}, tags=["server"])
async def ready(service: Served) -> Any:
    """Whether requests are taken now."""
    answer = _health(service)
    return answer if answer.status == "ok" else JSONResponse(answer.model_dump(), 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["server"])
async def metrics(service: Served) -> Any:
    """Counters and histograms, for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _health(service: Service) -> HealthAnswer:
    loads = {name: model.worker.load() for name, model in service.models.items()}
    failed = any(model.worker.failed for model in service.models.values())
    status: Literal["ok", "starting", "stopping", "failed"] = "ok"
    if failed or not service.ready:
        status = "failed" if failed else "stopping" if service.models else "starting"
    return HealthAnswer(
        status=status,
        models={name: {"running": running, "waiting": waiting} for name, (running, waiting) in loads.items()},
    )


def _answer(model: Model) -> ModelAnswer:
    manifest, (running, waiting) = model.session.manifest, model.worker.load()
    return ModelAnswer(
        id=model.name,
        created=model.created_s,
        tgate=ModelFacts(
            sizes=list(model.session.sizes),
            plans=[_plan(plan) for plan in model.worker.plans],
            takes="picture" if model.takes_picture else "prompt",
            makes="videos" if model.video else "pictures",
            frames=manifest.frames,
            negative_prompt=manifest.guided and not model.takes_picture,
            guidance_scale=manifest.guidance != "none",
            edits=model.edits,
            inpaints=model.inpaints,
            decoders=list(model.decoders),
            loras=list(manifest.adapters),
            ip_adapter=model.refers,
            controls=list(model.controls),
            engine=model.session.engine.name,
            running=running,
            waiting=waiting,
        ),
    )


def _plan(plan: Plan) -> PlanFacts:
    return PlanFacts(
        name=plan.name,
        sampler=plan.sampler.name,
        num_inference_steps=steps_of(plan),
        guidance_scale=plan.guidance_scale,
        settings=dict(plan.settings),
        steps=dict(Counter(step.graph for step in plan.steps)),
        baselines=list(plan.baselines),
    )
