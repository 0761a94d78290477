"""Fusers on disk: ``fuser.json`` (spec and card) beside ``fuser.safetensors`` (weights).

Nothing in the files is run. The JSON names the digest of the weights, which guards against
mixed-up and damaged files; it is no signature: whoever can write the folder can write both.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor, nn

from fedinfer_flower.errors import FedInferError, FuserError, InvalidValueError
from fedinfer_flower.kv.fuser import FUSERS, Fuser, FuserSpec, make_fuser
from fedinfer_flower.kv.fusers.hub import Hub, HubSpec
from fedinfer_flower.kv.layout import CacheLayout

if TYPE_CHECKING:
    from fedinfer_flower.kv.static_scales import StaticScales

__all__ = ["load_fuser", "load_hub", "read_fuser_card", "read_fuser_spec", "save_fuser", "save_hub"]

FILE_VERSION: Final = 1
MAX_WEIGHTS_BYTES: Final = 2 << 30
_MAX_JSON_BYTES: Final = 16 << 20
_MAX_HUB_MODELS: Final = 256
_JSON: Final = "fuser.json"
_WEIGHTS: Final = "fuser.safetensors"
_FIELDS: Final = {"version", "spec", "card", "weights_sha256", "weights_dtype", "scales"}
_HUB_FIELDS: Final = {"version", "hub", "layouts", "card", "weights_sha256", "weights_dtype"}
_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16}
_HEADER_BYTES: Final = 4096
_HEADER_BYTES_PER_TENSOR: Final = 256

M = TypeVar("M", bound=nn.Module)


def save_fuser(
    fuser: Fuser,
    folder: str | Path,
    card: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
) -> Path:
    """Write a fuser into a folder.

    Parameters
    ----------
    fuser : Fuser
    folder : path
        Made when it is not there; a fuser in it is replaced.
    card : mapping, optional
        What is to be known of the fuser, fit for JSON. Default the fuser's own.
    dtype : str
        ``"float32"``, or ``"float16"`` for half the bytes.

    Returns
    -------
    folder : pathlib.Path

    Raises
    ------
    FuserError
        If a weight is not finite, or too large for float16.
    InvalidValueError

    Privacy
    -------
    The card and the scales are written as they are: neither may hold anything of
    a private prompt.

    Examples
    --------
    >>> import tempfile
    >>> shape = dict(heads=1, head_size=4, hidden_size=8, window=16, rope="{}",
    ...              architecture="llama", tokenizer_digest="0" * 64)
    >>> one, two = (CacheLayout(layers=n, model_digest=str(n) * 64, **shape) for n in (1, 2))
    >>> fuser = make_fuser(FuserSpec.for_pair("last-token", one, two, width=8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_fuser(save_fuser(fuser, folder, {"seed": 0}))
    >>> again.spec == fuser.spec, again.card
    (True, {'seed': 0})
    """
    head = {
        "spec": fuser.spec.to_dict(),
        "card": dict(fuser.card if card is None else card),
        "scales": _scales_text(fuser),
    }
    return _write(fuser, Path(folder), head, dtype)


def load_fuser(folder: str | Path, *, max_bytes: int = MAX_WEIGHTS_BYTES) -> Fuser:
    """Read a fuser, in evaluation mode, with its card and scales.

    Parameters
    ----------
    folder : path
    max_bytes : int
        Most bytes of weights to read.

    Raises
    ------
    FuserError
        If a file is missing, damaged, of another release, larger than its spec implies, or
        does not hold exactly the weights that the spec names.
    """
    head = _read_json(Path(folder), _FIELDS)
    spec = FuserSpec.from_dict(head["spec"])
    if spec.kind not in FUSERS.names():
        raise FuserError(
            "a fuser of a kind that this installation has not",
            hint=f"known: {', '.join(FUSERS.names())}",
        )
    fuser = _filled(lambda: make_fuser(spec), Path(folder), head, max_bytes)
    fuser.card, fuser.scales = head["card"], _scales_of(head["scales"], spec)
    return fuser


def read_fuser_spec(folder: str | Path) -> FuserSpec:
    """Read what a fuser is made from, without its weights.

    Raises
    ------
    FuserError
    """
    return FuserSpec.from_dict(_read_json(Path(folder), _FIELDS)["spec"])


def read_fuser_card(folder: str | Path) -> dict[str, Any]:
    """Read a fuser's card, without its weights.

    Raises
    ------
    FuserError
    """
    card: dict[str, Any] = _read_json(Path(folder), _FIELDS)["card"]
    return card


def save_hub(
    hub: Hub,
    folder: str | Path,
    card: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
) -> Path:
    """Write a hub with all its encoders and decoders into a folder.

    Parameters and errors are those of `save_fuser`.
    """
    head = {
        "hub": hub.spec.to_dict(),
        "layouts": [layout.to_json() for layout in hub.layouts.values()],
        "card": dict(card or {}),
    }
    return _write(hub, Path(folder), head, dtype)


def load_hub(folder: str | Path, *, max_bytes: int = MAX_WEIGHTS_BYTES) -> Hub:
    """Read a hub, in evaluation mode.

    Parameters and errors are those of `load_fuser`.
    """
    head = _read_json(Path(folder), _HUB_FIELDS)
    spec, texts = HubSpec.from_dict(head["hub"]), head["layouts"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FuserError("a hub whose layouts are no list of texts")
    if len(texts) > _MAX_HUB_MODELS:
        raise FuserError(f"a hub of more than {_MAX_HUB_MODELS} models")

    def made() -> Hub:
        hub = Hub(spec)
        for text in texts:
            hub.join(CacheLayout.from_json(text))
        return hub

    return _filled(made, Path(folder), head, max_bytes)


# -- writing ---------------------------------------------------------------------------


def _write(module: nn.Module, folder: Path, head: dict[str, Any], dtype: str) -> Path:
    from safetensors.torch import save

    if dtype not in _DTYPES:
        raise InvalidValueError(f"dtype of stored weights is one of {', '.join(_DTYPES)}")
    state = {
        name: x.detach().to("cpu", _DTYPES[dtype]).contiguous().clone()
        for name, x in module.state_dict().items()
    }
    if not all(bool(torch.isfinite(x).all()) for x in state.values()):
        raise FuserError(
            f"a fuser with weights that are not finite as {dtype}",
            hint="train it with a lower learning rate, or store float32",
        )
    weights = save(state)
    head |= {
        "version": FILE_VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "weights_dtype": dtype,
    }
    try:
        text = json.dumps(head, sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError):
        raise InvalidValueError("a fuser card that JSON cannot hold") from None
    folder.mkdir(parents=True, exist_ok=True)
    # The weights first: a write that is cut short leaves a digest that does not fit.
    _replace(folder / _WEIGHTS, weights)
    _replace(folder / _JSON, text.encode())
    return folder


def _replace(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)


def _scales_text(fuser: Fuser) -> str:
    if fuser.scales is None:
        return ""
    _require_scales(fuser.scales, fuser.spec)
    return base64.b64encode(fuser.scales.to_bytes()).decode()


# -- reading ---------------------------------------------------------------------------


def _read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most so many bytes: the size is checked, then read no further."""
    try:
        with path.open("rb") as stream:
            data = stream.read(most + 1)
    except OSError as exc:
        raise FuserError(
            f"{path.name} of a fuser cannot be read ({type(exc).__name__})",
            hint="give a folder that save_fuser wrote",
        ) from None
    if len(data) > most:
        raise FuserError(f"{path.name} of a fuser is larger than {most} bytes")
    return data


def _read_json(folder: Path, names: set[str]) -> dict[str, Any]:
    data = _read_bytes(folder / _JSON, _MAX_JSON_BYTES)
    try:
        head = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise FuserError(f"{_JSON} is not JSON") from None
    if not isinstance(head, dict) or head.get("version") != FILE_VERSION:
        raise FuserError(
            f"{_JSON} is not of version {FILE_VERSION}",
            hint="install the release that wrote it, or train the fuser again",
        )
    if set(head) != names or not isinstance(head["card"], dict):
        raise FuserError(f"{_JSON} lacks a field or has an unknown one")
    if head["weights_dtype"] not in list(_DTYPES) or not isinstance(head["weights_sha256"], str):
        raise FuserError(f"{_JSON} names weights in a form that is not read")
    return head


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _filled(make: Callable[[], M], folder: Path, head: dict[str, Any], max_bytes: int) -> M:
    """Make the module that a spec names, and put exactly its weights into it."""
    dtype = _DTYPES[head["weights_dtype"]]
    try:
        # First without memory: a spec that asks for too much is refused before it costs.
        with torch.device("meta"):
            expected = {name: x.shape for name, x in make().state_dict().items()}
        implied = sum(shape.numel() for shape in expected.values()) * dtype.itemsize
        if implied > max_bytes:
            raise FuserError(f"a fuser of {implied} bytes, at most {max_bytes} are read")
        most = implied + _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(expected)
        state = _read_weights(folder / _WEIGHTS, most, head["weights_sha256"])
        if state.keys() != expected.keys():
            raise FuserError("weights of a fuser with other names than its spec implies")
        for name, x in state.items():
            if x.shape != expected[name] or x.dtype != dtype:
                raise FuserError("weights of a fuser in another shape or type than its spec says")
            if not bool(torch.isfinite(x).all()):
                raise FuserError("weights of a fuser that are not finite")
        module = make()
    except FuserError:
        raise
    except FedInferError as exc:
        raise FuserError(f"a fuser that cannot be: {exc.message}", hint=exc.hint) from None
    module.load_state_dict(state, strict=True)
    return module.eval()


def _read_weights(path: Path, most: int, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _read_bytes(path, most)
    if hashlib.sha256(data).hexdigest() != digest:
        raise FuserError(
            f"{_WEIGHTS} is not the file that {_JSON} names",
            hint="both files belong together: copy the folder again",
        )
    try:
        return load(data)
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise FuserError(f"{_WEIGHTS} is not in the safetensors format") from None


def _scales_of(text: Any, spec: FuserSpec) -> StaticScales | None:
    if text == "":
        return None
    from fedinfer_flower.kv.static_scales import StaticScales

    try:
        scales = StaticScales.from_bytes(base64.b64decode(text, validate=True))
    except (binascii.Error, TypeError, ValueError):
        raise FuserError("static scales of a fuser that are not base64") from None
    except FedInferError as exc:
        raise FuserError(f"static scales that cannot be: {exc.message}") from None
    _require_scales(scales, spec)
    return scales


def _require_scales(scales: StaticScales, spec: FuserSpec) -> None:
    if scales.layout != spec.sharer:
        raise FuserError(
            "static scales of another model than the fuser's sharer",
            hint="fit them on entries of the sharer that the fuser was trained with",
        )
