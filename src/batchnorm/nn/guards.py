"""Attributes that other people's code reads just before it drops what a layer of ours adds to torch's.

``torch.nn.utils.fuse_conv_bn_eval``, ``to_mkldnn``, a repository's own ``fuse()`` and the converters of torch take any
subclass of torch's layers. None of them asks what the subclass does; the attributes that they need tell that they run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from batchnorm.nn.base import FusedBatchNorm


def _is_listed() -> bool:
    """Whether ``torch.jit.trace`` goes through every attribute that there is, without a use for any of them."""
    return torch.jit._trace._trace_module_map is not None


class Epsilon:
    """The attribute ``eps``. Who reads it computes batch normalization without the layer, and loses its activation.

    An activation that came from the network around the layer (``from_torch(model, example=)``) goes back to where it
    was, so that the reader finds an ordinary layer. One that the layer was built with has no other place: that raises.
    The package itself reads ``layer.epsilon``.
    """

    def __get__(self, layer: FusedBatchNorm | None, owner: type) -> Any:
        if layer is None:
            return self
        if _is_listed():
            return layer.epsilon
        if layer.taken_from:
            layer.hand_back()  # it may be of the class that it had before, which is none of ours
        if vars(layer).get("activation") is not None:
            raise TypeError(
                f"eps of {owner.__name__}(activation={layer.activation!r}) cannot be read: code that folds or converts "
                "batch normalization by its eps would drop the activation. Use batchnorm.fold or "
                "batchnorm.convert_sync_batchnorm, or build the layer without an activation, with a module for it "
                "behind; the value alone is layer.epsilon."
            )
        return vars(layer)["eps"]

    def __set__(self, layer: FusedBatchNorm, value: float) -> None:
        vars(layer)["eps"] = value  # where torch's repr looks for it


class QConfig:
    """The attribute ``qconfig``: missing, until set, but an error on a layer with an activation or other statistics.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` and quantization read it: as with ``eps``, what came from the
    network around the layer goes back. ``torch.ao.quantization.prepare`` sets it, and would then not find the layer by
    its exact type: that raises.
    """

    def __get__(self, layer: FusedBatchNorm | None, owner: type) -> Any:
        if layer is None:
            return self
        if "qconfig" in vars(layer):
            return vars(layer)["qconfig"]
        source = layer.statistics
        if _is_listed():
            raise AttributeError("qconfig")  # goes on to Module.__getattr__, which words it
        if type(source).__name__ != "Batch":
            raise TypeError(
                f"SyncBatchNorm.convert_sync_batchnorm and quantization drop the statistics of {owner.__name__}"
                f"(statistics={source!r}): use batchnorm.convert_sync_batchnorm, and revert_sync_batchnorm "
                "before you quantize."
            )
        if layer.taken_from:
            layer.hand_back()
        if vars(layer).get("activation") is None:
            raise AttributeError("qconfig")
        raise TypeError(
            f"SyncBatchNorm.convert_sync_batchnorm and quantization drop the activation of {owner.__name__}"
            f"(activation={layer.activation!r}): build the layer without it, with a module for it behind."
        )

    def __set__(self, layer: FusedBatchNorm, value: Any) -> None:
        if value is not None:
            raise TypeError(
                f"torch's quantization finds batch normalization by its exact type, and not {type(layer).__name__} of "
                "batchnorm: pass batchnorm.to_torch(model), or batchnorm.fold(model, example) to be rid of it; with "
                "qconfig = None the layer stays in float."
            )
        vars(layer)["qconfig"] = value

    def __delete__(self, layer: FusedBatchNorm) -> None:
        if vars(layer).pop("qconfig", self) is self:
            raise AttributeError("qconfig")
