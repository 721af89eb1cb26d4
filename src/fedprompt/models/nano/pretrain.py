"""Pre-training of the embedded nano ViT on procedurally drawn images (`fedprompt pretrain`).

*Plain*: classify the procedural shapes, with a head that is thrown away. *Promptable*: continue
from the plain weights with task tokens. For every image one of four attributes is asked (`TASKS`);
the tokens of that task stand where prompts will stand (after CLS, without position embedding), and
one head over the answers of all tasks forces CLS to express what the tokens ask for. An ordinarily
pre-trained network of this size hardly reacts to prompts; this one does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import atomic_write
from fedprompt.core.seeding import derive_seed, numpy_generator, torch_generator
from fedprompt.data.drawing.composition import (
    HUES,
    UNDEFINED,
    Composition,
    Drawn,
    Grounds,
    Masks,
    compose,
    draw_masks,
)
from fedprompt.data.drawing.patterns import PATTERNS
from fedprompt.models.backbone import Backbone
from fedprompt.models.nano import network as nano
from fedprompt.models.nano.card import Training, make_card, source_commit, write_card
from fedprompt.models.nano.recipe import TASKS, TOKENS_PER_TASK, PretrainConfig, Progress
from fedprompt.models.selection import QUERIES


def pretrain(
    config: PretrainConfig,
    output: Path,
    progress: Progress | None = None,
    init: Path | None = None,
) -> Path:
    """Train and write `<name>.safetensors` and its card `<name>.json`.

    Args:
        config: the recipe.
        output: folder to write to; created if missing. Existing files are replaced at the very end.
        progress: called now and then.
        init: weights to continue from; the promptable stage expects the plain ones.

    Returns:
        The path of the weights.

    Raises:
        ConfigError: the device is not there, or `init` cannot be read.
    """
    report = progress or (lambda stage, done, total, metrics: None)
    device = _device(config.device)
    output.mkdir(parents=True, exist_ok=True)
    started, commit = time.perf_counter(), source_commit()
    # PyTorch and timm initialise from the global generator; the caller's is put back afterwards.
    with torch_threads(config.threads), torch.random.fork_rng(devices=[]):
        backbone = untrained(config.seed)
        if init is not None:
            backbone = Backbone(nano.load(init)[0], nano.IMAGE_SIZE)
        masks = _draw(config, report)
        trainer = _Trainer(config, backbone, masks, device)
        history = trainer.fit(report)
        seconds = time.perf_counter() - started
        tensors = _half({f"vit.{name}": value for name, value in trainer.vit.state_dict().items()})
        if config.promptable:
            tensors |= _half({"task_tokens": trainer.tokens})
        tensors |= _half(_query_statistics(config, tensors, masks, report))
    path = output / f"{config.name}.safetensors"
    content = save(tensors)
    atomic_write(path, content)
    training = Training(
        classes=len(masks.names),
        images=len(masks),
        parameters=sum(value.numel() for value in trainer.vit.parameters()),
        device=str(trainer.device),
        history=history,
        seconds=seconds,
        init=init,
        commit=commit,
    )
    write_card(path, make_card(config, training, content))
    return path


# ---------------------------------------------------------------- training


class _Trainer:
    """The network, its throw-away head and its optimiser; every random draw comes from generators
    of the seed.
    """

    def __init__(
        self, config: PretrainConfig, backbone: Backbone, masks: Masks, device: torch.device
    ) -> None:
        self.config, self.masks, self.device = config, masks, device
        self.backbone = backbone.to(device)
        self.vit = backbone.vit.train().requires_grad_(True)
        self.generator = numpy_generator(config.seed, f"pretrain/{config.name}/order")
        self.grounds = Grounds(seed=config.seed)
        self.finished = 0
        shapes = len(masks.names)
        answers = [shapes, HUES, HUES, len(PATTERNS)] if config.promptable else [shapes]
        self.offsets = np.concatenate([[0], np.cumsum(answers)])
        initial = torch_generator(config.seed, f"pretrain/{config.name}/head")
        self.head = nn.Linear(nano.EMBED_DIM, int(self.offsets[-1]))
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=initial)
            self.head.bias.zero_()
        self.head.to(device)
        tokens = torch.randn(len(TASKS), TOKENS_PER_TASK, nano.EMBED_DIM, generator=initial)
        self.tokens = nn.Parameter((0.5 * tokens).to(device))
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [*self.vit.named_parameters(), *self.head.named_parameters()]
        decayed = [
            value
            for name, value in parameters
            if value.ndim > 1 and name not in ("cls_token", "pos_embed")
        ]
        chosen = {id(value) for value in decayed}
        rest = [value for _, value in parameters if id(value) not in chosen]
        rate, decay = self.config.learning_rate, self.config.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": decayed, "lr": rate, "weight_decay": decay},
            {"params": rest, "lr": rate, "weight_decay": 0.0},
        ]
        if self.config.promptable:
            token_rate = self.config.token_learning_rate
            groups.append({"params": [self.tokens], "lr": token_rate, "weight_decay": 0.0})
        return torch.optim.AdamW(groups, betas=(0.9, 0.98))

    def fit(self, report: Progress) -> list[dict[str, float]]:
        """Train; returns loss and accuracy, averaged over each twentieth of the steps."""
        steps = self.config.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        history: list[dict[str, float]] = []
        sums, window = torch.zeros(2, dtype=torch.float64), 0
        for step in range(1, steps + 1):
            sums += self._step()
            schedule.step()
            self.finished = step
            window += 1
            if step % max(steps // 20, 1) == 0 or step == steps:
                loss, accuracy = (sums / window).tolist()
                history.append(
                    {"step": step, "loss": round(loss, 4), "accuracy": round(accuracy, 4)}
                )
                sums, window = torch.zeros(2, dtype=torch.float64), 0
            if step % 10 == 0 or step == steps:
                report("train", step, steps, history[-1] if history else {})
        return history

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to one hundredth."""
        warmup = max(round(self.config.warmup * self.config.steps), 1)
        if step < warmup:
            return (step + 1) / warmup
        passed = (step - warmup) / max(self.config.steps - warmup, 1)
        return float(0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(passed, 1.0))))

    def _step(self) -> Tensor:
        """One optimiser step: (loss, accuracy) of the batch."""
        images, target, tasks = self._batch()
        features = self._features(images, tasks)
        logits = self.head(features)
        loss = F.cross_entropy(logits, target, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.vit.parameters(), 2.0)
        self.optimizer.step()
        accuracy = (logits.detach().argmax(dim=1) == target).double().mean()
        return torch.stack([loss.detach().double(), accuracy]).cpu()

    def _batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Freshly coloured images (B, 3, 32, 32) in [-1, 1], targets (B,) and tasks (B,), -1 for
        no tokens.
        """
        index = self.generator.integers(0, len(self.masks), self.config.batch_size)
        drawn = _coloured(self.masks, index, self.grounds, self.generator, self._composition())
        images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).to(self.device)
        pixels = (images.float() / 255 - 0.5) / 0.5
        labels, tasks = self.masks.labels[index], None
        if self.config.promptable:
            labels, chosen = self._ask(labels, drawn)
            tasks = torch.from_numpy(chosen).to(self.device)
        return pixels, torch.from_numpy(labels).to(self.device), tasks

    def _composition(self) -> Composition:
        """Clean images first, then fewer and fewer of them."""
        usual = self.config.composition
        if self.config.promptable:
            return usual
        start, end = self.config.curriculum
        passed = np.clip((self.finished / self.config.steps - start) / (end - start), 0, 1)
        return dataclasses.replace(usual, clean=float(1 + passed * (usual.clean - 1)))

    def _ask(
        self, labels: NDArray[np.int64], drawn: Drawn
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose a task per image; of an image without the attribute the shape is asked."""
        answers = np.stack([labels, drawn.foreground, drawn.background, drawn.pattern])
        tasks = self.generator.integers(0, len(TASKS), len(labels))
        everyone = np.arange(len(labels))
        tasks[answers[tasks, everyone] == UNDEFINED] = 0
        bare = self.generator.random(len(labels)) < self.config.bare_share
        tasks[bare] = 0
        targets = answers[tasks, everyone] + self.offsets[tasks]
        return targets, np.where(bare, -1, tasks)

    def _features(self, pixels: Tensor, tasks: Tensor | None) -> Tensor:
        """CLS features (B, d) with the tokens of each image's task; gradients flow through the
        embedding too.
        """
        tokens = self.backbone.embed(pixels)
        if tasks is None:
            return self.backbone.encode(tokens)
        features = tokens.new_empty(len(tokens), nano.EMBED_DIM)
        for bare in (True, False):
            rows = ((tasks < 0) == bare).nonzero()[:, 0]
            if len(rows):
                prompts = None if bare else self.tokens[tasks[rows]]
                features = features.index_copy(0, rows, self.backbone.encode(tokens[rows], prompts))
        return features


