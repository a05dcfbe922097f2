"""libtgate through ctypes: the C ABI as a C program meets it, with NumPy on this side."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint64
from ctypes import c_void_p as Handle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OK, ARGUMENT, BUNDLE, PLAN, ENGINE, REQUEST, MEMORY, CANCELLED, INTERNAL = range(9)
NAMES = ("ok", "argument", "bundle", "plan", "engine", "request", "memory", "cancelled", "internal")


def onnxruntime_library() -> Path:
    """The library of C functions that the installed wheel carries."""
    import onnxruntime  # not above: a process that has loaded this module loads no other copy of its library

    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    return library


class Failure(Exception):
    """What a call of the library ended with."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def _struct(title: str, /, **fields: Any) -> type[Structure]:
    return type(title, (Structure,), {"_fields_": [("size", c_size_t), *fields.items()]})


_Texts = POINTER(c_char_p)
BundleOptions = _struct("BundleOptions", check_digests=c_int32)
BundleFacts = _struct(
    "BundleFacts",
    **dict.fromkeys(("model", "family", "licence", "dtype"), c_char_p),
    **dict.fromkeys(("plans", "sizes", "tokenizers"), c_size_t),
    **dict.fromkeys(("frames", "fps", "takes_prompt", "takes_picture", "decodes", "guided"), c_int32),
)
TensorFacts = _struct("TensorFacts", name=c_char_p, dtype=c_char_p, rank=c_size_t, shape=c_int64 * 8)
Memory = _struct("Memory", **dict.fromkeys(("weights", "request", "scratch", "peak"), c_uint64))
SessionOptions = _struct(
    "SessionOptions",
    **dict.fromkeys(("engine", "library", "memory"), c_char_p),
    plans=_Texts,
    plan_count=c_size_t,
    sizes=_Texts,
    size_count=c_size_t,
    threads=c_int32,
    device=c_int32,
    stream=Handle,
    cuda_graphs=c_int32,
)
PoolOptions = _struct("PoolOptions", images=c_size_t, image_size=c_char_p, plans=_Texts, plan_count=c_size_t)
Progress = _struct("Progress", done=c_size_t, total=c_size_t, graph=c_char_p, phase=c_char_p)
OnStep = ctypes.CFUNCTYPE(c_int32, Handle, POINTER(Progress), Handle)


class Ids(Structure):
    _fields_ = (("ids", POINTER(c_int64)), ("count", c_size_t))


class Adapter(Structure):
    _fields_ = (("name", c_char_p), ("scale", c_double))


class Tensor(Structure):
    _fields_ = (("name", c_char_p), ("data", POINTER(c_float)), ("count", c_size_t))


RequestOptions = _struct(
    "RequestOptions",
    pool=Handle,
    plan=c_char_p,
    image_size=c_char_p,
    images=c_size_t,
    seed=c_uint64,
    generator=c_char_p,
    guidance_scale=c_double,
    prompt=c_char_p,
    ids=POINTER(Ids),
    tensors=POINTER(Tensor),
    picture=POINTER(c_uint8),
    id_count=c_size_t,
    tensor_count=c_size_t,
    picture_bytes=c_size_t,
    negative_prompt=c_char_p,
    negative_ids=POINTER(Ids),
    initial_latents=POINTER(c_float),
    initial_latents_count=c_size_t,
    on_step=OnStep,
    user_data=Handle,
)
PictureFacts = _struct("PictureFacts", bytes=c_size_t, width=c_int32, height=c_int32, frames=c_int32)

STRUCTS: Mapping[str, type[Structure]] = {
    "bundle_options": BundleOptions,
    "bundle_facts": BundleFacts,
    "tensor_facts": TensorFacts,
    "memory": Memory,
    "session_options": SessionOptions,
    "pool_options": PoolOptions,
    "progress": Progress,
    "request_options": RequestOptions,
    "picture_facts": PictureFacts,
}


class Library:
    """The functions, by their names without ``tgate_``."""

    def __init__(self, path: Path) -> None:
        self.c: Any = ctypes.CDLL(str(path))
        texts = (
            "version",
            "error_text",
            "bundle_plan",
            "bundle_size",
            "bundle_adapter",
            "session_engine",
            "session_advice",
            "request_cut",
        )
        for name in texts:
            getattr(self.c, f"tgate_{name}").restype = c_char_p
        for name in ("pool_bytes", "pool_moved_images"):
            getattr(self.c, f"tgate_{name}").restype = c_uint64
        for name in ("pool_free_images", "request_latents_count", "request_latents_shape"):
            getattr(self.c, f"tgate_{name}").restype = c_size_t

    def call(self, name: str, *arguments: Any) -> None:
        """A function whose last argument is the error. Raises :class:`Failure`."""
        error = Handle()
        code = getattr(self.c, f"tgate_{name}")(*arguments, byref(error))
        if code != OK:
            text = self.c.tgate_error_text(error).decode()
            assert self.c.tgate_error_code(error) == code
            self.c.tgate_error_free(error)
            raise Failure(code, text)
        assert error.value is None

    def struct(self, name: str, **fields: Any) -> Any:
        """A struct that its init function has filled, with these fields set."""
        kind = STRUCTS[name]
        made = kind()
        assert getattr(self.c, f"tgate_{name}_init")(byref(made), c_size_t(ctypes.sizeof(kind))) == OK
        for key, value in fields.items():
            setattr(made, key, value)
        return made


