"""What is asked and answered, in JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tgate_runtime.generators import SEED_LIMIT
from tgate_serve.choice import Choice
from tgate_serve.scheduler import PRIORITIES

Format = Literal["png", "jpeg", "webp"]
VideoFormat = Literal["mp4", "gif"]
Decoder = Literal["full", "preview"]
VideoStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
MOST_PARTIALS = 3


class Asked(BaseModel):
    """What pictures and videos are asked with alike. What is left out, or null, is the model's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str | None, Field(description="one of /v1/models; the first that can if left out")] = None
    negative_prompt: Annotated[str | None, Field(description="what to steer away from")] = None
    size: Annotated[str | None, Field(description="WIDTHxHEIGHT, one of the model's; auto is its default")] = None
    plan: Annotated[str | None, Field(description="one of the model's plans, by name")] = None
    num_inference_steps: Annotated[int | None, Field(ge=1, description="of the plan that is meant")] = None
    m: Annotated[int | None, Field(ge=1, description="the gate step of the plan that is meant")] = None
    k: Annotated[int | None, Field(ge=1, description="the self-attention interval of the plan that is meant")] = None
    guidance_scale: Annotated[float | None, Field(allow_inf_nan=False, description="above 1")] = None
    loras: Annotated[
        dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None,
        Field(max_length=16, description="scales by the names of the model's adapters (tgate adapt)"),
    ] = None
    seed: Annotated[int | None, Field(ge=0, lt=SEED_LIMIT, description="image j has seed + j; random if left out")] = (
        None
    )
    generator: Annotated[
        Literal["numpy", "torch-cuda"] | None, Field(description="of noise: numpy, or what diffusers draws on CUDA")
    ] = None
    priority: Annotated[int | None, Field(ge=0, le=PRIORITIES[-1], description="higher goes first; 0 if left out")] = (
        None
    )
    within_s: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="after so many seconds nobody wants it any more")
    ] = None

    def choice(self) -> Choice:
        """Which plan is meant."""
        return Choice(plan=self.plan, steps=self.num_inference_steps, m=self.m, k=self.k)

    def common(self) -> dict[str, Any]:
        """The fields of a :class:`~tgate_serve.model.Wish` that all of them say."""
        return {
            "negative_prompt": self.negative_prompt,
            "size": None if self.size == "auto" else self.size,
            "choice": self.choice(),
            "guidance_scale": self.guidance_scale,
            "loras": self.loras or None,
            "seed": self.seed,
            "generator": self.generator or "numpy",
            "priority": self.priority or 0,
            "within_s": self.within_s,
        }


