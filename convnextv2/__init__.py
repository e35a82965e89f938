"""ConvNeXt V2 and its sparse masked pre-training, FCMAE."""

from convnextv2.deferred import deferred
from convnextv2.models.config import VARIANTS
from convnextv2.version import __version__ as __version__

__getattr__, __dir__, __all__ = deferred(
    __name__,
    {
        "models.classifier": "ConvNeXtV2",
        "models.config": "VARIANTS ClassifierConfig EncoderConfig FCMAEConfig",
        "models.encoder": "Block Encoder",
        "models.fcmae": "FCMAE FCMAEOutput create_fcmae",
        "weights.pretrained": f"create_model {' '.join(VARIANTS)}",
    },
)
