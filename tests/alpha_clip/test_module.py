import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import alpha_clip
from alpha_clip.batches import RegionBatch
from alpha_clip.data import RegionDataModule
from alpha_clip.last_checkpoint import LastCheckpoint
from alpha_clip.lora import LoraConfig
from alpha_clip.losses import RegionContrastiveLoss, RegionSigmoidLoss
from alpha_clip.module import AlphaClipModule, EncoderConfig
from alpha_clip.optim import OptimConfig, create_optimizer
from alpha_clip.sampling import Sampling
from alpha_clip.surgery import alpha_parameters
from alpha_clip.trainable import TrainableConfig

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
        trainer: dict[str, Any] | None = None,
        callbacks: tuple[L.Callback, ...] = (),
        **more: Any,
    ) -> tuple[AlphaClipModule, dict[str, torch.Tensor], L.Trainer]:
        torch.manual_seed(0)
        module = AlphaClipModule(EncoderConfig(name=tiny_name), trainable, FAST, **more)
        before = {k: v.detach().clone() for k, v in module.model.named_parameters()}
        folder = str(two_shards)
        data = RegionDataModule(
            [folder], [folder] if val else [], 4, Sampling(2, 0.1), shuffle=3, workers=0
        )
        options: dict[str, Any] = {
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        run = L.Trainer(**{**options, **(trainer or {})}, callbacks=list(callbacks))
        run.fit(module, data)
        return module, before, run

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


@pytest.fixture
def batch(model: alpha_clip.AlphaClip) -> RegionBatch:
    """Three random images with two regions each; one phrase occurs twice."""
    size = model.image_size
    tokens = model.tokenizer(["a red thing", "a blue thing", "a star", "a cup", "a dog"])
    return RegionBatch(
        rgb=torch.randn(3, 3, size, size),
        alphas=torch.randn(3, 2, 1, size, size),
        tokens=tokens,
        phrase=torch.tensor([[0, 1], [2, 0], [3, 4]]),
        phrase_ids=torch.tensor([[5, 6], [7, 5], [8, 9]]),
        image_ids=torch.arange(3),
        whole=torch.zeros(3, 2, dtype=torch.bool),
    )


def step(module: AlphaClipModule, batch: RegionBatch) -> torch.Tensor:
    """The loss of a batch; the gradient is in the parameters."""
    module.zero_grad()
    loss = module.loss(module(batch), module.model.logit_scale.exp(), None)
    loss.backward()
    return loss.detach()


def gradients(module: AlphaClipModule) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_regions_of_one_picture_are_learned_apart(tiny_name: str) -> None:
    """The picture is the same, so alpha alone can tell which of the two phrases is meant."""
    module = AlphaClipModule(EncoderConfig(name=tiny_name), TrainableConfig(), SLOW)
    optimizer = create_optimizer(module.model.named_parameters(), module.roles, SLOW)
    size = module.model.image_size
    alphas = torch.full((1, 2, 1, size, size), -0.5 / 0.26)
    alphas[0, 0, ..., : size // 2] = alphas[0, 1, ..., size // 2 :] = 0.5 / 0.26
    tokens = module.model.tokenizer(["a red thing", "a blue thing"])
    two = torch.tensor([[0, 1]])
    whole = torch.zeros(1, 2, dtype=torch.bool)
    rgb = torch.randn(1, 3, size, size)
    batch = RegionBatch(rgb, alphas, tokens, two, two, torch.zeros(1, dtype=torch.int64), whole)
    losses, told_apart = [], []
    for _ in range(40):
        pairs = module(batch)
        told_apart.append((pairs.image @ pairs.text.T).argmax(1).tolist() == [0, 1])
        losses.append(step(module, batch).item())
        optimizer.step()
    assert losses[0] > 0.6  # with alpha at zero both regions look the same
    assert not told_apart[0]
    assert min(losses) < 0.3
    assert any(told_apart)


def test_features_are_those_of_the_model(tiny_name: str, batch: RegionBatch) -> None:
    module = AlphaClipModule(EncoderConfig(name=tiny_name))
    with torch.no_grad():
        pairs = module(batch)
        text = module.model.encode_text(batch.tokens, normalize=True)[batch.phrase.flatten()]
        image = module.model.encode_regions(batch.rgb, batch.alphas, normalize=True)
    torch.testing.assert_close(pairs.text, text)
    torch.testing.assert_close(pairs.image, image.flatten(0, 1))
    assert pairs.image_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert pairs.phrase_ids.tolist() == [5, 6, 7, 5, 8, 9]


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_chunks_change_neither_loss_nor_gradient(
    tiny_name: str, batch: RegionBatch, chunk: int
) -> None:
    """All regions of the batch stay negatives of each other, whatever is held at a time."""
    torch.manual_seed(1)
    plain = AlphaClipModule(EncoderConfig(name=tiny_name))
    torch.manual_seed(1)
    chunked = AlphaClipModule(EncoderConfig(name=tiny_name), chunk=chunk, grad_checkpointing=True)
    torch.testing.assert_close(step(chunked, batch), step(plain, batch))
    ours, theirs = gradients(chunked), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [None, 2, 100])
def test_regions_of_an_image_share_what_comes_before_late_alpha(
    tiny_name: str, batch: RegionBatch, chunk: int | None
) -> None:
    """One backward pass goes through the shared blocks, with a row an image."""
    found = []
    for count in (None, chunk):
        torch.manual_seed(1)
        encoder = EncoderConfig(name=tiny_name, alpha_block=2)
        module = AlphaClipModule(encoder, chunk=count)
        rows: list[int] = []
        block = module.model.visual.transformer.resblocks[0]  # type: ignore[union-attr,index]
        block.register_full_backward_hook(lambda _, given, out, rows=rows: rows.append(len(out[0])))
        loss = step(module, batch)
        assert sum(rows) == len(batch.rgb)
        found.append((loss, gradients(module)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_chunks_bound_the_activations(tiny_name: str, batch: RegionBatch) -> None:
    held: list[int] = []

    def kept(chunk: int | None) -> int:
        module = AlphaClipModule(EncoderConfig(name=tiny_name), chunk=chunk)
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (held.append(t.numel()), t)[1], lambda t: t
        ):
            module(batch)
        return sum(held)

    assert kept(1) < kept(None) / 20


def test_a_compiled_tower_takes_the_same_step(tiny_name: str, batch: RegionBatch) -> None:
    torch.manual_seed(1)
    plain = AlphaClipModule(EncoderConfig(name=tiny_name))
    torch.manual_seed(1)
    compiled = AlphaClipModule(EncoderConfig(name=tiny_name), compile=True)
    compiled.model.visual.compile(backend="eager")  # what is traced, without a compiler
    torch.testing.assert_close(step(compiled, batch), step(plain, batch))
    for name, gradient in gradients(compiled).items():
        expected = dict(plain.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_models_own(tiny_name: str, tmp_path: Path) -> None:
    import json

    assert isinstance(AlphaClipModule(EncoderConfig(name=tiny_name)).loss, RegionContrastiveLoss)
    source = Path(tiny_name.removeprefix("local-dir:")) / "open_clip_config.json"
    config = json.loads(source.read_text())
    config["model_cfg"] |= {"init_logit_bias": -10, "custom_text": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    module = AlphaClipModule(EncoderConfig(name=f"local-dir:{tmp_path}"))
    assert isinstance(module.loss, RegionSigmoidLoss)


def test_validation_accuracy_equals_its_definition(fit: Fit, two_shards: Path) -> None:
    module, _, trainer = fit(val=True, trainer={"val_check_interval": 1})
    model = module.model.eval()
    right = total = 0
    with torch.no_grad():
        batches = list(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
        names = {
            int(i): tokens
            for b in batches
            for i, tokens in zip(b.phrase_ids[:, 0], b.tokens[b.phrase[:, 0]], strict=True)
        }
        candidates = {i: model.encode_text(t[None], True)[0] for i, t in names.items()}
        for batch in batches:
            images = model.encode_image(batch.rgb, batch.alphas[:, 0], normalize=True)
            for image, own in zip(images, batch.phrase_ids[:, 0], strict=True):
                best = max(candidates, key=lambda name: float(image @ candidates[name]))
                right += best == int(own)
                total += 1
    assert total == 12
    assert float(trainer.callback_metrics["val/region_top1"]) == pytest.approx(right / total)
    assert {"val/within_image_top1", "val/within_image_cosine"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_the_model_is_written_with_every_checkpoint(
    fit: Fit, tmp_path: Path, lora: LoraConfig | None
) -> None:
    """With LoRA merged: what was written loads without peft, and gives the trained features."""
    trainable = TrainableConfig(lora=lora)
    module, _, trainer = fit(trainable, output=str(tmp_path / "out"))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    size = module.model.image_size
    rgba = torch.randn(2, 4, size, size)
    expected = module.model.eval().encode_image(rgba)
    for saved in (tmp_path / "out", tmp_path / "run.ckpt"):
        loaded, _, _ = alpha_clip.create_model(checkpoint=saved)
        torch.testing.assert_close(loaded.encode_image(rgba), expected, rtol=1e-4, atol=1e-5)
        assert not any("lora" in key for key in loaded.state_dict())


def test_averaged_weights_are_what_is_written(fit: Fit, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    with pytest.warns(UserWarning, match="overrides the configure_model"):
        _, _, trainer = fit(
            callbacks=(EMAWeightAveraging(decay=0.5),), steps=3, output=str(tmp_path / "out")
        )
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = alpha_clip.load_checkpoint(tmp_path / "out")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    own, averaged = checkpoint["state_dict"], loaded.clip.state_dict()
    assert all(torch.equal(own[f"model.clip.{k}"], v) for k, v in averaged.items())


def test_training_goes_on_from_a_written_model(fit: Fit, tmp_path: Path) -> None:
    first, _, trainer = fit(output=str(tmp_path / "out"))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    second = AlphaClipModule(EncoderConfig(checkpoint=str(tmp_path / "out")))
    own, other = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(own[k], other[k]) for k in own)


def test_the_temperature_is_kept_in_clips_range(tiny_name: str) -> None:
    learning = AlphaClipModule(EncoderConfig(name=tiny_name), TrainableConfig(logit_scale=True))
    for value, expected in ((9.0, 4.6052), (-2.0, 0.0), (3.0, 3.0)):
        learning.model.logit_scale.data.fill_(value)
        learning.on_train_batch_end()
        assert learning.model.logit_scale.item() == pytest.approx(expected)


def test_the_temperature_can_be_set(tiny_name: str) -> None:
    module = AlphaClipModule(EncoderConfig(name=tiny_name), logit_scale=4.6052)
    assert module.model.logit_scale.item() == pytest.approx(4.6052)


def test_the_frozen_text_tower_keeps_no_graph(tiny_name: str, batch: RegionBatch) -> None:
    for trains in (False, True):
        module = AlphaClipModule(EncoderConfig(name=tiny_name), TrainableConfig(text=trains))
        pairs = module(batch)
        assert pairs.image.requires_grad
        assert pairs.text.requires_grad == trains


def test_text_features_computed_beforehand_are_used(tiny_name: str, batch: RegionBatch) -> None:
    module = AlphaClipModule(EncoderConfig(name=tiny_name))
    batch.text = torch.randn(5, 4)
    assert torch.equal(module(batch).text, batch.text[[0, 1, 2, 0, 3, 4]])


def test_nothing_to_train_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        fit(TrainableConfig(alpha=False, visual=False))


def test_a_chunk_below_one_is_refused(tiny_name: str) -> None:
    with pytest.raises(ValueError, match="chunk of at least 1 region, got 0"):
        AlphaClipModule(EncoderConfig(name=tiny_name), chunk=0)


def test_a_run_without_end_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"the run has no end: set trainer.max_epochs"):
        fit(steps=-1, trainer={"max_epochs": -1})


class Poison(L.Callback):
    """Makes the gradient of one step infinite."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self.at:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(torch.inf)


def test_a_gradient_that_is_not_finite_stops_the_run(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"gradient was inf in step 3 .*checkpoint is sound"):
        fit(steps=6, callbacks=(Poison(2),))


def test_lost_weights_are_never_written(fit: Fit, tmp_path: Path) -> None:
    """Also where the checkpoint is due in the very step that lost them."""
    folder = tmp_path / "checkpoints"
    keep = LastCheckpoint(str(folder), every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="the gradient was inf in step 3"):
        fit(
            steps=6,
            callbacks=(Poison(2), keep),
            trainer={"enable_checkpointing": True},
            output=str(tmp_path / "out"),
        )
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(v.isfinite().all() for v in saved["state_dict"].values())
    loaded = alpha_clip.load_checkpoint(tmp_path / "out")
    assert all(v.isfinite().all() for v in loaded.state_dict().values())


class Interrupt(L.Callback):
    """Sends this process a signal in its second step, as a terminal or a cluster does."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_a_run_saves_and_leaves_without_error(
    fit: Fit, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    keep = LastCheckpoint(str(tmp_path / "checkpoints"))
    with pytest.raises(SystemExit) as stop:
        fit(steps=6, callbacks=(Interrupt(number), keep), trainer={"enable_checkpointing": True})
    assert stop.value.code == 0
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert signal.getsignal(number) is before


def test_who_asks_twice_need_not_wait(tmp_path: Path) -> None:
    keep = LastCheckpoint(str(tmp_path))
    keep._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        keep._note(signal.SIGINT, None)


def test_a_checkpoint_of_another_recipe_is_refused(fit: Fit, tmp_path: Path) -> None:
    module, _, trainer = fit()
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    module.on_load_checkpoint(checkpoint)  # its own: no objection
    module.trainable = TrainableConfig(visual=False)
    module.loss = RegionContrastiveLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match="another recipe") as refusal:
        module.on_load_checkpoint(checkpoint)
    assert "loss.label_smoothing: 0.0 there, 0.1 here" in str(refusal.value)
    assert "trainable.visual: True there, False here" in str(refusal.value)
    with pytest.raises(ValueError, match="not written by AlphaClipModule"):
        module.on_load_checkpoint({"state_dict": {}})
