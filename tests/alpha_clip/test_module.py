from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import alpha_clip
from alpha_clip.batches import RegionBatch
from alpha_clip.data import RegionDataModule
from alpha_clip.module import AlphaClipModule, EncoderConfig, TrainableConfig
from alpha_clip.optim import OptimConfig, create_optimizer
from alpha_clip.sampling import Sampling
from alpha_clip.surgery import alpha_parameters

pytestmark = [
    # Frozen towers stay in eval mode on purpose; nothing in them depends on the mode.
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    # No validation data, and no workers: the set is tiny.
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]

SLOW = OptimConfig(lr_alpha=1e-2, lr=1e-4)
FAST = OptimConfig(lr_alpha=1e-2, lr=1e-3, lr_text=1e-3)
Fit = Callable[..., tuple[AlphaClipModule, dict[str, torch.Tensor], L.Trainer]]


@pytest.fixture
def fit(tiny_name: str, two_shards: Path, tmp_path: Path) -> Fit:
    """Train the tiny model for a few steps; returns it, its weights before, and the trainer."""

    def run(
        trainable: TrainableConfig = TrainableConfig(),
        steps: int = 2,
        val: bool = False,
        **more: Any,
    ) -> tuple[AlphaClipModule, dict[str, torch.Tensor], L.Trainer]:
        torch.manual_seed(0)
        module = AlphaClipModule(EncoderConfig(name=tiny_name), trainable, FAST, **more)
        before = {k: v.detach().clone() for k, v in module.model.named_parameters()}
        folder = str(two_shards)
        data = RegionDataModule(
            [folder], [folder] if val else [], 4, Sampling(2, 0.1), shuffle=3, workers=0
        )
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, data)
        return module, before, trainer

    return run


def moved(module: AlphaClipModule, before: dict[str, torch.Tensor]) -> set[str]:
    after = dict(module.model.named_parameters())
    assert all(v.isfinite().all() for v in after.values())
    return {k for k, v in before.items() if not torch.equal(v, after[k])}


def parts(names: set[str]) -> set[str]:
    """Sort names of parameters into the four parts that can be frozen."""

    def part(name: str) -> str:
        if name.endswith("weight_alpha"):
            return "alpha"
        if name.startswith("clip.visual."):
            return "visual"
        return "logit_scale" if name == "clip.logit_scale" else "text"

    return {part(name) for name in names}


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (TrainableConfig(), {"alpha", "visual"}),
        (TrainableConfig(alpha=True, visual=False), {"alpha"}),
        (TrainableConfig(alpha=False, text=True), {"visual", "text"}),
        (TrainableConfig(visual=False, logit_scale=True), {"alpha", "logit_scale"}),
    ],
    ids=["the paper's", "alpha alone", "a plain CLIP", "alpha and temperature"],
)
def test_what_is_frozen_does_not_move(
    fit: Fit, trainable: TrainableConfig, expected: set[str]
) -> None:
    module, before, trainer = fit(trainable)
    assert parts(moved(module, before)) == expected
    assert trainer.global_step == 2
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_without_alpha_its_kernel_stays_exactly_zero(fit: Fit) -> None:
    module, _, _ = fit(TrainableConfig(alpha=False, visual=True, text=True), steps=3)
    (kernel,) = alpha_parameters(module.model)
    assert not kernel.any()
    rgba = torch.randn(1, 4, module.model.image_size, module.model.image_size)
    other = torch.cat([rgba[:, :3], -rgba[:, 3:]], 1)
    assert torch.equal(module.model.encode_image(rgba), module.model.encode_image(other))


