"""Which layers train, and what "frozen" means: not one bit of a frozen parameter or batch statistic moves.

Other buffers are the model's own business: spectral norm, for example, updates its vectors in every train-mode forward.
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from toughen.layers.layer_map import Layer

NormStats = Literal["frozen", "follow", "update"]


class TrainableSet:
    """The layers of a model that train; everything else is frozen.

    A frozen parameter keeps ``grad None``: a zero gradient would still decay and coast on momentum, ``None`` is
    skipped by every torch optimizer. So one optimizer over all parameters serves every selection.

    Args:
        model: The model, at its current weights.
        norm_stats: Batch-norm statistics while a selection is active. ``"frozen"``: none moves, all layers of
            batch norm run in eval mode. ``"follow"``: the batch norm directly behind a selected layer runs in train
            mode. ``"update"``: all run in train mode, so the output of frozen layers drifts with the batches.
        norm_affine: ``"frozen"``, or ``"follow"``: scale and shift of the batch norm directly behind a selected
            layer train with it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm_stats: NormStats = "frozen",
        norm_affine: Literal["frozen", "follow"] = "frozen",
    ) -> None:
        self.model = model
        self.norm_stats = norm_stats
        self.norm_affine = norm_affine
        self._asked = {name: p.requires_grad for name, p in model.named_parameters()}
        self._following: frozenset[str] = frozenset()
        self._active = False

    def select(self, layers: Sequence[Layer]) -> None:
        """Train exactly these layers from now on; drop the gradients of all others.

        Parameters that did not ask for a gradient when this set was made stay frozen even when selected.
        """
        self._following = frozenset(layer.norm for layer in layers if layer.norm is not None)
        chosen = {name for layer in layers for name in layer.parameters}
        if self.norm_affine == "follow":
            chosen |= {f"{norm}.{kind}" for norm in self._following for kind in ("weight", "bias")}
        selected = {id(p) for name, p in self._named_parameters() if name in chosen}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(id(parameter) in selected and self._asked[name])
            if not parameter.requires_grad:
                parameter.grad = None
        self._active = True
        self.apply_mode()

    def may_train(self, layer: Layer) -> bool:
        """Return whether any parameter of a layer would train if it were selected."""
        asked = {id(p) for name, p in self.model.named_parameters() if self._asked[name]}
        return any(id(p) in asked for name, p in self._named_parameters() if name in layer.parameters)

    def apply_mode(self) -> None:
        """Give batch norm the mode that ``norm_stats`` asks for (after a ``model.train()`` it has another)."""
        if not self._active or self.norm_stats == "update":
            return
        for name, module in self.model.named_modules():
            if isinstance(module, _NormBase):
                module.training = self.norm_stats == "follow" and name in self._following and self.model.training

    def restore(self) -> None:
        """Let every parameter ask for gradients as it did when this set was made; statistics move again."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._asked[name])
        if self._active and self.norm_stats != "update":
            for module in self.model.modules():
                if isinstance(module, _NormBase):
                    module.training = self.model.training
        self._active = False

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        # a shared parameter must be found under each of its names
        return list(self.model.named_parameters(remove_duplicate=False))
