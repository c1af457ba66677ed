"""Gets labels from a trained model, without TensorFlow and without training code.

The names are imported eagerly: the module `inference.predict` would hide a lazily imported function `predict`.
"""

from stepdistill_jax.decoding.beam import beam_search
from stepdistill_jax.decoding.greedy import Decoded, LabelDecoder, greedy_decode
from stepdistill_jax.decoding.sampling import sample_decode
from stepdistill_jax.inference.evaluate import evaluate
from stepdistill_jax.inference.export import export
from stepdistill_jax.inference.model import LoadedModel, load_model
from stepdistill_jax.inference.options import DecodeOptions
from stepdistill_jax.inference.predict import predict
from stepdistill_jax.inference.predictor import Predictor, load

__all__ = [
    "DecodeOptions",
    "Decoded",
    "LabelDecoder",
    "LoadedModel",
    "Predictor",
    "beam_search",
    "evaluate",
    "export",
    "greedy_decode",
    "load",
    "load_model",
    "predict",
    "sample_decode",
]