def _coloured(
    masks: Masks,
    index: NDArray[np.int64],
    grounds: Grounds,
    generator: np.random.Generator,
    composition: Composition,
) -> Drawn:
    return compose(
        masks.body[index], masks.details[index], masks.whole[index], grounds, generator, composition
    )


def untrained(seed: int) -> Backbone:
    """A nano ViT with random weights of the seed; the global generator is used and put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pretrain/vit"))
        vit = nano.build()
        for module in vit.modules():
            if isinstance(module, nn.Linear):  # timm's 0.02 is made for wider networks
                nn.init.xavier_uniform_(module.weight)
    return Backbone(vit, nano.IMAGE_SIZE)


def _draw(config: PretrainConfig, report: Progress) -> Masks:
    done = 0

    def drawn(count: int) -> None:
        nonlocal done
        done += count
        report("draw", min(done, config.images), config.images, {})

    return draw_masks(config.shapes, config.images, config.seed, drawn)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "pretrain.device: expected a GPU for 'cuda', but torch finds none; use 'cpu' or 'auto'"
        )
    return torch.device(name)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """While entered, torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- what is stored


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().to(torch.float16).contiguous() for name, value in tensors.items()
    }


def _query_statistics(
    config: PretrainConfig, tensors: Mapping[str, Tensor], masks: Masks, report: Progress
) -> dict[str, Tensor]:
    """Mean and standard deviation of every raw query over procedural images, by the weights as
    stored.
    """
    vit = nano.build()
    vit.load_state_dict(
        {name[4:]: value.float() for name, value in tensors.items() if name.startswith("vit.")}
    )
    backbone = Backbone(vit, nano.IMAGE_SIZE)
    generator = numpy_generator(config.seed, f"pretrain/{config.name}/statistics")
    grounds = Grounds(seed=config.seed)
    rows: dict[str, list[Tensor]] = {kind: [] for kind in QUERIES}
    for start in range(0, config.statistics, 256):
        index = generator.integers(0, len(masks), min(256, config.statistics - start))
        images = _coloured(masks, index, grounds, generator, config.composition).images
        with torch.no_grad():
            tokens = backbone.embed(backbone.preprocess(torch.from_numpy(images)))
            for kind in QUERIES:
                rows[kind].append(backbone.raw_queries(tokens, kind))
        report("query", start + len(index), config.statistics, {})
    result = {}
    for kind in QUERIES:
        query = torch.cat(rows[kind])
        result[f"query.{kind}.mean"] = query.mean(dim=0)
        result[f"query.{kind}.std"] = query.std(dim=0, unbiased=False)
    return result
