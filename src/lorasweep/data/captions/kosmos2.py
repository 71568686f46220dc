"""Sentences by Kosmos-2 (arXiv 2306.14824), run by transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import PositiveInt

from lorasweep.core.settings import Count, Settings, SettingsError
from lorasweep.core.text import shown
from lorasweep.data.captions.caption_images import CaptionerError, Device, Repeats, in_batches
from lorasweep.data.captions.captioner_weights import Weights, find_weights, not_found
from lorasweep.data.dataset import ImageFile
from lorasweep.data.image_files import open_image
from lorasweep.models.base_model import Precision, torch_dtype
from lorasweep.models.devices import resolve_device
from lorasweep.models.model_files import check_parts

_FILES = ("*.safetensors", "*.json", "*.model")
_NEEDED = "the .safetensors and .json files"


@dataclass(frozen=True, kw_only=True)
class Kosmos2(Settings):
    """A description of each image, in sentences."""

    cached: ClassVar[bool] = True

    repeats: Repeats
    model: str
    """Folder or hub id."""
    revision: str | None
    prompt: str
    """What the answer goes on from; it is not part of the caption."""
    max_new_tokens: Count
    dtype: Precision
    batch_size: PositiveInt
    device: Device
    tags: bool = True  # as runs were of which this was not asked; conf/ says false
    """May the parts between commas be shuffled and dropped?"""

    def identity(self) -> str:
        """The weights' revision or hash and what else decides the words."""
        return (
            f"kosmos2 {self._weights().revision} prompt={self.prompt!r} "
            f"max_new_tokens={self.max_new_tokens} dtype={self.dtype}"
        )

    def caption(self, images: Sequence[ImageFile]) -> Iterator[list[str]]:
        """Describe the images, a batch at a time; the most probable words, nothing is drawn."""
        try:
            device = resolve_device(self.device, "device")
        except SettingsError as error:
            raise CaptionerError(str(error)) from None
        weights = self._weights()
        if not any(weights.folder.glob("*.safetensors")):
            raise not_found(self.model, _NEEDED, "no .safetensors file there")
        processor, model = self._loaded(weights, device)
        for batch in in_batches(images, self.batch_size):
            yield self._describe(batch, model, processor)

    def _describe(self, batch: Sequence[ImageFile], model: Any, processor: Any) -> list[str]:
        import torch

        inputs = processor(
            # one prompt for all: rows of different lengths would be padded and come out otherwise
            text=[self.prompt] * len(batch),
            images=[open_image(image.path) for image in batch],
            num_image_tokens=model.config.latent_query_num,
            return_tensors="pt",
        ).to(model.device, dtype=model.dtype)  # only floating-point tensors take the dtype
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
            )
        new = tokens[:, inputs["input_ids"].shape[1] :]  # (batch, new tokens), without the prompt
        texts = processor.batch_decode(new, skip_special_tokens=True)
        # strips the marks of grounding; the phrases and boxes that come with the text are not used
        return [processor.post_process_generation(text)[0].strip() for text in texts]

    def _weights(self) -> Weights:
        return find_weights(self.model, self.revision, _FILES, _NEEDED)

    def _loaded(self, weights: Weights, device: str) -> tuple[Any, Any]:
        """The processor and the model. Raises CaptionerError for files that are not theirs."""
        from safetensors import SafetensorError

        try:
            check_parts(weights.folder, "it", [""])
            return _load_processor(weights), self._load_model(weights, device)
        except CaptionerError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CaptionerError(
                f"model={self.model}: its files can't be loaded as Kosmos-2's"
                f" ({shown(first, 300)}); download it again"
            ) from None

    def _load_model(self, weights: Weights, device: str) -> Any:
        from transformers import Kosmos2ForConditionalGeneration
        from transformers.utils import logging as transformers_logging

        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()  # it would fill log files
        model, loaded = Kosmos2ForConditionalGeneration.from_pretrained(
            weights.folder,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch_dtype(self.dtype),
            output_loading_info=True,
        )
        if missing := loaded["missing_keys"]:
            raise CaptionerError(  # transformers would fill them with random numbers
                f"model={self.model}: {len(missing)} of Kosmos-2's weights are missing in the file "
                f"({min(missing)}, ...); download it again"
            )
        return model.to(device).eval()


def _load_processor(weights: Weights) -> Any:
    from transformers import CLIPImageProcessorPil, Kosmos2Processor

    # named, because the default image processor wants torchvision, which we do without
    images = CLIPImageProcessorPil.from_pretrained(weights.folder, local_files_only=True)
    return Kosmos2Processor.from_pretrained(
        weights.folder, image_processor=images, local_files_only=True
    )