class Reference(BaseModel):
    """A picture inside JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: Annotated[str, Field(description="data:image/...;base64,...; other URLs are not fetched")]


class ControlAsked(Reference):
    """What one ControlNet looks at, and when."""

    scale: Annotated[
        float | None, Field(allow_inf_nan=False, description="what it adds is multiplied with this; 1 if left out")
    ] = None
    start: Annotated[
        float | None, Field(ge=0, le=1, description="the part of the way from which on it runs; 0 if left out")
    ] = None
    end: Annotated[float | None, Field(ge=0, le=1, description="the part up to which it does; 1 if left out")] = None
    until_gate: Annotated[
        bool | None, Field(description="it stops where the plan's gate closes; false, it goes on, if left out")
    ] = None


class PicturesAsked(Asked):
    """What pictures are asked with alike, whatever they begin from."""

    prompt: Annotated[str, Field(description="what to draw")]
    n: Annotated[int | None, Field(ge=1, description="how many; 1 if left out")] = None
    response_format: Annotated[Literal["b64_json"] | None, Field(description="no files are kept, and so no URLs")] = (
        None
    )
    output_format: Annotated[Format | None, Field(description="png if left out")] = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="quality of jpeg and webp; 100")] = None
    decoder: Annotated[Decoder | None, Field(description="what decodes the pictures; full if left out")] = None
    user: Annotated[str | None, Field(max_length=256, description="noted in the server's log")] = None
    stream: Annotated[bool | None, Field(description="answer with server-sent events")] = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=MOST_PARTIALS, description="looks at each picture on its way, of a stream")
    ] = None
    stream_steps: Annotated[bool | None, Field(description="events of the queue and of each step, of a stream")] = None
    ip_adapter_image: Annotated[
        Reference | None, Field(description="what they attend to beside the prompt, of a model with an IP-Adapter")
    ] = None
    ip_adapter_scale: Annotated[
        float | None, Field(allow_inf_nan=False, description="how much of it is added; 1 if left out")
    ] = None
    controls: Annotated[
        dict[str, ControlAsked] | None,
        Field(max_length=16, description="control pictures by the names of the model's ControlNets; in JSON alone"),
    ] = None


class ImageAsked(PicturesAsked):
    """Pictures of a prompt."""


class EditAsked(PicturesAsked):
    """Pictures that begin from one, beside a prompt. A form's files ``image``, ``mask`` and ``ip_adapter_image`` come
    in place of the objects of those names."""

    image: Annotated[Reference | None, Field(description="what to begin from")] = None
    mask: Annotated[
        Reference | None,
        Field(description="what of it is drawn anew: what is transparent or, without alpha, white; all if left out"),
    ] = None
    strength: Annotated[
        float | None,
        Field(gt=0, le=1, description="the part of the plan's steps that is taken; if left out 0.6, or 1 to inpaint"),
    ] = None


class VideoAsked(Asked):
    """A video of a prompt or of a picture, whichever its model takes."""

    prompt: Annotated[str | None, Field(description="what to draw, of a model that takes a prompt")] = None
    input_reference: Annotated[
        Reference | None, Field(description="what to start from, of a model that takes a picture")
    ] = None
    seconds: Annotated[str | None, Field(description="the model's own length, the only one that it draws")] = None
    output_format: Annotated[VideoFormat | None, Field(description="mp4 if left out")] = None


class VideosAsked(BaseModel):
    """Which of the videos are listed."""

    model_config = ConfigDict(extra="forbid")

    after: Annotated[str | None, Field(description="the video before the first that is wanted")] = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Annotated[Literal["asc", "desc"], Field(description="the oldest first, or the newest")] = "desc"


class ContentAsked(BaseModel):
    """What of a video is wanted."""

    model_config = ConfigDict(extra="forbid")

    variant: Annotated[Literal["video", "thumbnail"], Field(description="thumbnail: the first frame, as WebP")] = (
        "video"
    )


class Report(BaseModel):
    """What was done for an answer. ``steps``: how many of each graph an image took. ``company``: images that shared a
    call, over all steps the mean. ``cut``: what was cut off the prompts, as it was written; null if nothing."""

    model: str
    plan: str
    sampler: str
    steps: dict[str, int]
    guidance_scale: float
    queue_s: float
    draw_s: float
    decode_s: float
    company: float
    cut: list[str] | None


class Picture(BaseModel):
    """A picture of an answer, and the seed with which it can be drawn alone."""

    b64_json: str
    seed: int


class ImagesAnswer(BaseModel):
    """Pictures."""

    id: str
    created: int
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    data: list[Picture]
    tgate: Report


class VideoError(BaseModel):
    """Why there will be no video."""

    code: str
    message: str


class VideoAnswer(BaseModel):
    """A video and how far it is. Times are in seconds of Unix time; ``completed_at`` is when it ended, well or not.
    ``progress``: in percent. ``queue_position``: how many images wait before it; null once its first step is taken.
    ``tgate``: null until it is completed."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    output_format: VideoFormat
    size: str
    seconds: str
    seed: int
    prompt: str | None
    error: VideoError | None
    queue_position: int | None
    tgate: Report | None


class VideosAnswer(BaseModel):
    """Some of the videos; the next ones come after ``last_id``."""

    object: Literal["list"] = "list"
    data: list[VideoAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """A video that is forgotten."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class PlanFacts(BaseModel):
    """A plan that is served. ``settings``: what it was made from. ``steps``: of each graph."""

    name: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    settings: dict[str, Any]
    steps: dict[str, int]
    baselines: list[str]


class ModelFacts(BaseModel):
    """A model that is served. ``takes``: what it is conditioned by. ``edits``: whether its pictures can begin from one;
    ``inpaints``: whether all of them do, within a mask. ``decoders``: what its pictures can be decoded by.
    ``ip_adapter``: whether they can attend to one beside the prompt. ``loras``: the names of its adapters.
    ``controls``: of its ControlNets. ``running``, ``waiting``: images, now."""

    sizes: list[str]
    plans: list[PlanFacts]
    takes: Literal["prompt", "picture"]
    makes: Literal["pictures", "videos"]
    frames: int
    negative_prompt: bool
    guidance_scale: bool
    edits: bool
    inpaints: bool
    decoders: list[str]
    loras: list[str]
    ip_adapter: bool
    controls: list[str]
    engine: str
    running: int
    waiting: int


class ModelAnswer(BaseModel):
    """A model, as OpenAI has it, and our facts of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tgate-engine"] = "tgate-engine"
    tgate: ModelFacts


class ModelsAnswer(BaseModel):
    """All models, the one for those who name none first."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class HealthAnswer(BaseModel):
    """Whether the server works; ``models``: images that run and wait."""

    status: Literal["ok", "starting", "stopping", "failed"]
    models: dict[str, dict[str, int]]


class CancelAnswer(BaseModel):
    """A request that was called off."""

    id: str
    cancelled: Literal[True] = True
