"""Published C2C fusers: the folder, converted to safetensors once, and what is read of it.

The weights are published as pickled state dicts, which no part of this package opens:
``scripts/convert_c2c.py`` writes them as safetensors, in a folder of the same layout::

    config.json                     {"model": {base_model, teacher_model, mapping, ...}}
    final/projector_config.json     {"0": {"1": {"<receiver layer>": [[<sharer layer>, <i>]]}}}
    final/projector_<i>.json        {"class": "C2CProjector", "init_args": {...}}
    final/projector_<i>.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fedinfer_flower.errors import FuserError, InvalidValueError
from fedinfer_flower.kv.c2c_projector import DTYPES, C2CProjector, ProjectorShape
from fedinfer_flower.kv.fuser import FuserSpec
from fedinfer_flower.kv.fusers.c2c import MULTI_SOURCE_MODES, C2CFuser
from fedinfer_flower.kv.layout import CacheLayout
from fedinfer_flower.kv.share import ShareSpec

__all__ = ["C2CCheckpoint", "load_c2c"]

MAX_WEIGHTS_BYTES: Final = 8 << 30
_MAX_JSON_BYTES: Final = 1 << 20
_HEADER_BYTES: Final = 64 << 10
_MAX_NETWORKS: Final = 1024
_MAX_NAME: Final = 256
_MAPS: Final = {"last_aligned": "terminal", "k_nearest": "depth"}
_STORED: Final = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True, kw_only=True)
class C2CCheckpoint:
    """What the JSON files of a published fuser say.

    Parameters
    ----------
    folder : pathlib.Path
        In which the networks are.
    shape : ProjectorShape
        Of every network.
    layers : mapping of int to (int, int)
        For a layer of the receiver, the layer of the sharer and the number of the network.
    receiver_name, sharer_name : str
        The models' published names. Nothing can check them against a folder on a disk.
    mapping : str
        ``"last_aligned"`` or ``"k_nearest"``: what `layers` was made by.
    multi_source_mode : str
        ``"sequential"``, ``"parallel"``, or empty where the config does not say.
    alignment : str
        ``"first"`` or ``"longest"``: the re-tokenisation of the training; ``"none"`` where
        both models were fed the same ids.

    Examples
    --------
    >>> C2CCheckpoint.read("no-such-folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fedinfer_flower.errors.FuserError: FI409 FuserError: no projector_config.json in the folder ...
    """

    folder: Path
    shape: ProjectorShape
    layers: Mapping[int, tuple[int, int]]
    receiver_name: str
    sharer_name: str
    mapping: str
    multi_source_mode: str
    alignment: str

    @classmethod
    def read(cls, folder: str | Path) -> C2CCheckpoint:
        """Read the JSON files of a folder, published or converted.

        Raises
        ------
        FuserError
            If one is missing, malformed, or asks for what is not supported.
        """
        inner = _inner(Path(folder))
        layers = _layers(_json(inner / "projector_config.json"))
        numbers = sorted({number for _, number in layers.values()})
        if numbers != list(range(len(numbers))) or len(numbers) > _MAX_NETWORKS:
            raise FuserError("a C2C layer map that leaves a network out")
        if (inner / f"projector_{len(numbers)}.json").exists():
            raise FuserError("a C2C folder with a network that no layer uses")
        shapes = [_shape(_json(inner / f"projector_{number}.json")) for number in numbers]
        if any(shape != shapes[0] for shape in shapes):
            raise FuserError("a C2C fuser whose networks have different shapes")
        beside = [path for path in (inner, inner.parent) if (path / "config.json").is_file()]
        if not beside:
            raise FuserError("no config.json in the folder of a C2C fuser")
        model = _json(beside[0] / "config.json").get("model")
        return cls(folder=inner, shape=shapes[0], layers=layers, **_described(model))

    @property
    def networks(self) -> int:
        """Number of networks."""
        return 1 + max(number for _, number in self.layers.values())

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every weight of one network, without memory for them."""
        with torch.device("meta"):
            return {k: tuple(x.shape) for k, x in C2CProjector(self.shape).state_dict().items()}

    def require_weights(self, state: Any) -> None:
        """Require exactly the weights of one network, in a published type, all finite.

        Raises
        ------
        FuserError
        """
        expected = self.weight_shapes()
        if not isinstance(state, Mapping) or state.keys() != expected.keys():
            raise FuserError(
                "a C2C network that lacks weights or has unknown ones",
                hint="another class of network, or another revision of the format, is not read",
            )
        for name, shape in expected.items():
            x = state[name]
            if not isinstance(x, Tensor) or x.dtype not in _STORED.values():
                raise FuserError(f"C2C weights of a type that is not one of {', '.join(DTYPES)}")
            if tuple(x.shape) != shape:
                raise FuserError("C2C weights in another shape than the network's JSON says")
            if not bool(torch.isfinite(x).all()):
                raise FuserError("C2C weights that are not finite")

    def weights(self, number: int) -> dict[str, Tensor]:
        """Read the weights of one network from its safetensors file.

        Raises
        ------
        FuserError
            If the file is missing, larger than the network can be, or holds anything else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.folder / f"projector_{number}.safetensors"
        most = self.network_bytes() + _HEADER_BYTES
        if not path.is_file():
            raise FuserError(
                f"no {path.name} in the folder",
                hint="published weights are pickled: python scripts/convert_c2c.py FOLDER OUT",
            )
        with path.open("rb") as stream:
            data = stream.read(most + 1)
        if len(data) > most:
            raise FuserError(f"{path.name} is larger than its network can be")
        try:
            state = load(data)
        except (SafetensorError, KeyError, ValueError):
            raise FuserError(f"{path.name} is not in the safetensors format") from None
        self.require_weights(state)
        return {name: x.float() for name, x in state.items()}

    def network_bytes(self) -> int:
        """Return how many bytes the weights of one network take at most.

        Raises
        ------
        FuserError
            If all networks together would take more than 8 GiB.
        """
        numbers = 0
        for shape in self.weight_shapes().values():
            numbers += torch.Size(shape).numel()
        if 4 * numbers * self.networks > MAX_WEIGHTS_BYTES:
            raise FuserError("a C2C fuser of more than 8 GiB")
        return 4 * numbers


def load_c2c(
    folder: str | Path,
    sharer: CacheLayout,
    receiver: CacheLayout,
    *,
    multi_source_mode: str | None = None,
) -> C2CFuser:
    """Load a published fuser whose weights ``scripts/convert_c2c.py`` has converted.

    Parameters
    ----------
    folder : path
        ``<pair>_Fuser`` as converted.
    sharer, receiver : CacheLayout
        Of the two models that the fuser was trained for: `LanguageModel.layout`. Shapes are
        checked; whether the weights are those of the training nobody can check, because the
        format names models and not digests.
    multi_source_mode : str, optional
        ``"sequential"`` or ``"parallel"``; default what the config says.

    Returns
    -------
    fuser : C2CFuser
        In evaluation mode, float32 whatever the weights were stored in, bound to the digests
        of the two layouts.

    Raises
    ------
    FuserError
        If the folder is not exactly one such fuser, does not fit the two models, or its config
        does not say how several sharers are joined and the caller does not either.
    InvalidValueError

    Notes
    -----
    *Privacy.* Nothing leaves the process. A fuser is a trained network of somebody else: it
    cannot run code, but what it makes of a cache is up to whoever trained it.

    Examples
    --------
    >>> from fedinfer_flower.kv.c2c_checkpoint import load_c2c
    >>> fuser = load_c2c("qwen_Fuser", sharer.layout, receiver.layout)  # doctest: +SKIP
    """
    found = C2CCheckpoint.read(folder)
    mode = found.multi_source_mode if multi_source_mode is None else multi_source_mode
    if multi_source_mode is not None and mode not in MULTI_SOURCE_MODES:
        raise InvalidValueError(f"multi_source_mode is one of {', '.join(MULTI_SOURCE_MODES)}")
    if not mode:
        raise FuserError(
            "the config of the C2C fuser does not say how several sharers are joined",
            hint="give multi_source_mode='parallel' or 'sequential'; with one sharer both are one",
        )
    found.network_bytes()
    spec = FuserSpec(
        kind="c2c",
        sharer=sharer,
        receiver=receiver,
        share=ShareSpec(last=0, decode=0),
        layer_map=_MAPS[found.mapping],
        width=found.shape.hidden_dim,
        depth=found.shape.num_layers - 1,
        dropout=float(found.shape.dropout),
    )
    fuser = C2CFuser(spec, shape=found.shape, layers=found.layers, multi_source_mode=mode)
    for number, network in enumerate(fuser.projectors):
        network.load_state_dict(found.weights(number), strict=True)
    fuser.card = {
        "format": "c2c",
        "receiver": found.receiver_name,
        "sharer": found.sharer_name,
        "mapping": found.mapping,
        "alignment": found.alignment,
        "multi-source-mode": mode,
        "trained-dtype": found.shape.dtype,
    }
    return fuser.eval()


# -- the JSON files ----------------------------------------------------------------------


def _inner(folder: Path) -> Path:
    for path in (folder, folder / "final"):
        if (path / "projector_config.json").is_file():
            return path
    raise FuserError(
        "no projector_config.json in the folder or in its 'final'",
        hint="give the folder of one published fuser, <pair>_Fuser",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_JSON_BYTES + 1)
        values = json.loads(data) if len(data) <= _MAX_JSON_BYTES else None
    except OSError:
        raise FuserError(f"no {path.name} in the folder of a C2C fuser") from None
    except (ValueError, RecursionError):
        raise FuserError(f"{path.name} of a C2C fuser is not JSON") from None
    if not isinstance(values, dict):
        raise FuserError(f"{path.name} of a C2C fuser is no JSON object of at most 1 MiB")
    return values


def _shape(values: dict[str, Any]) -> ProjectorShape:
    if values.keys() != {"class", "init_args"} or values["class"] != "C2CProjector":
        raise FuserError(
            "a network of another class than C2CProjector",
            hint="only fusers made of C2CProjector are read",
        )
    return ProjectorShape.from_dict(values["init_args"])


def _layers(values: dict[str, Any]) -> dict[int, tuple[int, int]]:
    """Read ``{"0": {"1": {"<receiver layer>": [[<sharer layer>, <network>]]}}}``."""
    inner = values.get("0")
    if values.keys() != {"0"} or not isinstance(inner, dict) or inner.keys() != {"1"}:
        raise FuserError(
            "a C2C layer map that is not of one sharer and one receiver",
            hint="a fuser serves one ordered pair; give one folder for each",
        )
    pairs = inner["1"]
    if not isinstance(pairs, dict) or not 1 <= len(pairs) <= _MAX_NETWORKS:
        raise FuserError("a C2C layer map without layers, or with too many")
    found = {}
    for name, value in pairs.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 4):
            raise FuserError("a C2C layer map whose layers are no numbers")
        if not isinstance(value, list) or len(value) != 1:
            raise FuserError(
                "a C2C layer map that gives one layer several networks",
                hint="such layers need an aggregator, which is not read",
            )
        row = value[0]
        if not isinstance(row, list) or len(row) != 2 or any(type(i) is not int for i in row):
            raise FuserError("a C2C layer map whose entries are no pairs of numbers")
        if not all(0 <= i < _MAX_NETWORKS for i in row):
            raise FuserError("a C2C layer map with numbers out of range")
        found[int(name)] = (row[0], row[1])
    return found


def _described(model: Any) -> dict[str, str]:
    if not isinstance(model, dict):
        raise FuserError("config.json of a C2C fuser has no object 'model'")
    names = {"receiver_name": model.get("base_model"), "sharer_name": model.get("teacher_model")}
    if not all(isinstance(x, str) and 0 < len(x) <= _MAX_NAME for x in names.values()):
        raise FuserError("config.json of a C2C fuser does not name its two models")
    mapping, mode = model.get("mapping"), model.get("multi_source_fusion_mode", "")
    if mapping not in list(_MAPS):
        raise FuserError(f"the mapping of a C2C fuser is one of {', '.join(_MAPS)}")
    if mode not in ["", *MULTI_SOURCE_MODES]:
        raise FuserError(f"multi_source_fusion_mode is one of {', '.join(MULTI_SOURCE_MODES)}")
    if model.get("include_response", False) is not False:
        raise FuserError(
            "a C2C fuser that rewrites its own response while it decodes",
            hint="only fusers with include_response=false are supported",
        )
    strategy = model.get("alignment_strategy", "first")
    if (
        strategy not in ["first", "longest"]
        or type(model.get("is_do_alignment", False)) is not bool
    ):
        raise FuserError("a C2C fuser of another token alignment than 'first' or 'longest'")
    alignment = strategy if model.get("is_do_alignment", False) else "none"
    return {**names, "mapping": mapping, "multi_source_mode": mode, "alignment": alignment}
