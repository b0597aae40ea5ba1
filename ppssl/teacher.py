"""The teacher: a frozen CLIP-style image-text model, loaded through open_clip, and the text features of the descriptions; or a
frozen image model of timm."""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.timm_trunk import TimmTrunk, image_input


class Teacher(nn.Module):
    """Image encoder of an image-text model plus the embeddings of P descriptions; or an image encoder alone.

    Attributes: ``text_features`` [P, E] float32 unit rows, None without descriptions, and then ``dim`` is to be given;
    ``logit_scale`` the model's own factor on cosine similarities; ``dim`` E; ``image_size`` pixels; ``mean``, ``std`` the model's
    normalization; ``name`` for logs.
    """

    def __init__(
        self,
        visual: nn.Module,
        text_features: Tensor | None,
        *,
        logit_scale: float = 1.0,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        name: str = "teacher",
        dim: int | None = None,
    ):
        super().__init__()
        if text_features is None and dim is None:
            raise ValueError("Teacher: without text_features the width of the image embedding is needed (dim)")
        self.visual = visual.eval().requires_grad_(False)
        self.register_buffer("text_features", None if text_features is None else F.normalize(text_features.detach().float(), dim=1))
        self.dim = text_features.shape[1] if dim is None else dim
        self.logit_scale, self.image_size, self.mean, self.std, self.name = logit_scale, image_size, mean, std, name

    def train(self, mode: bool = True) -> Teacher:
        """Frozen: stays in eval mode whatever the trainer asks."""
        return super().train(False)

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalized images -> [B, E] float32 unit rows; resized when they are not of the model's size."""
        size = (self.image_size, self.image_size)
        with torch.no_grad():  # not the decorator: torch.compile cannot follow a decorated bound method
            if images.shape[-2:] != size:
                images = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
            return F.normalize(self.visual(images).float(), dim=1)

    @classmethod
    def from_trunk(cls, trunk: TimmTrunk, weights: str, image_size: int | None = None) -> Teacher:
        """An image encoder of timm, with the weights that ``trunk`` has: its embedding is what timm pools before the classifier.

        weights: what they are called: their tag decides mean and standard deviation. image_size: pixels, None is the model's own.
        Raises ``ValueError`` for a size that the model does not take.
        """
        side = image_size or trunk.native_side
        trunk.map_side(side)
        how, visual = image_input(trunk.arch, weights), PooledTrunk(trunk.eval())
        with torch.no_grad():
            dim = visual(torch.zeros(1, 3, side, side)).shape[1]
        label = Path(weights).name if _looks_like_a_file(weights) else weights
        return cls(visual, None, image_size=side, mean=how.mean, std=how.std, name=f"{trunk.arch}/{label}", dim=dim)

    @classmethod
    def from_open_clip(cls, model: str, weights: str, descriptions: list[str] | None, image_size: int | None = None) -> Teacher:
        """Loads ``weights`` into the open_clip model ``model`` and embeds ``descriptions`` once (None: no
        text is wanted); the text tower is then dropped.

        model: an open_clip name, e.g. ``ViT-B-32-quickgelu``, or the path of a model-config .json.
        weights: a tag of that model, e.g. ``openai`` (downloaded on first use by open_clip), or the path of a .safetensors file.
        image_size: pixels, for which open_clip resizes the position embeddings; None is the model's own.
        Raises ``ValueError`` for an unknown model or tag, a QuickGELU mismatch, or a file that is not a safetensors file of
        this model; ``FileNotFoundError`` for a missing file; ``ConnectionError`` when a download fails, naming the remedy.
        """
        import open_clip  # heavy: only where a teacher is used

        if model.endswith(".json"):
            open_clip.add_model_config(model)
            model = Path(model).stem
        config = open_clip.get_model_config(model)
        if config is None:
            raise ValueError(f"teacher.model: open_clip knows no model {model!r}; open_clip.list_models() shows the names")
        is_file = _looks_like_a_file(weights)
        if is_file:
            _check_file(Path(weights))
        else:
            _check_tag(open_clip, model, weights, bool(config.get("quick_gelu", False)))
        try:
            with _quiet_logging():
                clip = open_clip.create_model(model, pretrained=weights, **({"force_image_size": image_size} if image_size else {}))
        except Exception as error:
            if is_file:
                raise ValueError(f"teacher.weights: {weights} does not fit open_clip's {model}: {error}") from error
            raise ConnectionError(
                f"teacher.weights: {weights!r} of {model} could not be downloaded ({type(error).__name__}: {error}). Without a "
                f"network, get the open_clip_model.safetensors of that model on another machine and set teacher.weights=PATH"
            ) from error
        clip = clip.eval().requires_grad_(False)
        text_features = None
        if descriptions is not None:
            with torch.no_grad():
                text_features = clip.encode_text(open_clip.get_tokenizer(model)(descriptions), normalize=True)
        preprocess = open_clip.get_model_preprocess_cfg(clip)
        return cls(
            clip.visual,
            text_features,
            logit_scale=float(clip.logit_scale.exp()),
            image_size=_side(clip.visual.image_size),
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
            name=f"{model}/{Path(weights).name if is_file else weights}",
            dim=config["embed_dim"],
        )


