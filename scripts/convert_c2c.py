"""Convert a published C2C fuser to safetensors, once: ``python scripts/convert_c2c.py FOLDER OUT``.

FOLDER is ``<pair>_Fuser`` as published, with weights as pickled state dicts. OUT becomes a
folder of the same layout with safetensors in their place, which
``fedinfer_flower.kv.c2c_checkpoint.load_c2c`` reads; it must not exist. This is the only
place that opens a pickle: restricted to tensors (``weights_only=True``), after its size was
held against what the network's JSON implies, and its content is then checked by name, shape,
type and finiteness. Still, convert only what you downloaded from a source you trust.
``training_state.pt`` is not read.
"""

from __future__ import annotations

import argparse
import pickle  # only for the name of its error
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedinfer_flower.errors import FedInferError, FuserError
from fedinfer_flower.kv.c2c_checkpoint import C2CCheckpoint

OVERHEAD_BYTES = 1 << 20
"""Of an archive around its tensors: names, alignment, checksums."""


def read_pickled(path: Path, *, most_bytes: int) -> Any:
    """Read one pickled state dict of bounded size."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
    except (OSError, zipfile.BadZipFile):
        raise FuserError(
            f"{path.name} is missing, or no archive as torch writes it since version 1.6"
        ) from None
    if max(unpacked, path.stat().st_size) > most_bytes:
        raise FuserError(f"{path.name} is larger than its network can be")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError):
        raise FuserError(f"{path.name} holds something else than tensors") from None


def convert(folder: Path, out: Path) -> int:
    """Write the converted folder; return the number of networks."""
    found = C2CCheckpoint.read(folder)
    if out.exists():
        raise FuserError("the folder to write to exists already", hint="name a new one")
    final = out / "final"
    final.mkdir(parents=True)
    try:
        for number in range(found.networks):
            name = f"projector_{number}"
            state = read_pickled(
                found.folder / f"{name}.pt", most_bytes=found.network_bytes() + OVERHEAD_BYTES
            )
            found.require_weights(state)
            tensors = {key: x.detach().contiguous().clone() for key, x in state.items()}
            save_file(tensors, final / f"{name}.safetensors")
            shutil.copyfile(found.folder / f"{name}.json", final / f"{name}.json")
        shutil.copyfile(found.folder / "projector_config.json", final / "projector_config.json")
        inner = found.folder / "config.json"
        shutil.copyfile(
            inner if inner.is_file() else found.folder.parent / "config.json", out / "config.json"
        )
    except BaseException:
        shutil.rmtree(out)  # half a folder would be refused later, with a worse message
        raise
    return found.networks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path, help="<pair>_Fuser as published")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    given = parser.parse_args(arguments)
    try:
        count = convert(given.folder, given.out)
    except FedInferError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    sys.stdout.write(f"{count} networks converted\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
