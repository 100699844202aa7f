"""What an unfinished folder knows: the request it answers and the sections that are finished."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from gdn2.data.durable import UNFINISHED, read_json, write_json
from gdn2.data.shards import SPLITS, Shard
from gdn2.data.sources import START, Position

JOURNAL = "journal.json.tmp"  # gone when the folder is complete


@dataclass
class Journal:
    """`request` is {"sources": [fingerprint, ...], "options": {...}}.

    A section is {"next": position of the first record after it, "skipped": {reason: count},
    "shards": {split: shard}}.
    """

    folder: Path
    request: dict
    sections: list[dict] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, request: dict) -> "Journal":
        """The folder's journal, a new one if there is none; ValueError if it is for another."""
        path = folder / JOURNAL
        if path.is_file():
            journal = cls._read(folder)
            if journal.sections or (folder / "tokenizer").is_dir():
                refuse_differences(folder, journal.request, request)
                return journal
        if folder.is_dir() and any(not file.name.endswith(UNFINISHED) for file in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and was not begun by prepare: use another")
        journal = cls(folder, request)
        journal._save()
        return journal

    @classmethod
    def _read(cls, folder: Path) -> "Journal":
        path = folder / JOURNAL
        data = read_json(path)
        try:
            journal = cls(folder, **data)
            shards = [shard for split in SPLITS for shard in journal.shards(split)]
            texts = [source["name"] for source in journal.request["sources"]]
            objects = [journal.request["options"], *(s["skipped"] for s in journal.sections)]
            whole = (
                all(shard.is_plausible() for shard in shards)
                and all(isinstance(text, str) for text in texts)
                and all(isinstance(item, dict) for item in objects)
                and all(type(number) is int for number in journal.next)
            )
        except (TypeError, LookupError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is damaged: delete {folder}, or use another folder")
        return journal

    @property
    def next(self) -> Position:
        return Position(*self.sections[-1]["next"]) if self.sections else START

    def shards(self, split: str) -> tuple[Shard, ...]:
        found = [section["shards"].get(split) for section in self.sections]
        return tuple(Shard(**shard) for shard in found if shard)

    def add(self, after: Position, skipped: dict[str, int], shards: dict[str, Shard]) -> None:
        plain = {split: asdict(shard) for split, shard in shards.items()}
        self.sections.append({"next": list(after), "skipped": dict(skipped), "shards": plain})
        self._save()

    def remove(self) -> None:
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def _save(self) -> None:
        data = {"request": self.request, "sections": self.sections}
        write_json(self.folder / JOURNAL, data)


def refuse_differences(folder: Path, old: dict, new: dict) -> None:
    """Compare requests; sources by what is in them (names, sizes, checksum), not where they lie."""
    differences = [
        f"{name} was {old['options'].get(name)!r} and is {value!r}"
        for name, value in new["options"].items()
        if old["options"].get(name) != value
    ]
    before, after = ([s | {"name": None} for s in side["sources"]] for side in (old, new))
    if before != after:
        was, now = (", ".join(s["name"] for s in side["sources"]) for side in (old, new))
        differences.append(f"sources were {was}, are {now}" if was != now else f"{now} has changed")
    if differences:
        raise ValueError(
            f"{folder} was begun with something else: {'; '.join(differences)}. "
            "Use another folder or delete this one"
        )
