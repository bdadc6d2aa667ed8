"""`alpha-clip fit` and `validate`: Lightning's command line, with what every run of ours has."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from alpha_clip.checkpoint_io import AtomicCheckpointIO
from alpha_clip.data import RegionDataModule
from alpha_clip.last_checkpoint import LastCheckpoint
from alpha_clip.module import AlphaClipModule
from alpha_clip.progress import RunProgress
from alpha_clip.throughput import Throughput

_BENIGN = (
    "is set, but there is no last checkpoint available",  # the first run of `ckpt_path: last`
    r"Found \d+ module\(s\) in eval mode",  # frozen towers stay in eval mode on purpose
    "does not have many workers",  # the config says how many
    "Total length of .list. across ranks is zero",  # no validation data were given
    "isinstance.treespec, LeafSpec.. is deprecated",  # inside Lightning
    r"torch.distributed.nn.functional.all_gather is deprecated",  # open_clip's, under torch 2.15
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
    # AlphaClipModule builds its layers itself and only shards them there.
    "You're using the WeightAveraging callback with a model that overrides the configure_model",
)


class TrainingCLI(LightningCLI):
    """Lightning's command line for `AlphaClipModule` and `RegionDataModule`.

    One key more, `output`, is the folder of a run: `model/` (what `create_model` takes),
    `checkpoints/` (`last.ckpt` and the best by validation, to go on from), `metrics/` (CSV, a
    version each start), `tensorboard/`. A command whose folder has a checkpoint goes on from it; to
    begin anew, give another `output`. `last` is our `LastCheckpoint`, `best` a `ModelCheckpoint`.

    Args:
        arguments: The command and its options; `None` takes what was typed.
    """

    def __init__(self, arguments: list[str] | None) -> None:
        for benign in _BENIGN:
            warnings.filterwarnings("ignore", f".*{benign}")
        # Lightning's CLI calls what jsonargparse 5 will remove.
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        chatter = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        chatter.addFilter(lambda record: "litlogger" not in record.getMessage())  # an advert
        super().__init__(
            AlphaClipModule,
            RegionDataModule,
            args=arguments,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "alpha-clip"},
            load_from_checkpoint_support=False,  # a checkpoint of ours says what it is
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's folder and its two kinds of checkpoints; see `LightningCLI`."""
        parser.add_argument("--output", type=str, default="runs/train", help="Folder of the run.")
        parser.link_arguments("output", "trainer.default_root_dir")
        for name, kind in (("last", LastCheckpoint), ("best", ModelCheckpoint)):
            parser.add_lightning_class_args(kind, name)
            parser.link_arguments("output", f"{name}.dirpath", compute_fn=_checkpoints)
        parser.set_defaults(
            {
                "best.monitor": "val/region_top1",
                "best.mode": "max",
                "best.save_top_k": 1,
                "best.filename": "best-{step}",
                "best.save_on_train_epoch_end": False,  # validation decides
            }
        )

    def before_instantiate_classes(self) -> None:
        """Fill in what follows from the run's folder."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit":
            return
        if config.model.output is None:
            config.model.output = os.path.join(config.output, "model")
        if config.ckpt_path is None:  # a run never begins anew over what it has made
            config.ckpt_path = "last"

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add loggers, unless the config has its own, and the callbacks of every run."""
        config = self.config_init[self.subcommand]
        given, output = config.trainer, config.output
        if given.logger is None and not given.fast_dev_run:
            kwargs["logger"] = [
                CSVLogger(output, "metrics", flush_logs_every_n_steps=1),
                TensorBoardLogger(output, "tensorboard", version=""),
            ]
        callbacks = given.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        kwargs["callbacks"] = [*callbacks, Throughput()]
        own = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if given.enable_progress_bar is not False and not own:
            kwargs["callbacks"].append(RunProgress())
        if given.logger is not False and not given.fast_dev_run:
            kwargs["callbacks"].append(LearningRateMonitor("step"))
        plugins = given.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)


def _checkpoints(output: str) -> str:
    return os.path.join(output, "checkpoints")
