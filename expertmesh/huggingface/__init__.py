"""A Hugging Face model whose feed-forward layers run in a cluster.

>>> from expertmesh.huggingface import attach, load_without_experts
>>> model = load_without_experts("path/to/checkpoint", "localhost:50051")  # doctest: +SKIP
>>> model.generate(**tokenizer("def", return_tensors="pt"))  # doctest: +SKIP
"""

try:
    import transformers as _  # noqa: F401  # the only part of expertmesh that needs it
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "expertmesh.huggingface needs transformers: pip install 'expertmesh[hf]'"
    ) from error

from expertmesh.huggingface.attachment import Attachment, attach
from expertmesh.huggingface.loading import load_without_experts

__all__ = ["Attachment", "attach", "load_without_experts"]
