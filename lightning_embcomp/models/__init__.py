"""Reference models: a click-through LightningModule around TorchRec's architectures."""

from lightning_embcomp.models.click_model import ClickModel, NonFiniteLossError
from lightning_embcomp.models.features import FeatureLike

__all__ = ["ClickModel", "FeatureLike", "NonFiniteLossError"]
