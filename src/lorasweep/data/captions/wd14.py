"""Tags by the WD14 taggers (SmilingWolf's ONNX models), run by onnxruntime."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from lorasweep.core.foreign_files import read_json, read_text
from lorasweep.core.settings import Settings
from lorasweep.data.captions.caption_images import CaptionerError, Device, Repeats, in_batches
from lorasweep.data.captions.captioner_weights import Weights, find_weights, not_found
from lorasweep.data.dataset import ImageFile
from lorasweep.data.image_files import open_image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_MODELS = ("model.onnx", "model_optimized.onnx")
_LABELS = ("selected_tags.csv", "tag_mapping.json")
_DATA = ("*.onnx.data", "*.onnx_data")  # where a model of more than 2 GB keeps its weights
_NEEDED = "model.onnx and selected_tags.csv"
_KINDS = {"0": "general", "4": "character", "9": "rating"}  # Danbooru's categories
_SIDE = 448  # pixels, for models that leave it open

Threshold = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Label:
    """What one output of the model stands for."""

    tag: str
    kind: str
    """general and character tags make the caption; ratings and all else don't."""


@dataclass(frozen=True, kw_only=True)
class WD14(Settings):
    """Tags that the model finds probable, general ones first, separated by commas."""

    cached: ClassVar[bool] = True

    repeats: Repeats
    model: str
    """Folder, hub id, or hub id with a subfolder."""
    revision: str | None
    general_threshold: Threshold
    character_threshold: Threshold
    undesired_tags: tuple[str, ...]
    remove_underscore: bool
    batch_size: PositiveInt
    device: Device
    tags: bool = True
    """May the parts between commas be shuffled and dropped?"""

    def identity(self) -> str:
        """The weights' revision or hash and what chooses and spells the tags."""
        undesired = sorted({self._spell(tag) for tag in self.undesired_tags})
        return (
            f"wd14 {self._weights().revision} general_threshold={self.general_threshold} "
            f"character_threshold={self.character_threshold} undesired_tags={undesired} "
            f"remove_underscore={self.remove_underscore}"
        )

    def caption(self, images: Sequence[ImageFile]) -> Iterator[list[str]]:
        """Tag the images, a batch at a time."""
        import numpy as np

        weights = self._weights()
        labels = read_labels(self._file(weights, _LABELS))
        session = self._session(self._file(weights, _MODELS))
        layout = Layout.of(session)
        for batch in in_batches(images, layout.batch_size or self.batch_size):
            pixels = np.stack([preprocess(open_image(image.path), layout) for image in batch])
            scores = session.run(None, {layout.name: pixels})[0]  # (batch, labels)
            if scores.shape[1] != len(labels):
                raise CaptionerError(
                    f"model={self.model}: {scores.shape[1]} outputs but {len(labels)} labels; "
                    "the label file belongs to another model, download both again"
                )
            probabilities = 1 / (1 + np.exp(-scores)) if layout.channels_first else scores
            yield [self._text(labels, row) for row in probabilities]

    def _weights(self) -> Weights:
        return find_weights(self.model, self.revision, (*_MODELS, *_LABELS, *_DATA), _NEEDED)

    def _file(self, weights: Weights, names: Sequence[str]) -> Path:
        for name in names:
            if (weights.folder / name).is_file():
                return weights.folder / name
        raise not_found(self.model, _NEEDED, f"no {names[0]} there")

    def _text(self, labels: Sequence[Label], probabilities: NDArray[np.float32]) -> str:
        undesired = {self._spell(tag) for tag in self.undesired_tags}
        thresholds = {"general": self.general_threshold, "character": self.character_threshold}
        tags = {
            kind: [
                self._spell(label.tag)
                for label, probability in zip(labels, probabilities, strict=True)
                if label.kind == kind and probability >= threshold
            ]
            for kind, threshold in thresholds.items()
        }
        return ", ".join(tag for tag in tags["general"] + tags["character"] if tag not in undesired)

    def _spell(self, tag: str) -> str:
        tag = tag.strip()
        # short tags are faces, as ^_^, whose underscore is no space
        return tag.replace("_", " ") if self.remove_underscore and len(tag) > 3 else tag

    def _session(self, path: Path) -> Any:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings about the graph are not the user's
        try:
            session = onnxruntime.InferenceSession(
                path, sess_options=options, providers=self._providers()
            )
        except (
            errors.Fail,
            errors.InvalidArgument,
            errors.InvalidGraph,
            errors.InvalidProtobuf,
            errors.NotImplemented,
        ) as error:
            raise CaptionerError(
                f"model={self.model}: onnxruntime cannot load {path.name} "
                f"({str(error).partition(chr(10))[0]}); download it again"
            ) from None
        if (
            self.device.startswith("cuda")
            and "CUDAExecutionProvider" not in session.get_providers()
        ):
            raise self._no_cuda("it could not be started, CUDA or cuDNN libraries are missing")
        return session

    def _providers(self) -> list[Any]:
        """onnxruntime's names of the devices, best first; it falls back along the list."""
        import onnxruntime

        has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if self.device == "cpu" or (self.device == "auto" and not has_cuda):
            return ["CPUExecutionProvider"]
        if not has_cuda:
            raise self._no_cuda("this onnxruntime is built without it")
        onnxruntime.preload_dlls()  # takes the CUDA libraries that came with torch
        index = int(self.device.partition(":")[2] or 0)
        return [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]

    def _no_cuda(self, reason: str) -> CaptionerError:
        return CaptionerError(
            f"device={self.device}: no CUDA for tagging ({reason}); install onnxruntime-gpu in "
            "place of onnxruntime or set device=cpu"
        )


