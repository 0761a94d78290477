"""Before the first round: everybody makes a key, and reads the others' over the telephone.

python keys.py STATE
"""

import sys

from hospital_consortium.places import Places
from hospital_consortium.task import N_SITES

from fedinfer_flower import Identity


def main(state):
    places = Places(state)
    for folder in (places.hospitals, places.office, places.registry, places.shared):
        folder.mkdir(parents=True, exist_ok=True)
    sites = [
        Identity.load_or_create(places.hospitals / f"partition-{site}" / "identity.json")
        for site in range(N_SITES)
    ]
    office = Identity.load_or_create(places.office / "office.id")
    registry = Identity.load_or_create(places.registry / "registry.id")
    lines = ["[sites]", *(f'site-{n} = "{site.key_id}"' for n, site in enumerate(sites))]
    lines += ["[queriers]", f'registry = "{registry.key_id}"']
    for folder in (places.hospitals, places.office, places.registry):
        (folder / "pins.toml").write_text("\n".join(lines) + "\n")
    (places.registry / "office.key").write_text(office.key_id)
    places.ledger().migrate()


if __name__ == "__main__":
    main(sys.argv[1])