def test_regions_of_one_picture_are_learned_apart(tiny_name: str) -> None:
    """The picture is the same, so alpha alone can tell which of the two phrases is meant."""
    module = AlphaClipModule(EncoderConfig(name=tiny_name), TrainableConfig(), SLOW)
    model, optimizer = module.model, create_optimizer(module.model, SLOW)
    size = model.image_size
    alphas = torch.full((1, 2, 1, size, size), -0.5 / 0.26)
    alphas[0, 0, ..., : size // 2] = alphas[0, 1, ..., size // 2 :] = 0.5 / 0.26
    tokens = model.tokenizer(["a red thing", "a blue thing"])[None]
    whole = torch.zeros(1, 2, dtype=torch.bool)
    batch = RegionBatch(torch.randn(1, 3, size, size), alphas, tokens, whole)
    losses, told_apart = [], []
    for _ in range(40):
        image, text, flat = module(batch)
        loss = module.loss(image, text, flat, model.logit_scale.exp(), whole.flatten(), 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        told_apart.append((image @ text.T).argmax(1).tolist() == [0, 1])
    assert losses[0] > 0.6  # with alpha at zero both regions look the same
    assert not told_apart[0]
    assert min(losses) < 0.3
    assert any(told_apart)


def test_validation_accuracy_equals_its_definition(fit: Fit, two_shards: Path) -> None:
    module, _, trainer = fit(val=True)
    model = module.model.eval()
    right = total = 0
    with torch.no_grad():
        batches = list(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
        tokens = torch.cat([b.tokens[:, 0] for b in batches])
        candidates = {tuple(t.tolist()): model.encode_text(t[None], True)[0] for t in tokens}
        for batch in batches:
            images = model.encode_image(batch.rgb, batch.alphas[:, 0], normalize=True)
            for image, token in zip(images, batch.tokens[:, 0], strict=True):
                best = max(candidates, key=lambda name: float(image @ candidates[name]))
                right += best == tuple(token.tolist())
                total += 1
    assert total == 12
    assert float(trainer.callback_metrics["val/region_top1"]) == pytest.approx(right / total)


def test_the_model_is_saved_at_the_end_of_an_epoch(fit: Fit, tmp_path: Path) -> None:
    module, _, _ = fit(output=str(tmp_path / "out"))
    loaded = alpha_clip.load_checkpoint(tmp_path / "out")
    own, saved = module.model.state_dict(), loaded.state_dict()
    assert all(torch.equal(own[k], saved[k]) for k in own)


def test_training_goes_on_from_a_checkpoint(fit: Fit, tmp_path: Path) -> None:
    first, _, _ = fit(output=str(tmp_path / "out"))
    second = AlphaClipModule(EncoderConfig(checkpoint=str(tmp_path / "out")))
    own, other = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(own[k], other[k]) for k in own)


def test_the_temperature_is_kept_in_clips_range(tiny_name: str) -> None:
    learning = AlphaClipModule(EncoderConfig(name=tiny_name), TrainableConfig(logit_scale=True))
    for value, expected in ((9.0, 4.6052), (-2.0, 0.0), (3.0, 3.0)):
        learning.model.logit_scale.data.fill_(value)
        learning.on_train_batch_end()
        assert learning.model.logit_scale.item() == pytest.approx(expected)


def test_features_of_a_phrase_do_not_depend_on_its_neighbours(
    tiny_name: str, two_shards: Path
) -> None:
    module = AlphaClipModule(EncoderConfig(name=tiny_name))
    size, length = module.model.image_size, module.model.config["text_cfg"]["context_length"]
    tokens = torch.randint(1, 100, (2, 2, length))
    tokens[1, 0] = tokens[0, 1]
    whole = torch.zeros(2, 2, dtype=torch.bool)
    rgb, alphas = torch.randn(2, 3, size, size), torch.randn(2, 2, 1, size, size)
    with torch.no_grad():
        image, text, flat = module(RegionBatch(rgb, alphas, tokens, whole))
        expected = module.model.encode_text(tokens.flatten(0, 1), normalize=True)
        regions = module.model.encode_regions(rgb, alphas, normalize=True).flatten(0, 1)
    assert torch.equal(flat, tokens.flatten(0, 1))
    torch.testing.assert_close(text, expected)
    torch.testing.assert_close(image, regions)


def test_the_frozen_text_tower_keeps_no_graph(tiny_name: str) -> None:
    for trains in (False, True):
        module = AlphaClipModule(EncoderConfig(name=tiny_name), TrainableConfig(text=trains))
        size, length = module.model.image_size, module.model.config["text_cfg"]["context_length"]
        batch = RegionBatch(
            torch.randn(1, 3, size, size),
            torch.randn(1, 1, 1, size, size),
            torch.randint(1, 100, (1, 1, length)),
            torch.zeros(1, 1, dtype=torch.bool),
        )
        image, text, _ = module(batch)
        assert image.requires_grad
        assert text.requires_grad == trains


def test_nothing_to_train_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        fit(TrainableConfig(alpha=False, visual=False))