@dataclass(frozen=True)
class Layout:
    """The form in which a model wants images."""

    name: str
    batch_size: int | None
    """None: any."""
    side: int
    """Pixels of the square."""
    channels_first: bool
    """NCHW models take pixels from -1 to 1 and give logits; NHWC take 0 to 255, give chances."""

    @classmethod
    def of(cls, session: Any) -> Layout:
        """Read it from the model's input."""
        node = session.get_inputs()[0]
        batch, *rest = node.shape  # a dimension that is left open is a name or None
        channels_first = rest[0] == 3
        side = rest[1] if channels_first else rest[0]
        return cls(
            name=node.name,
            batch_size=batch if isinstance(batch, int) else None,
            side=side if isinstance(side, int) else _SIDE,
            channels_first=channels_first,
        )


def preprocess(image: Image.Image, layout: Layout) -> NDArray[np.float32]:
    """RGB to what the taggers were trained on: BGR, padded to a white square, resized.

    As kohya's tag_images_by_wd14_tagger.py, with PIL's box filter for OpenCV's area.
    """
    import numpy as np
    from PIL import Image

    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), "white")
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    resample = Image.Resampling.BOX if longer >= layout.side else Image.Resampling.LANCZOS
    resized = square.resize((layout.side, layout.side), resample)
    bgr = np.asarray(resized, dtype=np.float32)[:, :, ::-1]  # (H, W, 3), 0 to 255
    if layout.channels_first:
        return np.ascontiguousarray(bgr.transpose(2, 0, 1) / 127.5 - 1)
    return np.ascontiguousarray(bgr)


def read_labels(path: Path) -> list[Label]:
    """The labels in the order of the model's outputs.

    From SmilingWolf's CSV (tag_id, name, category, count; a row an output) or the JSON of the
    models in subfolders (output index to tag and category).
    """
    try:
        if path.suffix == ".csv":
            lines = StringIO(read_text(path), newline="")
            rows = [(row["name"], _KINDS.get(row["category"], "")) for row in csv.DictReader(lines)]
        else:
            mapping = read_json(path)
            entries = [mapping[str(index)] for index in range(len(mapping))]
            rows = [(entry["tag"], entry["category"].lower()) for entry in entries]
    except (csv.Error, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CaptionerError(
            f"model: {path} is not a tagger's label file ({error!r}); download it again"
        ) from None
    return [Label(tag, kind) for tag, kind in rows]
