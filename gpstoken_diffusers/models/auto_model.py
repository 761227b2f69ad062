"""GPSTokenAutoModel: any network of this package, by what its folder says that it is."""

from __future__ import annotations

import os

from diffusers.models.modeling_utils import ModelMixin

from .autoencoder_gpstoken import AutoencoderGPSToken
from .loading import LOCATION_ARGUMENTS
from .transformer_gpstoken import GPSTokenTransformerModel
from .transformer_gpstoken_layout import GPSTokenLayoutModel

_CLASSES = {kind.__name__: kind for kind in (AutoencoderGPSToken, GPSTokenLayoutModel, GPSTokenTransformerModel)}


class GPSTokenAutoModel:
    """Where `diffusers.AutoModel` goes for the networks of a pipeline's folder; it makes no objects of its own."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> ModelMixin:
        """The network of a folder or Hub repository; arguments and errors as those of its class.

        Raises ValueError: the folder holds another class of model.
        """
        where = {key: kwargs[key] for key in LOCATION_ARGUMENTS if key in kwargs}
        name = AutoencoderGPSToken.load_config(pretrained_model_name_or_path, **where).get("_class_name")
        if name not in _CLASSES:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of class {name}, not one of {', '.join(_CLASSES)}."
            )
        return _CLASSES[name].from_pretrained(pretrained_model_name_or_path, **kwargs)