def _texts(names: Sequence[str]) -> Any:
    return (c_char_p * len(names))(*(name.encode() for name in names))


class _Owned:
    handle = Handle()  # until there is one

    def __init__(self, library: Library, handle: Handle, free: str) -> None:
        self.library = library
        self.handle = handle
        self._free = getattr(library.c, f"tgate_{free}_free")

    def close(self) -> None:
        if self.handle.value is not None:
            self._free(self.handle)
            self.handle = Handle()

    def __del__(self) -> None:
        self.close()


class Bundle(_Owned):
    def __init__(self, library: Library, path: Path, **options: Any) -> None:
        handle = Handle()
        asked = library.struct("bundle_options", **options)
        library.call("bundle_open", str(path).encode(), byref(asked), byref(handle))
        super().__init__(library, handle, "bundle")

    def memory(self, plan: str | None = None, size: str | None = None, images: int = 1) -> dict[str, int]:
        found = self.library.struct("memory")
        names = [None if text is None else text.encode() for text in (plan, size)]
        self.library.call("bundle_memory", self.handle, *names, c_size_t(images), byref(found))
        return {name: getattr(found, name) for name in ("weights", "request", "scratch", "peak")}

    def facts(self) -> Any:
        found = self.library.struct("bundle_facts")
        self.library.call("bundle_facts_get", self.handle, byref(found))
        return found

    def names(self, kind: str) -> list[str]:
        """``kind``: "plan", "size" or "adapter"."""
        give = getattr(self.library.c, f"tgate_bundle_{kind}")
        names: list[str] = []
        while (name := give(self.handle, c_size_t(len(names)))) is not None:
            names.append(name.decode())
        return names

    def tensors(self, size: str | None = None) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        found, text = self.library.struct("tensor_facts"), None if size is None else size.encode()
        while True:
            try:
                self.library.call("bundle_tensor", self.handle, text, c_size_t(len(shapes)), byref(found))
            except Failure as end:
                if end.code != ARGUMENT:
                    raise
                return shapes
            shapes[found.name.decode()] = tuple(found.shape[: found.rank])


class Session(_Owned):
    def __init__(
        self,
        bundle: Bundle,
        *,
        plans: Sequence[str] = (),
        sizes: Sequence[str] = (),
        library: Path | None = None,
        **options: Any,
    ) -> None:
        handle = Handle()
        asked = bundle.library.struct("session_options", **options)
        asked.library = str(library or onnxruntime_library()).encode()
        if plans:
            asked.plans, asked.plan_count = _texts(plans), len(plans)
        if sizes:
            asked.sizes, asked.size_count = _texts(sizes), len(sizes)
        bundle.library.call("session_open", bundle.handle, byref(asked), byref(handle))
        super().__init__(bundle.library, handle, "session")

    def adapted(self, scales: Mapping[str, float]) -> Session:
        handle = Handle()
        adapters = (Adapter * len(scales))(*(Adapter(name.encode(), scale) for name, scale in scales.items()))
        self.library.call("session_adapted", self.handle, adapters, c_size_t(len(scales)), byref(handle))
        made = Session.__new__(Session)
        _Owned.__init__(made, self.library, handle, "session")
        return made

    def engine(self) -> str:
        return str(self.library.c.tgate_session_engine(self.handle).decode())

    def advice(self) -> str:
        return str(self.library.c.tgate_session_advice(self.handle).decode())

    def decode(self, latents: NDArray[np.float32], size: str | None = None) -> NDArray[np.uint8]:
        """RGB pixels [frames, H, W, 3] of one image's latents."""
        facts, text = self.library.struct("picture_facts"), None if size is None else size.encode()
        self.library.call("session_picture_facts", self.handle, text, byref(facts))
        pixels, given = np.empty((facts.frames, facts.height, facts.width, 3), np.uint8), np.ascontiguousarray(latents)
        numbers, out = given.ctypes.data_as(POINTER(c_float)), pixels.ctypes.data_as(POINTER(c_uint8))
        counts = c_size_t(given.size), c_size_t(pixels.size)
        self.library.call("session_decode", self.handle, text, numbers, counts[0], out, counts[1])
        return pixels


class Pool(_Owned):
    def __init__(self, session: Session, images: int, *, plans: Sequence[str] = (), size: str | None = None) -> None:
        handle = Handle()
        asked = session.library.struct("pool_options", images=images)
        if size is not None:
            asked.image_size = size.encode()
        if plans:
            asked.plans, asked.plan_count = _texts(plans), len(plans)
        session.library.call("pool_create", session.handle, byref(asked), byref(handle))
        super().__init__(session.library, handle, "pool")

    @property
    def moved(self) -> int:
        return int(self.library.c.tgate_pool_moved_images(self.handle))

    @property
    def room(self) -> int:
        return int(self.library.c.tgate_pool_free_images(self.handle))

    @property
    def bytes(self) -> int:
        return int(self.library.c.tgate_pool_bytes(self.handle))