class PooledTrunk(nn.Module):
    """A model of timm up to its classifier: [B, 3, S, S] -> [B, E], pooled as it was trained (average, class token, attention)."""

    def __init__(self, trunk: TimmTrunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk.forward_head(self.trunk.forward_features(images), pre_logits=True)


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """A download that fails logs every attempt, twice; the error raised after it says it once."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def _looks_like_a_file(weights: str) -> bool:
    return Path(weights).suffix in (".safetensors", ".pt", ".pth", ".bin") or "/" in weights


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"teacher.weights: {path} is not there; give a tag of open_clip or an existing .safetensors file")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"teacher.weights: {path} is not a .safetensors file, and a pickled or TorchScript file (such as OpenAI's .pt) is "
            f"not loaded because it can run code; convert it once where you trust it: safetensors.torch.save_file("
            f"torch.jit.load(PT).state_dict(), 'clip.safetensors'), or download open_clip_model.safetensors of the same model"
        )


def _check_tag(open_clip: Any, model: str, tag: str, quick_gelu: bool) -> None:
    """Refuses before any download what open_clip only warns about: other activations give other logits."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise ValueError(f"teacher.weights: {model} has no weights {tag!r}; its tags: {', '.join(tags) or 'none'}")
    trained_with = bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False))
    if trained_with != quick_gelu:
        other = f"{model}-quickgelu" if trained_with else model.removesuffix("-quickgelu")
        raise ValueError(
            f"teacher.model: {model} has quick_gelu={quick_gelu}, but its weights {tag!r} were trained with "
            f"quick_gelu={trained_with} and would give other logits; use teacher.model={other}"
        )


MAX_CORPUS = 1 << 18
"""Bytes of a file of descriptions; its parser takes ten seconds for a megabyte."""


SHIPPED = 8
"""Descriptions that are taken of a shipped corpus, as the paper has them."""


def load_descriptions(corpus: str, count: int | None = None) -> list[str]:
    """The first ``count`` descriptions of a corpus, the relevant one first.

    corpus: the name of a file in ``ppssl/prompts`` or the path of a YAML file ``descriptions: [{text, relevant}, ...]``.
    count: None takes ``SHIPPED`` of a shipped corpus and all of any other file.
    Raises ``FileNotFoundError``/``ValueError`` naming the corpus and the remedy.
    """
    import yaml

    shipped = importlib.resources.files("ppssl") / "prompts"
    own = not (shipped / f"{corpus}.yaml").is_file()
    if not own:
        text = (shipped / f"{corpus}.yaml").read_text(encoding="utf-8")
    elif Path(corpus).is_file():
        if (size := Path(corpus).stat().st_size) > MAX_CORPUS:
            raise ValueError(f"ais.prompts: {corpus} has {size} bytes, at most {MAX_CORPUS} are read; keep fewer descriptions")
        text = Path(corpus).read_text(encoding="utf-8")
    else:
        names = sorted(p.name.removesuffix(".yaml") for p in shipped.iterdir() if p.name.endswith(".yaml"))
        raise FileNotFoundError(f"ais.prompts: no corpus {corpus!r}; use one of {', '.join(names)} or the path of a YAML file")
    try:
        entries = [(e["text"], bool(e.get("relevant", False))) for e in yaml.safe_load(text)["descriptions"]]
        if not all(isinstance(sentence, str) for sentence, _ in entries):  # nested aliases would grow beyond any memory as text
            raise TypeError("a description is no text")
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"ais.prompts: {corpus} is not of the form 'descriptions: [{{text: ..., relevant: true}}, ...]'"
        ) from error
    if len(entries) < 2:
        raise ValueError(
            f"ais.prompts: {corpus} has {len(entries)} descriptions; at least 2 are needed, for the method tells them apart"
        )
    count = count or (len(entries) if own else SHIPPED)
    if count > len(entries):
        raise ValueError(f"ais.count: {count} descriptions asked for, {corpus} has {len(entries)}; ais.count=null takes them all")
    ordered = sorted(entries, key=lambda e: not e[1])  # stable: the relevant first, the rest in the file's order
    return [text for text, _ in ordered[:count]]
