"""Networks that are here to be compared with, and pre-training that is looked at while it goes on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convnextv2.data.build import build_finetune_datasets
from convnextv2.models.fcmae import FCMAE
from convnextv2.training import Outcome
from convnextv2.training.finetuning import ClassifierTask
from convnextv2.training.pretraining import PretrainTask
from convnextv2.training.task import Task
from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.map_grid import MapGrid
from sparse_ops.sparse_grid import SparseGrid
from studies.frozen import accuracy, extract

VARIANTS = {
    "leaking": "masked once, after the stem, and dense from there on: visible content leaks through masked cells",
    "no-grn": "GRN is the identity, in pre-training and in fine-tuning",
}


class LeakingFCMAE(FCMAE):
    """A masked autoencoder whose encoder is dense, and masks its cells after the stem alone."""

    def encode(
        self, images: Tensor, visible: ActiveSet, backend: str | Backend | None = None
    ) -> tuple[Tensor, SparseGrid]:
        """As the sparse one, but that GRN, too, is over all cells."""
        grn_scope, (stem, *downsamples) = self.config.grn_scope, self.encoder.downsample_layers
        dense = MapGrid(len(images), grn_scope=grn_scope).native(images, self.config.encoder.kernel_size)
        sparse = SparseGrid(visible, backend or self.backend, grn_scope)
        x = stem(images, dense)
        x = x * dense.features(visible.densify(x.new_ones(visible.num_cells, 1)))
        x = self.encoder.stages[0](x, dense)
        for reduce, stage in zip(downsamples, self.encoder.stages[1:], strict=True):
            x, sparse = stage(reduce(x, dense), dense), sparse.down()
        return sparse.active.gather(dense.cells(x)), sparse


def freeze_grn(model: nn.Module) -> None:
    """Keep GRN at its initial value, gamma and beta of 0, which is the identity."""
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            parameter.requires_grad = False


class VariantTask(Task[Any]):
    """What both runs of a variant have in common."""

    variant: str | None = None

    def initialise(self, model: Any, resumed: bool) -> str:
        if self.variant == "no-grn":
            freeze_grn(model)
        return super().initialise(model, resumed)


class StudyPretrain(VariantTask, PretrainTask):
    """Pre-training of a variant, with kNN on its features now and then; the weights follow as from any pre-training."""

    probes = 0

    def model(self) -> FCMAE:
        model = super().model()
        if self.variant != "leaking":
            return model
        leaking = LeakingFCMAE(model.config, self.options.backend)
        leaking.load_state_dict(model.state_dict())  # arms begin with the same weights
        return leaking

    def begin_epoch(self, accelerator: Any, model: nn.Module, epoch: int) -> None:
        self._epoch = epoch + 1
        super().begin_epoch(accelerator, model, epoch)

    def evaluate(self, accelerator: Any, model: nn.Module, loaders: Any) -> Outcome | None:
        """The last epoch is always looked at and the last look counts as the best: the best weights are the last."""
        epochs = self.options.epochs
        due = {round(epochs * number / self.probes) for number in range(1, self.probes + 1)}
        if self._epoch not in due:
            return None
        o, seen = self.options, self._data
        shape = o.size, o.encoder().in_chans
        parts = build_finetune_datasets(o.data, *shape, mean=seen.mean, std=seen.std, wanted=o.wanted)
        encoder = accelerator.unwrap_model(model).encoder
        top1 = accuracy("knn", *(extract(encoder, part) for part in parts))
        return Outcome({"knn": top1}, {"probed": self._epoch})


class StudyClassifier(VariantTask, ClassifierTask):
    """Fine-tuning of a variant, which is measured after its last epoch alone, unless it ends by what is measured."""

    measured = frozenset()

    def begin_epoch(self, accelerator: Any, model: nn.Module, epoch: int) -> None:
        self._due = bool(self.options.patience) or epoch + 1 == self.options.epochs
        super().begin_epoch(accelerator, model, epoch)

    def evaluate(self, accelerator: Any, model: nn.Module, loaders: Any) -> Outcome | None:
        return super().evaluate(accelerator, model, loaders) if self._due else None

    def line(self, row: dict[str, Any]) -> str:
        return super().line(row) if "val_top1" in row else Task.line(self, row)