class Request(_Owned):
    def __init__(self, session: Session, **asked: Any) -> None:
        self.library = session.library
        self.images = asked.get("images", 1)
        handle = Handle()
        options = self._options(**asked)
        session.library.call("request_create", session.handle, byref(options), byref(handle))
        super().__init__(session.library, handle, "request")

    def _options(
        self,
        *,
        pool: Pool | None = None,
        ids: Sequence[Sequence[int]] | None = None,
        negative_ids: Sequence[Sequence[int]] | None = None,
        tensors: Mapping[str, NDArray[np.float32]] | None = None,
        picture: NDArray[np.uint8] | None = None,
        initial_latents: NDArray[np.float32] | None = None,
        on_step: Callable[[int, int], bool] | None = None,
        **fields: Any,
    ) -> Any:
        texts = {key: value.encode() if isinstance(value, str) else value for key, value in fields.items()}
        options = self.library.struct("request_options", **texts)
        self._kept: list[Any] = []  # what the struct points at

        def ids_of(rows: Sequence[Sequence[int]]) -> Any:
            arrays = [(c_int64 * len(row))(*row) for row in rows]
            self._kept += arrays
            return (Ids * len(rows))(*(Ids(array, len(array)) for array in arrays))

        if pool is not None:
            options.pool = pool.handle
        if ids is not None:
            options.ids, options.id_count = ids_of(ids), len(ids)
        if negative_ids is not None:
            options.negative_ids = ids_of(negative_ids)
        if tensors is not None:
            arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()}
            self._kept.append(arrays)
            options.tensors = (Tensor * len(arrays))(
                *(
                    Tensor(name.encode(), values.ctypes.data_as(POINTER(c_float)), values.size)
                    for name, values in arrays.items()
                )
            )
            options.tensor_count = len(arrays)
        if picture is not None:
            pixels = np.ascontiguousarray(picture, np.uint8)
            self._kept.append(pixels)
            options.picture, options.picture_bytes = pixels.ctypes.data_as(POINTER(c_uint8)), pixels.size
        if initial_latents is not None:
            start = np.ascontiguousarray(initial_latents, np.float32)
            self._kept.append(start)
            options.initial_latents, options.initial_latents_count = start.ctypes.data_as(POINTER(c_float)), start.size
        if on_step is not None:
            hear = on_step
            self._on_step = OnStep(lambda _, progress, __: 0 if hear(progress[0].done, progress[0].total) else 1)
            options.on_step = self._on_step
        return options

    def reset(self, **asked: Any) -> None:
        self.library.call("request_reset", self.handle, byref(self._options(**asked)))

    def step(self) -> None:
        self.library.call("request_step", self.handle)

    def run(self) -> Request:
        self.library.call("request_run", self.handle)
        return self

    def cancel(self) -> None:
        self.library.c.tgate_request_cancel(self.handle)

    def progress(self) -> tuple[int, int, str | None]:
        """Steps done, of how many, and the next one's graph."""
        found = self.library.struct("progress")
        self.library.call("request_progress", self.handle, byref(found))
        return found.done, found.total, None if found.graph is None else found.graph.decode()

    def cut(self) -> str:
        return str(self.library.c.tgate_request_cut(self.handle).decode())

    def latents(self) -> NDArray[np.float32]:
        """Of all its images, [images, ...]."""
        shape = (c_int64 * 8)()
        rank = self.library.c.tgate_request_latents_shape(self.handle, shape)
        array = np.empty((self.images, *shape[:rank]), np.float32)
        for image in range(self.images):
            out = array[image].ctypes.data_as(POINTER(c_float))
            count = c_size_t(array[image].size)
            self.library.call("request_latents", self.handle, c_size_t(image), out, count)
        return array

    def decode(self, image: int = 0) -> NDArray[np.uint8]:
        """RGB pixels [frames, H, W, 3]."""
        facts = self.library.struct("picture_facts")
        self.library.call("request_picture_facts", self.handle, byref(facts))
        pixels = np.empty((facts.frames, facts.height, facts.width, 3), np.uint8)
        assert pixels.size == facts.bytes
        out = pixels.ctypes.data_as(POINTER(c_uint8))
        self.library.call("request_decode", self.handle, c_size_t(image), out, c_size_t(pixels.size))
        return pixels


def batch(requests: Sequence[Request]) -> list[int]:
    """One step of each; which were stopped."""
    handles = (Handle * len(requests))(*(request.handle for request in requests))
    stopped = (c_int32 * len(requests))()
    requests[0].library.call("batch", handles, c_size_t(len(requests)), stopped)
    return list(stopped)
